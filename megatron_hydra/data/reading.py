"""Record what a run has read, by source and span, so that it can continue when its data change.

A span is a series of steps with the same blend, batch size and number of replicas. Every source of any blend
of the run has a number, which fixes its order of samples, and a count of samples read. A source that stays in
the blend or returns to it continues at this count. A new source starts at its first sample.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_hydra.data.sampling import Blend
from megatron_hydra.errors import HydraError

Content = Callable[[int, int], tuple[int, int] | None]
"""(first, end) -> number of pieces and of tokens in samples first … end−1 of a source; ``None``: unknown."""

_SETTINGS = ("phase", "global_batch_size", "micro_batch_size", "data_parallel_size")


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """A source, and the total data read from it.

    Attributes:
        name: its path or task.
        fingerprint: fingerprint of its samples in the order of its number.
        identity: fingerprint of its samples independent of the order; empty: unknown.
        files: identity of its tokens independent of packing; empty: generated, or unknown.
        samples_per_epoch: number of samples; ``None``: it never repeats, or unknown.
        samples: number of packed sequences read; the next sample has this number.
        pieces, tokens: number of documents and pieces (of documents longer than a sequence), and of tokens
            without padding; ``None``: unknown.
    """

    name: str
    fingerprint: str
    identity: str = ""
    files: str = ""
    samples_per_epoch: int | None = None
    samples: int = 0
    pieces: int | None = 0
    tokens: int | None = 0


@dataclasses.dataclass(frozen=True)
class PartRecord:
    """A source in the blend of a span.

    Attributes:
        source: number of the source.
        weight: its weight in the blend.
        blend_first: number of its samples read before this blend began.
        first: number of its samples read before this span began.
        samples, pieces, tokens: data read in the span, as in :class:`SourceRecord`.
    """

    source: int
    weight: float
    blend_first: int
    first: int
    samples: int = 0
    pieces: int | None = 0
    tokens: int | None = 0


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive steps with the same reading.

    Attributes:
        phase: ``data.phase``.
        first_step, steps: number of steps done before the span; number of its own steps.
        first_sample, samples: the same in samples of the run.
        blend_begins: the run's sample number at which this blend began. Batches may change within a blend.
        global_batch_size, micro_batch_size, data_parallel_size: sizes; the last two may be ``None``:
            unknown.
        parts: sources of the blend, in order.
    """

    phase: int
    first_step: int
    first_sample: int
    blend_begins: int
    global_batch_size: int
    micro_batch_size: int | None
    data_parallel_size: int | None
    parts: tuple[PartRecord, ...]
    steps: int = 0
    samples: int = 0

    def reads_as(self, other: Span) -> bool:
        """Whether the two differ only in the data read."""
        keys = (*_SETTINGS, "blend_begins")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


@dataclasses.dataclass(frozen=True)
class Reading:
    """All sources and spans of a run; the last span is the current one."""

    sources: tuple[SourceRecord, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Reading:
        """Read from a checkpoint. The state of a release without spans becomes a single span.

        Raises:
            KeyError, TypeError, ValueError: the state is damaged.
        """
        if "spans" not in state:
            return cls._of_old_state(state)
        spans = []
        for body in state["spans"]:
            parts = tuple(PartRecord(**part) for part in body["parts"])
            spans.append(Span(**{**body, "parts": parts}))
        reading = cls(tuple(SourceRecord(**body) for body in state["sources"]), tuple(spans))
        for part in reading.span.parts:
            if reading.sources[part.source].samples != part.first + part.samples:
                raise ValueError(f"source {part.source} is counted in two ways")
        return reading

    @classmethod
    def _of_old_state(cls, state: dict[str, Any]) -> Reading:
        saved, step = state["fingerprint"], int(state["step"])
        size = int(saved["batch.global_batch_size"])
        blend = saved["data.blend"]
        dealt = Blend([p["weight"] for p in blend], [p["name"] for p in blend])
        drawn = dealt.drawn_before(step * size)
        sources = tuple(
            SourceRecord(p["name"], p["fingerprint"], samples=n, pieces=None, tokens=None)
            for p, n in zip(blend, drawn, strict=True)
        )
        parts = tuple(
            PartRecord(i, p["weight"], 0, 0, n, None, None)
            for i, (p, n) in enumerate(zip(blend, drawn, strict=True))
        )
        return cls(sources, (Span(1, 0, 0, 0, size, None, None, parts, step, step * size),))

    def as_json(self) -> dict[str, Any]:
        """``sources`` and ``spans`` of a checkpoint's data state."""
        return {
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "spans": [dataclasses.asdict(span) for span in self.spans],
        }

    @property
    def span(self) -> Span:
        """The last span."""
        return self.spans[-1]

    @property
    def batch_unit(self) -> int:
        """The greatest common divisor of the numbers of samples of all steps."""
        return math.gcd(*(span.global_batch_size for span in self.spans))

    def samples_before(self, step: int) -> int:
        """Number of samples of the run before global step ``step`` (0-based)."""
        span = next(s for s in reversed(self.spans) if s.first_step <= step or s is self.spans[0])
        return span.first_sample + (step - span.first_step) * span.global_batch_size

    def at(self, step: int, drawn: Sequence[int], contents: Sequence[Content]) -> Reading:
        """The reading after ``step`` steps.

        Args:
            step: must not be before the step of this reading.
            drawn: total number of samples read from each source of the blend after ``step`` steps.
            contents: content functions of the sources.
        """
        span, sources, parts = self.span, list(self.sources), []
        if step < span.first_step + span.steps:
            raise ValueError(f"step {step} is before the last counted step")
        for part, end, content in zip(span.parts, drawn, contents, strict=True):
            source = sources[part.source]
            found = content(source.samples, end)
            pieces, tokens = found or (None, None)
            parts.append(
                dataclasses.replace(
                    part,
                    samples=end - part.first,
                    pieces=_sum(part.pieces, pieces),
                    tokens=_sum(part.tokens, tokens),
                )
            )
            sources[part.source] = dataclasses.replace(
                source,
                samples=end,
                pieces=_sum(source.pieces, pieces),
                tokens=_sum(source.tokens, tokens),
            )
        samples = self.samples_before(step) - span.first_sample
        span = dataclasses.replace(
            span, steps=step - span.first_step, samples=samples, parts=tuple(parts)
        )
        return Reading(tuple(sources), (*self.spans[:-1], span))

    def extended(
        self, sources: Sequence[SourceRecord], numbers: Sequence[int], weights: Sequence[float],
        span: Span, *, new_blend: bool,
    ) -> Reading:  # fmt: skip
        """Add a span to this reading, or continue its last span if nothing differs.

        Args:
            sources: the sources of this reading, possibly with completed identities, then the new sources.
            numbers, weights: numbers and weights of the sources of the new blend.
            span: settings of the new span, without its first step and its parts.
            new_blend: whether the blend has changed.
        """
        last = self.span
        step, sample = last.first_step + last.steps, last.first_sample + last.samples
        begins = {part.source: part.blend_first for part in last.parts}
        parts = tuple(
            PartRecord(
                number,
                weight,
                sources[number].samples if new_blend else begins[number],
                sources[number].samples,
            )
            for number, weight in zip(numbers, weights, strict=True)
        )
        new = dataclasses.replace(
            span,
            first_step=step,
            first_sample=sample,
            blend_begins=sample if new_blend else last.blend_begins,
            parts=parts,
        )
        if not new_blend and new.reads_as(last):
            return Reading(tuple(sources), self.spans)
        # A span without steps has read nothing.
        kept = self.spans if last.steps else self.spans[:-1]
        return Reading(tuple(sources), (*kept, new))

    # -- changes at a resume -------------------------------------------------------------------

    def change(self) -> dict[str, Any]:
        """Differences between a span that begins now and the span before; empty if none begins. JSON.

        Returns:
            ``phase`` and changed sizes as ``[before, after]``. If the blend has changed also ``sources``: for
            every source its weights ``[before, after]`` (``None``: not in the blend) and the data read from it.
        """
        if len(self.spans) < 2 or self.span.steps:
            return {}
        before, now = self.spans[-2:]
        found: dict[str, Any] = {
            key: [getattr(before, key), getattr(now, key)]
            for key in _SETTINGS
            if getattr(before, key) != getattr(now, key)
        }
        if now.blend_begins == now.first_sample:
            weights = [{part.source: part.weight for part in span.parts} for span in (before, now)]
            found["sources"] = [
                {
                    "number": number,
                    "name": source.name,
                    "weight": [of_span.get(number) for of_span in weights],
                    "samples": source.samples,
                    "tokens": source.tokens,
                }
                for number, source in enumerate(self.sources)
            ]
        return found

    def about_change(self, steps: int) -> list[str]:
        """:meth:`change` in sentences, with its effect on a schedule of ``steps`` steps."""
        found = self.change()
        if not found:
            return []
        span = self.span
        lines = [
            f"from step {span.first_step + 1:,} on: {key.replace('_', ' ')} {' -> '.join(map(str, found[key]))}"
            for key in _SETTINGS
            if key in found
        ]
        lines += [_about_source(source) for source in found.get("sources", ())]
        if "global_batch_size" in found:
            before = Reading(self.sources, self.spans[:-1])
            planned, now = before.samples_before(steps), self.samples_before(steps)
            left = max(0, planned - span.first_sample)
            same = span.first_step + -(-left // span.global_batch_size)
            lines.append(
                f"the learning rate depends on the sequences read: schedule.steps={steps} now reads {now:,}, "
                f"before {planned:,}; schedule.steps={same} reads as many as before"
            )
        return lines


def _about_source(source: dict[str, Any]) -> str:
    (before, after), samples = source["weight"], source["samples"]
    read = f"{samples:,} sequences read"
    if after is None:
        return f"{source['name']}: no longer in the blend; {read}; it continues there if you add it again"
    if before is None:
        return f"{source['name']}: in the blend with weight {after}, {read} before"
    return f"{source['name']}: weight {before} -> {after}; it continues after {read}"


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A source of a new blend, to be matched with the sources of a run.

    Attributes:
        name, identity, files: as in :class:`SourceRecord`.
        fingerprint: function from a source number to the fingerprint in that order.
    """

    name: str
    identity: str
    files: str
    fingerprint: Callable[[int], str]


def numbers_of(reading: Reading, parts: Sequence[Candidate]) -> list[int]:
    """Number of every source of a new blend: the number of the source it continues, or a new number.

    Raises:
        HydraError: a source was read with other rules, so its remaining documents are unknown; or its
            order has changed.
    """
    by_identity: dict[str, list[int]] = collections.defaultdict(list)
    for number, source in enumerate(reading.sources):
        by_identity[source.identity].append(number)
    free, numbers, added = set(range(len(reading.sources))), [], len(reading.sources)
    for part in parts:
        known = by_identity[part.identity]
        for number in known:
            if part.fingerprint(number) != reading.sources[number].fingerprint:
                raise HydraError(
                    f"cannot resume: the order of {part.name} has changed, because it was read with another "
                    "version of this code or of NumPy; resume with that version"
                )
        known = known or [  # from a release without identities
            n for n in by_identity[""] if part.fingerprint(n) == reading.sources[n].fingerprint
        ]
        found = next((n for n in known if n in free), None)
        if found is None:
            if not known:
                _raise_changed_reading(reading, part.name, part.files)
            found, added = added, added + 1
        free.discard(found)
        numbers.append(found)
    return numbers


def _raise_changed_reading(reading: Reading, name: str, files: str) -> None:
    for source in reading.sources:
        if files and source.samples and (source.name == name or source.files == files):
            same = source.files == files
            what = "with another upsample" if same else "with other tokens, or another upsample"
            raise HydraError(
                f"cannot resume: {name} has been read {what} ({source.name}, {source.samples:,} samples), so "
                "its unread documents are unknown. Restore its old settings, give new data another name, or "
                "start a new run (with another output) from the weights"
            )
