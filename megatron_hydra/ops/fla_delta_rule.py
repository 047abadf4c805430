"""FLA's chunked linear rules behind the signature of our own (its torch twin).

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
from megatron_hydra.ops.linear_rules import rule_of_decays


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
    rule = rule_of_decays(log_alpha)
    documents: dict[str, Any] = {}
    if exchange is not None:
        documents["cp_context"] = _context(exchange, q.device)
    elif cu_seqlens is not None and len(cu_seqlens) > 2:
        documents["cu_seqlens"] = int_tensor(cu_seqlens, torch.int64, q.device)
        documents["cu_seqlens_cpu"] = int_tensor(cu_seqlens, torch.int64, "cpu")
    kernel = rule.fla_kernel()
    if rule.flash_qla_head_dim and fla_tuning.flash_qla_refuses(q.shape[1]):
        kernel = inspect.unwrap(
            kernel
        )  # FLA's own implementation, without its dispatch to FlashQLA
    output, _ = kernel(
        *(x.unsqueeze(0) for x in (q, k, v, log_alpha, beta)),
        initial_state=initial_state,
        **documents,
    )
    return output.squeeze(0), None


def _context(exchange: StateExchange, device: torch.device) -> Any:
    """FLA's description of this rank's shard; FLA caches it by the identity of its arguments."""
    from fla.ops.cp import build_cp_context

    boundaries = exchange.cu_seqlens_global
    return build_cp_context(
        cu_seqlens=int_tensor(boundaries, torch.int64, device),
        cu_seqlens_cpu=int_tensor(boundaries, torch.int64, "cpu"),
        group=exchange.group,
    )
