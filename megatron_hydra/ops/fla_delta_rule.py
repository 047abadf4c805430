"""FLA's chunked gated delta rule behind the signature of our own (its torch twin).

flash-linear-attention's Triton kernels, or FlashQLA's through FLA's own dispatch where that is
installed. Under context parallelism FLA gets the group and the global boundaries (``cp_context``)
and passes states between ranks itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from megatron_hydra.ops import fla_tuning
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.gated_delta_rule import StateExchange


def fla_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: tuple[int, ...] | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    exchange: StateExchange | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`megatron_hydra.ops.gated_delta_rule.chunked_gated_delta_rule`.

    Args:
        q, k, v: bf16 or fp16 on a GPU.
        log_alpha, beta: fp32.
        exchange: of ``parallel.context_parallel.state_exchange``: names the group and the global
            boundaries.

    Returns:
        Output, and ``None``: FLA's final states are not asked for.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    documents: dict[str, Any] = {}
    rows = 1
    if exchange is not None:
        documents["cp_context"] = _context(exchange, q.device)
    elif cu_seqlens is not None and len(cu_seqlens) == 2:
        pass
    elif cu_seqlens is not None and _is_dense_batch(cu_seqlens, q):
        rows = len(cu_seqlens) - 1
    elif cu_seqlens is not None:
        documents["cu_seqlens"] = int_tensor(cu_seqlens, torch.int64, q.device)
        documents["cu_seqlens_cpu"] = int_tensor(cu_seqlens, torch.int64, "cpu")
    rule = chunk_gated_delta_rule
    if fla_tuning.flash_qla_refuses(q.shape[1]):
        rule = inspect.unwrap(rule)  # FLA's own implementation, without its dispatch to FlashQLA
    output, _ = rule(
        *(x.unflatten(0, (rows, -1)) for x in (q, k, v, log_alpha, beta)),
        initial_state=initial_state,
        **documents,
    )
    return output.flatten(0, 1), None


def _is_dense_batch(cu: tuple[int, ...], q: torch.Tensor) -> bool:
    """Whether documents of one length are better given as rows of a batch.

    FLA's own kernels are faster without boundaries, and make no indices of chunks, which FLA keeps for the last
    few boundaries only: a CUDA graph would read them after they are gone. FlashQLA cuts a long document into
    pieces that run side by side, and does so for streams with boundaries only.
    """
    if len({b - a for a, b in zip(cu, cu[1:], strict=False)}) != 1:
        return False
    heads, head_dim = q.shape[1:]
    return head_dim != fla_tuning.FLASH_QLA_HEAD_DIM or fla_tuning.flash_qla_refuses(heads)


def _context(exchange: StateExchange, device: torch.device) -> Any:
    """FLA's description of this rank's shard; FLA caches it by the identity of its arguments."""
    from fla.ops.cp import build_cp_context

    boundaries = exchange.cu_seqlens_global
    return build_cp_context(
        cu_seqlens=int_tensor(boundaries, torch.int64, device),
        cu_seqlens_cpu=int_tensor(boundaries, torch.int64, "cpu"),
        group=exchange.group,
    )
