"""The arguments of the GPU libraries' attention, checked with stand-ins against the torch twin.

The stand-ins have the libraries' signatures and compute what their documentation says the arguments
mean, so a wrong alignment, window, boundary or head count gives other numbers here, on a CPU.
"""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from megatron_hydra.ops import gpu_attention
from megatron_hydra.ops.varlen_attention import varlen_attention

STREAMS = {
    "one document": ((0, 12), (0, 12)),
    "packed": ((0, 1, 8, 15), (0, 1, 8, 15)),
    "the documents' last queries": ((0, 4, 9), (0, 11, 16)),
}


def library_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, window_size):
    """Query i of a document sees keys i + Tk − Tq − left … i + Tk − Tq + right; −1: no bound."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    left, right = window_size
    right = 0 if causal else right
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    pieces = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        row = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        column = torch.arange(d - c)[None, :]
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        if left >= 0:
            seen &= column >= row - left
        if right >= 0:
            seen &= column <= row + right
        scores = torch.einsum("qnd,knd->nqk", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("nqk,knd->qnd", weights, v[c:d]))
    return torch.cat(pieces)


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    assert dropout_p == 0
    assert softmax_scale is None
    boundaries = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return library_attention(q, k, v, *boundaries, causal, window_size)


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1),
    deterministic=False,
):  # fmt: skip
    assert seqused_q is seqused_k is softmax_scale is qv is None
    boundaries = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return library_attention(q, k, v, *boundaries, causal, window_size)


def flash_attn_3_with_lse(*args, **kwargs):
    """Its first releases also returned the log-sum-exp."""
    return flash_attn_3(*args, **kwargs), torch.zeros(1)


def varlen_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    return library_attention(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, (-1, -1)
    )


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return library_attention(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, False, window_size
    )


class DotProductAttention:
    """The attention of Transformer Engine 2."""

    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
        qkv_format="sbhd", attn_mask_type="causal", window_size=None,
    ):  # fmt: skip
        assert attention_dropout == 0
        assert qkv_format == "thd"
        # The causal mask without this suffix is aligned with the first key.
        assert attn_mask_type == "padding_causal_bottom_right"
        self.shape = num_attention_heads, num_gqa_groups, kv_channels

    def __call__(
        self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None,
        cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None,
        window_size=None,
    ):  # fmt: skip
        assert self.shape == (query_layer.shape[1], *key_layer.shape[1:])
        assert window_size[0] >= -1
        assert window_size[1] == 0  # the arguments it accepts with a causal mask
        boundaries = cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
        out = library_attention(query_layer, key_layer, value_layer, *boundaries, True, window_size)
        return out.flatten(1)


LIBRARIES = {
    "flash-attn 2": ("flash_attn", "flash_attn_varlen_func", flash_attn_2),
    "flash-attn 3": ("flash_attn_interface", "flash_attn_varlen_func", flash_attn_3),
    "flash-attn 3, first": (
        "flash_attn_interface", "flash_attn_varlen_func", flash_attn_3_with_lse,
    ),
    "torch 2.10": ("torch.nn.attention.varlen", "varlen_attn", varlen_2_10),
    "torch 2.13": ("torch.nn.attention.varlen", "varlen_attn", varlen_2_13),
    "Transformer Engine": (
        "transformer_engine.pytorch", "DotProductAttention", DotProductAttention,
    ),
}  # fmt: skip
LOADERS = {
    "flash_attn_varlen_func": gpu_attention.flash_attn_varlen,
    "varlen_attn": gpu_attention.torch_varlen,
    "DotProductAttention": gpu_attention.transformer_engine_varlen,
}


def install(monkeypatch, module, name, value):
    """Make ``from module import name`` give ``value``."""
    stand_in = types.ModuleType(module)
    setattr(stand_in, name, value)
    monkeypatch.setitem(sys.modules, module, stand_in)
    parent = module.partition(".")[0]
    if parent not in sys.modules:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))


@pytest.fixture(params=LIBRARIES)
def attention(request, monkeypatch):
    """Our wrapper of each library's stand-in."""
    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    module, name, function = LIBRARIES[request.param]
    install(monkeypatch, module, name, function)
    return LOADERS[name]()


def make(cu_q, cu_k, kv_heads):
    shapes = (cu_q[-1], 4), (cu_k[-1], kv_heads), (cu_k[-1], kv_heads)
    return [torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_wrappers_equal_the_twin_with_gradients(attention, stream, kv_heads, window):
    cu_q, cu_k = STREAMS[stream]
    inputs = make(cu_q, cu_k, kv_heads)
    got = attention(*inputs, cu_q, cu_k, window)
    want = varlen_attention(*inputs, cu_q, cu_k, window)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(want, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_flash_attn_3_goes_before_version_2(monkeypatch):
    install(monkeypatch, "flash_attn", "flash_attn_varlen_func", None)
    install(monkeypatch, "flash_attn_interface", "flash_attn_varlen_func", flash_attn_3)
    inputs = make((0, 5), (0, 5), 2)
    assert gpu_attention.flash_attn_varlen()(*inputs, (0, 5), (0, 5)).shape == inputs[0].shape


def test_layers_of_one_shape_share_a_module_of_transformer_engine(monkeypatch):
    made = []

    class Counted(DotProductAttention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.shape)

    install(monkeypatch, "transformer_engine.pytorch", "DotProductAttention", Counted)
    attention = gpu_attention.transformer_engine_varlen()
    for kv_heads in (2, 2, 4, 2):
        attention(*make((0, 5), (0, 5), kv_heads), (0, 5), (0, 5))
    assert made == [(4, 2, 8), (4, 4, 8)]


def test_the_stand_in_for_torch_has_the_installed_signature():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    installed = list(inspect.signature(varlen.varlen_attn).parameters)
    known = [name for name in inspect.signature(varlen_2_13).parameters if name in installed]
    assert known == list(inspect.signature(varlen_2_13).parameters)
    assert installed[:7] == known[:7]


def test_a_stream_goes_to_the_dense_kernel_where_it_is_a_dense_batch():
    def dense(q, k, v, cu_q, cu_k):
        return "dense"

    def packed(q, k, v, cu_q, cu_k, window):
        return "packed", window

    attention = gpu_attention.dense_or_packed(dense, packed)
    assert attention(None, None, None, (0, 4, 8), (0, 4, 8)) == "dense"
    assert attention(None, None, None, (0, 4, 9), (0, 4, 9)) == ("packed", None)
    assert attention(None, None, None, (0, 2, 4), (0, 4, 8)) == ("packed", None)
    assert attention(None, None, None, (0, 4, 8), (0, 4, 8), 3) == ("packed", 3)


@pytest.mark.parametrize("boundaries", [(0, 12), (0, 6, 12)])
def test_sdpa_equals_the_twin_on_dense_batches(boundaries):
    inputs = make(boundaries, boundaries, 2)
    kernels = [torch.nn.attention.SDPBackend.MATH]  # a CPU has none of the GPU kernels
    got = gpu_attention.sdpa_attention(*inputs, boundaries, boundaries, kernels)
    torch.testing.assert_close(got, varlen_attention(*inputs, boundaries, boundaries))


def test_sdpa_refuses_other_streams():
    with pytest.raises(ValueError, match="one length"):
        gpu_attention.sdpa_attention(*make((0, 5, 12), (0, 5, 12), 2), (0, 5, 12), (0, 5, 12))
