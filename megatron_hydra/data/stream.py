"""The stream of packed batches that training reads: a pure function of config, step and layout.

Arithmetic draws global sample n of a run from the blend. Step s has samples s·B … (s+1)·B−1 for any
data-parallel size. To resume, a run asks for the next step. If the blend or the batch changes during a run
(``data.phase``), :mod:`.reading` records the data read and finds the next sample of each source.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_hydra.config.run import BatchConfig, DataConfig
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.data.document import Document
from megatron_hydra.data.open_files import raise_open_file_limit
from megatron_hydra.data.reading import (
    Candidate,
    PartRecord,
    Reading,
    SourceRecord,
    Span,
    numbers_of,
)
from megatron_hydra.data.sampling import Blend, Draw, derive_key
from megatron_hydra.data.sources import IndexedSource, Source, SyntheticSource
from megatron_hydra.data.tokenizer import tokenizer_fingerprint
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_tokenizer

_log = logging.getLogger(__name__)
_PAD_TOKEN = 0
_FILES_A_PART = 4
"""Open files per source: the tokens, and the three arrays of a packing."""
_ABSENT = {"data.held_out": 0.0}
"""Values of keys that older fingerprints lack."""


class PackedStream:
    """Micro-batches of one data-parallel rank.

    Attributes:
        sources: the opened sources, in the order of ``data.blend``.
        tokens_per_step: number of tokens of a global batch, padding included.
        reading: data that the run had read when the stream was opened or resumed.
        has_new_blend: whether the resume changed the sources or their weights.
    """

    def __init__(
        self,
        data: DataConfig,
        batch: BatchConfig,
        *,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        tokenizer: Any = None,
        for_validation: bool = False,
    ) -> None:
        """Open every source and check all of it before the first step.

        Args:
            data, batch: the run's sections.
            dp_rank, dp_size: this rank's data-parallel rank, and the size. Context-, tensor- and
                pipeline-parallel ranks of one replica pass the same values and get the same batches.
            vocab_size: vocabulary size of the model; a larger token id is an error.
            tokenizer: an HF tokenizer; loaded from ``data.tokenizer`` if omitted.
            for_validation: read the documents that ``data.held_out`` holds out.

        Raises:
            HydraError: the config or the data are invalid.
        """
        _check_sizes(data, batch, dp_rank, dp_size)
        self.data, self.batch = data, batch
        self.dp_rank, self.dp_size, self.vocab_size = dp_rank, dp_size, vocab_size
        self._for_validation = for_validation
        if tokenizer is None and data.tokenizer:
            tokenizer = load_tokenizer(data.tokenizer)
        self._tokenizer_fingerprint = "" if tokenizer is None else tokenizer_fingerprint(tokenizer)
        raise_open_file_limit(_FILES_A_PART * sum(part.kind == "indexed" for part in data.blend))
        names = [f"blend[{i}] {part.path or part.task}" for i, part in enumerate(data.blend)]
        self._blend = Blend([part.weight for part in data.blend], names)
        self.sources = [self._open(i, tokenizer) for i in range(len(data.blend))]
        _check_one_tokenizer(self.sources)
        self.tokens_per_step = batch.global_batch_size * data.sequence_length
        self.reading = self._first_reading()
        self.has_new_blend = False
        self._ordered: dict[tuple[int, int], Source] = {}
        self._next_step = 0

    def _first_reading(self) -> Reading:
        numbers = range(len(self.sources))
        parts = [PartRecord(n, self.data.blend[n].weight, 0, 0) for n in numbers]
        return Reading(tuple(map(_record, self.sources)), (self._span(tuple(parts)),))

    def _span(self, parts: tuple[PartRecord, ...] = ()) -> Span:
        return Span(
            phase=self.data.phase,
            first_step=0,
            first_sample=0,
            blend_begins=0,
            global_batch_size=self.batch.global_batch_size,
            micro_batch_size=self.batch.micro_batch_size,
            data_parallel_size=self.dp_size,
            parts=parts,
        )

    def _open(self, position: int, tokenizer: Any) -> Source:
        part = self.data.blend[position]
        seed = self._seed_of(position)
        if part.kind == "synthetic":
            return SyntheticSource(part, self.data, seed=seed, tokenizer=tokenizer)
        source = IndexedSource(
            part,
            self.data,
            seed=seed,
            vocab_size=self.vocab_size,
            for_validation=self._for_validation,
        )
        if tokenizer is not None:
            source.check_tokenizer(tokenizer)
        return source

    def _seed_of(self, number: int) -> int:
        """Seed of the order of a source. In the first blend, a source's number is its position."""
        return derive_key(self.data.seed, number)

    def micro_batches(self, step: int) -> list[PackedBatch]:
        """This rank's micro-batches of global step ``step`` (0-based), in order.

        Raises:
            HydraError: a sample holds a token outside the vocabulary.
        """
        # Only global rank 0 reports.
        if self.dp_rank == 0 and not (dist.is_initialized() and dist.get_rank()):
            for message in self.epoch_restarts(step):
                _log.warning(message)
        size = self.batch.micro_batch_size
        samples = self.global_samples(step)
        stride = size * self.dp_size
        batches = [
            self._micro_batch(samples[start : start + size])
            for start in range(self.dp_rank * size, len(samples), stride)
        ]
        self._next_step = step + 1
        return batches

    def global_samples(self, step: int) -> list[int]:
        """Sample numbers of a global batch, in the order in which they are assigned to ranks.

        The order is shuffled within the step, so that no rank always gets the same part of a blend.
        """
        dealt = self._shuffled_samples(step, self.batch.global_batch_size)
        return (self.samples_before(step) + dealt).tolist()

    def _shuffled_samples(self, step: int, size: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=derive_key(self.data.seed, "deal", step)))
        return rng.permutation(size)

    def samples_before(self, step: int) -> int:
        """Number of samples of the run before global step ``step``, even if the batch size has changed."""
        return self.reading.samples_before(step)

    def draw(self, sample: int) -> Draw:
        """The part, and the sample of this part, for global sample number ``sample`` of this blend."""
        span = self.reading.span
        drawn = self._blend.draw(sample - span.blend_begins)
        return Draw(drawn.source, span.parts[drawn.source].blend_first + drawn.index)

    def drawn_before(self, sample: int) -> list[int]:
        """Number of samples of each part before global sample number ``sample`` of this blend."""
        span = self.reading.span
        drawn = self._blend.drawn_before(sample - span.blend_begins)
        return [part.blend_first + n for part, n in zip(span.parts, drawn, strict=True)]

    def documents(self, sample: int) -> list[Document]:
        """The documents of one packed sequence."""
        return self.drawn_documents(self.draw(sample))

    def drawn_documents(self, draw: Draw) -> list[Document]:
        """The documents of one packed sequence of a part."""
        documents = self.sources[draw.source].sample(draw.index)
        for document in documents:
            if int(document.tokens.max()) >= self.vocab_size or int(document.tokens.min()) < 0:
                raise HydraError(
                    f"{self.sources[draw.source].name}: token id {int(document.tokens.max())} is "
                    f"outside the model's vocabulary of {self.vocab_size}; check the tokenizer"
                )
        return documents

    def _micro_batch(self, samples: list[int]) -> PackedBatch:
        sequences = [self.documents(sample) for sample in samples]
        return pack_micro_batch(sequences, self.data.sequence_length, tuple(samples))

    def epoch_report(self, step: int) -> dict[str, dict[str, float]]:
        """Data read from every part of the blend after ``step`` steps, over all spans.

        Returns:
            name → ``samples`` drawn, ``epochs`` completed (fractional; 0 for generated parts),
            ``tokens`` drawn including padding.
        """
        drawn = self.drawn_before(self.samples_before(step))
        report = {}
        for position, (source, count) in enumerate(zip(self.sources, drawn, strict=True)):
            epochs = count / source.samples_per_epoch if source.samples_per_epoch else 0.0
            report[f"blend[{position}] {source.name}"] = {
                "samples": float(count),
                "tokens": float(count * self.data.sequence_length),
                "epochs": epochs,
            }
        return report

    def plan(self, steps: int) -> dict[str, dict[str, float]]:
        """Check a run of ``steps`` steps against its limits before it starts.

        Returns:
            :meth:`epoch_report` at the end of the run.

        Raises:
            HydraError: the run would exceed ``data.token_budget`` or a part's ``max_epochs``. Parts with
                the same path count together.
        """
        length, budget, span = self.data.sequence_length, self.data.token_budget, self.reading.span
        needed = self.samples_before(steps) * length
        if budget and needed > budget:
            earlier = span.first_sample * length
            fitting = span.first_step + max(0, (budget - earlier) // self.tokens_per_step)
            after = f" after {earlier:,} in {span.first_step:,} steps" if span.first_step else ""
            raise HydraError(
                f"schedule.steps {steps:,} x {self.tokens_per_step:,} tokens per step{after} = {needed:,} "
                f"tokens, above data.token_budget {budget:,}; at most {fitting:,} steps fit"
            )
        report = self.epoch_report(steps)
        epochs: collections.defaultdict[str, float] = collections.defaultdict(float)
        for part, numbers in zip(self.data.blend, report.values(), strict=True):
            epochs[os.path.realpath(part.path)] += numbers["epochs"]
        here = {part.source for part in span.parts}
        for number, source in enumerate(self.reading.sources):
            if number not in here and source.samples_per_epoch:  # only in an earlier blend
                epochs[os.path.realpath(source.name)] += source.samples / source.samples_per_epoch
        for part, name in zip(self.data.blend, report, strict=True):
            read = epochs[os.path.realpath(part.path)]
            if part.max_epochs and read > part.max_epochs:
                raise HydraError(
                    f"data.{name} would be read {read:.2f} times in {steps:,} steps, above its "
                    f"max_epochs {part.max_epochs}; lower its weight or add data"
                )
        return report

    def epoch_restarts(self, step: int) -> list[str]:
        """One sentence for every part that begins a new epoch within ``step``; usually none.

        Args:
            step: 0-based step; the sentences count from 1, like the log of training.
        """
        before = self.drawn_before(self.samples_before(step))
        after = self.drawn_before(self.samples_before(step + 1))
        messages = []
        for source, first, end in zip(self.sources, before, after, strict=True):
            period = source.samples_per_epoch
            if period is None or end == 0:
                continue
            epoch = (end - 1) // period
            if epoch > 0 and (first == 0 or epoch > (first - 1) // period):
                messages.append(
                    f"step {step + 1}: {source.name} starts epoch {epoch + 1}; all its {period:,} packed "
                    "sequences have been read, and repeat in a new order"
                )
        return messages

    def fingerprint(self) -> dict[str, Any]:
        """All settings that decide the order of samples, except the layout and :attr:`reading`. JSON."""
        return {
            "data.seed": self.data.seed,
            "data.sequence_length": self.data.sequence_length,
            "data.packing": self.data.packing,
            "data.tokenizer": self._tokenizer_fingerprint,
            "batch.global_batch_size": self.batch.global_batch_size,
            "order of samples": self._order_of(self.batch.global_batch_size),
            "data.held_out": self.data.held_out,
            "data.blend": self.parts(),
        }

    def _order_of(self, global_batch_size: int) -> int:
        """Hash of the order in which the first step's samples are assigned to ranks."""
        return derive_key(*self._shuffled_samples(0, global_batch_size).tolist())

    def parts(self) -> list[dict[str, Any]]:
        """Name, weight and fingerprint of every part, JSON."""
        return [
            {"name": source.name, "weight": part.weight, "fingerprint": source.fingerprint()}
            for source, part in zip(self.sources, self.data.blend, strict=True)
        ]

    def state(self, step: int | None = None) -> dict[str, Any]:
        """State for a checkpoint, JSON: the fingerprint, ``step``, ``samples``, and the data read.

        Args:
            step: steps done; default: one more than the last step passed to ``micro_batches``.
        """
        done = self._next_step if step is None else step
        samples = self.samples_before(done)
        contents = [source.content for source in self.sources]
        self.reading = self.reading.at(done, self.drawn_before(samples), contents)
        return {
            "fingerprint": self.fingerprint(),
            "step": done,
            "samples": samples,
            **self.reading.as_json(),
        }

    def check_state(self, state: dict[str, Any]) -> int:
        """Accept a checkpoint's state and return the step to resume from.

        Data-parallel size and micro-batch size may differ from the saved run. Blend and global batch may
        differ as well if ``data.phase`` is higher than in the saved run.

        Raises:
            HydraError: data or order differ; names the first key that differs.
        """
        try:
            saved, step = state["fingerprint"], int(state["step"])
            saved_blend, size = saved["data.blend"], int(saved["batch.global_batch_size"])
            reading = Reading.of_state(state)
            phase, order = reading.span.phase, self._order_of(size)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise HydraError(f"the checkpoint's data state is damaged: {error}") from error
        advice = "resume with the same data, or start a new run (another output) from the weights"
        own = self.fingerprint() | {"order of samples": order, "batch.global_batch_size": size}
        for key, value in own.items():
            if key != "data.blend" and saved.get(key, _ABSENT.get(key)) != value:
                raise HydraError(
                    f"cannot resume: {key} was {saved.get(key)!r} and is {value!r} now; {advice}"
                )
        if self.data.phase < phase:
            raise HydraError(
                f"cannot resume: data.phase was {phase} and is {self.data.phase} now: it counts the "
                f"changes of the data and must not decrease; set it to {phase}"
            )
        numbers = [part.source for part in reading.span.parts]
        difference = self._difference_in_blend(saved_blend, numbers)
        change = difference
        if size != self.batch.global_batch_size:
            now = self.batch.global_batch_size
            change = f"batch.global_batch_size was {size} and is {now} now"
        if change and self.data.phase == phase:
            raise HydraError(
                f"cannot resume: {change}; {advice}; to allow the change, set data.phase={phase + 1}: "
                f"it applies from step {step + 1:,} on, and weights and optimizer are kept"
            )
        self._resume_reading(reading, numbers, bool(difference))
        self._next_step = step
        return step

    def _difference_in_blend(self, saved: list[dict[str, Any]], numbers: list[int]) -> str:
        """The first difference between a checkpoint's blend and this one; empty if they are equal."""
        if len(saved) != len(self.sources):
            return f"data.blend had {len(saved)} parts and has {len(self.sources)} now"
        for position, (old, part, number) in enumerate(
            zip(saved, self.data.blend, numbers, strict=True)
        ):
            source = self.sources[position]
            new = {"weight": part.weight, "fingerprint": self._fingerprint_of(position)(number)}
            for key, value in new.items():
                if old.get(key) != value:
                    return (
                        f"data.blend[{position}] ({source.name}) has another {key} than in the checkpoint "
                        f"({old.get('name')}): {old.get(key)} before, {value} now"
                    )
        return ""

    def _fingerprint_of(self, position: int) -> Callable[[int], str]:
        """Function from a source number to the fingerprint of a part in that order."""
        return lambda number: self._source_in_order(position, number).fingerprint()

    def _source_in_order(self, position: int, number: int) -> Source:
        """A part in the order of a source number. It and its fingerprint are made only once."""
        key = position, number
        if key not in self._ordered:
            self._ordered[key] = self.sources[position].with_seed(self._seed_of(number))
        return self._ordered[key]

    def _resume_reading(self, reading: Reading, numbers: list[int], has_new_blend: bool) -> None:
        """Continue a checkpoint's reading, with this blend and batch."""
        if has_new_blend:
            parts = [
                Candidate(
                    source.name, source.identity(), source.files, self._fingerprint_of(position)
                )
                for position, source in enumerate(self.sources)
            ]
            numbers = numbers_of(reading, parts)
        self.sources = [self._source_in_order(position, n) for position, n in enumerate(numbers)]
        self._ordered.clear()
        records = dict(enumerate(reading.sources))
        for source, number in zip(self.sources, numbers, strict=True):
            known = records.get(number, _record(source))
            records[number] = dataclasses.replace(
                _record(source), samples=known.samples, pieces=known.pieces, tokens=known.tokens
            )
        self.reading = reading.extended(
            [records[number] for number in range(len(records))],
            numbers,
            [part.weight for part in self.data.blend],
            self._span(),
            new_blend=has_new_blend,
        )
        self.has_new_blend = has_new_blend


def _record(source: Source) -> SourceRecord:
    # The content of a generated part is unknown without generating it again.
    known = None if source.samples_per_epoch is None else 0
    return SourceRecord(
        source.name,
        source.fingerprint(),
        source.identity(),
        source.files,
        source.samples_per_epoch,
        pieces=known,
        tokens=known,
    )


def pack_micro_batch(
    sequences: list[list[Document]], length: int, sample_ids: tuple[int, ...]
) -> PackedBatch:
    """Join sequences of ``length`` tokens; a sequence without a document is all padding."""
    packed = [pack_sequence(documents, length) for documents in sequences]
    edges = [0]
    for position, (_, _, _, ends) in enumerate(packed):
        edges += [position * length + end for end in ends]
    columns = [torch.from_numpy(np.concatenate([p[c] for p in packed])) for c in range(3)]
    return PackedBatch(
        tokens=columns[0],
        labels=columns[1],
        loss_mask=columns[2],
        cu_seqlens=tuple(edges),
        sample_ids=sample_ids,
    )


def pack_sequence(
    documents: list[Document], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Put documents into one sequence and pad it.

    Args:
        documents: at most ``length`` tokens in all.
        length: S.

    Returns:
        tokens ``[S]`` int64; labels ``[S]`` int64 (the next token of the same document); loss mask
        ``[S]`` float32; the end of every document, padding included.
    """
    tokens = np.full(length, _PAD_TOKEN, dtype=np.int64)
    labels = np.full(length, _PAD_TOKEN, dtype=np.int64)
    mask = np.zeros(length, dtype=np.float32)
    ends: list[int] = []
    start = 0
    for document in documents:
        end = start + len(document)
        tokens[start:end] = document.tokens
        labels[start : end - 1] = document.tokens[1:]
        mask[start : end - 1] = document.trainable[1:]
        ends.append(end)
        start = end
    if start < length:
        ends.append(length)
    return tokens, labels, mask, ends


def _check_one_tokenizer(sources: list[Source]) -> None:
    """Check by the manifests that all data of a blend have the same tokenizer."""
    first: tuple[str, str] | None = None
    for source in sources:
        manifest = source.documents.manifest if isinstance(source, IndexedSource) else None
        own = manifest.tokenizer.get("fingerprint", "") if manifest is not None else ""
        if not own:
            continue
        if first is not None and own != first[1]:
            raise HydraError(
                f"data.blend: {source.name}.json and {first[0]}.json name different tokenizers; "
                "prepare one of them again"
            )
        first = first or (source.name, own)


def _check_sizes(data: DataConfig, batch: BatchConfig, dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise HydraError(f"data-parallel rank {dp_rank} is outside 0..{dp_size - 1}")
    if data.phase < 1:
        raise HydraError(f"data.phase is {data.phase}: it counts from 1")
    if data.sequence_length < 2:
        raise HydraError(f"data.sequence_length is {data.sequence_length}: it must be at least 2")
    if batch.micro_batch_size < 1:
        raise HydraError(f"batch.micro_batch_size is {batch.micro_batch_size}: at least 1")
    per_pass = batch.micro_batch_size * dp_size
    if batch.global_batch_size < 1 or batch.global_batch_size % per_pass:
        raise HydraError(
            f"batch.global_batch_size {batch.global_batch_size} is not a multiple of "
            f"batch.micro_batch_size {batch.micro_batch_size} x data-parallel size {dp_size}"
        )
