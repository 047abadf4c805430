"""KL to a teacher and cross-entropy, computed from hidden states; only one chunk of logits exists at a time.

The loss of stage 2 (and, without a teacher, of pretrain and finetune), summed over unmasked tokens:

    L = Σ_t  λ·τ²·KL(softmax(z^T_t/τ) ‖ softmax(z^S_t/τ)) + (1−λ)·CE(z^S_t, y_t),     z = W h

At 512K tokens and a vocabulary of 150K, full logits of one model would take 300 GB in fp32. Here the forward
computes the gradient chunk by chunk. So memory in addition to inputs and their gradients does not depend on the
number of tokens. The vocabulary may be split over a
tensor-parallel group.

:func:`linear_distillation_loss_reference` is the same mathematics with full logits and autograd.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class DistillationLoss(NamedTuple):
    """Sums over unmasked tokens, fp32 scalars. Only ``loss`` has a gradient."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


class _Settings(NamedTuple):
    kl_weight: float
    temperature: float
    chunk_tokens: int
    tp_group: torch.distributed.ProcessGroup | None
    fused: bool = False
    fp32_logits: bool = True


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated and returned in fp32 whatever the inputs' type."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _logits(hidden: Tensor, weight: Tensor, settings: _Settings) -> Tensor:
    """``[C, V_local]`` in fp32 or in the weight's dtype; the torch passes accept only fp32."""
    if settings.fp32_logits:
        return _matmul_fp32(hidden, weight.t())
    logits = hidden.to(weight.dtype) @ weight.t()
    return logits if settings.fused else logits.float()


def _add_matmul_fp32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in fp32; on a GPU the product itself adds, without another pass over ``total``."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += _matmul_fp32(a, b)


def _all_reduce(x: Tensor, op: Any, settings: _Settings) -> Tensor:
    if settings.tp_group is not None and settings.tp_group.size() > 1:
        torch.distributed.all_reduce(x, op=op, group=settings.tp_group)
    return x


class _Chunk(NamedTuple):
    """Loss sums of one chunk of C tokens, and their gradient by its logits ``[C, V_local]``."""

    kl: Tensor
    ce: Tensor
    d_logits: Tensor | None


def _chunk_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels_local: Tensor,
    mask: Tensor,
    settings: _Settings,
    needs_gradient: bool,
) -> _Chunk:
    """Losses of a chunk. Overwrites the logits.

    Args:
        student_logits, teacher_logits: ``[C, V_local]`` fp32.
        labels_local: ``[C]`` row of the label in this rank's part of the vocabulary, or outside.
        mask: ``[C]`` bool.
    """
    tau = settings.temperature
    is_local = (labels_local >= 0) & (labels_local < student_logits.shape[1])
    target_index = labels_local.clamp(0, student_logits.shape[1] - 1)[:, None]

    both = [student_logits] if teacher_logits is None else [student_logits, teacher_logits]
    peak = _all_reduce(
        torch.stack([z.amax(dim=1) for z in both]), torch.distributed.ReduceOp.MAX, settings
    )
    z_s = student_logits.sub_(peak[0, :, None])
    target = z_s.gather(1, target_index)[:, 0] * is_local
    p_s = z_s.exp()
    sums = [p_s.sum(dim=1), target]
    if teacher_logits is not None:
        # (z^T − z^S)/τ goes into the student's buffer: its plain logits are not needed any more.
        z_t = teacher_logits.sub_(peak[1, :, None]).div_(tau)
        p_s_tau = p_s if tau == 1 else z_s.div(tau).exp_()
        gap = torch.sub(z_t, z_s, alpha=1 / tau, out=z_s)
        p_t = z_t.exp_()
        sums += [p_s_tau.sum(dim=1), p_t.sum(dim=1), gap.mul_(p_t).sum(dim=1)]
    total = _all_reduce(torch.stack(sums), torch.distributed.ReduceOp.SUM, settings)

    zero = torch.zeros_like(total[0])
    ce = torch.where(mask, total[0].log() - total[1], zero).sum()
    kl = ce.new_zeros(())
    if teacher_logits is not None:
        kl_tokens = total[4] / total[3] - total[3].log() + total[2].log()
        kl = torch.where(mask, kl_tokens, zero).sum() * tau**2
    if not needs_gradient:
        return _Chunk(kl, ce, None)

    weight = mask.to(total.dtype)[:, None]
    ce_weight = 1.0 if teacher_logits is None else 1.0 - settings.kl_weight
    d_logits = p_s * (weight * ce_weight / total[0, :, None])
    d_logits.scatter_add_(1, target_index, -ce_weight * weight * is_local[:, None])
    if teacher_logits is not None:
        kl_scale = settings.kl_weight * tau * weight
        d_logits.addcmul_(p_s_tau, kl_scale / total[2, :, None])
        d_logits.addcmul_(p_t, kl_scale / total[3, :, None], value=-1)
    return _Chunk(kl, ce, d_logits)


def _fused_chunk_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels_local: Tensor,
    mask: Tensor,
    settings: _Settings,
    needs_gradient: bool,
    dtype: torch.dtype,
) -> _Chunk:
    """As :func:`_chunk_loss` by two Triton passes over the logits; the gradient is in ``dtype``."""
    from megatron_hydra.ops import triton_chunk_loss

    tau, has_teacher = settings.temperature, teacher_logits is not None
    own = triton_chunk_loss.chunk_statistics(student_logits, teacher_logits, labels_local, tau)
    stats = own
    if settings.tp_group is not None and settings.tp_group.size() > 1:
        # This rank's sums are relative to its own maxima.
        peak = _all_reduce(own[[0, 4]], torch.distributed.ReduceOp.MAX, settings)
        s_shift, t_shift = own[0] - peak[0], (own[4] - peak[1]) / tau
        sums = torch.stack(
            (
                own[1] * s_shift.exp(), own[2], own[3] * (s_shift / tau).exp(),
                own[5] * t_shift.exp(), own[6] * t_shift.exp(),
            )
        )  # fmt: skip
        sums = _all_reduce(sums, torch.distributed.ReduceOp.SUM, settings)
        stats = torch.stack((peak[0], *sums[:3], peak[1], *sums[3:]))
    s_peak, s_sum, target, s_sum_tau, t_peak, t_sum, cross = stats.unbind()

    zero = torch.zeros_like(s_peak)
    ce = torch.where(mask, s_sum.log() + s_peak - target, zero).sum()
    kl = ce.new_zeros(())
    if has_teacher:
        kl_tokens = cross / t_sum - (t_peak - s_peak) / tau - t_sum.log() + s_sum_tau.log()
        kl = torch.where(mask, kl_tokens, zero).sum() * tau**2
    if not needs_gradient:
        return _Chunk(kl, ce, None)
    ce_factor = mask * (1.0 - settings.kl_weight if has_teacher else 1.0)
    factors = [ce_factor.float(), ce_factor / s_sum, zero, zero]
    if has_teacher:
        kl_factor = mask * (settings.kl_weight * tau)
        factors[2:] = [kl_factor / s_sum_tau, kl_factor / t_sum]
    gradient = triton_chunk_loss.chunk_gradient(
        student_logits, teacher_logits, labels_local, stats.contiguous(), torch.stack(factors),
        tau, dtype,
    )  # fmt: skip
    return _Chunk(kl, ce, gradient)


class _LinearDistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels_local: Tensor,
        mask: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Within forward, grad mode is off, so the inputs show which gradients the caller needs.
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if wants_weight
            else None
        )
        kl, ce = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, hidden.shape[0], settings.chunk_tokens):
            part = slice(start, start + settings.chunk_tokens)
            keep = mask[part]
            # A masked token's hidden state may have any value, also NaN.
            h = torch.where(keep[:, None], hidden[part], 0)
            logits = _logits(h, weight, settings)
            teacher_logits = None
            if teacher_hidden is not None and teacher_weight is not None:
                h_t = torch.where(keep[:, None], teacher_hidden[part], 0)
                teacher_logits = _logits(h_t, teacher_weight, settings)
            arguments = (logits, teacher_logits, labels_local[part], keep, settings)
            wants = wants_hidden or wants_weight
            if settings.fused:
                chunk = _fused_chunk_loss(*arguments, wants, weight.dtype)
            else:
                chunk = _chunk_loss(*arguments, wants)
            kl += chunk.kl
            ce += chunk.ce
            del logits, teacher_logits, arguments  # before the products, and before the next chunk
            if chunk.d_logits is not None:
                d_logits = chunk.d_logits.to(weight.dtype)
                if d_hidden is not None:
                    d_hidden[part] = d_logits @ weight
                if d_weight is not None:
                    _add_matmul_fp32(d_weight, d_logits.t(), h)
                del d_logits
            del chunk
        ctx.d_hidden, ctx.d_weight, ctx.weight_dtype = d_hidden, d_weight, weight.dtype
        if teacher_hidden is None:
            loss = ce.clone()
        else:
            loss = settings.kl_weight * kl + (1 - settings.kl_weight) * ce
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _d_kl: Tensor, _d_ce: Tensor) -> tuple[Any, ...]:
        if ctx.weight_dtype is None:
            raise RuntimeError("linear_distillation_loss: backward can be called only once")
        d_hidden, d_weight = ctx.d_hidden, ctx.d_weight
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(d_loss)
        if d_weight is not None:
            scaled = (
                d_weight
                if d_weight.dtype == ctx.weight_dtype
                else torch.empty_like(d_weight, dtype=ctx.weight_dtype)
            )
            d_weight = torch.mul(d_weight, d_loss, out=scaled)  # one pass, rounded at its end
        ctx.d_hidden = ctx.d_weight = ctx.weight_dtype = None
        return d_hidden, d_weight, None, None, None, None, None


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    tp_group: torch.distributed.ProcessGroup | None = None,
    first_label: int | None = None,
    fused: bool | None = None,
    fp32_logits: bool = True,
) -> DistillationLoss:
    """The loss above, with at most ``chunk_tokens`` rows of logits in memory.

    Args:
        student_hidden: ``[N, D]`` last hidden states after the final norm; all tokens, also where
            sequence parallelism shards the model's activations (gather them first).
        student_weight: ``[V_local, D]`` this rank's rows of the LM head (of a tied embedding, too).
        labels: ``[N]`` int64, global vocabulary indices.
        loss_mask: ``[N]``; a token counts if it is not 0. Masked tokens contribute nothing, not even a NaN.
        teacher_hidden, teacher_weight: ``[N, D_teacher]``, ``[V_local, D_teacher]``; no gradient.
            Without them the loss is the cross-entropy alone.
        kl_weight, temperature: λ and τ.
        chunk_tokens: rows of logits in memory at a time; N need not be a multiple.
        tp_group: the group over which the vocabulary is split, in rank order.
        first_label: the label of this rank's first row; ``None``: parts are equal. No rank may have none.
        fused: whether our Triton kernels compute losses and gradient of a chunk's logits; ``None``: on a GPU if
            Triton is installed.
        fp32_logits: keep a chunk's logits in fp32; else in the weights' dtype. bf16 rounds them to 8 bits and
            halves their memory traffic. Sums and gradients are computed in fp32 in both cases.

    Returns:
        Sums over unmasked tokens: ``loss`` (with gradient), ``kl`` (τ² included) and ``ce``, the
        same on every rank of ``tp_group``. The gradient by ``student_hidden`` is this rank's
        *partial* sum: pass the hidden states through Megatron's
        copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region, as its
        column-parallel layers do.

    Source: design §5; MiniLLM-style forward-formed gradients as in Liger's fused linear losses.
    """
    if student_hidden.dim() != 2 or labels.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"expected hidden [N, D] and labels [N], got {tuple(student_hidden.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if first_label is None:
        first_label = 0 if tp_group is None else tp_group.rank() * student_weight.shape[0]
    if fused is None:
        fused = student_hidden.is_cuda and importlib.util.find_spec("triton") is not None
    settings = _Settings(kl_weight, temperature, chunk_tokens, tp_group, fused, fp32_logits)
    teacher: tuple[Tensor | None, Tensor | None] = (None, None)
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.detach(), teacher_weight.detach())
    if not torch.is_grad_enabled():  # otherwise the loss would compute unused gradients
        student_hidden, student_weight = student_hidden.detach(), student_weight.detach()
    return DistillationLoss(
        *_LinearDistillationLoss.apply(
            student_hidden, student_weight, labels - first_label, loss_mask != 0, *teacher, settings
        )
    )


def linear_distillation_loss_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> DistillationLoss:
    """Plain twin of :func:`linear_distillation_loss`: full logits, whole vocabulary, autograd."""
    keep = loss_mask != 0
    logits = _wide(student_hidden[keep]) @ _wide(student_weight).t()
    ce = F.cross_entropy(logits, labels[keep], reduction="sum")
    if teacher_hidden is None or teacher_weight is None:
        return DistillationLoss(ce, torch.zeros_like(ce), ce.detach())
    with torch.no_grad():
        teacher_logits = _wide(teacher_hidden[keep]) @ _wide(teacher_weight).t()
        teacher_log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    kl = F.kl_div(log_p, teacher_log_p, log_target=True, reduction="sum") * temperature**2
    loss = kl_weight * kl + (1 - kl_weight) * ce
    return DistillationLoss(loss, kl.detach(), ce.detach())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
