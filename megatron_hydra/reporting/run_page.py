"""One HTML page about a run: curves, restarts, throughput, config. It works offline."""

from __future__ import annotations

import datetime as dt
import html
import json
import statistics
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.files import write_text_atomic
from megatron_hydra.reporting import EVENTS_FILE, METRICS_FILE, PHASES
from megatron_hydra.reporting.charts import Points, line_chart

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #66708a; --line: #d8dde8; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8f0; --soft: #97a1b8; --line: #353d4d; --paper: #161a22; } }
body { margin: 0 auto; max-width: 1180px; padding: 24px; color: var(--ink); background: var(--paper);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 32px 0 8px; }
p.sub { color: var(--soft); margin: 0 0 16px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
.tile b { display: block; font-size: 20px; font-weight: 600; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 10px; min-width: 0; }
figcaption { font-weight: 600; } .key { font-weight: 400; font-size: 13px; margin-left: 8px; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: var(--soft); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.grid { stroke: var(--line); } .mark { stroke: #c0392b; stroke-dasharray: 3 3; fill: none; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); font-size: 14px; }
pre { border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; font-size: 13px; }
"""


def write_run_page(run: Path, output: Path) -> None:
    """Make the page.

    Args:
        run: a run's output folder.
        output: the HTML file.

    Raises:
        HydraError: the run does not exist, or has no log entry yet.
    """
    try:
        page = _page(run)
    except (KeyError, TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        raise HydraError(
            f"{run}: {METRICS_FILE} or {EVENTS_FILE} has an invalid entry "
            f"({type(error).__name__}: {error}); the file may be damaged"
        ) from error
    try:
        write_text_atomic(output, page)
    except OSError as error:
        raise HydraError(f"{output} cannot be written: {error}") from None


def _page(run: Path) -> str:
    entries = _lines(run / METRICS_FILE)
    if not entries:
        raise HydraError(
            f"{run} has no {METRICS_FILE} with an entry: name the output folder of a run that has done its "
            "first step"
        )
    events = _lines(run / EVENTS_FILE)
    config = (run / "config.yaml").read_text() if (run / "config.yaml").is_file() else ""
    title = f"{run.resolve().name}: {_verb(config)}".rstrip(": ")
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="sub">{html.escape(_summary(entries, events))}</p>',
        _tiles(entries, events),
        f'<h2>Curves</h2><div class="charts">{"".join(_charts(entries, events))}</div>',
        f"<h2>Throughput</h2>{_throughput(entries)}",
        _data_read(run),
        f"<h2>Starts, stops and faults</h2>{_history(events)}",
        f"<h2>Config</h2><pre>{html.escape(config)}</pre>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a JSON-lines file; a half-written last line is skipped."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _verb(config: str) -> str:
    found = [line.partition(":")[2] for line in config.splitlines() if line.startswith("verb:")]
    return found[0].strip() if found else ""


def _summary(entries: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    last = events[-1]["event"] if events else ""
    state = {
        "end": "finished",
        "stop": "stopped, to be started again",
    }.get(last, "running, or killed")
    times = [event["time"] for event in events if "time" in event]
    when = f", {_when(times[0])} to {_when(times[-1])}" if times else ""
    return f"{state}{when}; step {entries[-1]['step']:,}, {entries[-1]['tokens']:,} tokens"


def _when(seconds: float) -> str:
    moment = dt.datetime.fromtimestamp(seconds, tz=dt.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _tiles(entries: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    restarts = sum(event["event"] == "resume" for event in events)
    saves = sum(event["event"] == "save" for event in events)
    tiles = [
        ("loss", _short(entries[-1].get("loss"))),
        ("tokens/s (median)", _short(_median(entries, "tokens_per_s"))),
        ("restarts", str(restarts)),
        ("checkpoints written", str(saves)),
        ("steps left out", str(entries[-1].get("skipped_steps", 0))),
    ]
    if (utilisation := _median(entries, "mfu")) is not None:
        tiles.insert(2, ("model FLOP/s utilisation", f"{100 * utilisation:.1f} %"))
    cells = "".join(f'<div class="tile"><b>{v}</b><span>{n}</span></div>' for n, v in tiles)
    return f'<div class="tiles">{cells}</div>'


def _median(entries: list[dict[str, Any]], key: str) -> float | None:
    # The first entry of an attempt includes its warm-up, which hardly changes a median.
    values = [entry[key] for entry in entries if isinstance(entry.get(key), (int, float))]
    return statistics.median(values) if values else None


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, (int, float)) else "–"


def _charts(entries: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[str]:
    marks = [event["step"] for event in events if event["event"] == "resume"]

    def series(key: str, scale: float = 1.0) -> Points:
        return [(e["step"], _number(e.get(key), scale)) for e in entries]

    held_out = [
        (e["step"], e["validation"]) for e in entries if isinstance(e.get("validation"), dict)
    ]

    def held_out_points(key: str) -> Points:
        return [(step, _number(found.get(key))) for step, found in held_out]

    def layers(key: str) -> dict[str, Points]:
        count = max((len(e[key]) for e in entries if isinstance(e.get(key), list)), default=0)
        return {
            f"layer {i}": [
                (e["step"], _number(e[key][i])) for e in entries if isinstance(e.get(key), list)
            ]
            for i in range(count)
        }

    losses = {key: series(key) for key in ("loss", "kl", "ce") if any(key in e for e in entries)}
    if "kl" not in losses:
        losses.pop("ce", None)  # equal to the loss
    held_out_losses = {
        f"held-out {key}": held_out_points(key)
        for key in ("loss", "kl", "ce")
        if held_out and key in losses
    }
    sources: dict[str, list[tuple[float, float | None]]] = {}
    answered: dict[str, list[tuple[float, float | None]]] = {}
    for step, found in held_out:
        for name, numbers in found.get("sources", {}).items():
            sources.setdefault(name, []).append((step, _number(numbers.get("loss"))))
        for name, numbers in found.get("probes", {}).items():
            answered.setdefault(name, []).append((step, _number(numbers.get("accuracy"), 100)))
    held_out_layers: dict[str, Points] = {
        f"layer {i}": [(step, _number(found["layers"][i])) for step, found in held_out]
        for i in range(len(held_out[-1][1].get("layers", [])) if held_out else 0)
    }
    phases: dict[str, Points] = {
        name: [(e["step"], _number(e["seconds"].get(name))) for e in entries if "seconds" in e]
        for name in PHASES
    }
    memory = {
        "in use": series("memory_gb"),
        "held by the allocator": series("memory_reserved_gb"),
    }
    charts: list[tuple[str, dict[str, Points], str]] = [
        ("loss", losses | held_out_losses, ""),
        ("held-out loss by source", dict(sources) if len(sources) > 1 else {}, ""),
        ("probes answered right", dict(answered), "%"),
        ("alignment loss by layer", layers("layers"), ""),
        ("held-out alignment loss by layer", held_out_layers, ""),
        ("gradient norm", {"gradient norm": series("grad_norm")}, ""),
        ("learning rate", {"learning rate": series("lr")}, ""),
        ("tokens per second", {"tokens per second": series("tokens_per_s")}, ""),
        ("model FLOP/s of a device", {"model": series("model_tflops")}, "TFLOP/s"),
        ("model FLOP/s utilisation", {"utilisation": series("mfu", 100)}, "%"),
        ("seconds of a step by phase, slowest rank", phases, "s"),
        ("peak memory, largest rank", memory, "GB"),
        ("mean γ of FA heads by layer", layers("gamma_fa"), ""),
        ("mean γ of GDN heads by layer", layers("gamma_gdn"), ""),
    ]
    drawn = (line_chart(name, lines, unit=unit, marks=marks) for name, lines, unit in charts)
    return [chart for chart in drawn if chart]


def _number(value: Any, scale: float = 1.0) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value * scale if is_number else None


def _throughput(entries: list[dict[str, Any]]) -> str:
    rows = [
        [name, unit, _short(_median(entries, key))]
        for name, key, unit in (
            ("tokens", "tokens_per_s", "1/s"),
            ("model FLOP/s of a device", "model_tflops", "TFLOP/s"),
            ("peak memory, largest rank", "memory_gb", "GB"),
            ("peak memory held by the allocator", "memory_reserved_gb", "GB"),
        )
        if any(key in entry for entry in entries)
    ]
    timed = [entry["seconds"] for entry in entries if isinstance(entry.get("seconds"), dict)]
    for phase in PHASES:
        values = [seconds[phase] for seconds in timed if phase in seconds]
        if values:
            rows.append([f"{phase.replace('_', ' and ')}, slowest rank", "s a step",
                         _short(statistics.fmean(values)) + " (mean)"])  # fmt: skip
    return _table(["", "unit", "median"], rows)


def _data_read(run: Path) -> str:
    """Data read from each source in each span of steps, by the newest checkpoint; "" without one."""
    folder = run / "checkpoints"
    try:
        latest = (folder / "latest").read_text(encoding="utf-8").strip()
        data = json.loads((folder / latest / "training.json").read_text(encoding="utf-8"))["data"]
    except OSError:  # no checkpoint yet, or it was replaced a moment ago
        return ""
    if "spans" not in data:  # written by a release without this record
        return ""
    rows = []
    for span in data["spans"]:
        steps = f"{span['first_step'] + 1:,} to {span['first_step'] + span['steps']:,}"
        sizes = [span[f"{key}_size"] for key in ("global_batch", "micro_batch", "data_parallel")]
        for part in span["parts"]:
            name = data["sources"][part["source"]]["name"]
            first, count = part["first"], part["samples"]
            which = f"{first:,} to {first + count - 1:,}" if count else "none"
            numbers = [_count(part[key]) for key in ("samples", "pieces", "tokens")]
            rows.append([steps, str(span["phase"]), *map(_count, sizes), name, f"{part['weight']:g}",
                         which, *numbers])  # fmt: skip
    for source in data["sources"]:
        numbers = [_count(source[key]) for key in ("samples", "pieces", "tokens")]
        rows.append(["all", "", "", "", "", source["name"], "", "", *numbers])
    head = ["steps", "phase", "global batch", "micro-batch", "replicas", "source", "weight",
            "its sequences", "sequences", "documents or pieces", "tokens"]  # fmt: skip
    return f"<h2>Data read, up to the newest checkpoint</h2>{_table(head, rows)}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _history(events: list[dict[str, Any]]) -> str:
    rows = []
    for event in events:
        known = ("time", "event", "step")
        facts = ", ".join(f"{k}: {v}" for k, v in event.items() if k not in known)
        rows.append([_when(event.get("time", 0)), event["event"], f"{event['step']:,}", facts])
    if len(rows) > 400:
        rows = [*rows[:200], ["…", f"{len(rows) - 400} more", "", ""], *rows[-200:]]
    return _table(["when", "what", "step", ""], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
