"""Our layer in Megatron-Core's HybridModel: the evidence for docs/parallelism.md.

HybridModel will replace GPTModel, which is deprecated since 0.19. No other file here uses it.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.layer_spec import (
    build_gpt_model,
    hydra_layer_spec,
    kernel_case,
    transformer_config,
)
from megatron_hydra.model.norm import RMSNorm
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.parallel import megatron_versions
from megatron_hydra.parallel.packed_sequence import PackedSequence
from tests import canonical_access
from tests.parallel.layouts import canonical_weights, tiny

pytestmark = pytest.mark.usefixtures("one_rank")

FOLDER = "megatron.core.models.hybrid"
MODEL = tiny(HydraConfig(), ((1, 6), (), (0, 3, 5)), num_layers=3)
RUN = RunConfig(precision="fp32")
CUTS = (0, 9, 24)


@pytest.fixture(scope="module")
def hybrid() -> dict[str, Any]:
    """HybridModel's modules, by name."""
    try:
        return {
            name: importlib.import_module(f"{FOLDER}.{name}")
            for name in ("hybrid_block", "hybrid_layer_allocation", "hybrid_model")
        }
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(FOLDER):
            raise
        pytest.skip(f"Megatron-Core {megatron_versions.installed()} has no HybridModel; 0.18 has")


class _InHybridStack(HydraAttention):
    """Accepts the additional arguments of HybridStack's layers."""

    def __init__(self, *args: Any, pp_layer_offset: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)


def _build(hybrid: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """HybridModel with our layer (attention and MLP) in place of each attention layer."""
    monkeypatch.setattr(hybrid["hybrid_block"], "TENorm", RMSNorm)  # hard-coded: the last norm
    layer = hydra_layer_spec(MODEL, RUN, choose_kernels(RUN.backend, kernel_case(MODEL, RUN)))
    layer.submodules.self_attention.module = _InHybridStack
    block = hybrid["hybrid_block"]
    return hybrid["hybrid_model"].HybridModel(
        config=transformer_config(MODEL, RUN),
        hybrid_stack_spec=ModuleSpec(
            module=block.HybridStack,
            submodules=block.HybridStackSubmodules(attention_layer=layer),
        ),
        vocab_size=MODEL.vocab_size,
        max_sequence_length=MODEL.max_position_embeddings,
        hybrid_layer_pattern=hybrid["hybrid_layer_allocation"].Symbols.ATTENTION * MODEL.num_layers,
        share_embeddings_and_output_weights=MODEL.tie_embeddings,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _outcome(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of a packed stream and every gradient, by GPTModel's names."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(MODEL.vocab_size, (1, CUTS[-1]), generator=generator)
    packed = PackedSequence(CUTS)
    logits = model(tokens, packed.positions_local[None], None, packed_seq_params=packed)
    logits.square().mean().backward()
    gradients = {
        name.replace("final_norm", "final_layernorm"): parameter.grad
        for name, parameter in model.named_parameters()
    }
    assert all(gradient is not None for gradient in gradients.values())
    return {"logits": logits.detach(), **gradients}  # type: ignore[dict-item]


def test_our_layer_in_hybrid_model_is_that_in_gpt_model(
    hybrid: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt = build_gpt_model(MODEL, RUN)
    canonical_access.load(gpt, canonical_weights(MODEL))
    other = _build(hybrid, monkeypatch)
    weights = {
        name.replace("final_layernorm", "final_norm"): tensor
        for name, tensor in gpt.state_dict().items()
    }
    other.load_state_dict(weights)
    expected, got = _outcome(gpt), _outcome(other)
    assert len(expected) > 20
    assert got.keys() == expected.keys()
    assert not [name for name in got if not torch.equal(got[name], expected[name])]
