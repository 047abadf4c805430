"""Tokenise a corpus to ``.bin/.idx`` in many processes. A run that is killed at any moment can be resumed.

Workers turn units of the corpus into parts (see :mod:`megatron_hydra.data.parts`). A part depends only on its
unit. The main process assembles the parts in order in ``<output>.work/``. After a kill, recorded work is kept
and the rest is made again. The result has the same bytes as an undisturbed run.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_hydra.data.corpus import Unit, input_identity
from megatron_hydra.data.hub import pin_revisions
from megatron_hydra.data.manifest import Manifest
from megatron_hydra.data.part_worker import Worker, finished_parts
from megatron_hydra.data.parts import Assembler, publish
from megatron_hydra.data.progress import Progress, Report
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.data.tokenizer import (
    chat_template_fingerprint,
    special_tokens_fingerprint,
    tokenizer_fingerprint,
    vocabulary_size,
)
from megatron_hydra.data.units import plan_units
from megatron_hydra.errors import HydraError
from megatron_hydra.files import write_json_atomic

_LOCK_PATIENCE = 5.0
"""Seconds to wait for an output's lock. Workers of a killed run hold it until they have ended."""


def tokenize(config: TokenizeConfig, report: Report = print) -> Manifest:
    """Prepare a corpus, or resume a stopped preparation.

    Args:
        config: the options.
        report: function that takes lines of progress.

    Returns:
        The manifest, which is also at ``<prefix>.json``.

    Raises:
        HydraError: inputs, tokenizer or options are wrong; too many rows are unreadable; the disk is full; or
            the output exists and belongs to another preparation.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process uses one core
    config = dataclasses.replace(config, corpus=pin_revisions(config.corpus, report))
    worker = Worker(config)
    try:
        planned = plan_units(config.corpus, report)
        units = _shard_of(planned, config.shard)
        recipe = _recipe(config, worker, planned)
        with _locked(config):
            if _is_done(config, recipe):
                report(f"{config.prefix} is complete, nothing to do")
                return Manifest.load(config.prefix + ".json")
            _claim(config, _plan(config, units, recipe))
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
            f"the disk is full while writing {config.work}; free some space and run the same command "
            "again; it resumes"
        ) from error


def _shard_of(units: list[Unit], shard: tuple[int, int]) -> list[Unit]:
    """Contiguous units of one shard, in order: about 1/n of the bytes and at least one unit."""
    index, count = shard
    if not 0 <= index < count:
        raise HydraError(f"--shard {index}/{count}: the first number must be 0..{count - 1}")
    if len(units) < count:
        raise HydraError(
            f"--shard {index}/{count}: the corpus has only {len(units)} units; use "
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


def _recipe(config: TokenizeConfig, worker: Worker, planned: list[Unit]) -> dict[str, Any]:
    """All inputs and options that decide the output's bytes; JSON.

    Args:
        config, worker: the preparation.
        planned: units of all shards, so that shards from other units have another recipe.
    """
    corpus, tokenizer = config.corpus, worker.tokenizer
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
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "eod_id": worker.eod,
        },
    }
    if config.add_special_tokens:
        recipe["special_tokens"] = special_tokens_fingerprint(tokenizer)
    if corpus.tools_column:
        recipe["tools_column"] = corpus.tools_column
    if corpus.chat:
        recipe["chat_template"] = chat_template_fingerprint(tokenizer)
    index, count = config.shard
    if count > 1:
        recipe["shard"] = {"index": index, "count": count, "units": _digest(planned)}
    return recipe


def _digest(units: list[Unit]) -> str:
    """Identity of a work list, the same on every node."""
    rows = [(os.path.basename(u.path), u.kind, u.begin, u.end, u.size) for u in units]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _plan(config: TokenizeConfig, units: list[Unit], recipe: dict[str, Any]) -> dict[str, Any]:
    """The plan that unfinished work must match. It changes if an input file is modified."""
    paths = [] if config.corpus.hub else sorted({unit.path for unit in units})
    modified = [[path, os.stat(path).st_mtime_ns] for path in paths]
    return {**recipe, "units": _digest(units), "modified": modified}


@contextlib.contextmanager
def _locked(config: TokenizeConfig) -> Iterator[None]:
    """Lock the output, so that only one process prepares it."""
    path = Path(config.prefix + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, config.prefix):
        try:
            yield
        finally:
            path.unlink()


def _lock(path: Path, prefix: str) -> TextIO:
    """Create and lock a file; closing the file releases the lock."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        stream = open(path, "w", encoding="utf-8")  # noqa: SIM115  # the caller closes it
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(stream.fileno()).st_ino == os.stat(path).st_ino:
                return stream
        except (BlockingIOError, FileNotFoundError):
            pass  # another process holds it, or has just removed and released it
        stream.close()
        if time.monotonic() > deadline:
            raise HydraError(f"{prefix} is being prepared by another process")
        time.sleep(0.1)


def _is_done(config: TokenizeConfig, recipe: dict[str, Any]) -> bool:
    """Whether the output of this preparation is complete; finishes an interrupted move to the final names.

    Raises:
        HydraError: the output belongs to another preparation and ``force`` is off.
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
    """Create the work folder, or check that it belongs to this preparation."""
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
                f"{config.work} has unfinished work of another preparation (different: "
                f"{', '.join(different)}{commits}); finish that one, or start again with --force"
            )
        shutil.rmtree(config.work)
    config.work.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, plan)


def _make_parts(
    config: TokenizeConfig,
    units: list[Unit],
    worker: Worker,
    assembler: Assembler,
    report: Report,
) -> None:
    """Make and assemble all missing parts."""
    progress = Progress(units, assembler, config.max_tokens, report)
    _check_bad_rows(config, assembler)
    todo = range(assembler.state.parts, 0 if assembler.state.full else len(units))
    with contextlib.closing(finished_parts(config, units, todo, worker)) as finished:
        for number in finished:
            if number is not None:
                assembler.append(number)
                _check_bad_rows(config, assembler)
            progress.show()
            if assembler.state.full:
                break
    progress.show(last=True)


def _check_bad_rows(config: TokenizeConfig, assembler: Assembler) -> None:
    count = assembler.state.counts.bad_rows
    if count <= config.max_bad_rows:
        return
    assembler.sync()
    shown = "".join(f"\n  {where}: {error}" for where, error in assembler.state.bad)
    raise HydraError(
        f"{count} unreadable row{'s' if count > 1 else ''}, above --max-bad-rows "
        f"{config.max_bad_rows}. The first:{shown}\nRepair the input, or skip such rows: run the same "
        "command with a higher --max-bad-rows (finished work is kept)"
    )


def _finish(
    config: TokenizeConfig, recipe: dict[str, Any], assembler: Assembler, report: Report
) -> Manifest:
    """Write index and manifest, and move the files to their final names."""
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
