"""The page of a run is complete and self-contained, and a browser renders it correctly."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.reporting import EVENTS_FILE, METRICS_FILE
from megatron_hydra.reporting.run_page import write_run_page
from tests.required import skip_without

ROOT = Path(__file__).resolve().parents[2]
CHARTS = (
    "loss", "alignment loss by layer", "gradient norm", "learning rate", "tokens per second",
    "model FLOP/s of a device", "model FLOP/s utilisation", "seconds of a step by phase",
    "peak memory", "mean γ of FA heads", "mean γ of GDN heads", "held-out loss by source",
    "held-out alignment loss by layer",
)  # fmt: skip


def _entry(step: int) -> dict:
    return {
        "step": step, "tokens": step * 192, "loss": None if step == 7 else 3 / step,
        "kl": 2 / step, "ce": 4 / step, "layers": [1 / step, 2 / step, None],
        "loss_tokens": 180, "grad_norm": 1.0 + step % 3, "lr": 1e-4, "tokens_per_s": 1000.0 + step,
        "model_tflops": 0.5, "mfu": 0.41, "memory_gb": 1.5,
        "memory_reserved_gb": 1.75,
        "seconds": {"data": 0.01, "forward_backward": 0.2, "optimizer": 0.05, "save": 0.0},
        "gamma_fa": [1.0, None, 1.1], "gamma_gdn": [0.9, 1.0, 1.2],
    } | ({"validation": _validation(step)} if step % 4 == 0 else {})  # fmt: skip


def _validation(step: int) -> dict:
    return {
        "loss": 3.1 / step, "kl": 2.1 / step, "ce": None, "layers": [1.1 / step, 2.1 / step, None],
        "tokens": 90, "sources": {"web <1>": {"loss": 3.0 / step}, "books": {"loss": None}},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my <run>"
    folder.mkdir()
    lines = [json.dumps(_entry(step)) for step in range(1, 13)]
    (folder / METRICS_FILE).write_text("\n".join(lines) + '\n{"step": 13, "lo')
    events = [
        {"time": 1795000000.0, "event": "start", "step": 0, "host": "n1", "processes": 2},
        {"time": 1795000100.0, "event": "save", "step": 6, "checkpoint": "step_00000006"},
        {"time": 1795000200.0, "event": "resume", "step": 6, "host": "n2", "processes": 2},
        {"time": 1795000250.0, "event": "skip", "step": 7, "fault": "<script>alert(1)</script>"},
        {"time": 1795000300.0, "event": "end", "step": 12},
    ]
    (folder / EVENTS_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text("verb: distill\noptimizer:\n  lr: 0.0001  # <b>\n")
    return folder


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", [], []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]

    def handle_data(self, data) -> None:
        self.text += data + "\n"


def test_the_page_holds_everything_and_needs_nothing(run: Path, tmp_path: Path) -> None:
    write_run_page(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    reader = _Reader()
    reader.feed(text)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == len(CHARTS)
    assert all(any(c.startswith(html.escape(name)) for c in captions) for name in CHARTS)
    for words in ("my <run>: distill", "finished", "step 12", "2,304 tokens", "lr: 0.0001",
                  "41.0 %", "checkpoint: step_00000006", "host: n2", "2026-11-18",
                  "peak memory held by the allocator", "held by the allocator"):  # fmt: skip
        assert words in reader.text, words
    assert "script" not in reader.tags
    assert reader.links == []
    assert "url(" not in text
    assert "http" not in text


def test_a_run_without_an_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HydraError, match=r"has no metrics\.jsonl with an entry"):
        write_run_page(tmp_path, tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HydraError, match=r"file/page\.html cannot be written"):
        write_run_page(run, tmp_path / "file/page.html")


def test_old_logs_without_the_newer_numbers_still_make_a_page(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n')
    write_run_page(tmp_path, tmp_path / "page.html")
    assert "<figcaption>loss" in (tmp_path / "page.html").read_text()


_MEASURE = """<script>addEventListener('load', () => {
  const boxes = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
  const lines = [...document.querySelectorAll('path.line')].map(p => p.getTotalLength());
  document.title = JSON.stringify({
    charts: boxes.length, smallest: Math.min(...boxes.map(b => Math.min(b.width, b.height))),
    lines: lines.length, shortest: Math.min(...lines),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    requests: performance.getEntriesByType('resource').length,
    ink: getComputedStyle(document.querySelector('path.line')).stroke });
});</script></body>"""


@pytest.mark.parametrize("width", [1240, 420])
def test_a_browser_renders_the_page(width: int, run: Path, tmp_path: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        skip_without("chromium", "chromium is not installed (apt-get install chromium)")
    command = [sys.executable, str(ROOT / "tools/run_report.py"), str(run)]
    subprocess.run(command, check=True, capture_output=True)
    page = run / "report.html"
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text().replace("</body>", _MEASURE))
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000",
         "--virtual-time-budget=5000", "--dump-dom", measured.as_uri()],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(html.unescape(title[1]))
    assert seen["charts"] == len(CHARTS)
    assert seen["smallest"] > 100
    assert seen["lines"] > len(CHARTS)
    assert seen["shortest"] > 0
    assert seen["overflow"] <= 0  # nothing is wider than the page, also on a telephone
    assert seen["requests"] == 0
    assert seen["ink"].startswith("rgb")
