"""FlashQLA 0.1.3's kernels in plain torch, with their names and arguments.

The stand-ins read, skip and leave out the same as FlashQLA's kernels. They compute from k, v, g and β with our
own rule. They give NaN if FlashQLA's kernels would silently give a wrong number: in a run over a part's last
chunks that does not start at a chunk.
"""

from __future__ import annotations

import sys
import types

import torch

from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule

CHUNK_SIZE = 64
PART_CHUNKS = 2
"""Chunks of a part of a cut fragment: few, so that short streams have several parts."""

THRESHOLD = -10.0

_split = True


def _spans(cu):
    values = cu.tolist()
    return list(zip(values, values[1:], strict=False))


def chunk_local_cumsum(g, cu_seqlens, chunk_size, reverse=False, zero_last_chunk=False):
    assert chunk_size == CHUNK_SIZE and zero_last_chunk == reverse
    out = torch.empty_like(g)
    for a, b in _spans(cu_seqlens):
        for start in range(a, b, CHUNK_SIZE):
            x = g[0, start : min(start + CHUNK_SIZE, b)]
            sums = x.flip(0).cumsum(0).flip(0) if reverse else x.cumsum(0)
            out[0, start : min(start + CHUNK_SIZE, b)] = sums
    return out


def _log_alpha(g, a, b):
    """Invert the running sums of the chunks in ``a:b``, which starts at a chunk."""
    x = g[0, a:b]
    before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    at_chunk = (torch.arange(b - a) % CHUNK_SIZE == 0)[:, None]
    return x - torch.where(at_chunk, torch.zeros_like(x), before)


def kkt_solve(k, b, cu_seqlens, chunk_size):
    assert chunk_size == CHUNK_SIZE
    return k.new_zeros(1, k.shape[1], b.shape[2], CHUNK_SIZE)


def build_cp_context(cu_seqlens, enable_intra, num_v_heads, chunk_size, is_train):
    assert enable_intra and is_train and chunk_size == CHUNK_SIZE
    if not _split:
        return types.SimpleNamespace(is_intra=False, cu_seqlens=cu_seqlens)
    parts, no_final, no_start, of_part, of_fragment = [], [], [], [], [0]
    for i, (a, b) in enumerate(_spans(cu_seqlens)):
        starts = list(range(a, b, PART_CHUNKS * CHUNK_SIZE))
        parts += starts
        no_final += [False] * (len(starts) - 1) + [True]
        no_start += [True] + [False] * (len(starts) - 1)
        of_part += [i] * len(starts)
        of_fragment.append(len(parts))
    return types.SimpleNamespace(
        is_intra=True, cu_seqlens=cu_seqlens,
        intra_cp_cu_seqlens=torch.tensor([*parts, int(cu_seqlens[-1])], dtype=torch.int32),
        seq_map_r2c=torch.tensor(of_fragment, dtype=torch.int32),
        seq_map_c2r=torch.tensor(of_part, dtype=torch.int32),
        ht_mask=torch.tensor(no_final), ht_mask_bwd=torch.tensor(no_start),
    )  # fmt: skip


def get_warmup_chunks_bidi(g, cu_seqlens, ht_mask_fwd, ht_mask_bwd, chunk_size, seq_map_r2c):
    assert chunk_size == CHUNK_SIZE
    spans, heads = _spans(cu_seqlens), g.shape[2]
    counts = torch.zeros(2, len(spans), heads, dtype=torch.int32)
    falls = torch.zeros(2, len(spans), heads, dtype=torch.bool)
    for p, (a, b) in enumerate(spans):
        chunks = -(-(b - a) // CHUNK_SIZE)
        for direction, mask in enumerate((ht_mask_fwd, ht_mask_bwd)):
            if mask[p]:
                continue
            counts[direction, p], falls[direction, p] = chunks, True
            total = torch.zeros(heads, dtype=g.dtype)
            for step in range(chunks):
                if direction == 0:
                    at = b - step * CHUNK_SIZE - 1
                else:
                    at = min(a + (step + 1) * CHUNK_SIZE, b) - 1
                total = total + g[0, at]
                now = (total < THRESHOLD) & (counts[direction, p] == chunks)
                counts[direction, p][now], falls[direction, p][now] = step + 1, False
    return torch.maximum(counts[0], counts[1]), counts[1], falls[0], falls[1]


def fused_gdr_h(
    k, v, a, g, b, initial_state=None, output_final_state=True, output_h=True, cu_seqlens=None,
    num_warmup_chunks=None,
):  # fmt: skip
    if output_h:  # the states that enter chunks follow from the states that enter parts
        assert num_warmup_chunks is None and not output_final_state
        return initial_state, None, None
    spans, heads, d = _spans(cu_seqlens), k.shape[2], k.shape[3]
    assert initial_state is None and num_warmup_chunks.shape == (len(spans), heads)
    finals = k.new_zeros(len(spans), heads, d, v.shape[3])
    transitions = k.new_zeros(len(spans), heads, d, d)
    eye = torch.eye(d, dtype=k.dtype)[None, None]
    for p, (first, end) in enumerate(spans):
        for h in range(heads):
            count, start = int(num_warmup_chunks[p, h]), first
            if end - count * CHUNK_SIZE > first:
                start = end - count * CHUNK_SIZE
            if count == 0:
                continue
            if (start - first) % CHUNK_SIZE:  # FlashQLA's value is meaningless here, and unused
                finals[p, h] = transitions[p, h] = float("nan")
                continue
            x = [t[0, start:end, h : h + 1] for t in (k, k, v)]
            x += [_log_alpha(g, start, end)[:, h : h + 1], b[0, start:end, h : h + 1]]
            finals[p, h] = chunked_gated_delta_rule(*x)[1][0, 0]
            if count >= -(-(end - first) // CHUNK_SIZE):
                x[2] = torch.zeros_like(x[1])
                transitions[p, h] = chunked_gated_delta_rule(*x, None, eye)[1][0, 0]
    return None, finals, transitions


def _scan(start, own, maps, falls_back, span, reverse, transpose):
    """The states before every part."""
    before, state = {}, start
    order = range(span[0], span[1])
    for p in reversed(order) if reverse else order:
        before[p] = state
        m = maps[p].transpose(-1, -2) if transpose else maps[p]
        state = own[p] + torch.where(falls_back[p][:, None, None], m @ state, 0.0)
    return before


def _corrected(start, own, maps, falls_back, of_fragment, reverse):
    out = torch.empty_like(own)
    for i, span in enumerate(_spans(of_fragment)):
        before = _scan(start[i], own, maps, falls_back, span, reverse, reverse)
        for p, state in before.items():
            out[p] = state
    return out


def correct_initial_states(raw_h0, ht_buffer, mt_buffer, fallback_mask, seq_map_r2c):
    return _corrected(raw_h0, ht_buffer, mt_buffer, fallback_mask, seq_map_r2c, False)


def correct_terminal_states(raw_dht, dht_buffer, mt_buffer, fallback_mask, seq_map_r2c):
    return _corrected(raw_dht, dht_buffer, mt_buffer, fallback_mask, seq_map_r2c, True)


def _rule(q, k, v, g, b, cu, initial_state):
    log_alpha = torch.cat([_log_alpha(g, a, e) for a, e in _spans(cu)])
    return chunked_gated_delta_rule(
        q[0], k[0], v[0], log_alpha, b[0], tuple(cu.tolist()), initial_state
    )


def fused_gdr_fwd(
    q, k, v, a, g, b, scale, initial_state, output_final_state, output_h, output_o, cu_seqlens,
    cp_seq_map, raw_cu_seqlens,
):  # fmt: skip
    assert scale == q.shape[-1] ** -0.5 and output_o and not output_h and not output_final_state
    assert (cp_seq_map is None) == (cu_seqlens is raw_cu_seqlens)
    return _rule(q, k, v, g, b, cu_seqlens, initial_state)[0][None], None, None


def fused_gdr_dh(
    q, k, a, g, b, do, dht, output_dh0, output_dh, scale, cu_seqlens, num_warmup_chunks
):
    assert dht is None and output_dh0 and not output_dh
    spans, heads = _spans(cu_seqlens), k.shape[2]
    grads = k.new_zeros(len(spans), heads, k.shape[3], do.shape[3])
    for p, (first, last) in enumerate(spans):
        for h in range(heads):
            end = min(last, first + int(num_warmup_chunks[p, h]) * CHUNK_SIZE)
            if end == first:
                continue
            x = [t[:, first:end, h : h + 1] for t in (q, k, torch.zeros_like(do), g, b)]
            with torch.enable_grad():
                state = torch.zeros_like(grads[p, h])[None, None].requires_grad_()
                output, _ = _rule(*x, torch.tensor([0, end - first]), state)
                (grad,) = torch.autograd.grad(output, state, do[0, first:end, h : h + 1])
            grads[p, h] = grad[0, 0]
    return None, grads


def fused_gdr_bwd(q, k, v, a, g, b, do, dht, h, scale, cu_seqlens):
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v, g, b)]
        output, finals = _rule(*leaves, cu_seqlens, h)
        return (*torch.autograd.grad((output, finals), leaves, (do[0], dht)), None)


def install(monkeypatch, split: bool) -> None:
    """Replace the package by the stand-ins.

    Args:
        monkeypatch: pytest's.
        split: whether fragments are cut into parts.
    """
    monkeypatch.setattr(sys.modules[__name__], "_split", split)
    chunk, utils = types.ModuleType("chunk"), types.ModuleType("utils")
    for name in (
        "CHUNK_SIZE", "build_cp_context", "kkt_solve", "get_warmup_chunks_bidi", "fused_gdr_h",
        "fused_gdr_fwd", "fused_gdr_dh", "fused_gdr_bwd",
        "correct_initial_states", "correct_terminal_states",
    ):  # fmt: skip
        setattr(chunk, name, globals()[name])
    utils.chunk_local_cumsum = chunk_local_cumsum
    index = types.ModuleType("index")
    index.prepare_varlen_metadata = lambda boundaries, on_host: boundaries
    rule = types.ModuleType("gated_delta_rule")
    rule.chunk = chunk
    for name, module in {
        "flash_qla": types.ModuleType("flash_qla"),
        "flash_qla.ops": types.ModuleType("ops"),
        "flash_qla.ops.gated_delta_rule": rule,
        "flash_qla.ops.gated_delta_rule.chunk": chunk,
        "flash_qla.ops.utils": utils,
        "flash_qla.utils": types.ModuleType("utils"),
        "flash_qla.utils.index": index,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
