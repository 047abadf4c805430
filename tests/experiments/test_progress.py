from __future__ import annotations

import dataclasses
import io
import json

from megatron_hydra.experiments.progress import ProgressLine
from megatron_hydra.experiments.store import StepStore
from tests.experiments.helpers import step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_reads_the_metrics_of_running_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    store = StepStore(tmp_path / "s")
    select = dataclasses.replace(step("a"), kind="select", row="random")
    params = {"config": {"schedule": {"steps": 10}}}
    align = dataclasses.replace(step("b"), kind="align", action="stage", row="hydra", params=params)
    terminal = Terminal()
    line = ProgressLine(store, terminal)
    line.show([select, align], "about 2.0 min left")
    assert terminal.getvalue() == "\r\x1b[Krandom select | hydra align | about 2.0 min left"
    store.out(align).mkdir(parents=True)
    entries = [json.dumps({"step": n, "loss": 1.5, "more": "x" * 5000}) for n in range(1, 6)]
    (store.out(align) / "metrics.jsonl").write_text("\n".join(entries) + '\n{"step": 6, "lo')
    line.show([align, select], "about 2.0 min left")
    shown = terminal.getvalue().rpartition("\x1b[K")[2]
    assert shown.startswith("hydra align 5/10 loss 1.50 | random select") and len(shown) < 70
    line.clear()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_nothing_is_redrawn_in_a_file(tmp_path):
    file = io.StringIO()
    line = ProgressLine(StepStore(tmp_path / "s"), file)
    line.show([step("a")], "about 2.0 min left")
    line.clear()
    assert file.getvalue() == ""
