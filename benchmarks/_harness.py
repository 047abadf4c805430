"""What the benchmarks share: peers timed in turns in one process, ratios with spread, JSON, a plot.

A peer is a function without arguments that does the work once. Peers of one size are warmed up, then
timed round by round, each once a round, so that whatever else slows the machine falls on all alike.
A ratio is the median over rounds of the ratio within a round; its spread is the smallest and the
largest of them. A size that does not fit in memory becomes a row that says so.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import json
import math
import platform as host
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import HydraError

Peer = Callable[[], Any]
MIN_SAMPLE_SECONDS = 0.02
"""A GPU sample repeats its peer until it lasts so long: launches overlap as they do in training."""


class Sample:
    """Timings of one peer at one size.

    Attributes:
        wall: seconds per call, one a round; empty where memory did not suffice.
        cpu: CPU seconds of this process per call (of use on a busy machine).
        peak_bytes: device memory at its highest during a call, beyond what was held before; on the
            CPU growth of the resident set.
        failure: why there are none.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.peak_bytes = 0
        self.failure = ""

    @property
    def median(self) -> float:
        """Median seconds of a call; NaN where there is none."""
        return statistics.median(self.wall) if self.wall else math.nan

    @property
    def spread(self) -> float:
        """(largest − smallest) / median."""
        return (max(self.wall) - min(self.wall)) / self.median if self.wall else math.nan


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
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def parser(doc: str, example: str, *, sizes: str = "", what: str = "") -> argparse.ArgumentParser:
    """The flags that every benchmark has.

    Args:
        doc: the module's docstring.
        example: a command line.
        sizes: default of ``--sizes``; no such flag where empty.
        what: what a size is.
    """
    made = argparse.ArgumentParser(
        description=doc,
        epilog=f"example:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--device", default="auto", help="cuda, cpu, or auto (default)")
    made.add_argument("--output", type=Path, help="folder for the JSON and the plot; default: none")
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
        HydraError: there is none of this kind.
    """
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HydraError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if device.type == "cpu" and torch.cuda.is_available():
        raise HydraError("--device cpu on a machine with a GPU: hide it, CUDA_VISIBLE_DEVICES=''")
    return device


class _ResidentPeak(threading.Thread):
    """Samples this process's resident set until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.peak = _resident_bytes()
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.001):
            self.peak = max(self.peak, _resident_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return max(self.peak, _resident_bytes()) - self.base


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * 4096


def measured_memory(peer: Peer, device: torch.device) -> int:
    """Peak bytes of one call beyond what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peer()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    watcher = _ResidentPeak()
    watcher.start()
    try:
        peer()
    finally:
        grown = watcher.stop()
    return grown


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
    """One line for a table; the whole story goes to stderr: one peer's failure stops no other."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "OOM"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def time_in_turns(
    peers: dict[str, Peer], device: torch.device, repeats: int, warmup: int
) -> dict[str, Sample]:
    """Warm every peer up, then time all of them, each once a round."""
    samples = {name: Sample() for name in peers}
    alive: dict[str, tuple[Peer, int]] = {}
    for name, peer in peers.items():
        try:
            for _ in range(max(warmup - 1, 0)):
                peer()
            begin = time.perf_counter()
            samples[name].peak_bytes = measured_memory(peer, device)
            calls = 1
            if device.type == "cuda":
                once = time.perf_counter() - begin
                if once < 1:  # a long one would be known well enough
                    once, _ = _timed(peer, device, 1)
                calls = max(1, min(100, round(MIN_SAMPLE_SECONDS / once)))
            alive[name] = (peer, calls)
        except Exception as error:
            samples[name].failure = _failure(error)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for _ in range(repeats):
        for name, (peer, calls) in alive.items():
            wall, cpu = _timed(peer, device, calls)
            samples[name].wall.append(wall)
            samples[name].cpu.append(cpu)
    return samples


class Report:
    """Rows of one benchmark: printed as they come, kept as JSON, drawn at the end.

    Args:
        name: the benchmark's.
        arguments: its flags.
        device: where it runs.
        ratios: label → (slower peer, faster peer): which ratios every size shows.
    """

    def __init__(
        self,
        name: str,
        arguments: argparse.Namespace,
        device: torch.device,
        ratios: dict[str, tuple[str, str]] | None = None,
    ) -> None:
        self.name, self.device, self.ratios = name, device, ratios or {}
        self.repeats, self.warmup = arguments.repeats, arguments.warmup
        self.output: Path | None = arguments.output
        self.body: dict[str, Any] = {
            "benchmark": name,
            "date": dt.date.today().isoformat(),
            "machine": machine(device),
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "rows": [],
            "ratios": [],
            "notes": [],
        }
        machine_name = self.body["machine"]["device"]
        print(f"{name} on {machine_name}, torch {torch.__version__}", flush=True)

    def measure(self, size: int, peers: dict[str, Peer], **facts: Any) -> dict[str, Sample]:
        """Time the peers of one size and report them.

        Args:
            facts: put into every row's JSON.
        """
        samples = time_in_turns(peers, self.device, self.repeats, self.warmup)
        self.add(size, samples, **facts)
        return samples

    def add(self, size: int, samples: dict[str, Sample], **facts: Any) -> None:
        """Report timings that were taken elsewhere."""
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
            shown = sample.failure or (
                f"{1000 * sample.median:12.3f} ms  ±{100 * sample.spread / 2:4.1f} %"
                f"  {sample.peak_bytes / 2**30:8.3f} GiB"
            )
            print(f"  {size_name(size):>6}  {name:<28} {shown}", flush=True)
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
        """Keep and print a line that is no timing."""
        self.body["notes"].append(text)
        print(f"  {text}", flush=True)
        self.save()

    def save(self) -> None:
        """Write what there is so far: a run that is cut off leaves its rows."""
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
                cells = ", ".join(f"{size_name(r['size'])} {r['median']:.2f}" for r in rows)
                print(f"  {label:<40} {cells}")
        if self.output is not None:
            plot(self.body, self.output / f"{self.name}.png")


def graphed(peer: Peer, stream: torch.cuda.Stream | None = None) -> Peer:
    """The peer as a replayed CUDA graph: the device's time alone, without the host's launches.

    Args:
        peer: what to capture, at its first call.
        stream: to capture on; a backward must be captured on the stream of its forward.
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
    """Where the time of a few calls goes on the GPU, by kernel; the peer is warm already."""
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


def machine(device: torch.device) -> dict[str, str]:
    """What ran it: device and versions."""
    facts = {"torch": torch.__version__, "python": host.python_version()}
    for package in ("triton", "fla", "transformers", "megatron.core", "flash_qla"):
        try:
            module = __import__(package, fromlist=["__version__"])
            facts[package] = str(getattr(module, "__version__", "installed"))
        except Exception:  # absent, or broken here
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
    """Time against size, log-log, a line a peer; nothing for fewer than two sizes."""
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
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds",
             title=f"{body['benchmark']}, {body['machine']['device']}, {body['date']}")  # fmt: skip
    axes.set_xticks(sizes, [size_name(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
