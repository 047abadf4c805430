"""The processes that turn units of a corpus into parts."""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.data.chat import ChatError, encode_chat, runs
from megatron_hydra.data.corpus import Row, Unit
from megatron_hydra.data.parts import PartWriter, part_path
from megatron_hydra.data.rows import read_unit
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.data.tokenizer import load_tokenizer, token_dtype
from megatron_hydra.data.word_encoder import WordEncoder
from megatron_hydra.errors import HydraError

_AHEAD = 4


class Worker:
    """What a process needs to turn units into parts.

    Attributes:
        config: the preparation.
        tokenizer, dtype, eod: the HF tokenizer, the storage type of its ids, its end token.
    """

    def __init__(self, config: TokenizeConfig) -> None:
        """Load the tokenizer.

        Raises:
            HydraError: it cannot be loaded, or lacks the end token.
        """
        self.config = config
        self.tokenizer = load_tokenizer(
            config.tokenizer, config.tokenizer_revision, config.trust_remote_code
        )
        self.dtype = token_dtype(len(self.tokenizer))
        self.eod = _eod_id(config, self.tokenizer)
        self._encoder = WordEncoder(
            self.tokenizer,
            self.dtype,
            add_special_tokens=config.add_special_tokens,
            fast=not config.exact and not config.corpus.chat,
        )
        self._eod_bytes = b"" if self.eod is None else np.array([self.eod], self.dtype).tobytes()

    def make_part(self, number: int, unit: Unit) -> None:
        """Write part ``number``."""
        part = PartWriter(part_path(self.config.work, number), self.dtype)
        try:
            for row in read_unit(unit, self.config.corpus):
                self._add(part, row)
            part.finish()
        except BaseException:
            part.discard()
            raise

    def _add(self, part: PartWriter, row: Row) -> None:
        part.counts.rows += 1
        chat = self.config.corpus.chat
        if row.error:
            part.bad(row.where, row.error)
        elif not row.value:
            part.counts.empty_rows += 1
            if self.config.keep_empty and not chat:
                part.add(b"", [], [])
        else:
            try:
                self._add_chat(part, row.value) if chat else self._add_text(part, row.value)
            except UnicodeEncodeError:
                part.bad(row.where, "the text holds a lone surrogate, which is not Unicode")
            except ChatError as error:
                part.bad(row.where, str(error))

    def _add_text(self, part: PartWriter, text: str) -> None:
        encoded = self._encoder.encode(text) + self._eod_bytes
        part.add(encoded, [len(encoded) // part.itemsize], [])

    def _add_chat(self, part: PartWriter, messages: list[Any]) -> None:
        ids, learned = encode_chat(self.tokenizer, messages)
        if self.eod is not None:
            ids, learned = np.append(ids, self.eod), np.append(learned, False)
        lengths, modes = runs(learned)
        part.add(ids.astype(self.dtype).tobytes(), lengths.tolist(), modes.tolist())


def _eod_id(config: TokenizeConfig, tokenizer: Any) -> int | None:
    if not config.append_eod:
        return None
    token = config.eod_token or tokenizer.eos_token
    if token is None:
        raise HydraError(
            f"the tokenizer {config.tokenizer!r} has no end token; name one with --eod-token or "
            "use --no-eod"
        )
    known = tokenizer.get_vocab().get(token)
    if known is None:
        raise HydraError(f"--eod-token {token!r} is not in the vocabulary of {config.tokenizer!r}")
    return int(known)


_worker: Worker | None = None


def _start_worker(config: TokenizeConfig, parent: int) -> None:
    """Process initialiser: die with the parent, leave Ctrl-C to it, load the tokenizer once."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    if _worker is None:
        _worker = Worker(config)


def _make_part(number: int, unit: Unit) -> None:
    assert _worker is not None
    _worker.make_part(number, unit)


def finished_parts(
    config: TokenizeConfig, units: list[Unit], todo: range, worker: Worker
) -> Generator[int, None, None]:
    """Part numbers in order, each once it is complete; a few are made ahead.

    Args:
        config, units: the preparation.
        todo: numbers of the parts that are wanted.
        worker: of this process; forked processes share it.

    Raises:
        HydraError: a worker process died.
    """
    global _worker

    def exists(number: int) -> bool:
        return Path(f"{part_path(config.work, number)}.json").exists()

    if config.workers == 0:
        for number in todo:
            if not exists(number):
                worker.make_part(number, units[number])
            yield number
        return
    _worker = worker
    context = multiprocessing.get_context("spawn" if config.corpus.hub else "fork")
    pool = ProcessPoolExecutor(
        config.workers, context, initializer=_start_worker, initargs=(config, os.getpid())
    )
    waiting: collections.deque[tuple[int, Future[None] | None]] = collections.deque()
    numbers = iter(todo)
    try:
        while True:
            while len(waiting) < _AHEAD * config.workers and (n := next(numbers, None)) is not None:
                waiting.append((n, None if exists(n) else pool.submit(_make_part, n, units[n])))
            if not waiting:
                return
            number, future = waiting.popleft()
            if future is not None:
                future.result()
            yield number
    except BrokenProcessPool as error:
        raise HydraError(
            "a worker died (out of memory?); run the same command again to go on, with fewer "
            "--workers if it happens again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _worker = None
