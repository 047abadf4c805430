"""What a HydraHead model remembers between calls (copied into every export; needs torch and transformers).

The containers are transformers' own, ``DynamicCache`` and ``StaticCache``: :func:`adopt` puts layers of this
file in place of their empty ones. transformers' layer for a hybrid, ``LinearAttentionAndFullAttentionLayer``,
does not exist in all releases that are supported, copies all keys at every token, has no place for a window
of tokens or for padding, and cannot take back what a state has read.

Taking back. A state holds no history. While :meth:`HydraHeadCacheLayer.activate_past_recording` is on, a layer
keeps, for its last tokens, the state before them and what each of them writes; ``crop`` runs the delta rule
again over the tokens that stay. No projection, no other layer and no softmax is computed again. That is what
assisted decoding needs.

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
"""Tokens that can be taken back while a cache records."""

Rule = Callable[..., Any]
"""The delta rule: (q, k, v, log α, β, state) -> outputs, state."""


@dataclasses.dataclass
class Record:
    """How to take back the tokens of one call, or its last :data:`UNDO`.

    Attributes:
        length: their number T.
        given: ``[B, T]`` bool, which are real, as the caller has ordered them; ``None``: all.
        rows: name -> ``[B, count + T, channels]``: the rows that a memory of ``count`` rows had before, then
            one for each token, real ones first.
        counts: name -> count.
        state: ``[B, n, d, d]`` before the first one; ``None``: empty.
        writes: k, v, log α, β that the delta rule was given, ``[B, T, n, …]``.
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
        """``[B]`` int64, how many of the first ``kept`` tokens are real; ``None``: all of them."""
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
    """What one layer remembers; every tensor is absent where the layer has no such heads.

    Attributes:
        keys, values: ``[B, n_fa_kv, capacity, d]``: KV groups of the layer's FA heads only.
        length: columns in use (real tokens and padding of the batch).
        begun: whether any token was seen.
        state: ``[B, n_gdn, d, d]`` fp32.
        tail: ``[B, W−1, channels]``: the last inputs of the convolution.
        window: ``[B, w−1, 2·n_fa_kv·d]``: keys and values within the window (``mixer=token``), in place
            of ``keys`` and ``values``.
        leaving, leaving_gates: ``[B, w, 2·n_gdn_kv·d]`` and ``[B, w, 2·n_gdn]`` fp32: what the tokens
            within the window write into the state when they leave it.
        key_mask: ``[B, length]`` bool, which columns are real tokens; ``None``: all of them. Those of
            one call stand as inside the model, real ones first.
        given_mask: ``[B, length]`` bool, the same as the caller has ordered them.
        lengths: ``[B]`` int64, real tokens of every sequence: its next position.
        record_past: whether tokens can be taken back.

    The masks and ``lengths`` are the same for all layers; the first one holds them.
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

    # What the layer's attention writes, in this order, and then ``advance``.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, n_fa_kv, T, d]`` and return all keys and values so far.

        A prompt is stored exactly; decoding then grows the store by an eighth at a time, so that a
        new token does not copy all earlier ones.
        """
        count = key_states.shape[2]
        if self.keys is None or self.values is None:
            # Detached: the cache serves inference, gradients do not flow through earlier calls.
            self.keys = key_states.detach().contiguous()
            self.values = value_states.detach().contiguous()
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
        """Keep the last ``count`` real ones of ``rows``, see :func:`latest`."""
        rows = rows.detach()
        self._put(name, latest(rows, count, valid))
        if self.record_past:
            length = rows.shape[1] - count
            recorded = self.recorded(length, valid)
            # A copy: a part of a long prompt would hold all of it.
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
        """Keep the ``state`` after this call; of its last tokens, the one ``before`` and what they write."""
        self._put("state", state.detach())
        if self.record_past:
            self._record.state = None if before is None else before.detach()
            self._record.writes = tuple(x.detach() for x in writes)
            self._record.rule = rule

    def recorded(self, length: int, valid: torch.Tensor | None) -> int:
        """How many of ``length`` new tokens are recorded: of padded ones all, as each row has its own."""
        return min(length, UNDO) if valid is None else length

    def _put(self, name: str, value: torch.Tensor) -> None:
        setattr(self, name, value)

    def advance(self, length: int, given: torch.Tensor | None, device: torch.device) -> None:
        """Note that this layer has taken in ``length`` columns."""
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
        """Note ``length`` new columns, of which ``valid`` ``[B, length]`` are real (None: all); ``given``
        says the same in the caller's order. Of the first layer, before any layer takes them in.
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
        """The mask of all columns; ``None`` as long as all are real."""
        if past is None and new is None:
            return None
        if past is None:
            past = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        if new is None:
            new = torch.ones_like(past[:, :1]).expand(-1, length)
        return torch.cat((past, new), dim=1)

    # What transformers calls.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: shapes differ by layer, and come with the first token."""

    def get_seq_length(self) -> Any:
        """Columns so far, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """:meth:`get_max_length`, as transformers called it before."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns after this call, and the first of them."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + new, 0

    @property
    def batch_size(self) -> int:
        """Sequences held, −1 before the first token."""
        tensors = (getattr(self, name) for name in (*self.STORES, *self.MEMORIES))
        return next((t.shape[0] for t in tensors if t is not None), -1)

    max_batch_size = batch_size

    def offload(self) -> None:
        """Move what is held to the host's memory."""
        self._apply(lambda x: x.to("cpu", non_blocking=True), self.STORES + self.MEMORIES)

    def prefetch(self) -> None:
        """Move it back."""
        if self.device is not None:
            device = self.device
            self._apply(lambda x: x.to(device, non_blocking=True), self.STORES + self.MEMORIES)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take over the beams' sequences."""
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
        """From here on, tokens can be taken back."""
        self.record_past = True

    def stop_recording(self) -> None:
        """Keep no more than the next token needs."""
        self.record_past = False
        self.records.clear()

    @property
    def _has_states(self) -> bool:
        return any(getattr(self, name) is not None for name in self.MEMORIES)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return self.record_past or (self.begun and not self._has_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``−tokens_to_remove`` columns; a positive number is, as in transformers 5.0, how
        many stay.

        Raises:
            ValueError: more than were recorded.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self.length - tokens_to_remove
        if removed <= 0:
            self.records.clear()
            return
        if removed > self.length:
            raise ValueError(f"the cache holds {self.length} tokens, {removed} are to be removed")
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
                f"{removed} more tokens are to be removed from the cache than it has recorded; its states hold "
                "no history. Call activate_past_recording() before the tokens that may have to be removed, at "
                f"most {UNDO} of them"
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
    """The same in tensors of fixed size and place, so that a compiled step stays valid.

    ``length`` is a tensor; keys, values, ``key_mask`` and ``given_mask`` have ``max_cache_len`` columns.

    Args:
        max_cache_len: columns that there is room for.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        self.max_cache_len = max_cache_len
        super().__init__()

    def reset(self) -> None:
        """Forget everything, and keep the room."""
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
        """From here on ``length`` is a tensor."""
        if not isinstance(self.length, torch.Tensor):
            self.length = _fixed(torch.zeros((), dtype=torch.int64, device=device))

    def _columns(self, length: int, device: torch.device) -> torch.Tensor:
        """``[length]`` int64, where the next tokens go."""
        self._begin(device)
        return self.length + torch.arange(length, device=device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, n_fa_kv, T, d]``; return them where they are the first, else the whole store."""
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
        """The stores as they are: they cannot grow."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _put(self, name: str, value: torch.Tensor) -> None:
        kept = getattr(self, name)
        if kept is None:
            setattr(self, name, _fixed(value.clone()))
        else:
            kept.copy_(value)

    def advance(self, length: int, given: torch.Tensor | None, device: torch.device) -> None:
        """Note that this layer has taken in ``length`` columns."""
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
        """As the other kind of layer does, in place."""
        if not self.begun and length > self.max_cache_len:
            raise ValueError(
                f"the static cache has room for {self.max_cache_len} tokens, the input has {length}"
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
        """Columns that there is room for."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """All columns, and the first of them."""
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
        """Nothing: tokens cannot be taken back."""

    @property
    def is_croppable(self) -> bool:
        """Never."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for nothing to remove."""
        if tokens_to_remove:
            raise ValueError(
                "a static cache of a HydraHead model cannot be cropped: use a dynamic one "
                "(cache_implementation=None)"
            )


def _fixed(tensor: torch.Tensor) -> torch.Tensor:
    """Tell torch.compile that it stays where it is, so that CUDA graphs may be made of it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class HydraHeadCache(DynamicCache):
    """transformers' dynamic cache with a HydraHead model's layers: KV of FA heads only, states and
    convolution tails of GDN heads; a window of tokens where softmax sees no more.

    Args:
        config: the model's.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        adopt(self, config.num_hidden_layers)

    @property
    def seen(self) -> int:
        """Columns so far, padding included (what ``attention_mask`` is as wide as)."""
        return self.layers[0].length

    @property
    def lengths(self) -> torch.Tensor | None:
        """``[B]`` int64, real tokens of every sequence: its next position."""
        return self.layers[0].lengths

    def kv_bytes(self) -> int:
        """Bytes of the keys and values held, summed over the real tensors of all layers."""
        return sum(
            2 * layer.keys[:, :, : layer.length].numel() * layer.keys.element_size()
            for layer in self.layers
            if layer.keys is not None
        )

    def state_bytes(self) -> int:
        """Bytes of what does not grow: recurrent states, convolution tails, windows of tokens."""
        tensors = [getattr(layer, n) for layer in self.layers for n in layer.MEMORIES]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def adopt(cache: Any, num_layers: int) -> Cache:
    """Put a HydraHead model's layers in place of the empty ones of a dynamic or a static cache.

    Raises:
        ValueError: a cache of another kind, or one that another model has filled.
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
                f"a {type(cache).__name__} of {type(layer).__name__} holds no states; {_WANTED}"
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
    "a HydraHead model takes an empty DynamicCache or StaticCache of transformers, or its own HydraHeadCache: "
    "give one of them, or none, and one is made"
)


def record_past(cache: Cache, on: bool) -> None:
    """Let every layer record, or stop it."""
    for layer in cache.layers:
        if on:
            layer.activate_past_recording()
        else:
            layer.stop_recording()


def layer_memory(cache: Cache, index: int, device: torch.device) -> HydraHeadCacheLayer:
    """A layer's memory, on its device; of an offloaded cache, the next one is on its way there."""
    if cache.offloading:
        if device.type == "cuda":
            here = torch.cuda.default_stream(device)
            here.wait_stream(cache.prefetch_stream)
            # It may still be copying to the host what it is about to fetch.
            cache.prefetch_stream.wait_stream(here)
            cache.layers[index].prefetch()
            cache.prefetch(index + 1, only_non_sliding=False)
        else:
            cache.layers[index].prefetch()
    return cache.layers[index]


def put_back(cache: Cache, index: int) -> None:
    """Move a layer's memory to the host again, where the cache is offloaded."""
    if cache.offloading:
        cache.layers[index].offload()


__all__ = ["HydraHeadCache"]
