"""FLA's chunked linear rules, with the signature of our torch twin.

They are flash-linear-attention's Triton kernels, or FlashQLA's through FLA's own dispatch if it is installed.
Under context parallelism the same kernels compute a shard (:mod:`.sharded_delta_rule`). FLA's own context
parallelism never takes FlashQLA and compiles other kernels; it is a separate back end.
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
from megatron_hydra.ops.linear_rules import FlaKernels
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
    dense_rows: bool = True,
    fla: FlaKernels,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the rule's twin (:attr:`.LinearRule.twin`).

    Args:
        q, k, v: bf16 or fp16 on a GPU.
        log_alpha, beta: fp32.
        exchange: connects the shard to the others; ``initial_state`` must then be ``None``.
        dense_rows: whether FLA may get documents of one length as rows of a batch. Use ``False`` if the number
            of rows changes: TileLang compiles FLA's backward for each number again, for ten seconds.
        fla: FLA's kernels of the model's rule.

    Returns:
        The output, and ``None`` in place of final states, which FLA does not compute here.
    """
    inputs = (q, k, v, log_alpha, beta)
    if exchange is not None:
        if fla.exchanges_states:
            return fla_own_context_parallel(*inputs, cu_seqlens, exchange=exchange, fla=fla)
        assert initial_state is None
        return sharded_gated_delta_rule(shard_kernels(*inputs), inputs, exchange), None
    documents: dict[str, Any] = {}
    rows = 1
    if cu_seqlens is None or len(cu_seqlens) == 2:
        pass
    elif dense_rows and _is_dense_batch(cu_seqlens, q, fla):
        rows = len(cu_seqlens) - 1
    else:
        documents["cu_seqlens"] = int_tensor(cu_seqlens, torch.int64, q.device)
        documents["cu_seqlens_cpu"] = int_tensor(cu_seqlens, torch.int64, "cpu")
    output = _whole(fla, inputs, rows, initial_state=initial_state, **documents)
    return output, None


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
    fla: FlaKernels,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`fla_gated_delta_rule`, but FLA passes the states between ranks itself (``fla.ops.cp``)."""
    if exchange is None:
        return fla_gated_delta_rule(q, k, v, log_alpha, beta, cu_seqlens, initial_state, fla=fla)
    assert initial_state is None
    context = _context(exchange, q.device)
    inputs = (q, k, v, log_alpha, beta)
    output = _whole(fla, inputs, 1, initial_state=None, cp_context=context)
    return output, None


def shard_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
) -> ShardKernels:
    """The kernels for a shard of such inputs: FlashQLA's if FLA would take them, else FLA's own."""
    from fla.ops.gated_delta_rule.backends import FlashQLABackend

    backend, heads = FlashQLABackend(), q.shape[1]
    reason: str | None = None
    if fla_tuning.flash_qla_refuses(heads):
        reason = "FlashQLA failed on them"
    elif not backend.is_available():
        reason = "FlashQLA is not installed"
    elif not backend.is_enabled():
        reason = "FLA_FLASH_QLA=0"
    else:
        accepted, why = backend.verify(
            "chunk_gated_delta_rule", *(x[None] for x in (q, k, v, log_alpha, beta))
        )
        reason = None if accepted else str(why)
    _say(heads, reason)
    return FlashQlaShardKernels() if reason is None else FlaShardKernels()


@functools.cache
def _say(heads: int, reason: str | None) -> None:
    """Log the choice, once for each number of heads."""
    _log.info(
        "context-parallel shards of %d GDN heads are computed by %s", heads,
        "FlashQLA" if reason is None else f"FLA's Triton kernels ({reason})",
    )  # fmt: skip


def _whole(
    fla: FlaKernels, inputs: tuple[torch.Tensor, ...], rows: int, **options: Any
) -> torch.Tensor:
    """Run FLA's function on a stream cut into ``rows``, without its dispatch if FlashQLA refuses the heads."""
    kernel = fla.load()
    if fla.flash_qla_head_dim and fla_tuning.flash_qla_refuses(inputs[0].shape[1]):
        kernel = inspect.unwrap(kernel)  # without FLA's dispatch to FlashQLA
    output, _ = kernel(*(x.unflatten(0, (rows, -1)) for x in inputs), **options)
    return output.flatten(0, 1)


def _is_dense_batch(cu: tuple[int, ...], q: torch.Tensor, fla: FlaKernels) -> bool:
    """Whether documents should become rows of a batch, because all have one length.

    Without boundaries, FLA's own kernels need no indices of chunks. FlashQLA cuts a long document into pieces
    that run in parallel, but only in streams with boundaries.
    """
    if len({b - a for a, b in zip(cu, cu[1:], strict=False)}) != 1:
        return False
    heads, head_dim = q.shape[1:]
    return head_dim != fla.flash_qla_head_dim or fla_tuning.flash_qla_refuses(heads)


def _context(exchange: StateExchange, device: torch.device) -> Any:
    """FLA's description of this rank's shard; FLA caches it by the identity of its arguments."""
    from fla.ops.cp import build_cp_context

    boundaries = exchange.cu_seqlens_global
    return build_cp_context(
        cu_seqlens=int_tensor(boundaries, torch.int64, device),
        cu_seqlens_cpu=int_tensor(boundaries, torch.int64, "cpu"),
        group=exchange.group,
    )
