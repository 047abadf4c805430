"""Each row of the paper's comparison, exported and loaded as by a user: its output and its cache.

Weights are random with slow decays, so that a lost, doubled or leaked token changes the output.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.conversion.convert import megatron_to_hf
from megatron_hydra.evaluation.cache_bytes import measure_cache_bytes

LAYERS, HEADS, GROUPS, D, WINDOW, CONV = 3, 6, 3, 16, 6, 4
DENSE = ModelConfig(
    family="qwen3", num_layers=LAYERS, hidden_size=40, ffn_hidden_size=56, vocab_size=61,
    num_query_heads=HEADS, num_kv_heads=GROUPS, head_dim=D, qk_norm=True, max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    # a first GDN output near zero magnifies rounding, see tests/parallel/layouts.py
    norm_eps=1e-4,
)  # fmt: skip
EVERY = tuple(range(HEADS))
KINDS = {
    "dense": (None, None),
    "layer-wise": (HydraConfig(), ((), EVERY, ())),
    "token-wise": (HydraConfig(mixer="token", window=WINDOW), (EVERY,) * LAYERS),
    "mixing": (HydraConfig(mixer="parallel"), (EVERY,) * LAYERS),
    "hydrahead": (HydraConfig(), ((1, 2, 3), (), (0, 5))),
    "shared": (HydraConfig(qkv="shared"), ((1, 2, 3), (), (0, 5))),
    "all-gdn": (HydraConfig(), ((),) * LAYERS),
}
PROMPTS = (1, 2, 3, 45)  # three are shorter than the convolution


def random_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for key, shape in canonical_shapes(model).items():
        value = torch.randn(shape, generator=generator) * 0.2
        if key.endswith(("layernorm.weight", "_norm", "gamma", "gamma.fa", "gamma.gdn")):
            value = 1 + value
        elif key.endswith("dt_bias"):
            value = value - 6.0  # half-lives of hundreds of tokens
        weights[key] = value
    return weights


SLOW = {"shared"}  # its layer is hydrahead's; tests/hf/test_modeling_hydrahead.py tests its cache


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS],
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    """Export a Megatron checkpoint and load the folder in transformers."""
    hydra, heads = KINDS[kind]
    config = DENSE
    if hydra is not None:
        config = ModelConfig(**{**vars(DENSE), "hydra": hydra, "full_attention_heads": heads})
    root = tmp_path_factory.mktemp(kind)
    save_canonical(root / "megatron", random_weights(config), config)
    megatron_to_hf(root / "megatron", root / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(root / "hf", trust_remote_code=True).eval()
    assert type(loaded).__name__ == (
        "Qwen3ForCausalLM" if hydra is None else "HydraHeadForCausalLM"
    )
    return loaded


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 61, (batch, length), generator=generator)


def in_pieces(model, ids: torch.Tensor, cuts: tuple[int, ...]) -> torch.Tensor:
    cache, logits = None, []
    bounds = (0, *(cut for cut in cuts if cut < ids.shape[1]), ids.shape[1])
    for start, end in zip(bounds, bounds[1:], strict=False):
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("cuts", [(1, 2, 3), (20,), (7, 8, 40, 41)])
def test_chunked_prefill_equals_one_pass(model, batch, length, cuts):
    ids = tokens(batch, length)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        pieces = in_pieces(model, ids, cuts)
    assert torch.equal(pieces.argmax(-1), whole.argmax(-1))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-4)


GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}


def generate(model, ids, mask=None, **options):
    """New tokens, and the logits that chose each of them."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids, attention_mask=mask, **GREEDY, **options, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("length", PROMPTS)
def test_greedy_with_cache_equals_without(model, length):
    ids = tokens(1, length)
    cached, cached_logits = generate(model, ids)
    plain, plain_logits = generate(model, ids, use_cache=False)
    assert torch.equal(cached, plain)
    torch.testing.assert_close(cached_logits, plain_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 11])
def test_a_left_padded_batch_equals_single_sequences(model, chunk):
    """Also for a prompt in chunks, the first of which are padding in most rows."""
    widest = max(PROMPTS)
    ids = torch.zeros(len(PROMPTS), widest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(PROMPTS):
        ids[row, widest - length :] = tokens(1, length)[0]
        mask[row, widest - length :] = 1
    # transformers 5.0 makes no cache for chunks
    given = {"past_key_values": DynamicCache(config=model.config)} if chunk else {}
    batch, batch_logits = generate(model, ids, mask, prefill_chunk_size=chunk, **given)
    for row, length in enumerate(PROMPTS):
        single, logits = generate(model, tokens(1, length))
        assert torch.equal(batch[row], single[0])
        torch.testing.assert_close(batch_logits[row], logits[0], rtol=0, atol=1e-4)


KV = 2 * GROUPS * D * 4  # bytes of one token's keys and values: all KV groups of one layer, fp32
STATE = HEADS * (D * D + 3 * (CONV - 1) * D) * 4  # all heads of one layer: state, convolution tail
KEPT = (WINDOW - 1) * KV + WINDOW * (2 * HEADS * D + 2 * HEADS) * 4  # keys, values; waiting writes
EXPECTED = {
    "dense": (LAYERS * KV, 0),
    "layer-wise": (KV, 2 * STATE),
    "token-wise": (0, LAYERS * (STATE + KEPT)),
    "mixing": (LAYERS * KV, LAYERS * STATE),
    # heads 1, 2, 3 read two KV groups; so do heads 0 and 5
    "hydrahead": (4 * KV / GROUPS, (3 + 6 + 4) * STATE / HEADS),
    "shared": (
        4 * KV / GROUPS,
        (3 + 6 + 4) * STATE / HEADS,
    ),  # one projection, but separate caches
    "all-gdn": (0, LAYERS * STATE),
}


def test_the_cache_in_use_has_only_the_tensors_of_the_kind(kind, model):
    """KV bytes of a token, and fixed bytes of a sequence (with one 64-bit counter)."""
    measured = measure_cache_bytes(model, 64)
    per_token, fixed = EXPECTED[kind]
    assert measured["kv_bytes_per_token"] == per_token
    assert measured["state_bytes"] == fixed + (0 if kind == "dense" else 8)
