"""Shared code of the benchmarks: peers timed in turns in one process, ratios with spread, JSON, a plot.

A peer is a function without arguments that does the work once. Peers of one size are warmed up, then timed
round by round, each once in a round. So other load on the machine slows all peers alike. A ratio is the median
over rounds of the ratio within a round; its spread is the smallest and the largest of them. If a size does not
fit in memory, its row says so.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import importlib
import itertools
import json
import math
import platform as host
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.arguments import command_parser, path_argument
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import platform

Peer = Callable[[], Any]
MIN_SAMPLE_SECONDS = 0.02
"""A GPU sample repeats its peer for so many seconds: launches then overlap as in training."""


class Sample:
    """Timings of one peer at one size.

    Attributes:
        wall: seconds per call, one for each round; empty if memory did not suffice.
        cpu: CPU seconds of this process per call (of use on a busy machine).
        peak_bytes: peak of torch's allocator during a call, minus the bytes before it
            (:func:`measured_memory`); ``None`` if it was not measured.
        failure: why there are no timings.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.peak_bytes: int | None = None
        self.failure = ""

    @property
    def median(self) -> float:
        """Median seconds of a call; NaN without timings."""
        return statistics.median(self.wall) if self.wall else math.nan

    @property
    def spread(self) -> float:
        """(largest − smallest) / median."""
        return (max(self.wall) - min(self.wall)) / self.median if self.wall else math.nan

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        shown = f"{1000 * self.median:12.3f} ms  ±{100 * self.spread / 2:4.1f} %"
        if self.peak_bytes is not None:
            shown += f"  {self.peak_bytes / 2**30:8.3f} GiB"
        return shown


class Ratio:
    """How much faster ``under`` is than ``over``: median, smallest, largest over rounds."""

    def __init__(self, over: Sequence[float], under: Sequence[float]) -> None:
        ratios = [a / b for a, b in zip(over, under, strict=False)]
        self.median = statistics.median(ratios) if ratios else math.nan
        self.low = min(ratios, default=math.nan)
        self.high = max(ratios, default=math.nan)

    def __str__(self) -> str:
        if math.isnan(self.median):
            return "-"
        return shown_ratio(self.median, self.low, self.high)


def shown_ratio(median: float, low: float, high: float) -> str:
    """``median (low..high)`` with two decimals; two digits of numbers that have none there."""

    def shown(ratio: float) -> str:
        return f"{ratio:.2f}" if abs(ratio) >= 0.1 else f"{ratio:.2g}"

    return f"{shown(median)} ({shown(low)}..{shown(high)})"


def parser(doc: str, example: str, *, sizes: str = "", what: str = "") -> argparse.ArgumentParser:
    """The flags that every benchmark has.

    Args:
        doc: the module's docstring.
        example: a command line.
        sizes: default of ``--sizes``; empty: no such flag.
        what: what a size is.
    """
    made = command_parser(description=doc, epilog=f"example:\n  {example}\n")
    made.add_argument("--device", default="auto", help="cuda, cpu, or auto (default)")
    made.add_argument(
        "--output", type=path_argument, help="folder for the JSON and the plot; default: none"
    )
    made.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    made.add_argument(
        "--warmup", type=int, default=2, help="untimed calls of each peer (default 2)"
    )
    made.add_argument("--seed", type=int, default=0)
    if sizes:
        made.add_argument("--sizes", type=sizes_of, default=sizes_of(sizes),
                          help=f"{what}, comma-separated, K for 1024 (default {sizes})")  # fmt: skip
    return made


def sizes_of(text: str) -> list[int]:
    """``"8K,512"`` → ``[8192, 512]``."""
    try:
        return [
            int(part[:-1]) * 1024 if part.upper().endswith("K") else int(part)
            for part in text.split(",")
        ]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of sizes such as 8K,512"
        ) from None


def size_name(size: int) -> str:
    """8192 → ``8K``."""
    return f"{size // 1024}K" if size % 1024 == 0 else str(size)


def chosen_device(arguments: argparse.Namespace) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        HydraError: this machine has no such device.
    """
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HydraError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if device.type == "cpu" and torch.cuda.is_available():
        raise HydraError("--device cpu on a machine with a GPU: hide it, CUDA_VISIBLE_DEVICES=''")
    platform.keep_freed_memory()
    return device


def cpu_only(arguments: argparse.Namespace, benchmark: str) -> torch.device:
    """The CPU, for a benchmark of work that no GPU does.

    Raises:
        HydraError: ``--device`` names another.
    """
    if arguments.device not in ("auto", "cpu"):
        raise HydraError(f"--device {arguments.device}: {benchmark} measures the CPU; leave it out")
    return torch.device("cpu")


def measured_memory(peer: Peer, device: torch.device) -> int:
    """Peak bytes of one call by torch's allocator, minus the bytes before it; results are included.

    On the CPU it is the sum over the allocator's own records. The resident set is less exact: the C library
    keeps freed blocks and maps new ones, which changes it by more than a loss's chunks.
    Memory that torch did not allocate (mapped files, a library's buffers) is not counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peer()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        peer()
    changes = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def _timed(peer: Peer, device: torch.device, calls: int) -> tuple[float, float]:
    """Wall and CPU seconds per call."""
    cpu = time.process_time()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            peer()
        end.record()
        end.synchronize()
        wall = begin.elapsed_time(end) / 1000
    else:
        start = time.perf_counter()
        for _ in range(calls):
            peer()
        wall = time.perf_counter() - start
    return wall / calls, (time.process_time() - cpu) / calls


def _failure(error: Exception) -> str:
    """The error as one line for a table; the traceback goes to stderr, and other peers continue."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "OOM"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def time_in_turns(
    peers: dict[str, Peer],
    device: torch.device,
    repeats: int,
    warmup: int,
    memory: bool = True,
) -> dict[str, Sample]:
    """Warm every peer up, then time all of them, each once in a round.

    A peer that fails at any call has no timings; the others continue.

    Args:
        memory: whether to measure the memory of one warm-up call.
    """
    samples = {name: Sample() for name in peers}
    alive: dict[str, tuple[Peer, int]] = {}
    for name, peer in peers.items():
        try:
            calls = _warm_up(peer, device, warmup, samples[name] if memory else None)
            alive[name] = (peer, calls)
        except Exception as error:
            _give_up(samples[name], error, device)
    for _ in range(repeats):
        for name, (peer, calls) in list(alive.items()):
            try:
                wall, cpu = _timed(peer, device, calls)
            except Exception as error:
                _give_up(samples[name], error, device)
                del alive[name]
                continue
            samples[name].wall.append(wall)
            samples[name].cpu.append(cpu)
    return samples


def _warm_up(peer: Peer, device: torch.device, warmup: int, sample: Sample | None) -> int:
    """Call a peer ``warmup`` times, at least once; returns the calls that a timing should repeat.

    Args:
        sample: gets the memory of the last of these calls; ``None``: it is not measured.
    """
    for _ in range(max(warmup - 1, 0)):
        peer()
    begin = time.perf_counter()
    if sample is None:
        peer()
    else:
        sample.peak_bytes = measured_memory(peer, device)
    if device.type != "cuda":
        return 1
    once = time.perf_counter() - begin
    if once < 1:  # one long call is exact enough
        once, _ = _timed(peer, device, 1)
    return max(1, min(100, round(MIN_SAMPLE_SECONDS / once)))


def _give_up(sample: Sample, error: Exception, device: torch.device) -> None:
    """Store the reason instead of timings, and free the failed call's memory."""
    sample.failure = _failure(error)
    sample.wall.clear()
    sample.cpu.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Report:
    """Rows of one benchmark: printed at once, kept as JSON, drawn at the end.

    Args:
        name: the benchmark's.
        arguments: its flags.
        device: where it runs.
        ratios: label → (slower peer, faster peer): the ratios of every size.
        unit: the unit of sizes.
    """

    def __init__(
        self,
        name: str,
        arguments: argparse.Namespace,
        device: torch.device,
        ratios: dict[str, tuple[str, str]] | None = None,
        unit: str = "tokens",
    ) -> None:
        self.name, self.device, self.ratios = name, device, ratios or {}
        self.repeats, self.warmup = arguments.repeats, arguments.warmup
        self.output: Path | None = arguments.output
        self.body: dict[str, Any] = {
            "benchmark": name,
            "date": dt.date.today().isoformat(),
            "machine": machine(device),
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "unit": unit,
            "ran": {},
            "rows": [],
            "ratios": [],
            "notes": [],
        }
        machine_name = self.body["machine"]["device"]
        print(f"{name} on {machine_name}, torch {torch.__version__}", flush=True)

    def ran(self, **kernels: str) -> None:
        """Keep and print which implementations ran, and the installed versions."""
        if kernels.items() <= self.body["ran"].items():
            return
        self.body["ran"] |= kernels
        print(f"  ran: {', '.join(f'{part} {name}' for part, name in kernels.items())}", flush=True)
        self.save()

    def measure(
        self, size: int, peers: dict[str, Peer], *, memory: bool = True, **facts: Any
    ) -> dict[str, Sample]:
        """Time the peers of one size and report them.

        Args:
            memory: whether to measure peak memory, too.
            facts: entries of every row's JSON.
        """
        samples = time_in_turns(peers, self.device, self.repeats, self.warmup, memory)
        self.add(size, samples, **facts)
        return samples

    def add(self, size: int, samples: dict[str, Sample], **facts: Any) -> None:
        """Report timings that the caller has taken."""
        for name, sample in samples.items():
            self.body["rows"].append(
                {
                    "size": size,
                    "peer": name,
                    "seconds": sample.wall,
                    "cpu_seconds": sample.cpu,
                    "median_seconds": sample.median,
                    "peak_bytes": sample.peak_bytes,
                    "failure": sample.failure,
                    **facts,
                }
            )
            print(f"  {size_name(size):>6}  {name:<28} {sample}", flush=True)
        for label, (over, under) in self.ratios.items():
            if over in samples and under in samples:
                self.ratio(size, label, Ratio(samples[over].wall, samples[under].wall))
                if self.device.type == "cpu" and samples[over].cpu:
                    cpu = Ratio(samples[over].cpu, samples[under].cpu)
                    self.ratio(size, f"{label}, CPU time", cpu)
        self.save()

    def ratio(self, size: int, label: str, ratio: Ratio) -> None:
        """Report one ratio."""
        self.body["ratios"].append(
            {
                "size": size,
                "label": label,
                "median": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
            }
        )
        print(f"  {size_name(size):>6}  {label:<40} {ratio}", flush=True)

    def note(self, text: str) -> None:
        """Keep and print a line of text."""
        self.body["notes"].append(text)
        print(f"  {text}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the rows so far, so that an interrupted run leaves them."""
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.body, indent=1)
            (self.output / f"{self.name}.json").write_text(text + "\n")

    def finish(self) -> None:
        """The table of ratios once more, and the plot."""
        self.save()
        if self.body["ratios"]:
            print(f"{self.name}: ratios, median (smallest..largest)")
            labels = list(dict.fromkeys(row["label"] for row in self.body["ratios"]))
            for label in labels:
                rows = [row for row in self.body["ratios"] if row["label"] == label]
                cells = ", ".join(
                    f"{size_name(r['size'])} {shown_ratio(r['median'], r['low'], r['high'])}"
                    for r in rows
                )
                print(f"  {label:<40} {cells}")
        if self.output is not None:
            plot(self.body, self.output / f"{self.name}.png")


def graphed(peer: Peer, stream: torch.cuda.Stream | None = None) -> Peer:
    """The peer as a replayed CUDA graph: only the device's time, without the host's launches.

    Args:
        peer: what to capture, at its first call.
        stream: the stream to capture on; for a backward, the stream of its forward.
    """
    graph: list[torch.cuda.CUDAGraph] = []

    def run() -> None:
        if not graph:
            peer()
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                peer()
            graph.append(captured)
        graph[0].replay()

    return run


def profile(peer: Peer, title: str, calls: int = 3, rows: int = 30) -> str:
    """GPU time of a few calls by kernel; the peer must be warm."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            peer()
        torch.cuda.synchronize()
    table = recorded.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=70
    )
    return f"== {title}, {calls} calls\n{table}\n"


def used_delta_rule(name: str, operation: str = "gated_delta_rule") -> str:
    """The chosen delta rule; for FLA, also the kernels that its dispatch has chosen in this process so far.

    Args:
        name: ``names["gated_delta_net"]`` of the chosen kernels.
        operation: FLA's name of the rule.
    """
    if name != "fla":
        return name
    try:
        # FLA's dispatch logs entries "operation:function:backend", with ":fail" if refused.
        registries = importlib.import_module("fla.backends")._operation_registries
        entries = registries[operation]._logged
    except (ImportError, AttributeError, KeyError):
        return "fla (dispatch unknown)"
    taken = sorted({e.rpartition(":")[2] for e in entries if not e.endswith(":fail")})
    return f"fla ({', '.join(taken) or 'Triton'})"


def machine(device: torch.device) -> dict[str, str]:
    """The device and the installed versions."""
    facts = {"torch": torch.__version__, "python": host.python_version()}
    for package in ("triton", "fla", "transformers", "megatron.core", "flash_qla"):
        try:
            module = __import__(package, fromlist=["__version__"])
            facts[package] = str(getattr(module, "__version__", "installed"))
        except Exception:  # not installed, or broken
            facts[package] = "not installed"
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn"] = str(torch.backends.cudnn.version())
    else:
        model = next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            host.machine(),
        )
        facts["device"] = f"CPU {model}"
        facts["threads"] = str(torch.get_num_threads())
    return facts


def plot(body: dict[str, Any], path: Path) -> None:
    """Plot time against size, log-log, one line for each peer; needs two sizes."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in body["rows"]:
        if row["seconds"]:
            lines.setdefault(row["peer"], []).append((row["size"], row["median_seconds"]))
    if max((len(points) for points in lines.values()), default=0) < 2:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set(xscale="log", yscale="log", xlabel=body["unit"], ylabel="seconds",
             title=f"{body['benchmark']}, {body['machine']['device']}, {body['date']}")  # fmt: skip
    axes.set_xticks(sizes, [size_name(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
