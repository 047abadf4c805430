"""Corpus to ``.bin/.idx`` on many processes, such that a run killed at any moment can go on.

Workers turn units of the corpus into parts (see :mod:`megatron_hydra.data.parts`), each a pure
function of its unit; this process assembles them in order in ``<output>.work/``. After a kill, what
was recorded as done is kept and the rest is made: the result has the bytes of an undisturbed run.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.data.chat import ChatError, encode_chat, runs
from megatron_hydra.data.corpus import (
    CorpusConfig,
    Row,
    Unit,
    input_identity,
    plan_units,
    read_unit,
)
from megatron_hydra.data.manifest import Manifest, write_json_atomically
from megatron_hydra.data.parts import Assembler, PartWriter, State, part_path, publish
from megatron_hydra.data.tokenizer import load_tokenizer, token_dtype, tokenizer_fingerprint
from megatron_hydra.data.word_encoder import WordEncoder
from megatron_hydra.errors import HydraError

_PROGRESS_SECONDS = 2.0
_AHEAD = 4
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """One preparation.

    Attributes:
        corpus: the inputs.
        output: prefix of the files to write; a shard adds ``-00003-of-00016``.
        tokenizer: path or Hub name.
        tokenizer_revision: git revision on the Hub.
        workers: processes; 0: do the work in this process.
        append_eod: end every document with the end token.
        eod_token: which; ``None``: the tokenizer's ``eos_token``.
        add_special_tokens: as in HF's ``tokenizer(text)`` (Llama's BOS, for instance).
        keep_empty: keep documents without text as empty ones (as Megatron-LM does).
        max_tokens: stop before the document that would exceed it; 0: no limit.
        max_bad_rows: unreadable rows to skip before giving up.
        shard: (i, n): only the i-th of n contiguous parts of the corpus.
        exact: never take the fast path of the word encoder.
        trust_remote_code: run a tokenizer's own Python code.
        force: replace an existing output.
    """

    corpus: CorpusConfig
    output: str
    tokenizer: str
    tokenizer_revision: str | None = None
    workers: int = 1
    append_eod: bool = True
    eod_token: str | None = None
    add_special_tokens: bool = True
    keep_empty: bool = False
    max_tokens: int = 0
    max_bad_rows: int = 0
    shard: tuple[int, int] = (0, 1)
    exact: bool = False
    trust_remote_code: bool = False
    force: bool = False

    @property
    def prefix(self) -> str:
        """Where this run's files go."""
        index, count = self.shard
        return self.output if count == 1 else shard_prefix(self.output, index, count)

    @property
    def work(self) -> Path:
        """The folder of unfinished work."""
        return Path(self.prefix + ".work")


def shard_prefix(output: str, index: int, count: int) -> str:
    """Name of one shard's files."""
    return f"{output}-{index:05d}-of-{count:05d}"


# -- workers ----------------------------------------------------------------------------------


class _Worker:
    """What a process needs to turn units into parts."""

    def __init__(self, config: TokenizeConfig) -> None:
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


_worker: _Worker | None = None


def _start_worker(config: TokenizeConfig, parent: int) -> None:
    """Process initialiser: die with the parent, leave Ctrl-C to it, load the tokenizer once."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    if _worker is None:
        _worker = _Worker(config)


def _make_part(number: int, unit: Unit) -> None:
    assert _worker is not None
    _worker.make_part(number, unit)


# -- the main process -------------------------------------------------------------------------


def tokenize(config: TokenizeConfig, report: Report = print) -> Manifest:
    """Prepare a corpus, or go on with a preparation that was stopped.

    Args:
        config: what to do.
        report: takes lines of progress.

    Returns:
        The manifest, which is also at ``<prefix>.json``.

    Raises:
        HydraError: inputs, tokenizer or options are wrong, too many rows are unreadable, the disk
            is full, or the output exists and is another preparation's.
    """
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    worker = _Worker(config)
    units = _shard_of(plan_units(config.corpus), config.shard)
    recipe = _recipe(config, worker)
    try:
        with _locked(config):
            if _is_done(config, recipe):
                report(f"{config.prefix}: prepared already, nothing to do")
                return Manifest.load(config.prefix + ".json")
            _claim(config, {**recipe, "units": _digest(units, config)})
            _worker = worker
            assembler = Assembler(
                config.work,
                worker.dtype,
                has_modes=config.corpus.chat,
                max_tokens=config.max_tokens,
            )
            with contextlib.closing(assembler):
                _make_parts(config, units, worker, assembler, report)
                return _finish(config, recipe, assembler, report)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HydraError(
            f"the disk is full while writing {config.work}; make room and run the same command "
            "again: it goes on where it stopped"
        ) from error
    finally:
        _worker = None


def _shard_of(units: list[Unit], shard: tuple[int, int]) -> list[Unit]:
    """Contiguous units of one shard: about 1/n of the bytes, in order."""
    index, count = shard
    if not 0 <= index < count:
        raise HydraError(f"--shard {index}/{count}: the first number must be 0..{count - 1}")
    middles = np.cumsum([unit.size for unit in units]) - np.array([u.size for u in units]) / 2
    owner = np.minimum(middles * count // sum(unit.size for unit in units), count - 1)
    chosen = [unit for unit, own in zip(units, owner, strict=True) if own == index]
    if not chosen:
        raise HydraError(
            f"--shard {index}/{count}: the corpus has only {len(units)} units to share out; use "
            "fewer shards or a smaller --unit-size"
        )
    return chosen


def _recipe(config: TokenizeConfig, worker: _Worker) -> dict[str, Any]:
    """All that decides the output's bytes; JSON."""
    corpus = config.corpus
    recipe: dict[str, Any] = {
        "inputs": input_identity(corpus),
        "column": corpus.column,
        "format": corpus.format,
        "chat": corpus.chat,
        "append_eod": config.append_eod,
        "add_special_tokens": config.add_special_tokens,
        "keep_empty": config.keep_empty,
        "max_tokens": config.max_tokens,
        "tokenizer": {
            "name": config.tokenizer,
            "revision": config.tokenizer_revision,
            "fingerprint": tokenizer_fingerprint(worker.tokenizer),
            "vocab_size": len(worker.tokenizer),
            "eod_id": worker.eod,
        },
    }
    if config.shard[1] > 1:
        recipe["shard"] = {"index": config.shard[0], "count": config.shard[1]}
        recipe["unit_bytes"] = corpus.unit_bytes
    return recipe


def _digest(units: list[Unit], config: TokenizeConfig) -> str:
    """Identity of the work list; changes if an input file is touched."""
    local = not config.corpus.hub
    stamps = sorted({(u.path, os.stat(u.path).st_mtime_ns if local else 0) for u in units})
    body = json.dumps([[dataclasses.astuple(unit) for unit in units], stamps])
    return hashlib.sha256(body.encode()).hexdigest()


@contextlib.contextmanager
def _locked(config: TokenizeConfig) -> Iterator[None]:
    """One process at a time prepares an output."""
    path = Path(config.prefix + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HydraError(f"{config.prefix} is being prepared by another process") from error
        try:
            yield
        finally:
            path.unlink()


def _is_done(config: TokenizeConfig, recipe: dict[str, Any]) -> bool:
    """Whether the output is there and is this preparation's; finishes an interrupted publication.

    Raises:
        HydraError: the output is another preparation's and ``force`` is off.
    """
    if (config.work / "manifest.json").exists():
        publish(config.work, config.prefix)
    existing = [config.prefix + s for s in (".json", ".bin", ".idx")]
    existing = [path for path in existing if os.path.exists(path)]
    if not existing or config.force:
        return False
    manifest = Manifest.load(existing[0]) if existing[0].endswith(".json") else None
    if manifest is not None and {**manifest.source, "tokenizer": manifest.tokenizer} == recipe:
        manifest.check_files(config.prefix)
        shutil.rmtree(config.work, ignore_errors=True)
        return True
    raise HydraError(
        f"{existing[0]} exists and comes from other inputs or options; choose another --output, or "
        "replace it with --force"
    )


def _claim(config: TokenizeConfig, plan: dict[str, Any]) -> None:
    """Begin the work folder, or check that it is ours."""
    path = config.work / "plan.json"
    if config.work.exists() and not path.exists():
        shutil.rmtree(config.work)
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        different = [
            key for key in sorted(plan.keys() | old.keys()) if plan.get(key) != old.get(key)
        ]
        if not different:
            return
        if not config.force:
            raise HydraError(
                f"{config.work} holds unfinished work of another preparation (different: "
                f"{', '.join(different)}); finish that one, or start over with --force"
            )
        shutil.rmtree(config.work)
    config.work.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, plan)


def _make_parts(
    config: TokenizeConfig,
    units: list[Unit],
    worker: _Worker,
    assembler: Assembler,
    report: Report,
) -> None:
    """Make and assemble all parts that are missing."""
    progress = _Progress(units, assembler.state, report)
    _check_bad_rows(config, assembler)
    todo = range(assembler.state.parts, 0 if assembler.state.full else len(units))
    with contextlib.closing(_finished_parts(config, units, todo, worker)) as finished:
        for number in finished:
            assembler.append(number)
            progress.show(assembler.state)
            _check_bad_rows(config, assembler)
            if assembler.state.full:
                break
    progress.show(assembler.state, last=True)


def _finished_parts(
    config: TokenizeConfig, units: list[Unit], todo: range, worker: _Worker
) -> Generator[int, None, None]:
    """Part numbers in order, each once it is complete; a few are made ahead."""

    def exists(number: int) -> bool:
        return Path(f"{part_path(config.work, number)}.json").exists()

    if config.workers == 0:
        for number in todo:
            if not exists(number):
                worker.make_part(number, units[number])
            yield number
        return
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


def _check_bad_rows(config: TokenizeConfig, assembler: Assembler) -> None:
    count = assembler.state.counts.bad_rows
    if count <= config.max_bad_rows:
        return
    assembler.sync()
    shown = "".join(f"\n  {where}: {error}" for where, error in assembler.state.bad)
    raise HydraError(
        f"{count} unreadable row{'s' if count > 1 else ''}, above --max-bad-rows "
        f"{config.max_bad_rows}. The first:{shown}\nRepair the input, or skip such rows by running "
        "the same command with a higher --max-bad-rows (what is done is kept)"
    )


def _finish(
    config: TokenizeConfig, recipe: dict[str, Any], assembler: Assembler, report: Report
) -> Manifest:
    """Index, manifest, and the move to the final names."""
    counts = assembler.state.counts
    if counts.tokens == 0:
        names = ", ".join(config.corpus.inputs)
        raise HydraError(
            f"{names}: no document with text in {counts.rows:,} rows; nothing to write"
        )
    bin_record, idx_record = assembler.finish()
    source = {key: value for key, value in recipe.items() if key != "tokenizer"}
    loss = "answers" if config.corpus.chat else "all"
    manifest = Manifest(
        source, recipe["tokenizer"], dataclasses.asdict(counts), loss, bin_record, idx_record
    )
    manifest.save(config.work / "manifest.json")
    publish(config.work, config.prefix)
    for where, error in assembler.state.bad:
        report(f"skipped {where}: {error}")
    report(
        f"{config.prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens; "
        f"{counts.empty_rows:,} empty and {counts.bad_rows:,} bad of {counts.rows:,} rows"
    )
    return manifest


class _Progress:
    """One line every few seconds: share done, tokens/s, time left."""

    def __init__(self, units: list[Unit], state: State, report: Report) -> None:
        self._ends = np.cumsum([unit.size for unit in units])
        self._report = report
        self._begin = self._shown = time.monotonic()
        self._first_size = self._size(state)
        self._first_tokens = state.counts.tokens
        if state.parts:
            report(f"going on after {state.counts.tokens:,} tokens ({state.parts:,} parts)")

    def _size(self, state: State) -> int:
        return int(self._ends[state.parts - 1]) if state.parts else 0

    def show(self, state: State, last: bool = False) -> None:
        """Report if it is time."""
        now = time.monotonic()
        if now - self._shown < _PROGRESS_SECONDS and not last:
            return
        self._shown = now
        seconds = max(now - self._begin, 1e-9)
        done, total = self._size(state), int(self._ends[-1])
        rate = (state.counts.tokens - self._first_tokens) / seconds
        left = (total - done) * seconds / max(done - self._first_size, 1)
        clock = time.strftime("%H:%M:%S", time.gmtime(0 if last else left))
        self._report(
            f"{done / total:6.1%}  {state.counts.tokens:,} tokens  {rate:,.0f} tokens/s  "
            f"{state.counts.documents:,} documents  {state.counts.bad_rows} bad rows  {clock} left"
        )
