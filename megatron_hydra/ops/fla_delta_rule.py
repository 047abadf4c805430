"""FLA's chunked gated delta rule behind the signature of our own (its torch twin).

flash-linear-attention's Triton kernels, or FlashQLA's through FLA's own dispatch where that is
installed. Under context parallelism the same kernels compute a shard (:mod:`.sharded_delta_rule`); FLA's
own context parallelism, which never takes FlashQLA and compiles kernels of its own, has a name of its own.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch

from megatron_hydra.ops import fla_tuning
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.fla_shard_kernels import FlaShardKernels
from megatron_hydra.ops.flash_qla_shard_kernels import FlashQlaShardKernels
from megatron_hydra.ops.sharded_delta_rule import (
    ShardKernels,
    StateExchange,
    sharded_gated_delta_rule,
)

_log = logging.getLogger(__name__)


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
        exchange: connects the shard to the others; ``initial_state`` must then be absent.

    Returns:
        Output, and ``None``: FLA's final states are not asked for.
    """
    if exchange is not None:
        assert initial_state is None
        inputs = (q, k, v, log_alpha, beta)
        return sharded_gated_delta_rule(shard_kernels(*inputs), inputs, exchange), None
    documents: dict[str, Any] = {}
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        documents["cu_seqlens"] = int_tensor(cu_seqlens, torch.int64, q.device)
        documents["cu_seqlens_cpu"] = int_tensor(cu_seqlens, torch.int64, "cpu")
    return _whole(q, k, v, log_alpha, beta, initial_state=initial_state, **documents), None


def fla_own_context_parallel(
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
    """As :func:`fla_gated_delta_rule`, but FLA passes the states between ranks itself (``fla.ops.cp``)."""
    if exchange is None:
        return fla_gated_delta_rule(q, k, v, log_alpha, beta, cu_seqlens, initial_state)
    assert initial_state is None
    context = _context(exchange, q.device)
    return _whole(q, k, v, log_alpha, beta, initial_state=None, cp_context=context), None


def shard_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
) -> ShardKernels:
    """What computes a shard of such inputs: FlashQLA's kernels if FLA would take them, else FLA's own."""
    from fla.ops.gated_delta_rule.backends import FlashQLABackend

    backend = FlashQLABackend()
    if fla_tuning.flash_qla_refuses(q.shape[1]):
        return FlaShardKernels()
    if not (backend.is_available() and backend.is_enabled()):
        return FlaShardKernels()
    accepted, _ = backend.verify(
        "chunk_gated_delta_rule", *(x[None] for x in (q, k, v, log_alpha, beta))
    )
    return FlashQlaShardKernels() if accepted and _has_shard_kernels() else FlaShardKernels()


@functools.cache
def _has_shard_kernels() -> bool:
    from flash_qla.ops.gated_delta_rule import chunk

    if getattr(chunk, "aggregate_card_state", None) is None:
        _log.warning(
            "FlashQLA has no kernel here that joins the states of a shard's parts: under context parallelism "
            "FLA's own kernels compute the gated delta rule, more slowly"
        )
        return False
    return True


def _whole(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """FLA's function, with its dispatch unless FlashQLA refuses so many heads."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    rule = chunk_gated_delta_rule
    if fla_tuning.flash_qla_refuses(q.shape[1]):
        rule = inspect.unwrap(rule)  # FLA's own implementation, without its dispatch to FlashQLA
    output, _ = rule(*(x.unsqueeze(0) for x in (q, k, v, log_alpha, beta)), **options)
    return output.squeeze(0)


def _context(exchange: StateExchange, device: torch.device) -> Any:
    """FLA's description of this rank's shard; FLA caches it by the identity of its arguments."""
    from fla.ops.cp import build_cp_context

    boundaries = exchange.cu_seqlens_global
    return build_cp_context(
        cu_seqlens=int_tensor(boundaries, torch.int64, device),
        cu_seqlens_cpu=int_tensor(boundaries, torch.int64, "cpu"),
        group=exchange.group,
    )
