"""Record what a run has read, by source and span, so that it can continue when its data change.

A span is a row of steps that read one blend, in batches of one size, on one number of replicas. Every source
that some blend of the run held has a number, which fixes its order of samples, and a count of samples read: a
source that stays in the blend, or comes back, continues there; a new one starts at its first sample.
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
"""Pieces of documents and their tokens in samples first … end−1 of a source, or ``None``: not known."""

_SETTINGS = ("phase", "global_batch_size", "micro_batch_size", "data_parallel_size")


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """A source and what has been read of it in all.

    Attributes:
        name: its path or task.
        fingerprint: of its samples, in the order that its number gives it.
        identity: of its samples, in whatever order; empty: not known.
        files: identity of its tokens, however they are packed; empty: generated, or not known.
        samples_per_epoch: ``None``: it never repeats, or not known.
        samples: packed sequences read; the next one has this number.
        pieces, tokens: documents, and pieces of documents that are longer than a sequence, and tokens
            without padding; ``None``: not known.
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
    """A part of a span's blend.

    Attributes:
        source: its number.
        weight: in the blend.
        blend_first: samples of it that were read when this blend began.
        first: … when this span began.
        samples, pieces, tokens: read in the span, as in :class:`SourceRecord`.
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
    """Steps in a row that read alike.

    Attributes:
        phase: ``data.phase``.
        first_step, steps: steps done when it began; its own.
        first_sample, samples: of the run, likewise.
        blend_begins: number of the run's sample at which this blend began: batches may change under it.
        global_batch_size, micro_batch_size, data_parallel_size: the last two ``None``: not known.
        parts: of the blend, in its order.
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
        """Whether the two differ in nothing but what has been read."""
        keys = (*_SETTINGS, "blend_begins")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


@dataclasses.dataclass(frozen=True)
class Reading:
    """All sources and spans of a run; the last span is the current one."""

    sources: tuple[SourceRecord, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Reading:
        """From a checkpoint. One of a release that kept no spans has a single one.

        Raises:
            KeyError, TypeError, ValueError: damaged.
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
        """The last one."""
        return self.spans[-1]

    @property
    def batch_unit(self) -> int:
        """The largest number of samples that divides every step's."""
        return math.gcd(*(span.global_batch_size for span in self.spans))

    def samples_before(self, step: int) -> int:
        """Samples of the run that come before global step ``step`` (0-based)."""
        span = next(s for s in reversed(self.spans) if s.first_step <= step or s is self.spans[0])
        return span.first_sample + (step - span.first_step) * span.global_batch_size

    def at(self, step: int, drawn: Sequence[int], contents: Sequence[Content]) -> Reading:
        """The same when ``step`` steps are done.

        Args:
            step: not before the one that this reading is of.
            drawn: samples that have then been read of each part of the blend, in all.
            contents: of the parts.
        """
        span, sources, parts = self.span, list(self.sources), []
        if step < span.first_step + span.steps:
            raise ValueError(f"step {step} lies before what has been counted")
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
            sources: the sources of this reading, perhaps with better identities, then the new ones.
            numbers, weights: of the parts of the blend from now on.
            span: settings of the new span, without its first step and its parts.
            new_blend: whether the blend is another.
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
        kept = self.spans if last.steps else self.spans[:-1]  # one without a step has read nothing
        return Reading(tuple(sources), (*kept, new))

    # -- what a resume has changed ------------------------------------------------------------

    def change(self) -> dict[str, Any]:
        """What differs in the span that begins now from the one before it; empty: none begins. JSON.

        Returns:
            ``phase`` and sizes that differ as ``[before, after]``; with another blend ``sources``, of every
            source: its weights ``[before, after]`` (``None``: not in the blend), and what has been read of it.
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
        """:meth:`change` in sentences, and what it means for a schedule of so many ``steps``."""
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
                f"the learning rate follows the sequences read: schedule.steps={steps} is now {now:,} of them, "
                f"before {planned:,}; schedule.steps={same} reads as many as before"
            )
        return lines


def _about_source(source: dict[str, Any]) -> str:
    (before, after), samples = source["weight"], source["samples"]
    read = f"{samples:,} sequences read"
    if after is None:
        return (
            f"{source['name']}: no longer in the blend; {read}; it continues there if it comes back"
        )
    if before is None:
        return f"{source['name']}: in the blend with weight {after}, {read} before"
    return f"{source['name']}: weight {before} -> {after}; it continues after {read}"


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A part of a blend that is to be found among the sources of a run.

    Attributes:
        name, identity, files: as in :class:`SourceRecord`.
        fingerprint: in the order that a number gives it.
    """

    name: str
    identity: str
    files: str
    fingerprint: Callable[[int], str]


def numbers_of(reading: Reading, parts: Sequence[Candidate]) -> list[int]:
    """Number of every part of a new blend: that of the source it continues, or a new number.

    Raises:
        HydraError: the documents of a part have been read by other rules, so that what is left of them
            cannot be told; or its order is another than the one it was read in.
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
                    f"cannot resume: {part.name} has another order than the one it was read in, from another "
                    "version of this code or of NumPy; resume with that version"
                )
        known = known or [  # of a release that kept no identities
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
                "that what is left of it cannot be told; give it as it was, give new data another name, or "
                "start a new run (another output) from the weights"
            )
