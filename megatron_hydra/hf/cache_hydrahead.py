"""The cache of a HydraHead model (copied into every export; needs torch and transformers).

The containers are ``DynamicCache`` and ``StaticCache`` of transformers. :func:`adopt` replaces their empty
layers by the layers of this file. transformers has a layer for hybrid models,
``LinearAttentionAndFullAttentionLayer``. We do not use it for these reasons: some supported releases lack
it; it copies all keys at every token; it cannot store a window of tokens or padding; and it cannot remove
tokens from a state.

Removing tokens (``crop``). Assisted decoding removes rejected tokens from the cache, but a recurrent state
holds no history. :meth:`HydraHeadCacheLayer.activate_past_recording` switches recording on. A layer then
keeps the state before its last tokens, and the inputs that each of these tokens gave to the delta rule.
``crop`` runs the delta rule again over the tokens that stay. It computes no projection, no softmax and no
other layer again.

B: batch, T: new tokens, n: heads, d: head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticLayer

from .window_hydrahead import latest

UNDO = 512
"""Number of tokens that ``crop`` can remove while a cache records."""

Rule = Callable[..., Any]
"""The delta rule: (q, k, v, log α, β, state) -> outputs, state."""


@dataclasses.dataclass
class Record:
    """The data that ``crop`` needs to remove tokens of one call (at most its last :data:`UNDO`).

    Attributes:
        length: number of these tokens, T.
        given: ``[B, T]`` bool, true for real tokens, in the caller's order; ``None``: all are real.
        rows: name -> ``[B, count + T, channels]``: first the ``count`` rows that the memory held before the
            call, then one row for each token, real tokens first.
        counts: name -> count.
        state: ``[B, n, d, d]`` before the first token; ``None``: empty.
        writes: k, v, log α, β as given to the delta rule, ``[B, T, n, …]``.
        rule: the delta rule.
    """

    length: int = 0
    given: torch.Tensor | None = None
    rows: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    state: torch.Tensor | None = None
    writes: tuple[torch.Tensor, ...] | None = None
    rule: Rule | None = None

    def real(self, kept: int) -> torch.Tensor | None:
        """``[B]`` int64: the number of real tokens among the first ``kept``; ``None``: all are real."""
        return None if self.given is None else self.given[:, :kept].sum(1)

    def row_memory(self, name: str, kept: int) -> torch.Tensor:
        """``[B, count, channels]`` after the first ``kept`` tokens."""
        real = self.real(kept)
        rows, count = self.rows[name], self.counts[name]
        if real is None:
            return rows[:, kept : kept + count].clone()
        return latest(rows, count, torch.arange(self.length, device=rows.device) < real[:, None])

    def state_after(self, kept: int) -> torch.Tensor | None:
        """The state after the first ``kept`` tokens."""
        if not kept or self.writes is None or self.rule is None:
            return self.state
        k, v, log_alpha, beta = (x[:, :kept] for x in self.writes)
        real = self.real(kept)
        if real is not None:
            gone = torch.arange(kept, device=k.device) >= real[:, None]
            log_alpha = log_alpha.masked_fill(gone[..., None], 0.0)
            beta = beta.masked_fill(gone[..., None], 0.0)
        return self.rule(k, k, v, log_alpha, beta, self.state)[1]


class HydraHeadCacheLayer(CacheLayerMixin):
    """The cache of one layer. A tensor is ``None`` if the layer has no heads that use it.

    Attributes:
        keys, values: ``[B, n_fa_kv, capacity, d]``: KV groups of the layer's FA heads only.
        length: columns in use (real tokens and padding of the batch).
        begun: whether the layer has read any token.
        state: ``[B, n_gdn, d, d]`` fp32.
        tail: ``[B, W−1, channels]``: the last inputs of the convolution.
        window: ``[B, w−1, 2·n_fa_kv·d]``: keys and values within the window. ``mixer=token`` uses it
            instead of ``keys`` and ``values``.
        leaving, leaving_gates: ``[B, w, 2·n_gdn_kv·d]`` and ``[B, w, 2·n_gdn]`` (with a decay of each
            channel: ``n_gdn·(d + 1)``) fp32: the values that the tokens within the window write into the
            state when they leave the window.
        key_mask: ``[B, length]`` bool, true for columns of real tokens; ``None``: all are real. The columns
            of one call have the order of the model's layers, real tokens first.
        given_mask: ``[B, length]`` bool, the same in the caller's order.
        lengths: ``[B]`` int64, number of real tokens of every sequence, which is also its next position.
        record_past: whether the layer records, so that ``crop`` can remove tokens.

        The masks and ``lengths`` are the same for all layers. Only the first layer stores them.
    """

    STORES = ("keys", "values")
    MEMORIES = ("state", "tail", "window", "leaving", "leaving_gates")
    ROWS = ("key_mask", "given_mask", "lengths")

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.device: torch.device | None = None
        self._clear()

    def _clear(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        self.tail: torch.Tensor | None = None
        self.window: torch.Tensor | None = None
        self.leaving: torch.Tensor | None = None
        self.leaving_gates: torch.Tensor | None = None
        self.key_mask: torch.Tensor | None = None
        self.given_mask: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None
        self.length: Any = 0
        self.begun = self.is_initialized = False
        self.records: list[Record] = []
        self._record = Record()

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    # The layer's attention calls these methods in this order, and then ``advance``.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, n_fa_kv, T, d]`` and return all keys and values so far.

        A prompt gets a store of exactly its size. Decoding then grows the store by an eighth each time, so
        that a new token does not copy all earlier ones.
        """
        count = key_states.shape[2]
        if self.keys is None or self.values is None:
            # Detached: the cache is for inference. No gradients flow through earlier calls.
            # Copied: a view would keep the queries and keys of all heads in memory.
            self.keys = key_states.detach().clone(memory_format=torch.contiguous_format)
            self.values = value_states.detach().clone(memory_format=torch.contiguous_format)
            return key_states, value_states
        end = self.length + count
        keys, values = self.reserve(count)
        keys[:, :, self.length : end] = key_states.detach()
        values[:, :, self.length : end] = value_states.detach()
        return keys[:, :, :end], values[:, :, :end]

    def reserve(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, ``[B, n_fa_kv, capacity, d]``, with room for ``count`` more columns."""
        assert self.keys is not None and self.values is not None
        end = self.length + count
        if end > self.keys.shape[2]:
            spare = 0 if count > 1 else end // 8 + 32
            self.keys = self._grown(self.keys, end + spare)
            self.values = self._grown(self.values, end + spare)
        return self.keys, self.values

    def _grown(self, old: torch.Tensor, capacity: int) -> torch.Tensor:
        new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def remember(
        self, name: str, rows: torch.Tensor, count: int, valid: torch.Tensor | None
    ) -> None:
        """Keep the last ``count`` real rows, see :func:`latest`."""
        rows = rows.detach()
        self._put(name, latest(rows, count, valid))
        if self.record_past:
            length = rows.shape[1] - count
            recorded = self.recorded(length, valid)
            # A copy, because a view would keep the whole long prompt in memory.
            self._record.rows[name] = (
                rows if recorded == length else rows[:, length - recorded :].clone()
            )
            self._record.counts[name] = count

    def remember_state(
        self,
        state: torch.Tensor,
        before: torch.Tensor | None,
        writes: tuple[torch.Tensor, ...],
        rule: Rule,
    ) -> None:
        """Keep the ``state`` after this call. If the cache records, keep ``before`` and ``writes`` as well."""
        self._put("state", state.detach())
        if self.record_past:
            self._record.state = None if before is None else before.detach()
            self._record.writes = tuple(x.detach() for x in writes)
            self._record.rule = rule

    def recorded(self, length: int, valid: torch.Tensor | None) -> int:
        """Number of new tokens to record. A padded batch records all: its rows differ in real tokens."""
        return min(length, UNDO) if valid is None else length

    def _put(self, name: str, value: torch.Tensor) -> None:
        setattr(self, name, value)

    def advance(self, length: int, given: torch.Tensor | None, device: torch.device) -> None:
        """Count ``length`` columns that this layer has read."""
        self.length = self.length + length
        self.device = device
        self.begun = self.is_initialized = True
        if self.record_past:
            self._record.length, self._record.given = self.recorded(length, given), given
            self.records.append(self._record)
            while sum(r.length for r in self.records[1:]) >= UNDO:
                self.records.pop(0)
            self._record = Record()

    def note(
        self,
        batch: int,
        length: int,
        valid: torch.Tensor | None,
        given: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        """Add ``length`` new columns to the masks, before any layer reads them. Only for the first layer.

        Args:
            valid: ``[B, length]`` bool, true for real tokens, real tokens first; ``None``: all are real.
            given: the same in the caller's order.
        """
        self.key_mask = self._with(self.key_mask, valid, batch, length, device)
        self.given_mask = self._with(self.given_mask, given, batch, length, device)
        gained = length if valid is None else valid.sum(1)
        lengths = self.lengths
        if lengths is None:
            lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths = lengths + gained

    def _with(
        self,
        past: torch.Tensor | None,
        new: torch.Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> torch.Tensor | None:
        """The mask of all columns; ``None`` while all are real."""
        if past is None and new is None:
            return None
        if past is None:
            past = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        if new is None:
            new = torch.ones_like(past[:, :1]).expand(-1, length)
        return torch.cat((past, new), dim=1)

    # Methods that transformers calls.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: shapes differ by layer and are known at the first token."""

    def get_seq_length(self) -> Any:
        """Number of columns so far, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """Return −1: no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Alias of :meth:`get_max_length`, its name in older transformers."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Number of columns after this call, and the index of the first one."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + new, 0

    @property
    def batch_size(self) -> int:
        """Number of sequences, −1 before the first token."""
        tensors = (getattr(self, name) for name in (*self.STORES, *self.MEMORIES))
        return next((t.shape[0] for t in tensors if t is not None), -1)

    max_batch_size = batch_size

    def offload(self) -> None:
        """Move the tensors to host memory."""
        self._apply(lambda x: x.to("cpu", non_blocking=True), self.STORES + self.MEMORIES)

    def prefetch(self) -> None:
        """Move the tensors back to the device."""
        if self.device is not None:
            device = self.device
            self._apply(lambda x: x.to(device, non_blocking=True), self.STORES + self.MEMORIES)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select the sequences of the given beams."""
        self.records.clear()
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.records.clear()
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def _apply(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        names: tuple[str, ...] = (*STORES, *MEMORIES, *ROWS),
    ) -> None:
        for name in names:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def activate_past_recording(self) -> None:
        """Start recording, so that ``crop`` can remove the tokens that follow."""
        self.record_past = True

    def stop_recording(self) -> None:
        """Stop recording and drop all records."""
        self.record_past = False
        self.records.clear()

    @property
    def _has_states(self) -> bool:
        return any(getattr(self, name) is not None for name in self.MEMORIES)

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` can remove tokens."""
        return self.record_past or (self.begun and not self._has_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``−tokens_to_remove`` columns.

        A positive number is the number of columns to keep, as in transformers 5.0.

        Raises:
            ValueError: the cache has not recorded that many columns.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self.length - tokens_to_remove
        if removed <= 0:
            self.records.clear()
            return
        if removed > self.length:
            raise ValueError(f"cannot remove {removed} tokens: the cache holds {self.length}")
        if self._has_states or self.key_mask is not None:
            self._rewind(removed)
        else:
            self.length -= removed
        self.records.clear()
        if self.lengths is not None and self.given_mask is None:
            self.lengths = self.lengths - removed

    def _rewind(self, removed: int) -> None:
        index, kept = len(self.records), 0
        while removed > 0 and index:
            index -= 1
            kept = self.records[index].length - removed
            removed = -kept
        if removed > 0:
            raise ValueError(
                f"cannot remove the tokens: {removed} of them were not recorded, and recurrent states hold no "
                "history. Call activate_past_recording() before the model reads tokens that you may remove "
                f"later (at most {UNDO} tokens)"
            )
        record = self.records[index]
        gone = sum(r.length for r in self.records[index + 1 :]) + record.length - kept
        for name in record.rows:
            self._put(name, record.row_memory(name, kept))
        if self.state is not None:
            self.state = record.state_after(kept)
        start = self.length - gone - kept
        self.length -= gone
        if self.given_mask is not None and self.key_mask is not None:
            self.given_mask = self.given_mask[:, : self.length]
            real = self.given_mask[:, start:].sum(1)
            columns = torch.arange(kept, device=real.device) < real[:, None]
            self.key_mask = torch.cat((self.key_mask[:, :start], columns), dim=1)
            self.lengths = self.given_mask.sum(1)


class HydraHeadStaticCacheLayer(HydraHeadCacheLayer):
    """A cache layer whose tensors keep their size and address, so that a compiled step stays valid.

    ``length`` is a tensor. Keys, values, ``key_mask`` and ``given_mask`` have ``max_cache_len`` columns.

    Args:
        max_cache_len: capacity in columns.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        self.max_cache_len = max_cache_len
        super().__init__()

    def reset(self) -> None:
        """Forget everything, but keep the allocated tensors."""
        for name in (*self.STORES, *self.MEMORIES, "lengths"):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.zero_()
        for mask in (self.key_mask, self.given_mask):
            if mask is not None:
                mask.fill_(True)
        if isinstance(self.length, torch.Tensor):
            self.length.zero_()
        self.begun = False

    def _begin(self, device: torch.device) -> None:
        """Make ``length`` a tensor."""
        if not isinstance(self.length, torch.Tensor):
            self.length = _fixed(torch.zeros((), dtype=torch.int64, device=device))

    def _columns(self, length: int, device: torch.device) -> torch.Tensor:
        """``[length]`` int64: the columns of the next tokens."""
        self._begin(device)
        return self.length + torch.arange(length, device=device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, n_fa_kv, T, d]``. Return these tensors in the first call, else the whole store."""
        batch, heads, count, channels = key_states.shape
        if self.keys is None or self.values is None:
            shape = (batch, heads, self.max_cache_len, channels)
            self.keys = _fixed(key_states.new_zeros(shape))
            self.values = _fixed(value_states.new_zeros(shape))
        columns = self._columns(count, key_states.device)
        self.keys.index_copy_(2, columns, key_states.detach())
        self.values.index_copy_(2, columns, value_states.detach())
        return (self.keys, self.values) if self.begun else (key_states, value_states)

    def reserve(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stores unchanged: they cannot grow."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _put(self, name: str, value: torch.Tensor) -> None:
        kept = getattr(self, name)
        if kept is None:
            setattr(self, name, _fixed(value.clone()))
        else:
            kept.copy_(value)

    def advance(self, length: int, given: torch.Tensor | None, device: torch.device) -> None:
        """Count ``length`` columns that this layer has read."""
        self._begin(device)
        self.length.add_(length)
        self.device = device
        self.begun = self.is_initialized = True

    def note(
        self,
        batch: int,
        length: int,
        valid: torch.Tensor | None,
        given: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        """As in the base class, but in place."""
        if not self.begun and length > self.max_cache_len:
            raise ValueError(
                f"the static cache holds at most {self.max_cache_len} tokens, the input has {length}"
            )
        if self.lengths is None:
            ones = torch.ones(batch, self.max_cache_len, dtype=torch.bool, device=device)
            self.key_mask, self.given_mask = _fixed(ones), _fixed(ones.clone())
            self.lengths = _fixed(torch.zeros(batch, dtype=torch.int64, device=device))
        if valid is None or given is None:
            self.lengths.add_(length)
            return
        columns = self._columns(length, device)
        for mask, new in ((self.key_mask, valid), (self.given_mask, given)):
            if mask is not None:
                mask.index_copy_(1, columns, new)
        self.lengths.add_(valid.sum(1))

    def get_max_length(self) -> int:
        """Capacity in columns."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Capacity in columns, and the index of the first one."""
        return self.max_cache_len, 0

    def _apply(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        names: tuple[str, ...] = (
            *HydraHeadCacheLayer.STORES,
            *HydraHeadCacheLayer.MEMORIES,
            *HydraHeadCacheLayer.ROWS,
        ),
    ) -> None:
        for name in names:
            tensor = getattr(self, name)
            if tensor is None:
                continue
            new = function(tensor)
            if new.shape == tensor.shape and new.device == tensor.device:
                tensor.copy_(new)
            else:
                setattr(self, name, _fixed(new))

    def activate_past_recording(self) -> None:
        """Do nothing: a static cache cannot remove tokens."""

    @property
    def is_croppable(self) -> bool:
        """Return False: a static cache cannot remove tokens."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless ``tokens_to_remove`` is 0."""
        if tokens_to_remove:
            raise ValueError(
                "a static cache of a HydraHead model cannot be cropped: use a dynamic cache "
                "(cache_implementation=None)"
            )


def _fixed(tensor: torch.Tensor) -> torch.Tensor:
    """Tell torch.compile that the tensor keeps its address, so that CUDA graphs can use it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class HydraHeadCache(DynamicCache):
    """transformers' dynamic cache with the layers of a HydraHead model.

    It stores keys and values of FA heads, and states and convolution tails of GDN heads. If softmax sees a
    window only, it stores the tokens of that window.

    Args:
        config: the model's config.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        adopt(self, config.num_hidden_layers)

    @property
    def seen(self) -> int:
        """Number of columns so far, padding included: the width of ``attention_mask``."""
        return self.layers[0].length

    @property
    def lengths(self) -> torch.Tensor | None:
        """``[B]`` int64: number of real tokens of every sequence, which is also its next position."""
        return self.layers[0].lengths

    def kv_bytes(self) -> int:
        """Bytes of the stored keys and values, summed over all layers."""
        return sum(
            2 * layer.keys[:, :, : layer.length].numel() * layer.keys.element_size()
            for layer in self.layers
            if layer.keys is not None
        )

    def state_bytes(self) -> int:
        """Bytes of the tensors that do not grow: recurrent states, convolution tails, windows of tokens."""
        tensors = [getattr(layer, n) for layer in self.layers for n in layer.MEMORIES]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def adopt(cache: Any, num_layers: int) -> Cache:
    """Replace the empty layers of a dynamic or static cache by layers of a HydraHead model.

    Raises:
        ValueError: the cache is of another kind, or another model has filled it.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise ValueError(f"the cache is a {type(cache).__name__}; {_WANTED}")
    if layers and all(isinstance(layer, HydraHeadCacheLayer) for layer in layers):
        if len(layers) != num_layers:
            raise ValueError(f"the cache has {len(layers)} layers, the model has {num_layers}")
        return cache
    for layer in layers:
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise ValueError(
                f"a {type(cache).__name__} of {type(layer).__name__} cannot store states; {_WANTED}"
            )
        if layer.is_initialized and int(layer.get_seq_length()):
            raise ValueError(f"the {type(cache).__name__} holds another model's tokens; {_WANTED}")
    if layers and len(layers) != num_layers:
        raise ValueError(f"the cache has {len(layers)} layers, the model has {num_layers}")
    static = [layer.max_cache_len for layer in layers if isinstance(layer, StaticLayer)]
    cache.layers = [
        HydraHeadStaticCacheLayer(static[0]) if static else HydraHeadCacheLayer()
        for _ in range(num_layers)
    ]
    cache.layer_class_to_replicate = None
    return cache


_WANTED = (
    "a HydraHead model needs an empty DynamicCache or StaticCache of transformers, or its own HydraHeadCache. "
    "Without a cache the model makes one"
)


def record_past(cache: Cache, on: bool) -> None:
    """Start (``on``) or stop recording in every layer."""
    for layer in cache.layers:
        if on:
            layer.activate_past_recording()
        else:
            layer.stop_recording()


def layer_memory(cache: Cache, index: int, device: torch.device) -> HydraHeadCacheLayer:
    """Return a layer's cache, on its device. If the cache is offloaded, prefetch the next layer's as well."""
    if cache.offloading:
        _fetch(cache, index, device)
    return cache.layers[index]


# torch 2.11's compiler crashes (segmentation fault) on the streams of an offloaded cache, in transformers' own
# models too. Copies gain nothing from compilation, so the compiler does not look into them.
@torch.compiler.disable
def _fetch(cache: Cache, index: int, device: torch.device) -> None:
    if device.type != "cuda":
        cache.layers[index].prefetch()
        return
    here = torch.cuda.default_stream(device)
    here.wait_stream(cache.prefetch_stream)
    # The stream may still copy this layer to the host.
    cache.prefetch_stream.wait_stream(here)
    cache.layers[index].prefetch()
    cache.prefetch(index + 1, only_non_sliding=False)


def put_back(cache: Cache, index: int) -> None:
    """Move a layer's cache back to the host if the cache is offloaded."""
    if cache.offloading:
        _put_back(cache, index)


@torch.compiler.disable
def _put_back(cache: Cache, index: int) -> None:
    cache.layers[index].offload()


__all__ = ["HydraHeadCache"]
