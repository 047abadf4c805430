"""The worker processes that turn units of a corpus into parts."""

from __future__ import annotations

import collections
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.data.chat import ChatError, encode_chat, runs
from megatron_hydra.data.corpus import Row, Unit
from megatron_hydra.data.parts import Counts, PartWriter, part_path
from megatron_hydra.data.rows import read_unit
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.data.tokenizer import encode_batch, token_dtype, vocabulary_size
from megatron_hydra.data.word_encoder import WordEncoder
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_tokenizer

UNITS_AHEAD = 4
"""Number of units in work or queued, per process."""
_TICK_SECONDS = 1.0


class Worker:
    """Turns units into parts in one process.

    Attributes:
        config: the preparation.
        tokenizer, dtype, eod: the HF tokenizer, the storage type of its ids, its end token.
    """

    def __init__(self, config: TokenizeConfig) -> None:
        """Load the tokenizer.

        Raises:
            HydraError: the tokenizer cannot be loaded or lacks the end token; or, for conversations, it
                lacks a chat template or offsets.
        """
        self.config = config
        self.tokenizer = load_tokenizer(
            config.tokenizer, config.tokenizer_revision, config.trust_remote_code
        )
        if config.corpus.chat:
            _check_chat(config, self.tokenizer)
        self.dtype = token_dtype(vocabulary_size(self.tokenizer))
        self.eod = _eod_id(config, self.tokenizer)
        self._encoder = WordEncoder(
            self.tokenizer,
            self.dtype,
            add_special_tokens=config.add_special_tokens,
            fast=not config.exact and not config.corpus.chat,
        )
        has_eod = self.eod is None or (
            config.add_special_tokens and _ends_with(self.tokenizer, self.eod)
        )
        self._eod_bytes = b"" if has_eod else np.array([self.eod], self.dtype).tobytes()

    def make_part(self, number: int, unit: Unit, until: float = math.inf) -> tuple[Counts, bool]:
        """Write part ``number``.

        Args:
            number, unit: number and unit of the part.
            until: ``time.monotonic()`` at which to stop inside the unit, for a timed sample.

        Returns:
            Counts of the rows read, and whether the whole unit was read.
        """
        part = PartWriter(part_path(self.config.work, number), self.dtype)
        is_whole = True
        try:
            for row in read_unit(unit, self.config.corpus):
                if until < math.inf and time.monotonic() >= until:
                    is_whole = False
                    break
                self._add(part, row)
            part.finish()
        except BaseException:
            part.discard()
            raise
        return part.counts, is_whole

    def room_for_words(self) -> int:
        """Number of bytes by which the table of words may still grow."""
        return self._encoder.room_for_words()

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
                self._add_chat(part, row) if chat else self._add_text(part, row.value)
            except UnicodeEncodeError:
                part.bad(row.where, "the text has a lone surrogate, which is not valid Unicode")
            except ChatError as error:
                part.bad(row.where, str(error))

    def _add_text(self, part: PartWriter, text: str) -> None:
        encoded = self._encoder.encode(text) + self._eod_bytes
        part.add(encoded, [len(encoded) // part.itemsize], [])

    def _add_chat(self, part: PartWriter, row: Row) -> None:
        ids, learned = encode_chat(self.tokenizer, row.value, row.tools)
        if self.eod is not None and ids[-1] != self.eod:  # some templates end with it
            ids, learned = np.append(ids, self.eod), np.append(learned, False)
        lengths, modes = runs(learned)
        part.add(ids.astype(self.dtype).tobytes(), lengths.tolist(), modes.tolist())


def _check_chat(config: TokenizeConfig, tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise HydraError(
            f"--chat: the tokenizer {config.tokenizer!r} has no chat template; use the one of a "
            "chat model"
        )
    if not tokenizer.is_fast:
        raise HydraError(
            f"--chat: the tokenizer {config.tokenizer!r} is a slow tokenizer, which gives no offsets of its "
            "tokens in the text; use one with a tokenizer.json"
        )


def _ends_with(tokenizer: Any, token: int | None) -> bool:
    """Whether the tokenizer itself appends the token to a text."""
    (ids,) = encode_batch(tokenizer, ["a"], add_special_tokens=True)
    return bool(ids) and ids[-1] == token


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
    """Initialise a process: end with the parent, ignore Ctrl-C (the parent handles it), load the tokenizer."""
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
) -> Generator[int | None, None, None]:
    """Yield part numbers in order, each after it is complete; a few parts are made ahead.

    While the next part is in work, the generator yields ``None`` every second, so that the caller can show
    progress. If it is closed early or fails, the worker processes are killed. Complete parts are kept; the
    resumed run makes the others.

    Args:
        config, units: the preparation.
        todo: numbers of the parts to make.
        worker: the worker of this process, which forked processes share.

    Raises:
        HydraError: a worker process died.
    """
    global _worker
    if config.workers == 0:
        for number in todo:
            if not _is_made(config, number):
                worker.make_part(number, units[number])
            yield number
        return
    _worker = worker
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn" if config.corpus.hub else "fork")
    pool = ProcessPoolExecutor(
        config.workers, context, initializer=_start_worker, initargs=(config, os.getpid())
    )
    complete = False
    try:
        yield from _parts_of_pool(pool, config, units, todo)
        complete = True
    except BrokenProcessPool as error:
        raise HydraError(
            "a worker died (out of memory?); run the same command again to resume, with fewer "
            "--workers if it happens again"
        ) from error
    finally:
        if not complete:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        _worker = None


def _parts_of_pool(
    pool: Executor, config: TokenizeConfig, units: list[Unit], todo: range
) -> Iterator[int | None]:
    streams = config.corpus.hub and config.corpus.streaming  # units of streams take long
    most = config.workers + 1 if streams else UNITS_AHEAD * config.workers
    waiting: collections.deque[tuple[int, Future[None] | None]] = collections.deque()
    numbers = iter(todo)
    while True:
        while len(waiting) < most and (n := next(numbers, None)) is not None:
            made = _is_made(config, n)
            waiting.append((n, None if made else pool.submit(_make_part, n, units[n])))
        if not waiting:
            return
        number, future = waiting.popleft()
        if future is not None:
            while not wait([future], _TICK_SECONDS).done:
                yield None
            future.result()
        yield number


def _is_made(config: TokenizeConfig, number: int) -> bool:
    return Path(f"{part_path(config.work, number)}.json").exists()
