"""Why test_every_kind.py has norm_eps 1e-4: 1e-6 magnifies fp32 rounding; float64 is exact.

The first token's GDN output is β(q·k)v, which may be near zero by chance. The RMSNorm divides by its root mean
square and so magnifies the rounding, which differs between one pass and chunks. An error in the states would
also appear in float64.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.conversion.convert import megatron_to_hf
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM
from tests.hf import test_every_kind as every

HYBRIDS = [kind for kind in every.KINDS if kind != "dense"]


@pytest.fixture(scope="module", autouse=True)
def float64():
    """Let ``.float()`` give float64: the model uses it to compute narrow dtypes in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request, float64, tmp_path_factory):
    hydra, heads = every.KINDS[request.param]
    config = dataclasses.replace(
        every.DENSE, hydra=hydra, full_attention_heads=heads, norm_eps=1e-6
    )
    root = tmp_path_factory.mktemp("eps")
    save_canonical(root / "megatron", every.random_weights(config), config)
    megatron_to_hf(root / "megatron", root / "hf")
    return HydraHeadForCausalLM.from_pretrained(root / "hf").double().eval()


@pytest.mark.parametrize("length", every.PROMPTS)
def test_chunks_are_one_pass_in_float64(model, length):
    ids = every.tokens(3, length)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        pieces = every.in_pieces(model, ids, (1, 2, 3, 20))
    assert whole.dtype == torch.float64
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9)


def test_cached_steps_are_passes_without_cache_in_float64(model):
    ids = every.tokens(1, 45)
    _, cached = every.generate(model, ids)
    _, plain = every.generate(model, ids, use_cache=False)
    torch.testing.assert_close(cached, plain, rtol=0, atol=1e-9)
