"""Estimate CPU time, disk space and memory of a preparation from a timed sample of its corpus.

One process tokenises units from all parts of the corpus for some seconds, like a worker. All estimates are
proportional to the results: tokens per CPU-second, bytes per token, documents per token. It writes only to a
temporary folder.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from megatron_hydra.config.run import DataConfig
from megatron_hydra.data.corpus import Unit
from megatron_hydra.data.hub import pin_revisions
from megatron_hydra.data.indexed import IndexedDocuments, write_index
from megatron_hydra.data.pack_index import pack_source
from megatron_hydra.data.part_worker import UNITS_AHEAD, Worker
from megatron_hydra.data.parts import Assembler, Counts, part_path
from megatron_hydra.data.progress import Report
from megatron_hydra.data.sampling import Permutation, derive_key
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.data.units import plan_units
from megatron_hydra.errors import HydraError

_PACKED = 100_000
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Sample:
    """Results of a timed sample in one process.

    Attributes:
        units, of_units: number of units started, and of all units.
        whole_bytes, all_bytes: total size of the completely read units, and of all units.
        whole_tokens: number of tokens of the completely read units.
        counts: counts of everything read.
        seconds: wall-clock time.
        warm_tokens, warm_seconds: number of tokens, and CPU seconds for them. The first unit, which fills
            tables, is excluded if others were read.
        assembly_seconds: CPU seconds of the main process.
        itemsize: bytes per token.
        worker_bytes: peak memory of the process with full tables.
        main_bytes: memory of the tokenizer, which the main process loads as well.
        lengths: number of tokens of each document.
    """

    units: int
    of_units: int
    whole_bytes: int
    all_bytes: int
    whole_tokens: int
    counts: Counts
    seconds: float
    warm_tokens: int
    warm_seconds: float
    assembly_seconds: float
    itemsize: int
    worker_bytes: int
    main_bytes: int
    lengths: np.ndarray

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second on one core."""
        return self.warm_tokens / max(self.warm_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class PreparationPlan:
    """Estimated resources of a preparation.

    Attributes:
        tokens, documents: numbers in the output.
        input_tokens: number of tokens of the whole input; ``None`` if no unit was read completely.
        input_bytes: size on disk of the input for ``tokens``; ``None`` in the same case.
        worker_hours, main_hours: CPU hours of all workers together, and of the main process.
        hours: wall-clock time if each worker has a core.
        bin_bytes, idx_bytes: size of the output.
        peak_bytes: largest disk space during the preparation.
        memory_bytes: memory of all processes together; it does not depend on ``tokens``.
        packing_bytes, packing_hours: memory and CPU time of packing, which training does once.
    """

    tokens: int
    documents: int
    input_tokens: int | None
    input_bytes: int | None
    worker_hours: float
    main_hours: float
    hours: float
    bin_bytes: int
    idx_bytes: int
    peak_bytes: int
    memory_bytes: int
    packing_bytes: int
    packing_hours: float


def plan_preparation(
    config: TokenizeConfig, tokens: int, seconds: float, report: Report = print
) -> PreparationPlan:
    """Take a sample, and estimate the resources for ``tokens``.

    Args:
        config: the preparation.
        tokens: number of tokens of the output; 0: all tokens of the input.
        seconds: time of the sample; a unit is stopped when it is over.
        report: function that takes the lines.

    Raises:
        HydraError: the input cannot be read, the sample has no token, or it cannot give the number of
            tokens of the input.
    """
    if config.shard[1] > 1:
        raise HydraError("--plan estimates the whole input: remove --shard, and divide the result")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config = dataclasses.replace(config, corpus=pin_revisions(config.corpus, report))
    units = plan_units(config.corpus, report)
    sample = _in_own_process(config, units, seconds)
    if not sample.counts.tokens:
        raise HydraError(
            f"the sample of {seconds:g} s has no token ({sample.counts.rows:,} rows, "
            f"{sample.counts.bad_rows:,} of them unreadable); check --column, or read more with a longer "
            "--plan-seconds"
        )
    # This process has the memory of the main process, except for the tokenizer.
    sample = dataclasses.replace(sample, main_bytes=_peak_memory() + sample.main_bytes)
    plan = _extrapolate(config, sample, tokens)
    for line in _lines(config, sample, plan):
        report(line)
    return plan


def _in_own_process(config: TokenizeConfig, units: list[Unit], seconds: float) -> Sample:
    # Not forked: a fork of a process with threads (torch starts some) can crash.
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp(prefix="hydra-plan-")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(take_sample, config, units, seconds, folder).result()
    except BrokenProcessPool as error:
        raise HydraError("the process that takes the sample died (out of memory?)") from error
    except OSError as error:
        raise HydraError(f"cannot take a sample in {folder}: {error}; set TMPDIR") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take_sample(config: TokenizeConfig, units: list[Unit], seconds: float, folder: str) -> Sample:
    """Tokenise units in a seeded order until the time is over, in this process."""
    main_bytes = -_peak_memory()
    work = Path(folder)
    config = dataclasses.replace(config, output=str(work / "sample"))
    config.work.mkdir()
    worker = Worker(config)
    main_bytes += _peak_memory()
    order = Permutation(len(units), derive_key("plan"))
    begin = time.monotonic()
    counts, whole_tokens, whole_bytes, number = Counts(), 0, 0, 0
    timed: list[tuple[int, float]] = []
    while number < len(units) and time.monotonic() < begin + seconds:
        unit, cpu = units[order(number)], time.process_time()
        own, is_whole = worker.make_part(number, unit, until=begin + seconds)
        timed.append((own.tokens, time.process_time() - cpu))
        counts.add(own)
        whole_tokens += own.tokens if is_whole else 0
        whole_bytes += unit.size if is_whole else 0
        number += 1
    elapsed = time.monotonic() - begin
    worker_bytes = _peak_memory() + worker.room_for_words()
    cpu = time.process_time()
    assembler = Assembler(config.work, worker.dtype, has_modes=config.corpus.chat)
    for part in range(number):
        assembler.append(part)
    cpu = time.process_time() - cpu
    sequences = np.concatenate(
        [np.zeros(1, np.int64), np.cumsum(_column(config.work, number, "len"))]
    )
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(_column(config.work, number, "doc"))])
    assembler.close()
    warm = timed[1:] if sum(tokens for tokens, _ in timed[1:]) else timed
    return Sample(
        units=number,
        of_units=len(units),
        whole_bytes=whole_bytes,
        all_bytes=sum(unit.size for unit in units),
        whole_tokens=whole_tokens,
        counts=counts,
        seconds=elapsed,
        warm_tokens=sum(tokens for tokens, _ in warm),
        warm_seconds=sum(spent for _, spent in warm),
        assembly_seconds=cpu,
        itemsize=np.dtype(worker.dtype).itemsize,
        worker_bytes=worker_bytes,
        main_bytes=main_bytes,
        lengths=np.diff(sequences[edges]),
    )


def _column(work: Path, parts: int, suffix: str) -> np.ndarray:
    files = [f"{part_path(work, part)}.{suffix}" for part in range(parts)]
    return np.concatenate([np.fromfile(file, np.int32) for file in files]).astype(np.int64)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _extrapolate(config: TokenizeConfig, sample: Sample, tokens: int) -> PreparationPlan:
    counts = sample.counts
    per_byte = sample.whole_tokens / sample.whole_bytes if sample.whole_tokens else 0.0
    input_tokens = round(sample.all_bytes * per_byte) if per_byte else None
    if not tokens and not input_tokens:
        raise HydraError(
            "the sample has read no unit of the input completely, so the number of tokens of the input is "
            "unknown: give it (--plan 15e9), or give more seconds (--plan-seconds)"
        )
    tokens = tokens or input_tokens or 0
    scale = tokens / counts.tokens
    documents, sequences = round(counts.documents * scale), round(counts.sequences * scale)
    bin_bytes = tokens * sample.itemsize
    idx_bytes = 34 + 12 * sequences + 8 * (documents + 1) + (sequences if config.corpus.chat else 0)
    columns = 4 * sequences + 4 * documents + 8 * documents
    ahead = UNITS_AHEAD * max(1, config.workers) * bin_bytes // max(1, scale * sample.units)
    worker_hours = tokens / sample.tokens_per_second / 3600
    main_hours = sample.assembly_seconds * scale / 3600
    packing_bytes, packing_seconds = _packing(sample.lengths, sample.itemsize)
    return PreparationPlan(
        tokens=tokens,
        documents=documents,
        input_tokens=input_tokens,
        input_bytes=round(tokens / per_byte) if per_byte else None,
        worker_hours=worker_hours,
        main_hours=main_hours,
        hours=max(worker_hours / max(1, config.workers), main_hours),
        bin_bytes=bin_bytes,
        idx_bytes=idx_bytes,
        peak_bytes=bin_bytes + idx_bytes + columns + round(ahead),
        memory_bytes=max(1, config.workers) * sample.worker_bytes + sample.main_bytes,
        packing_bytes=round(packing_bytes * documents) + sample.main_bytes,
        packing_hours=packing_seconds * documents / 3600,
    )


def _packing(lengths: np.ndarray, itemsize: int) -> tuple[float, float]:
    """Memory in bytes and CPU seconds of packing per document, measured on a pair with such documents.

    The tokens of that pair are a hole in a file, because packing reads only lengths.
    """
    drawn = np.random.default_rng(0).choice(lengths[lengths > 0], _PACKED).astype(np.int64)
    dtype = np.uint16 if itemsize == 2 else np.int32
    with tempfile.TemporaryDirectory(prefix="hydra-plan-") as folder:
        prefix = f"{folder}/sample"
        write_index(prefix + ".idx", dtype, drawn, np.arange(_PACKED + 1))
        with open(prefix + ".bin", "wb") as stream:
            stream.truncate(int(drawn.sum()) * itemsize)

        def pack() -> None:
            pack_source(
                IndexedDocuments(prefix),
                sequence_length=DataConfig().sequence_length,
                packing="split_long",
                seed=0,
                upsampling={},
            )

        begin = time.process_time()
        pack()
        spent = time.process_time() - begin
        tracemalloc.start()
        pack()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return most / _PACKED, spent / _PACKED


def _lines(config: TokenizeConfig, sample: Sample, plan: PreparationPlan) -> list[str]:
    counts, workers = sample.counts, max(1, config.workers)
    lines = [
        f"sample: {sample.units:,} of {sample.of_units:,} units in {sample.seconds:.1f} s: "
        f"{counts.tokens:,} tokens, {counts.documents:,} documents, {counts.bad_rows:,} bad of "
        f"{counts.rows:,} rows",
        f"  one core: {sample.tokens_per_second:,.0f} tokens a CPU-second",
    ]
    if plan.input_tokens is not None and plan.input_bytes is not None:
        lines.append(
            f"  the input: about {plan.input_tokens:,} tokens in {sample.all_bytes / _GB:,.3f} GB"
        )
    folder = _existing_parent(Path(config.prefix).absolute().parent)
    free = shutil.disk_usage(folder).free
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines += [
        f"for {plan.tokens:,} tokens, about {plan.documents:,} documents:",
        f"  CPU: {plan.worker_hours:,.2f} core-hours of workers, {plan.main_hours:,.2f} of the main process",
        f"  time: {plan.hours:,.2f} hours with {workers} workers, if each has a core",
        f"  disk: {plan.bin_bytes / _GB:,.2f} GB .bin, {plan.idx_bytes / _GB:,.2f} GB .idx; "
        f"{plan.peak_bytes / _GB:,.2f} GB while it is made ({free / _GB:,.2f} GB are free in {folder})",
        f"  memory: {workers} workers of {sample.worker_bytes / _GB:.2f} GB and {sample.main_bytes / _GB:.2f} "
        f"GB = {plan.memory_bytes / _GB:,.2f} GB at most, however long the corpus is "
        f"(this machine has {there / _GB:,.2f} GB)",
        f"  packing, once, by one process: {plan.packing_bytes / _GB:,.2f} GB of memory, "
        f"{plan.packing_hours * 60:,.1f} CPU-minutes",
    ]
    if plan.input_tokens is not None and plan.input_bytes is not None:
        share = plan.input_tokens / plan.tokens
        lines.insert(
            4, f"  input: {plan.input_bytes / _GB:,.2f} GB like this; it holds {share:.1%} of them"
        )
    if plan.peak_bytes > free:
        lines.append(f"too little room: {folder} lacks {(plan.peak_bytes - free) / _GB:,.2f} GB")
    if plan.memory_bytes > there:
        fitting = max(1, int((there - sample.main_bytes) // sample.worker_bytes))
        lines.append(f"too little memory: --workers {fitting} would fit")
    return lines


def _existing_parent(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
