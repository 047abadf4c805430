"""HydraHead in Hugging Face format (copied into every export; needs torch and transformers only).

HydraHead (arXiv 2606.20097) mixes full attention (FA) and Gated DeltaNet (GDN) along the head axis
of every attention layer:

    FA head    q = s_t · N_q(W_q x)   k = N_k(W_k x)   v = W_v x      s_t = ln(t + a) / ln(a)
               o = softmax_causal(q kᵀ / √d) v  ⊙  2σ(W_g x + b_g)
    GDN head   q = l2(R_t N_q(conv(W_q x)))   k = l2(R_t N_k(conv(W_k x)))   v = conv(W_v x)
               β = σ(W_b x)    log α = −exp(A_log) · softplus(W_a x + dt_bias)
               S_t = (I − β_t k_t k_tᵀ) α_t S_{t−1} + β_t k_t v_tᵀ
               o = S_tᵀ q_t / √d  ⊙  2σ(W_g x)
               ``linear=kda`` (Kimi Delta Attention): α_t is a diagonal matrix, a decay of each channel of k
    fusion     y = W_o [γ_h · RMSNorm(o_h)]_h, heads in their original order

FA heads of one KV group share k and v. GDN heads have their own k and v (``gdn_kv=mha``) or share them as
well (``gqa``). With ``qkv=shared`` all heads of a group, FA and GDN, use the same W_k and W_v, and all heads
use the same norms N_q and N_k. With ``gdn_kv=mha`` each GDN head still has its own short convolution.

Two baselines run both mixers in every head. They normalise and scale each output separately and add them:
``y = W_o [γ_h · RMSNorm(o_h) + γ'_h · RMSNorm(o'_h)]_h``. With ``mixer=parallel`` both mixers cover the whole
context. With ``mixer=token`` softmax covers a window and the state covers all tokens before it.

B: batch, T: new tokens, L: all tokens so far, D: hidden size, H: query heads, d: head_dim.

Padding. Before the first layer, a padded batch is reordered so that every row has its real tokens first.
The order is restored after the last layer. Inside the layers padding therefore follows the real tokens and
cannot change a convolution or a position. It does not change states (β = 0, α = 1), and keys are masked.

Packed documents (no padding between them) are joined to one row before the first layer. Softmax,
convolution, state and positions start again in each document.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import os
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple, logging

from .cache_hydrahead import (
    HydraHeadCache,
    HydraHeadCacheLayer,
    Rule,
    adopt,
    layer_memory,
    put_back,
    record_past,
)
from .configuration_hydrahead import HydraHeadConfig
from .decode_hydrahead import FusedLayer, decode, keep_if_whole, prompt_usable, read, usable
from .window_hydrahead import beyond_window, extend, within_window

logger = logging.get_logger(__name__)

CHUNK, BLOCK = 64, 16
"""Chunk length of the torch delta rule, and rows of a block of a chunk, in tokens."""

CACHE_NAME = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""The names of a cache in transformers' outputs and in generate(), which changed in 5.24."""

MASK_ELEMENTS = 1 << 26
"""Maximum size of an attention mask. Attention over longer inputs runs block by block."""


# -- the gated delta rule -------------------------------------------------------------------------


def _without_autocast(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Run a rule without autocast, which would compute its fp32 products in 16 bits."""

    @functools.wraps(rule)
    def wrapped(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if q.device.type == "meta":  # which has no autocast
            return rule(q, *args, **kwargs)
        with torch.autocast(q.device.type, enabled=False):
            return rule(q, *args, **kwargs)

    return wrapped


@_without_autocast
def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule by its definition, one token at a time: the decode step.

    Args and results: as :func:`chunked_gated_delta_rule`.
    """
    dtype = q.dtype
    q, k, v, log_alpha, beta = (x.float() for x in (q, k, v, log_alpha, beta))
    q = q * q.shape[-1] ** -0.5
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    decays = _by_head(log_alpha, q).exp()[..., None]
    outputs = []
    for t in range(q.shape[1]):
        state = state * decays[:, t]
        stored = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        error = (v[:, t] - stored) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(dtype), state


@_without_autocast
def chunked_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated delta rule by chunks of tokens (WY form of Gated DeltaNet, arXiv 2412.06464).

    Inside a chunk, let g be the cumulative sum of log α and Γ_ij = exp(g_i − g_j). All corrected values
    solve one triangular system, (I + strictly_lower(diag(β) K Kᵀ ∘ Γ)) [W U] = diag(β) [e^g K, V].
    The chunk then writes U − W S, where S is the state before the chunk. With a decay of each channel, Γ is
    inside the sums over channels.

    Args:
        q, k: ``[B, T, n, d]``; v: ``[B, T, n, dv]``.
        log_alpha, beta: ``[B, T, n]``, log of the decay (≤ 0) and write strength. ``[B, T, n·d]``: log of the
            decay of each channel of the keys.
        state: ``[B, n, d, dv]`` fp32 before the first token; ``None``: zero.
        chunk: length of a chunk in tokens.

    Returns:
        ``[B, T, n, dv]`` in ``q``'s dtype, and the state after the last token in fp32.
    """
    dtype, length = q.dtype, q.shape[1]
    chunk = min(chunk, length)
    q, k, v, log_alpha, beta = (
        _to_chunks(x.float(), chunk) for x in (q, k, v, _by_head(log_alpha, q), beta[..., None])
    )
    q = q * q.shape[-1] ** -0.5
    g = log_alpha.cumsum(-2)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if g.shape[-1] == 1:
        # Masked before exp: above the diagonal g_i − g_j is positive and may overflow.
        decay = (g - g.transpose(-1, -2)).masked_fill(~lower, float("-inf")).exp()
        keys_t = k.transpose(-1, -2)
        mixing = (q @ keys_t) * decay
        system = (k @ keys_t) * decay * beta
    else:
        mixing, system = _decayed_by_channel(q, k, g, lower)
        system = system * beta
    right = torch.cat((k * (beta * g.exp()), v * beta), dim=-1)
    # unitriangular reads the strictly lower part only and takes the diagonal as 1.
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    w, u = solved.split((k.shape[-1], v.shape[-1]), dim=-1)
    q = q * g.exp()
    to_end = (k * (g[..., -1:, :] - g).exp()).transpose(-1, -2)
    kept = g[..., -1, :].exp()[..., None]

    if state is None:
        state = q.new_zeros(*q.shape[1:3], k.shape[-1], v.shape[-1])
    outputs = []
    for n in range(q.shape[0]):
        written = u[n] - w[n] @ state
        outputs.append(q[n] @ state + mixing[n] @ written)
        state = state * kept[n] + to_end[n] @ written
    output = torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return output[:, :length].to(dtype), state


def _by_head(log_alpha: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``[B, T, n]`` or ``[B, T, n·d]`` → ``[B, T, n, 1 or d]``."""
    return log_alpha.unflatten(-1, (q.shape[2], -1))


def _decayed_by_channel(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, lower: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_c q_ic k_jc exp(g_ic − g_jc) and the same of k and k, ``[…, C, C]``, zero above the diagonal.

    Blocks of rows: what lies before a block is weighed by exp(g_i − r) · exp(r − g_j), r being g just before
    it; inside a block each pair has its own exponent. None of the exponents is positive.
    """
    size = q.shape[-2]
    rows = torch.stack((q, k), dim=-2)  # [..., C, 2, d]
    blocks = []
    for start in range(0, size, BLOCK):
        part = slice(start, min(start + BLOCK, size))
        inside = lower[part, part, None]
        gaps = g[..., part, None, :] - g[..., None, part, :]
        weights = gaps.masked_fill(~inside, float("-inf")).exp()
        near = rows[..., part, :, :] @ (weights * k[..., None, part, :]).transpose(-1, -2)
        parts = [near]
        if start:
            before = g[..., start - 1 : start, :]
            grown = rows[..., part, :, :] * (g[..., part, :] - before).exp()[..., None, :]
            keys = (k[..., :start, :] * (before - g[..., :start, :]).exp()).transpose(-1, -2)
            parts.insert(0, grown @ keys[..., None, :, :])
        joined = torch.cat(parts, dim=-1)
        blocks.append(F.pad(joined, (0, size - joined.shape[-1])))
    mixing, system = torch.cat(blocks, dim=-3).unbind(-2)
    return mixing, system


def _to_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """``[B, T, n, c]`` → ``[N, B, n, C, c]``. Zeros pad the last chunk and do not change the result."""
    batch, length, heads, channels = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % chunk))
    return x.view(batch, -1, chunk, heads, channels).permute(1, 0, 3, 2, 4).contiguous()


@functools.cache
def _fla_kernels(by_channel: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The chunked and the recurrent kernel of flash-linear-attention; ``None`` if it does not import."""
    try:
        if by_channel:
            from fla.ops.kda import chunk_kda, fused_recurrent_kda

            return chunk_kda, fused_recurrent_kda
        from fla.ops.gated_delta_rule import (
            chunk_gated_delta_rule,
            fused_recurrent_gated_delta_rule,
        )
    except Exception:  # a broken triton can raise any error; the torch path always works
        return None
    return chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


_declined: set[int] = set()
"""Head counts for which FlashQLA failed in this process. FLA uses FlashQLA if it is installed."""


def _by_fla(rule: Callable[..., Any], heads: int, inputs: dict[str, Any]) -> Any:
    """FLA's chunked rule. If FlashQLA fails (TileLang fails for 7, 13 or 15 heads), use FLA's own kernels.

    If the user sets ``FLA_FLASH_QLA``, a failure raises an error.
    """
    if torch.compiler.is_compiling():
        return rule(**inputs)
    own = inspect.unwrap(rule)
    if own is rule or "FLA_FLASH_QLA" in os.environ:
        return rule(**inputs)
    if heads in _declined:
        return own(**inputs)
    try:
        return rule(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # TileLang can raise any error
        result = own(**inputs)  # wrong inputs raise their error here again
        _declined.add(heads)
        logger.warning(
            f"FlashQLA cannot compute the gated delta rule of {heads} heads here ({error}). FLA's own kernels "
            "compute it. FLA_FLASH_QLA=1 requires FlashQLA, FLA_FLASH_QLA=0 disables it"
        )
        return result


class HydraHeadDeltaRule(nn.Module):
    """The chunked rule as a module, which a kernel from the Hub may replace (``use_kernels=True``).

    It has no parameters. Name and signature are those of Qwen3-Next's rule in transformers. The ``kernels``
    package finds the module by its class's ``kernel_layer_name``, compares signatures, and sets ``forward``.
    """

    kernel_layer_name = "chunk_gated_delta_rule"
    replaced = False
    """Whether ``forward`` is a kernel from the Hub."""

    def __setattr__(self, name: str, value: Any) -> None:
        # `kernels` sets a method, the class's own where it has no kernel. accelerate's hooks set no method.
        if name == "forward" and isinstance(value, types.MethodType):
            self.replaced = value.__func__ is not type(self).forward
        super().__setattr__(name, value)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = CHUNK,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The twin of a kernel. :func:`gated_delta_rule` calls this module only where a kernel replaces it."""
        if use_qk_l2norm_in_kernel or kwargs.get("cu_seqlens") is not None:
            raise NotImplementedError("the twin neither normalises q and k nor knows documents")
        rule = chunked_gated_delta_rule if query.shape[1] > 1 else recurrent_gated_delta_rule
        out, state = rule(query, key, value, g, beta, initial_state)
        return out, state if output_final_state else None


class HydraHeadDeltaStep(HydraHeadDeltaRule):
    """The recurrent rule as a module, for a kernel from the Hub; see :class:`HydraHeadDeltaRule`."""

    kernel_layer_name = "fused_recurrent_gated_delta_rule"

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The twin of a kernel; see :meth:`HydraHeadDeltaRule.forward`."""
        return super().forward(
            query,
            key,
            value,
            g,
            beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **kwargs,
        )


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    kernel: str = "auto",
    documents: Documents | None = None,
    hub: tuple[HydraHeadDeltaRule, HydraHeadDeltaStep] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule by the fastest implementation that supports the case.

    Arguments and results are those of :func:`chunked_gated_delta_rule`. With ``documents``, each document
    begins with an empty state, and no state is returned. Kernels from the Hub come first, then FLA's.
    """
    supported = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
    by_channel = log_alpha.shape[-1] != q.shape[2]
    # The Hub's kernels for GPUs are FLA's, with its limits. One for a CPU only a user can have named.
    module = None if hub is None else hub[q.shape[1] == 1]
    if module is not None and not (module.replaced and (supported or q.device.type == "cpu")):
        module = None
    inputs: dict[str, Any] = {"initial_state": state, "output_final_state": documents is None}
    if documents is not None:
        inputs["cu_seqlens"] = documents.bounds
    kernels = _fla_kernels(by_channel) if kernel == "auto" and supported else None
    if module is not None or kernels is not None:
        inputs["beta"] = beta.to(v.dtype) if q.shape[1] > 1 else beta.float()
    if module is not None:
        return module(q, k, v, log_alpha.float(), **inputs)
    if kernels is not None:
        g = _by_head(log_alpha, q).float() if by_channel else log_alpha.float()
        inputs |= {"q": q, "k": k, "v": v, "g": g}
        if q.shape[1] > 1:
            return kernels[0](**inputs) if by_channel else _by_fla(kernels[0], q.shape[2], inputs)
        return kernels[1](**inputs)
    if documents is not None:
        parts = [
            gated_delta_rule(
                q[:, part], k[:, part], v[:, part], log_alpha[:, part], beta[:, part], None, kernel
            )[0]
            for part in documents.parts
        ]
        return _join(parts), None
    function = chunked_gated_delta_rule if q.shape[1] > 1 else recurrent_gated_delta_rule
    return function(q, k, v, log_alpha, beta, state)


# -- packed documents -----------------------------------------------------------------------------


@dataclasses.dataclass
class Documents:
    """Documents joined to one row of N tokens.

    Attributes:
        bounds: ``[documents + 1]`` int64, the first token of each document, and N.
        lengths: number of tokens of each document, ≥ 1.
        positions: ``[1, N]`` int64, every token's position in its document.
        real: ``[N]`` int64, the index of each token among the caller's B·T tokens; ``None``: all tokens in
            the caller's order.
        width: T.
    """

    bounds: torch.Tensor
    lengths: list[int]
    positions: torch.Tensor
    real: torch.Tensor | None
    width: int

    @property
    def parts(self) -> list[slice]:
        """The columns of each document in the row."""
        ends = list(itertools.accumulate(self.lengths))
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    def to(self, device: torch.device) -> Documents:
        """The same with its tensors on ``device``."""
        real = None if self.real is None else self.real.to(device)
        return dataclasses.replace(
            self, bounds=self.bounds.to(device), positions=self.positions.to(device), real=real
        )

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, D]`` → ``[1, N, D]``."""
        flat = x.reshape(-1, x.shape[-1])
        return (flat if self.real is None else flat.index_select(0, self.real))[None]

    def unpack(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """``[1, N, D]`` → ``[B, T, D]``, zero where there is padding."""
        flat = x[0]
        if self.real is not None:
            whole = flat.new_zeros(batch * self.width, flat.shape[-1])
            flat = whole.index_copy(0, self.real.to(flat.device), flat)
        return flat.view(batch, -1, flat.shape[-1])


PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments by which transformers' flattening collator gives the bounds of documents."""


LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of transformers' loss function besides logits and labels."""


def _documents(
    given: dict[str, Any],
    position_ids: torch.Tensor | None,
    x: torch.Tensor,
    valid: torch.Tensor | None,
) -> Documents:
    """Find the packed documents of ``x`` ``[B, T, D]``. All arguments given must agree.

    Raises:
        ValueError: the arguments contradict each other or the input.
    """
    batch, length = x.shape[:2]
    real = None if valid is None else valid.flatten().nonzero()[:, 0]
    said: dict[str, torch.Tensor] = {}  # true where a document begins, [N]

    def kept(values: torch.Tensor) -> torch.Tensor:
        flat = values.to(x.device).expand(batch, length).reshape(-1)
        return flat if real is None else flat.index_select(0, real)

    def changes(values: torch.Tensor) -> torch.Tensor:
        return F.pad(values[1:] != values[:-1], (1, 0), value=True)

    rows = changes(kept(torch.arange(batch, device=x.device)[:, None]))
    if rows.shape[0] == 0:
        raise ValueError("the packed documents contain no real token")
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if given[name] is not None:
            said[name] = changes(kept(_numbers(name, given[name], batch, length)))
    if given["seq_idx"] is not None:
        if tuple(given["seq_idx"].shape) != (batch, length):
            raise ValueError(
                f"seq_idx has shape {tuple(given['seq_idx'].shape)}; it must be {(batch, length)}"
            )
        said["seq_idx"] = changes(kept(given["seq_idx"])) | rows
    if position_ids is not None:
        numbers = kept(position_ids)
        begins = numbers == 0
        follows = F.pad(numbers[1:] == numbers[:-1] + 1, (1, 0)) & ~rows
        if not bool((begins | follows).all()):
            raise ValueError(
                "position_ids do not count every sequence's real tokens from 0. Leave position_ids out: "
                "HydraHead counts positions itself. Only packed documents may have position_ids, each from 0"
            )
        said["position_ids"] = begins
    if not said:
        raise ValueError("max_length_q and max_length_k need cu_seq_lens_q or seq_idx")
    (first, begins), *others = said.items()
    for name, other in others:
        if not torch.equal(begins, other):
            raise ValueError(f"{first} and {name} give different bounds of the packed documents")
    bounds = F.pad(begins.nonzero()[:, 0], (0, 1), value=begins.shape[0])
    counts = bounds.diff().tolist()
    for name in ("max_length_q", "max_length_k"):
        if given[name] is not None and int(given[name]) < max(counts):
            raise ValueError(
                f"{name} is {int(given[name])}, but a document has {max(counts)} tokens"
            )
    positions = torch.arange(begins.shape[0], device=x.device)
    positions = positions - bounds[:-1].repeat_interleave(bounds.diff())
    return Documents(bounds, counts, positions[None], real, length)


def _numbers(name: str, bounds: Any, batch: int, length: int) -> torch.Tensor:
    """``[1, T]`` int64 from ``cu_seq_lens``: the index of every token's document."""
    bounds = torch.as_tensor(bounds).tolist()
    if batch != 1 or bounds[:1] != [0] or bounds[-1] != length or bounds != sorted(bounds):
        raise ValueError(
            f"{name} is {bounds} for input of shape {[batch, length]}: it must increase from 0 to the "
            "number of tokens of a single row"
        )
    counts = torch.tensor(bounds).diff()
    return torch.arange(len(counts)).repeat_interleave(counts)[None]


def _join(parts: list[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """Concatenate; do not copy a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# -- full attention -------------------------------------------------------------------------------


@dataclasses.dataclass
class Visibility:
    """The keys that the queries of this call may see; shared by all layers.

    Attributes:
        past: number of columns before the first query; a tensor for a static cache.
        queries: T.
        key_mask: ``[B, keys]`` bool, true for real tokens; ``None``: all are real.
        room: capacity of a static cache in keys, some not written yet; ``None``: past + T.
    """

    past: int | torch.Tensor
    queries: int
    key_mask: torch.Tensor | None = None
    room: int | None = None
    _whole: torch.Tensor | None = None

    def to(self, device: torch.device) -> Visibility:
        """The same with its tensors on ``device``."""
        past = self.past.to(device) if isinstance(self.past, torch.Tensor) else self.past
        key_mask = None if self.key_mask is None else self.key_mask.to(device)
        return Visibility(past, self.queries, key_mask, self.room)

    @property
    def needs_mask(self) -> bool:
        """Whether a mask must hide more than the later tokens."""
        return self.key_mask is not None or self.room is not None

    def keys(self, end: int) -> Any:
        """Number of columns that queries up to ``end`` may see."""
        return self.past + end if self.room is None else self.room

    @property
    def block(self) -> int:
        """Number of queries of one mask."""
        batch = 1 if self.key_mask is None else self.key_mask.shape[0]
        return max(1, MASK_ELEMENTS // (batch * self.keys(self.queries)))

    def mask(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """``[B or 1, 1, end − start, keys]`` bool for queries ``start … end``."""
        if self._whole is not None:
            return self._whole
        rows = (self.past + torch.arange(start, end, device=device))[:, None]
        columns = torch.arange(self.keys(end), device=device)[None, :]
        mask = (columns <= rows)[None, None]
        if self.key_mask is not None:
            # A padded query sees itself, so that no row of the softmax is empty.
            seen = self.key_mask[:, None, None, : self.keys(end)]
            mask = (mask & seen) | (columns == rows)
        if (start, end) == (0, self.queries):
            self._whole = mask
        return mask


@functools.lru_cache(maxsize=4096)
def _index(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An index tensor, made once. Indexing with a list would copy it to the device at every token."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(values, device=device)


_DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: list[int],
    visibility: Visibility,
) -> torch.Tensor:
    """Causal softmax attention. KV groups may have different numbers of heads.

    Args:
        q: ``[B, n, T, d]``; k, v: ``[B, g, keys, d]``.
        groups: the KV group of each of the n heads, ascending.
        visibility: the keys that each query may see.

    Returns:
        ``[B, n, T, d]``.
    """
    if visibility.queries == 1:
        return _decode_attention(q, k, v, groups, visibility)
    if groups != list(range(k.shape[1])):
        index = _index(tuple(groups), k.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
    if not visibility.needs_mask:
        if visibility.past == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if q.is_cuda:
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(q.shape[2], k.shape[2])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    outputs = []
    for start in range(0, visibility.queries, visibility.block):
        end = min(start + visibility.block, visibility.queries)
        seen = visibility.keys(end)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, :seen],
                v[:, :, :seen],
                attn_mask=visibility.mask(start, end, q.device),
            )
        )
    return torch.cat(outputs, dim=2)


def _decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: list[int],
    visibility: Visibility,
) -> torch.Tensor:
    """Attention of one query a head. The heads of a group act as its queries, so no key is repeated."""
    members = [[i for i, g in enumerate(groups) if g == group] for group in range(k.shape[1])]
    widest = max(len(m) for m in members)
    # Smaller groups repeat their last head. The extra rows are dropped afterwards.
    slots = [m[min(j, len(m) - 1)] for m in members for j in range(widest)]
    if slots != list(range(len(groups))):
        q = q.index_select(1, _index(tuple(slots), q.device))
    q = q.reshape(q.shape[0], k.shape[1], widest, q.shape[-1])
    mask = visibility.mask(0, 1, q.device) if visibility.needs_mask else None
    # cuDNN would build a plan for each shape, and the number of keys changes with every token.
    with sdpa_kernel(_DECODING) if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.reshape(out.shape[0], -1, 1, out.shape[-1])
    if slots != list(range(len(groups))):
        back = tuple(slots.index(i) for i in range(len(groups)))
        out = out.index_select(1, _index(back, q.device))
    return out


# -- the layer ------------------------------------------------------------------------------------


class HydraHeadRMSNorm(nn.Module):
    """RMSNorm over the last axis, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, size]`` and return ``x``'s dtype.

        Under autocast the weight has a wider dtype. An output of that dtype could not use the 16-bit kernels.
        """
        return (self.weight * _rms(x, self.eps).to(x.dtype)).to(x.dtype)


class HydraHeadShortConv(nn.Conv1d):
    """Taps of a causal depthwise convolution. The layer convolves q, k and v together.

    The layer calls this module to get the taps. It must not read ``weight`` directly: offloaded weights
    are on the device only during the forward of their own module.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """``[channels, width]``; the last tap is for the token itself."""
        return self.weight[:, 0]


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _l2(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class HydraHeadRotaryEmbedding(nn.Module):
    """cos and sin tables from explicit positions."""

    inv_freq: torch.Tensor

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        make = self.compute_default_rope_parameters
        if self.rope_type != "default":
            make = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = make(config)
        # Two buffers with these names: transformers recomputes them after loading on a meta device.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: HydraHeadConfig, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Frequencies ``[d/2]`` of plain rotary embedding, and the factor 1."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables ``[B or 1, T, 1, d]`` fp32 for positions ``[B or 1, T]``."""
        angles = positions[..., None].float() * self.inv_freq.to(positions.device).float()
        angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


@dataclasses.dataclass
class TokenContext:
    """Data shared by all layers of one call.

    Attributes:
        cos, sin: rotary tables ``[B or 1, T, 1, d]`` fp32.
        log_scale: s_t ``[B or 1, T, 1, 1]`` fp32.
        first: ``[B or 1]`` int64, the position of the first token.
        valid: ``[B, T]`` bool, true for real tokens, which come first; ``None``: all are real.
        visibility: the keys that FA heads may see.
        given: ``[B, T]`` bool, true for real tokens, in the caller's order.
        documents: packed documents, which do not see each other; ``None``: the rows are sequences.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    log_scale: torch.Tensor
    first: torch.Tensor
    valid: torch.Tensor | None
    visibility: Visibility
    given: torch.Tensor | None = None
    documents: Documents | None = None
    _elsewhere: dict[torch.device, TokenContext] = dataclasses.field(default_factory=dict)

    def to(self, device: torch.device) -> TokenContext:
        """The same with its tensors on ``device``, copied once for all layers on that device.

        Tools that place layers on several devices move only tensor arguments. They do not see the tensors
        in this class.
        """
        if device == self.first.device:
            return self
        if device not in self._elsewhere:
            documents = None if self.documents is None else self.documents.to(device)
            self._elsewhere[device] = TokenContext(
                cos=self.cos.to(device),
                sin=self.sin.to(device),
                log_scale=self.log_scale.to(device),
                first=self.first.to(device),
                valid=None if self.valid is None else self.valid.to(device),
                given=None if self.given is None else self.given.to(device),
                visibility=self.visibility.to(device),
                documents=documents,
            )
        return self._elsewhere[device]

    @property
    def parts(self) -> list[slice]:
        """The columns of each document, or all columns: attention runs on each separately."""
        return [slice(None)] if self.documents is None else self.documents.parts

    def visible(self, part: slice) -> Visibility:
        """The keys that queries of the columns ``part`` may see."""
        return self.visibility if self.documents is None else Visibility(0, part.stop - part.start)


class HydraHeadAttention(nn.Module):
    """FA heads and GDN heads, fused and projected; heads are in their original order.

    If ``mixer`` is not ``head``, every head is both FA and GDN.
    """

    # The switches and the layer's heads decide which of these exist.
    fa_gate_proj: nn.Linear
    gdn_gate_proj: nn.Linear
    fusion_gate: nn.Linear

    def __init__(self, config: HydraHeadConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.switches = config.hydra
        self.head_dim = config.head_dim
        heads = config.num_attention_heads
        group = heads // config.num_key_value_heads
        self.fa_heads = list(config.full_attention_heads[layer_idx])
        self.mixed = self.switches["mixer"] != "head"
        self.window = self.switches["window"] if self.switches["mixer"] == "token" else None
        self.gdn_heads = [h for h in range(heads) if self.mixed or h not in set(self.fa_heads)]
        self.fa_groups = _ranks([h // group for h in self.fa_heads])
        own = self.switches["gdn_kv"] == "mha"
        self.gdn_groups = _ranks([h if own else h // group for h in self.gdn_heads])
        self.tied = self.switches["qkv"] == "shared"
        # With shared projections: the KV groups that each branch uses.
        kinds = {"fa": (self.fa_heads, False), "gdn": (self.gdn_heads, own)}
        self.tied_groups = {
            name: [h // group for h in heads_of] if each else sorted({h // group for h in heads_of})
            for name, (heads_of, each) in kinds.items()
        }
        order = self.fa_heads + self.gdn_heads
        self.original_order = [order.index(h) for h in range(heads)]

        if self.tied:
            self._make_projections("", dict.fromkeys(("k", "v"), config.num_key_value_heads))
            self._make_norms("")
        if self.fa_heads:
            self._make_branch("fa", len(self.fa_heads), max(self.fa_groups) + 1)
        if self.gdn_heads:
            self._make_branch("gdn", len(self.gdn_heads), max(self.gdn_groups) + 1)
            self._make_recurrence()
        self.gammas = ("fa_gamma", "gdn_gamma") if self.mixed else ("gamma",)
        if self.switches["fusion"] != "concat":
            for name in self.gammas:
                setattr(self, name, nn.Parameter(torch.ones(heads)))
        if self.switches["fusion"] == "gated":
            self.fusion_gate = nn.Linear(config.hidden_size, heads, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.out_bias)

    def _make_branch(self, name: str, num_heads: int, num_kv: int) -> None:
        counts = {"q": num_heads, "k": num_kv, "v": num_kv}
        self._make_projections(f"{name}_", {"q": num_heads} if self.tied else counts)
        if self.switches[f"{name}_gate"]:
            biased = name == "fa" and self.switches["fa_gate_bias"]
            width = num_heads * self.head_dim
            setattr(self, f"{name}_gate_proj", nn.Linear(self.config.hidden_size, width, biased))
        if not self.tied:
            self._make_norms(f"{name}_")

    def _make_projections(self, prefix: str, counts: dict[str, int]) -> None:
        """Make the projections, ``counts`` heads of each part."""
        config = self.config
        for part, count in counts.items():
            size = count * self.head_dim
            linear = nn.Linear(config.hidden_size, size, bias=config.attention_bias)
            setattr(self, f"{prefix}{part}_proj", linear)

    def _make_norms(self, prefix: str) -> None:
        if self.config.qk_norm:
            for part in ("q", "k"):
                norm = HydraHeadRMSNorm(self.head_dim, self.config.rms_norm_eps)
                setattr(self, f"{prefix}{part}_norm", norm)

    def _qkv(
        self, name: str, x: torch.Tensor, tied: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projections of one branch, ``[B, T, heads·d]``; shared k and v come from ``tied``."""
        q = getattr(self, f"{name}_q_proj")(x)
        if not self.tied:
            return q, getattr(self, f"{name}_k_proj")(x), getattr(self, f"{name}_v_proj")(x)
        groups = self.tied_groups[name]
        if groups == list(range(self.config.num_key_value_heads)):
            return q, tied["k"], tied["v"]
        index = _index(tuple(groups), x.device)
        k, v = (self._heads(tied[p]).index_select(2, index).flatten(2) for p in ("k", "v"))
        return q, k, v

    def _qk_norms(
        self, name: str, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.config.qk_norm:
            return q, k
        prefix = "" if self.tied else f"{name}_"
        return getattr(self, f"{prefix}q_norm")(q), getattr(self, f"{prefix}k_norm")(k)

    def _make_recurrence(self) -> None:
        num_heads = len(self.gdn_heads)
        decays = (num_heads, self.head_dim) if self.switches["linear"] == "kda" else (num_heads,)
        self.gdn_a_proj = nn.Linear(self.config.hidden_size, math.prod(decays), bias=False)
        self.gdn_b_proj = nn.Linear(self.config.hidden_size, num_heads, bias=False)
        self.gdn_A_log = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))
        self.gdn_dt_bias = nn.Parameter(torch.zeros(decays, dtype=torch.float32))
        self.for_hub = self.config.gdn_kernel == "auto" and self.switches["linear"] != "kda"
        if self.for_hub:
            self.gdn_rule, self.gdn_step = HydraHeadDeltaRule(), HydraHeadDeltaStep()
        if self.switches["short_conv"]:
            num_kv = max(self.gdn_groups) + 1
            for part, count in (("q", num_heads), ("k", num_kv), ("v", num_kv)):
                size, width = count * self.head_dim, self.switches["conv_width"]
                setattr(self, f"gdn_{part}_conv", HydraHeadShortConv(size, width))

    def forward(
        self,
        x: torch.Tensor,
        context: TokenContext,
        cache: HydraHeadCacheLayer | None = None,
    ) -> torch.Tensor:
        """``[B, T, D]`` → ``[B, T, D]``."""
        branches = []
        tied = {p: getattr(self, f"{p}_proj")(x) for p in ("k", "v")} if self.tied else {}
        if self.fa_heads:
            branches.append(self._full_attention(x, tied, context, cache))
        if self.gdn_heads:
            branches.append(self._gated_delta_net(x, tied, context, cache))
        if not self.mixed:
            heads = torch.cat(branches, dim=2) if len(branches) > 1 else branches[0]
            if self.original_order != sorted(self.original_order):
                heads = heads.index_select(2, _index(tuple(self.original_order), x.device))
            branches = [heads]
        weights = self._weights(x)
        fused = [self._fuse(b, w, x.dtype) for b, w in zip(branches, weights, strict=True)]
        mixed = fused[0] if len(fused) == 1 else fused[0] + fused[1]
        return self.o_proj(mixed.flatten(2))

    def _full_attention(
        self,
        x: torch.Tensor,
        tied: dict[str, torch.Tensor],
        context: TokenContext,
        cache: HydraHeadCacheLayer | None,
    ) -> torch.Tensor:
        q, k, v = map(self._heads, self._qkv("fa", x, tied))
        q, k = self._qk_norms("fa", q, k)
        position = self.switches["fa_position"]
        if self.config.fa_rotates(self.layer_idx):
            q = _rotate(q, context.cos, context.sin)
            k = _rotate(k, context.cos, context.sin)
        if position in ("log-scale", "both"):
            q = (q * context.log_scale).to(q.dtype)
        if self.window is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = self.attend(q, k, v, context, cache).transpose(1, 2)
        else:
            kept = None if cache is None else cache.window
            groups = _index(tuple(self.fa_groups), x.device)
            outputs = []
            for part in context.parts:
                qkv = (q[:, part], k[:, part], v[:, part])
                out, rows = within_window(*qkv, groups, self.window, context.first, kept)
                outputs.append(out)
            out = _join(outputs)
            if cache is not None:
                cache.remember("window", rows, self.window - 1, context.valid)
        if self.switches["fa_gate"]:
            out = out * (2.0 * torch.sigmoid(self._heads(self.fa_gate_proj(x))))
        return out

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        context: TokenContext,
        cache: HydraHeadCacheLayer | None,
    ) -> torch.Tensor:
        """Softmax attention of q ``[B, n, T, d]`` over the cached and the new k, v ``[B, g, T, d]``."""
        if cache is not None:
            k, v = cache.update(k, v)
        outputs = [
            full_attention(
                q[:, :, part], k[:, :, part], v[:, :, part], self.fa_groups, context.visible(part)
            )
            for part in context.parts
        ]
        return _join(outputs, dim=2)

    def _gated_delta_net(
        self,
        x: torch.Tensor,
        tied: dict[str, torch.Tensor],
        context: TokenContext,
        cache: HydraHeadCacheLayer | None,
    ) -> torch.Tensor:
        q, k, v = self._qkv("gdn", x, tied)
        if self.switches["short_conv"]:
            q, k, v = self._convolve((q, k, v), context, cache)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        q, k = self._qk_norms("gdn", q, k)
        if self.switches["gdn_position"] == "rope":
            q = _rotate(q, context.cos, context.sin)
            k = _rotate(k, context.cos, context.sin)
        q, k = _l2(q), _l2(k)
        log_alpha, beta = self.gates(self.gdn_a_proj(x), self.gdn_b_proj(x))
        if self.window is not None:
            waiting = (None, None) if cache is None else (cache.leaving, cache.leaving_gates)
            writes = []
            for part in context.parts:
                new = (k[:, part], v[:, part], log_alpha[:, part], beta[:, part])
                written, rows = beyond_window(*new, self.window, waiting)
                writes.append(written)
            k, v, log_alpha, beta = (_join(list(w)) for w in zip(*writes, strict=True))
            if cache is not None:
                for name, kept in zip(("leaving", "leaving_gates"), rows, strict=True):
                    cache.remember(name, kept, self.window, context.valid)
        out = self.recur(q, k, v, log_alpha, beta, context, cache)
        if self.switches["gdn_gate"]:
            out = out * (2.0 * torch.sigmoid(self._heads(self.gdn_gate_proj(x))))
        return out

    def gates(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log decay log α and write strength β in fp32 from their projections ``[B, T, n]``.

        With a decay of each channel, the projection of α and log α are ``[B, T, n·d]``.
        """
        step = F.softplus(a.float() + self.gdn_dt_bias.float().flatten())
        rate = self.gdn_A_log.float().exp()
        if step.shape[-1] != rate.shape[0]:
            rate = rate.repeat_interleave(self.head_dim)
        return -rate * step, torch.sigmoid(b.float())

    def recur(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_alpha: torch.Tensor,
        beta: torch.Tensor,
        context: TokenContext,
        cache: HydraHeadCacheLayer | None,
    ) -> torch.Tensor:
        """The delta rule on q ``[B, T, n, d]`` and k, v ``[B, T, m, d]``; padding writes nothing."""
        if self.gdn_groups != list(range(len(self.gdn_heads))):
            index = _index(tuple(self.gdn_groups), q.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        if context.valid is not None:
            beta = beta.masked_fill(~context.valid[..., None], 0.0)
            log_alpha = log_alpha.masked_fill(~context.valid[..., None], 0.0)
        return self._rule((q, k, v, log_alpha, beta), context, cache)

    def _rule(
        self,
        inputs: tuple[torch.Tensor, ...],
        context: TokenContext,
        cache: HydraHeadCacheLayer | None,
    ) -> torch.Tensor:
        """The delta rule on q, k, v, log α, β; ``[B, T, n, d]``."""
        # The modules, not this layer: what a cache keeps of the rule is copied with it.
        hub = (self.gdn_rule, self.gdn_step) if self.for_hub else None
        rule: Rule = functools.partial(gated_delta_rule, kernel=self.config.gdn_kernel, hub=hub)
        if cache is None:
            return rule(*inputs, None, documents=context.documents)[0]
        state, outputs = cache.state, []
        length = inputs[0].shape[1]
        unrecorded = length - cache.recorded(length, context.valid) if cache.record_past else 0
        if unrecorded:  # crop removes only the last tokens of a long prompt
            out, state = rule(*(x[:, :unrecorded] for x in inputs), state)
            outputs.append(out)
            inputs = tuple(x[:, unrecorded:].clone() for x in inputs)
        out, after = rule(*inputs, state)
        cache.remember_state(after, state, inputs[1:], rule)
        return _join([*outputs, out])

    def _convolve(
        self,
        parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        context: TokenContext,
        cache: HydraHeadCacheLayer | None,
    ) -> tuple[torch.Tensor, ...]:
        """Causal depthwise convolution of q, k, v ``[B, T, channels]``; the last tap is the current token."""
        x = torch.cat(parts, dim=-1)
        weight = torch.cat([getattr(self, f"gdn_{p}_conv")() for p in ("q", "k", "v")])
        width, length = weight.shape[1], x.shape[1]
        before = None if cache is None else cache.tail
        extended = extend(x, before, width - 1)
        if cache is not None:
            cache.remember("tail", extended, width - 1, context.valid)
        y = x.float() * weight[:, -1].float()
        for j in reversed(range(width - 1)):
            tap = extended[:, j : j + length].float() * weight[:, j].float()
            if context.documents is not None:  # reads nothing of the document before
                inside = context.documents.positions >= width - 1 - j
                tap = tap.masked_fill(~inside[..., None], 0.0)
            y = y + tap
        return y.to(x.dtype).split([p.shape[-1] for p in parts], dim=-1)

    def remember_tail(
        self, x: torch.Tensor, context: TokenContext, cache: HydraHeadCacheLayer
    ) -> None:
        """Keep the last inputs ``[B, T, channels]`` of the convolution."""
        count = self.switches["conv_width"] - 1
        if context.valid is None and not cache.record_past:
            x = x[:, max(x.shape[1] - count, 0) :]  # earlier inputs are not needed
        cache.remember("tail", extend(x, cache.tail, count), count, context.valid)

    def _weights(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """Factors of the heads' outputs, ``[H]`` or ``[B, T, H]`` fp32.

        If every head is both FA and GDN: the factors of the softmax outputs, then of the recurrent ones.
        """
        if self.switches["fusion"] == "concat":
            return [None for _ in self.gammas]
        weights = [getattr(self, name).float() for name in self.gammas]
        if self.switches["fusion"] == "gated":
            logits = self.fusion_gate(x).float()
            if self.mixed:
                shares = [2.0 * torch.sigmoid(logits), 2.0 * torch.sigmoid(-logits)]
            else:
                shares = [torch.softmax(logits, dim=-1) * logits.shape[-1]]
            weights = [weight * share for weight, share in zip(weights, shares, strict=True)]
        return list(weights)

    def _fuse(
        self, heads: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Normalise and weight head outputs ``[B, T, H, d]``."""
        fused = heads
        if self.switches["fusion_norm"] == "rms":
            fused = _rms(heads, self.config.rms_norm_eps)
        if weight is not None:
            fused = fused.float() * weight[..., None]
        return fused.to(dtype)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, n·d]`` → ``[B, T, n, d]``."""
        return x.view(*x.shape[:2], -1, self.head_dim)


def _ranks(groups: list[int]) -> list[int]:
    """The rank of each group among the groups that occur."""
    present = sorted(set(groups))
    return [present.index(g) for g in groups]


class HydraHeadMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, D]`` → ``[B, T, D]``."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class HydraHeadDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP."""

    def __init__(self, config: HydraHeadConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.fused: FusedLayer | None = None
        self.self_attn = HydraHeadAttention(config, layer_idx)
        self.mlp = HydraHeadMLP(config)
        self.input_layernorm = HydraHeadRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HydraHeadRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        context: TokenContext,
        memory: Cache | None = None,
    ) -> torch.Tensor:
        """``[B, T, D]`` → ``[B, T, D]``; ``memory`` is the model's cache."""
        cache = None if memory is None else layer_memory(memory, self.layer_idx, x.device)
        context = context.to(x.device)
        fast = True
        if usable(self, x, context, cache):
            x = decode(self, x, context, cache)
        elif prompt_usable(self, x, context):
            x = read(self, x, context, cache)
        else:
            fast = False
            x = x + self.self_attn(self.input_layernorm(x), context, cache)
        if cache is not None:
            cache.advance(x.shape[1], context.given, x.device)
            put_back(memory, self.layer_idx)
        return x if fast else x + self.mlp(self.post_attention_layernorm(x))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As in every module; parameters that move or change dtype leave the storage that they share."""
        result = super()._apply(*args, **kwargs)
        keep_if_whole(self)
        return result


# -- the model ------------------------------------------------------------------------------------


class HydraHeadPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = HydraHeadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["HydraHeadDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values", "cache", "memory"]
    _keep_in_fp32_modules_strict: ClassVar = ["gdn_A_log", "gdn_dt_bias"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, HydraHeadAttention):
            return
        for name in ("fa_gate_proj", "gdn_gate_proj", "fusion_gate"):
            if hasattr(module, name):
                init.zeros_(getattr(module, name).weight)
        if module.fa_heads and module.switches["fa_gate"] and module.switches["fa_gate_bias"]:
            # No norm follows the gate, so the gate itself must start at 1.
            normed = module.switches["fusion_norm"] == "rms"
            init.constant_(module.fa_gate_proj.bias, 1.0 if normed else 0.0)
        for name in module.gammas:
            if hasattr(module, name):
                init.ones_(getattr(module, name))
        if not module.gdn_heads:
            return
        # The ranges of Gated DeltaNet: decay rates 1…16, step sizes 0.001…0.1.
        rate = torch.empty_like(module.gdn_A_log).uniform_(1, 16)
        init.copy_(module.gdn_A_log, rate.log())
        step = 10 ** torch.empty_like(module.gdn_dt_bias).uniform_(-3, -1)
        init.copy_(module.gdn_dt_bias, step.expm1().log())
        for part in ("q", "k", "v"):
            if hasattr(module, f"gdn_{part}_conv"):
                weight = getattr(module, f"gdn_{part}_conv").weight
                identity = torch.zeros_like(weight)
                identity[..., -1] = 1
                init.copy_(weight, identity)


def _given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given by either of its two names."""
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "cache and past_key_values are two names of one argument: give only one of them"
        )
    return past_key_values if cache is None else cache


class HydraHeadModel(HydraHeadPreTrainedModel):
    """The decoder without its LM head."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HydraHeadDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = HydraHeadRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: ``[B, T]`` new tokens; or ``inputs_embeds`` ``[B, T, D]``.
            attention_mask: ``[B, T]`` or ``[B, past + T]``, 0 for padding (on either side).
            position_ids: not needed: HydraHead counts positions from each sequence's first real token. If
                given, they must equal these positions, or start at 0 in every packed document.
            past_key_values, cache: the cache of an earlier call, by either of its names in transformers;
                extended in place.
            use_cache: make a cache if none is given; default: the config's value, but never in training.
            output_hidden_states: return the hidden states before, between and after the layers as well.
            output_attentions: not supported.
            kwargs: the bounds of packed documents, as given by transformers' flattening collator:
                ``cu_seq_lens_q``, ``cu_seq_lens_k`` ``[documents + 1]`` of a single row,
                ``max_length_q``, ``max_length_k``, ``seq_idx`` ``[B, T]``. No cache is made in this case.

        Raises:
            TypeError: an unknown keyword.
            ValueError: the form of the mask or positions is not supported; the cache is of another class;
                or packed documents contradict each other or extend a cache.
        """
        _refuse_unknown(kwargs, PACKING, type(self).__name__)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions is not supported: the kernels return no attention weights, and GDN heads "
                "have none. Leave it out"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, cache_given = x.shape[0], _given_cache(past_key_values, cache)
        cache = self._usable_cache(cache_given, use_cache)
        memory = None if cache is None else cache.layers[0]
        valid = _real_tokens(attention_mask, x, memory)
        packing = {name: kwargs.get(name) for name in PACKING}
        positions, documents = _positions(position_ids, packing, x, valid, memory)
        given, order = valid, None
        if documents is not None:
            if cache_given is not None or use_cache:
                raise ValueError(
                    "packed documents cannot use a cache: leave the cache out and set use_cache=False"
                )
            x, cache, memory = documents.pack(x), None, None
            given = valid = None
        elif valid is not None and x.shape[1] > 1:
            order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)
            x = _take(x, order)
            valid, positions = valid.gather(1, order), positions.gather(1, order)
        context = self._context(x, positions, valid, given, memory, documents)

        keep = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else (output_hidden_states)
        )
        states = [x]
        for layer in self.layers:
            # Not named past_key_values: transformers removes that argument of checkpointed layers.
            x = layer(x, context, memory=cache)
            states = [*states, x] if keep else [x]
        x = self.norm(x)
        states[-1] = x
        if order is not None:
            back = order.argsort(dim=1)
            states = [_take(state, back) for state in states]
        if documents is not None:
            states = [documents.unpack(state, batch) for state in states]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if keep else None,
            **{CACHE_NAME: cache},
        )

    def _usable_cache(self, given: Any, use_cache: bool | None) -> Cache | None:
        asked = bool(use_cache)
        if use_cache is None:
            use_cache = given is not None or (self.config.use_cache and not self.training)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs the layers again and would extend the cache twice.
            if given is not None:
                raise ValueError(
                    "a cache cannot be extended while gradient checkpointing computes gradients: call "
                    "model.eval() or torch.no_grad() first, or leave the cache out"
                )
            if asked:
                logger.warning_once("use_cache=True is ignored under gradient checkpointing")
            return None
        if given is not None:
            return adopt(given, self.config.num_hidden_layers)
        return HydraHeadCache(self.config) if use_cache else None

    def _context(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        given: torch.Tensor | None = None,
        memory: HydraHeadCacheLayer | None = None,
        documents: Documents | None = None,
    ) -> TokenContext:
        """Make the data shared by all layers; count the new tokens in ``memory``, the first layer's cache."""
        visibility = Visibility(0, x.shape[1], valid)
        if memory is not None:
            past, begun = memory.length, memory.begun
            if isinstance(past, torch.Tensor):
                past = past.clone()  # the layers change it in place
            memory.note(x.shape[0], x.shape[1], valid, given, x.device)
            if begun or not memory.is_compileable:
                room = memory.max_cache_len if memory.is_compileable else None
                visibility = Visibility(past, x.shape[1], memory.key_mask, room)
        a = self.config.hydra["log_scale_a"]
        cos, sin = (table.to(x.device) for table in self.rotary_emb(positions))
        seen = positions
        if self.config.hydra["mixer"] == "token":  # the scale compensates for the number of keys
            seen = positions.clamp(max=self.config.hydra["window"] - 1)
        return TokenContext(
            cos=cos,
            sin=sin,
            log_scale=((seen.float() + a).log() / math.log(a))[..., None, None],
            first=positions[:, 0],
            valid=valid,
            given=given,
            visibility=visibility,
            documents=documents,
        )


def _real_tokens(
    mask: torch.Tensor | None, x: torch.Tensor, memory: HydraHeadCacheLayer | None
) -> torch.Tensor | None:
    """``[B, T]`` bool: true for real new tokens; ``None`` if all are real.

    Raises:
        ValueError: the mask has another form, or contradicts the cache on earlier columns.
    """
    batch, length = x.shape[:2]
    lengths = None if memory is None else memory.lengths
    if lengths is not None and lengths.shape[0] != batch:
        raise ValueError(
            f"the cache holds {lengths.shape[0]} sequences, the input has {batch}: give as many, or "
            "start without a cache"
        )
    if mask is None:
        return None
    past = 0 if memory is None else int(memory.length)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be [{batch}, {past + length}] "
            "with 0 for padding (masks over pairs of tokens are not supported)"
        )
    mask = mask.to(device=x.device, dtype=torch.bool)
    if memory is not None and mask.shape[1] == past + length:
        _check_past(mask[:, :past], memory)
    valid = mask[:, -length:]
    return None if bool(valid.all()) else valid


def _check_past(mask: torch.Tensor, memory: HydraHeadCacheLayer) -> None:
    """Raise ValueError if a mask ``[B, seen]`` of earlier columns differs from the cached mask."""
    given = memory.given_mask
    differs = ~mask if given is None else mask != given[:, : mask.shape[1]]
    if not bool(differs.any()):
        return
    row, column = differs.nonzero()[0].tolist()
    where = f"(first: row {row}, column {column})"
    if bool(mask[row, column]):
        raise ValueError(
            f"attention_mask has 1 for earlier columns that were padding in earlier calls {where}: the "
            "cache has not read them. Give their zeros again, or give a mask of the new tokens only. If "
            "the columns are real tokens, run the whole text again without the cache"
        )
    raise ValueError(
        f"attention_mask has 0 for earlier columns that the cache has read as real tokens {where}: a "
        "recurrent state cannot forget a token. Run the whole text again without the cache and with "
        "this mask, or keep one cache for each conversation"
    )


def _positions(
    given: torch.Tensor | None,
    packing: dict[str, Any],
    x: torch.Tensor,
    valid: torch.Tensor | None,
    memory: HydraHeadCacheLayer | None,
) -> tuple[torch.Tensor, Documents | None]:
    """The position of every real token in its sequence, and the packed documents if any.

    Returns:
        ``[B or 1, T]`` int64, or ``[1, N]`` with documents.
    """
    length = x.shape[1]
    if any(value is not None for value in packing.values()):
        documents = _documents(packing, given, x, valid)
        return documents.positions, documents
    start: Any = 0
    if memory is not None and memory.begun:
        lengths = memory.lengths if memory.key_mask is not None else None
        start = memory.length if lengths is None else lengths[:, None]
    if valid is None:
        positions = start + torch.arange(length, device=x.device)[None, :]
    else:
        positions = start + valid.long().cumsum(1) - 1
    if given is not None:
        wrong = given.to(x.device) != positions
        if bool((wrong if valid is None else wrong & valid).any()):
            if memory is not None and memory.begun:
                raise ValueError(
                    "position_ids do not continue the positions of the real tokens in the cache. Leave "
                    "position_ids out: HydraHead counts positions itself"
                )
            documents = _documents(packing, given, x, valid)
            return documents.positions, documents
    return positions, None


def _refuse_unknown(given: dict[str, Any], known: tuple[str, ...], model: str) -> None:
    """Raise TypeError for unknown arguments that are not None."""
    unknown = sorted(k for k, value in given.items() if k not in known and value is not None)
    if unknown:
        raise TypeError(f"{model}.forward() got unexpected keywords: {', '.join(unknown)}")


def _take(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of ``[B, T, D]`` in the order ``[B, T]``."""
    return x.gather(1, order.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))


class HydraHeadForCausalLM(HydraHeadPreTrainedModel, GenerationMixin):
    """The decoder with its LM head."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.model = HydraHeadModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and the loss if ``labels`` are given; see :meth:`HydraHeadModel.forward`.

        Args:
            labels: ``[B, T]``, −100 for tokens without loss; shifted here.
            logits_to_keep: number of last positions to compute logits of (0: all), or a list of
                positions.
            kwargs: arguments of packed documents, and of transformers' loss: ``num_items_in_batch``,
                ``ignore_index``, ``shift_labels``.
        """
        _refuse_unknown(kwargs, (*PACKING, *LOSS_OPTIONS), type(self).__name__)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **{name: kwargs.get(name) for name in PACKING},
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            options = {k: kwargs[k] for k in LOSS_OPTIONS if kwargs.get(k) is not None}
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in every model, but pass a token that generate() has appended without mask and position.

        Such a token is always real and always the next one. Checking its mask and position at every step
        would make the host wait for the device. The cache knows which tokens of the prompt are padding.

        Args:
            inputs_embeds: ``[B, T, D]``, a prompt instead of ``input_ids``. generate() checks that this
                argument exists.
        """
        cache = _given_cache(past_key_values, cache)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE_NAME: cache}, **kwargs
        )
        # From transformers 5.0; the model counts positions itself.
        inputs.pop("cache_position", None)
        appended = inputs["input_ids"] is not None and inputs["input_ids"].shape[1] == 1
        layers = [] if cache is None else cache.layers
        begun = bool(layers) and getattr(layers[0], "begun", False)
        if appended and begun and not kwargs.get("is_first_iteration", False):
            for name in ("attention_mask", "position_ids"):
                inputs.pop(name, None)
        return inputs

    @staticmethod
    def create_masks_for_generate(
        *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """Return the mask unchanged. For a static cache transformers would make a mask over pairs of tokens."""
        return attention_mask

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """As in every model, but without a mask a draft model reads all tokens as real.

        transformers drops a mask of ones. It would then read every generated pad token as padding.
        """
        if getattr(generation_config, "is_assistant", False):
            return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.int64)
        return super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give generate() a cache with our layers instead of its default cache."""
        plain = generation_config.cache_implementation in (None, "dynamic", "dynamic_full")
        wanted = generation_config.use_cache is not False
        if model_kwargs.get(CACHE_NAME) is None and plain and wanted:
            model_kwargs[CACHE_NAME] = HydraHeadCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:
            return
        adopt(cache, self.config.num_hidden_layers)
        # The main model may reject the draft's tokens.
        if getattr(generation_config, "is_assistant", False):
            record_past(cache, True)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported, and neither is ``generate_batch``.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching (generate_batch) of transformers stores pages of keys and values. It cannot "
            "store the recurrent states of a HydraHead model: call generate() with a padded batch"
        )

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """As in every model, but the cache records, so that it can remove rejected tokens."""
        cache = kwargs.get(CACHE_NAME)
        if cache is None:
            return super()._assisted_decoding(*args, **kwargs)
        record_past(adopt(cache, self.config.num_hidden_layers), True)
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            record_past(cache, False)


class HydraHeadForSequenceClassification(HydraHeadPreTrainedModel):
    """The decoder with one score per label, computed from every sequence's last real token."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HydraHeadModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return scores ``[B, labels]``, and the loss if ``labels`` are given; see :class:`HydraHeadModel`.

        Args:
            attention_mask: shows the last real token. Without it, the config's ``pad_token_id`` in
                ``input_ids`` marks padding.
            labels: ``[B]`` classes; ``[B]`` numbers if the model has one label; or ``[B, labels]`` of 0 and 1.
            kwargs: ``num_items_in_batch``, which the loss ignores.

        Raises:
            ValueError: the batch has several rows, and neither the mask nor the config shows their ends.
        """
        _refuse_unknown(kwargs, ("num_items_in_batch",), type(self).__name__)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        last = self._last_tokens(input_ids, attention_mask, hidden)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _last_tokens(
        self, ids: torch.Tensor | None, mask: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        """``[B]`` int64, the column of every row's last real token."""
        batch, length = hidden.shape[:2]
        if mask is not None:
            real = mask[:, -length:].to(hidden.device).bool()
        elif ids is not None and self.config.pad_token_id is not None:
            real = (ids != self.config.pad_token_id).to(hidden.device)
        elif batch == 1:
            return torch.full((1,), length - 1, device=hidden.device)
        else:
            raise ValueError(
                "the end of every row is unknown: give attention_mask, or set pad_token_id in the config"
            )
        return (torch.arange(length, device=hidden.device) * real).argmax(-1)


class HydraHeadForTokenClassification(HydraHeadPreTrainedModel):
    """The decoder with one score per label and token."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HydraHeadModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Return scores ``[B, T, labels]``, and the loss if ``labels`` are given; see :class:`HydraHeadModel`.

        Args:
            labels: ``[B, T]`` classes, −100 for tokens without loss; not shifted.
            kwargs: arguments of packed documents; ``num_items_in_batch``, which the loss ignores.
        """
        _refuse_unknown(kwargs, (*PACKING, "num_items_in_batch"), type(self).__name__)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **{name: kwargs.get(name) for name in PACKING},
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [
    "HydraHeadCache",
    "HydraHeadForCausalLM",
    "HydraHeadForSequenceClassification",
    "HydraHeadForTokenClassification",
    "HydraHeadModel",
    "HydraHeadPreTrainedModel",
]
