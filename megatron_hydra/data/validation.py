"""The sequences that a validation reads: the same every time, for any layout and batch size."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig, ValidationConfig
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.data.document import Document
from megatron_hydra.data.sampling import Draw, derive_key
from megatron_hydra.data.stream import PackedStream, pack_micro_batch
from megatron_hydra.errors import HydraError

VALIDATION_SEED = derive_key("validation")
"""A fixed seed, not the run's: runs with other seeds read the same sequences, and generated samples differ
from those of training."""

PADDING = -1
"""Sample number of a sequence that only pads a micro-batch."""


class ValidationStream:
    """Validation data, part by part, for one data-parallel rank.

    Attributes:
        labels: unique labels of the parts: the last component of the path, or the task, with the length of
            its documents if given (``needles@1024``).
        counts: number of sequences of each part.
    """

    def __init__(
        self,
        data: DataConfig,
        validation: ValidationConfig,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        tokenizer: Any = None,
        probes: bool = False,
    ) -> None:
        """Open every part and check that it has enough sequences.

        Args:
            data, validation: the run's sections.
            micro_batch_size: number of sequences of a micro-batch.
            dp_rank, dp_size: data-parallel rank and size, as for :class:`~.stream.PackedStream`.
            vocab_size: vocabulary size of the model.
            tokenizer: an HF tokenizer; loaded from ``data.tokenizer`` if omitted.
            probes: read ``validation.probes`` instead of the held-out data.

        Raises:
            HydraError: training would refuse the data as well; or a part has too few sequences, or no token
                with a loss.
        """
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        data = dataclasses.replace(data, seed=VALIDATION_SEED, token_budget=0)
        blend = validation.probes if probes else validation.blend
        if blend:
            data = dataclasses.replace(data, blend=blend, held_out=0.0)
        self._data, self._sequences = data, validation.sequences
        # One rank and one sequence per step, so that the fingerprint does not depend on the layout.
        self._stream = PackedStream(
            data,
            BatchConfig(1, 1),
            dp_rank=0,
            dp_size=1,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            for_validation=True,
        )
        self.labels = _labels(data)
        drawn = self._stream.drawn_before(validation.sequences)
        self.counts = [max(1, count) for count in drawn]
        if probes:
            self.counts = [validation.probe_sequences] * len(blend)
        names = {True: "validation.probes", False: "validation.blend" if blend else "data.blend"}
        self._check_enough_documents(names[probes])

    def _check_enough_documents(self, key: str) -> None:
        for i, (source, count) in enumerate(zip(self._stream.sources, self.counts, strict=True)):
            there = source.samples_per_epoch
            if there is not None and count > there:
                raise HydraError(
                    f"validation.sequences is {self._sequences}: {key}.{i} ({source.name}) must provide "
                    f"{count} of them but has {there}; lower it, or hold out more data"
                )
            if not any(_has_learned_token(self._documents(i, n)) for n in range(count)):
                raise HydraError(
                    f"{key}.{i} ({source.name}): its {count} held-out sequences have no token with a "
                    "loss; raise validation.sequences, or hold out other data"
                )

    def _documents(self, part: int, number: int) -> list[Document]:
        return self._stream.drawn_documents(Draw(part, number))

    @property
    def files(self) -> list[str]:
        """Identity of each part's tokens; empty: generated."""
        return [source.files for source in self._stream.sources]

    def num_micro_batches(self, part: int, multiple: int = 1) -> int:
        """Number of micro-batches of a part on every data-parallel rank, rounded up to a multiple."""
        per_round = self.micro_batch_size * self.dp_size
        return -(-self.counts[part] // (per_round * multiple)) * multiple

    def micro_batches(self, part: int, multiple: int = 1) -> Iterator[PackedBatch]:
        """This rank's micro-batches of a part. The last one is padded without a loss.

        Args:
            part: index of the part in the blend.
            multiple: the number of micro-batches is a multiple of it, which some schedules need.
        """
        for round_ in range(self.num_micro_batches(part, multiple)):
            first = (round_ * self.dp_size + self.dp_rank) * self.micro_batch_size
            numbers = range(first, first + self.micro_batch_size)
            count = self.counts[part]
            yield pack_micro_batch(
                [self._documents(part, n) if n < count else [] for n in numbers],
                self._data.sequence_length,
                tuple(n if n < count else PADDING for n in numbers),
            )

    def fingerprint(self) -> dict[str, Any]:
        """All settings that decide the data read. JSON."""
        data = self._data
        return {
            "validation.sequences": self._sequences,
            "data.sequence_length": data.sequence_length,
            "data.packing": data.packing,
            "data.held_out": data.held_out,
            "parts": [
                {k: part[k] for k in ("weight", "fingerprint")} for part in self._stream.parts()
            ],
        }


def _has_learned_token(documents: list[Document]) -> bool:
    """Whether any token has a loss. The first token of a document has none."""
    return any(document.trainable[1:].any() for document in documents)


def _label(part: SourceConfig) -> str:
    if part.kind == "indexed":
        return os.path.basename(os.path.normpath(part.path))
    lengths = part.options.get("document_length")
    if not isinstance(lengths, (list, tuple)):
        return part.task
    return f"{part.task}@{'-'.join(dict.fromkeys(map(str, lengths)))}"


def _labels(data: DataConfig) -> list[str]:
    names = [_label(part) for part in data.blend]
    return [
        name if names.count(name) == 1 else f"{name}.{position}"
        for position, name in enumerate(names)
    ]
