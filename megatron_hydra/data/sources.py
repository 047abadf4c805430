"""The parts of a blend: each maps a sample number to the documents of one packed sequence."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any, Protocol, Self

import numpy as np

from megatron_hydra.config.run import DataConfig, SourceConfig
from megatron_hydra.data.document import Document
from megatron_hydra.data.held_out import Side
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.pack_index import pack_index
from megatron_hydra.data.packing import upsample_factors
from megatron_hydra.data.sampling import Permutation, derive_key
from megatron_hydra.data.synthetic import find_task, generate
from megatron_hydra.data.tokenizer import tokenizer_fingerprint
from megatron_hydra.errors import HydraError

_TRIED = 64
_PROBED = 64
_COUNTED = 1 << 20


class Source(Protocol):
    """Interface between a stream and a source.

    Attributes:
        name: name for logs and messages.
        samples_per_epoch: number of packed sequences until the part repeats; ``None``: it never repeats.
        files: identity of the tokens, independent of packing; empty: generated.
    """

    name: str
    samples_per_epoch: int | None
    files: str

    def sample(self, index: int) -> list[Document]:
        """Documents of sample ``index`` (0, 1, 2, …), at most S tokens in all."""

    def fingerprint(self) -> str:
        """Hash that changes if any sample changes."""

    def identity(self) -> str:
        """Hash of the samples, independent of their order."""

    def with_seed(self, seed: int) -> Self:
        """The same part in another order."""

    def content(self, first: int, end: int) -> tuple[int, int] | None:
        """Number of pieces and of their tokens in samples ``first … end−1``; ``None``: unknown."""


class IndexedSource:
    """Tokenised text: packs in a new seeded order every epoch."""

    def __init__(
        self,
        config: SourceConfig,
        data: DataConfig,
        *,
        seed: int,
        vocab_size: int,
        for_validation: bool = False,
    ) -> None:
        """Open the files, load or build the packing, and check both.

        Args:
            config, data: the source, and the settings of packing.
            seed: seed of the order of packs.
            vocab_size: vocabulary size of the model.
            for_validation: read the documents that ``data.held_out`` holds out, instead of the others.

        Raises:
            HydraError: the files are damaged, or were made with another tokenizer.
        """
        self.name = config.path
        self.documents = IndexedDocuments(config.path)
        upsampling = upsample_factors(config.upsample, config.path)
        self.packs, self.description = pack_index(
            self.documents,
            sequence_length=data.sequence_length,
            packing=data.packing,
            seed=data.seed,
            upsampling=upsampling,
            cache_dir=data.cache_dir,
            side=Side(data.held_out, for_validation) if data.held_out else None,
        )
        self.samples_per_epoch: int | None = len(self.packs)
        self.files = self.documents.fingerprint()
        largest = self.description["max_token_id"]
        if largest >= vocab_size:
            raise HydraError(
                f"{config.path}.bin holds token id {largest:,}, the model's vocabulary has "
                f"{vocab_size:,}: the data was made with another tokenizer; prepare it again"
            )
        self._seed = seed
        self._order: tuple[int, Permutation] | None = None
        self._fingerprint = ""

    def pack_number(self, index: int) -> int:
        """The pack of sample ``index``. Every epoch visits every pack once."""
        epoch, position = divmod(index, len(self.packs))
        if self._order is None or self._order[0] != epoch:
            key = derive_key(self._seed, "epoch", epoch)
            self._order = (epoch, Permutation(len(self.packs), key))
        return self._order[1](position)

    def with_seed(self, seed: int) -> IndexedSource:
        """The same packs in the order of another seed; the files are opened once."""
        if seed == self._seed:
            return self
        other = copy.copy(self)
        other._seed, other._order, other._fingerprint = seed, None, ""
        return other

    def content(self, first: int, end: int) -> tuple[int, int]:
        """Number of pieces and of their tokens (no padding) in samples ``first … end−1``.

        A whole epoch is counted once and multiplied. The rest is counted in blocks of samples, to limit memory.
        """
        packs, report = len(self.packs), self.description["report"]
        epochs = max(0, end // packs - -(-first // packs))  # whole epochs
        pieces, tokens = epochs * report["pieces"], epochs * report["tokens_per_epoch"]
        rest = [(first, end)]
        if epochs:
            rest = [(first, -(-first // packs) * packs), (end // packs * packs, end)]
        for begin, stop in rest:
            while begin < stop:
                epoch = begin // packs
                until = min(stop, (epoch + 1) * packs, begin + _COUNTED)
                order = Permutation(packs, derive_key(self._seed, "epoch", epoch))
                chosen = order.of(np.arange(begin, until) - epoch * packs)
                pieces += self.packs.pieces_in(chosen)
                tokens += self.packs.tokens_in(chosen)
                begin = until
        return pieces, tokens

    def sample(self, index: int) -> list[Document]:
        """The documents and pieces of one pack."""
        pieces = self.packs.pieces(self.pack_number(index))
        return [self.documents.read_piece(offset, length) for offset, length in pieces]

    def fingerprint(self) -> str:
        """Hash of the packing (its inputs and its result) and of its order.

        The hash includes the result, because another version of this code or of NumPy may give other packs for
        the same options.
        """
        if not self._fingerprint:
            order = Permutation(len(self.packs), derive_key(self._seed, "epoch", 0))
            first = order.of(np.arange(min(len(self.packs), _PROBED))).tolist()
            self._fingerprint = _digest([*self._packing(), first])
        return self._fingerprint

    def identity(self) -> str:
        """Hash of the packing without its order."""
        return _digest(self._packing())

    def _packing(self) -> list[Any]:
        return [self.description["key"], self.description["arrays"]]

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Check that the tokenizer is the one in the manifest, if a manifest exists.

        Raises:
            HydraError: they differ.
        """
        manifest = self.documents.manifest
        if manifest is None:
            return
        recorded = manifest.tokenizer.get("fingerprint", "")
        if recorded and recorded != tokenizer_fingerprint(tokenizer):
            raise HydraError(
                f"{self.name}.json: prepared with the tokenizer "
                f"{manifest.tokenizer.get('name')!r}, which is not data.tokenizer; prepare the "
                "data again"
            )


class SyntheticSource:
    """A generated task; sample i is a pure function of (seed, i) and never repeats."""

    samples_per_epoch: int | None = None
    files = ""

    def __init__(
        self, config: SourceConfig, data: DataConfig, *, seed: int, tokenizer: Any
    ) -> None:
        """Find the task and make one sample, so that bad options fail before training.

        Raises:
            HydraError: the task or an option is unknown, or the task needs a tokenizer.
        """
        self.name = config.task
        self._generator = find_task(config.task)
        self._options = config.options
        self._length = data.sequence_length
        self._tokenizer = tokenizer
        self._key = derive_key(seed, config.task)
        self.sample(0)
        if "document_length" in self._options:
            self._try_shortest()

    def _try_shortest(self) -> None:
        """Make some documents of the shortest length that the options allow.

        Whether the facts of a task fit depends on the random draw. A length that sometimes fails should fail
        here and not during a run.
        """
        shortest = {k: v for k, v in self._options.items() if k != "document_length"}
        low = int(self._options["document_length"][0])
        for index in range(_TRIED):
            generate(self._generator, self._key, index, low, self._tokenizer, shortest)

    def with_seed(self, seed: int) -> SyntheticSource:
        """The same task with other samples."""
        if (key := derive_key(seed, self.name)) == self._key:
            return self
        other = copy.copy(self)
        other._key = key
        return other

    def identity(self) -> str:
        """Hash of task, options and length."""
        return _digest([self.name, self._options, self._length])

    def content(self, first: int, end: int) -> None:
        """Return None: the content is unknown without generating the samples again."""

    def sample(self, index: int) -> list[Document]:
        """Generated documents."""
        return generate(
            self._generator, self._key, index, self._length, self._tokenizer, self._options
        )

    def fingerprint(self) -> str:
        """Hash of task, options, length, seed, tokenizer and of one generated sample."""
        digest = hashlib.sha256(
            json.dumps([self.name, self._options, self._length, self._key], sort_keys=True).encode()
        )
        for document in self.sample(0):
            digest.update(document.tokens.astype(np.int64).tobytes())
            digest.update(document.trainable.tobytes())
        return digest.hexdigest()[:24]


def _digest(body: list[Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]
