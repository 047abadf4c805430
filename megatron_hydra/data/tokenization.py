"""Corpus to ``.bin/.idx`` on many processes, such that a run killed at any moment can go on.

Workers turn units of the corpus into parts (see :mod:`megatron_hydra.data.parts`), each a pure
function of its unit; this process assembles them in order in ``<output>.work/``. After a kill, what
was recorded as done is kept and the rest is made: the result has the bytes of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.data.corpus import Unit, input_identity, plan_units
from megatron_hydra.data.hub import pin_revisions
from megatron_hydra.data.manifest import Manifest, write_json_atomically
from megatron_hydra.data.part_worker import Worker, finished_parts
from megatron_hydra.data.parts import Assembler, State, publish
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.data.tokenizer import tokenizer_fingerprint
from megatron_hydra.errors import HydraError

_PROGRESS_SECONDS = 2.0
Report = Callable[[str], None]


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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    config = dataclasses.replace(config, corpus=pin_revisions(config.corpus, report))
    worker = Worker(config)
    units = _shard_of(plan_units(config.corpus), config.shard)
    recipe = _recipe(config, worker)
    try:
        with _locked(config):
            if _is_done(config, recipe):
                report(f"{config.prefix}: prepared already, nothing to do")
                return Manifest.load(config.prefix + ".json")
            _claim(config, {**recipe, "units": _digest(units, config)})
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
            raise HydraError(f"cannot prepare {config.prefix}: {error}") from error
        raise HydraError(
            f"the disk is full while writing {config.work}; make room and run the same command "
            "again: it goes on where it stopped"
        ) from error


def _shard_of(units: list[Unit], shard: tuple[int, int]) -> list[Unit]:
    """Contiguous units of one shard: about 1/n of the bytes, in order, and at least one unit."""
    index, count = shard
    if not 0 <= index < count:
        raise HydraError(f"--shard {index}/{count}: the first number must be 0..{count - 1}")
    if len(units) < count:
        raise HydraError(
            f"--shard {index}/{count}: the corpus has only {len(units)} units to share out; use "
            "fewer shards or a smaller --unit-size"
        )
    sizes = np.array([max(unit.size, 1) for unit in units])
    middles = np.cumsum(sizes) - sizes / 2
    first = np.searchsorted(middles * count / sizes.sum(), np.arange(count + 1)).tolist()
    for own in range(1, count):
        first[own] = max(first[own], first[own - 1] + 1)
    for own in range(count - 1, 0, -1):
        first[own] = min(first[own], first[own + 1] - 1)
    return units[first[index] : first[index + 1]]


def _recipe(config: TokenizeConfig, worker: Worker) -> dict[str, Any]:
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
            if os.fstat(stream.fileno()).st_ino != os.stat(path).st_ino:
                raise BlockingIOError  # removed by the process that held it, and made anew
        except (BlockingIOError, FileNotFoundError) as error:
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
            before = [entry.get("revision") for entry in old.get("inputs", [])]
            commits = f"; --revision was {', '.join(map(str, before))}" if any(before) else ""
            raise HydraError(
                f"{config.work} holds unfinished work of another preparation (different: "
                f"{', '.join(different)}{commits}); finish that one, or start over with --force"
            )
        shutil.rmtree(config.work)
    config.work.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, plan)


def _make_parts(
    config: TokenizeConfig,
    units: list[Unit],
    worker: Worker,
    assembler: Assembler,
    report: Report,
) -> None:
    """Make and assemble all parts that are missing."""
    progress = _Progress(units, assembler.state, report)
    _check_bad_rows(config, assembler)
    todo = range(assembler.state.parts, 0 if assembler.state.full else len(units))
    with contextlib.closing(finished_parts(config, units, todo, worker)) as finished:
        for number in finished:
            assembler.append(number)
            progress.show(assembler.state)
            _check_bad_rows(config, assembler)
            if assembler.state.full:
                break
    progress.show(assembler.state, last=True)


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
