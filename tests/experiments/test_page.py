"""Tables in a page: only the text between the markers changes."""

from __future__ import annotations

import json

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.command import Request, show
from megatron_hydra.experiments.plan import make_plan
from megatron_hydra.experiments.spec import load_experiment
from megatron_hydra.experiments.store import StepStore

ROWS = """
seeds: [0]
variants:
  a: {hf_model: teacher, evaluation: {lm_eval: [sciq], lm_eval_limit: 20}}
  b: {evaluation: {lm_eval: [sciq], lm_eval_limit: 20}}
"""


@pytest.fixture
def request_of(write, tmp_path):
    """Row ``a`` is finished; row ``b`` has one finished stage."""
    from tests.experiments.conftest import BODY

    path = write(ROWS, body=BODY.replace("seeds: [0, 1]\n", ""))
    plan = make_plan(load_experiment(path).cells, fetch=False)
    store = StepStore(tmp_path / "s")
    a = plan.steps[plan.cells["trial / a / seed 0"]]
    store.out(a).mkdir(parents=True)
    tasks = {"facts": {"1024": {"accuracy": 0.25}, "100": {"accuracy": 0.75}}}
    lm_eval = {"tasks": {"sciq": {"acc,none": 0.5}}}
    (store.out(a) / "results.json").write_text(json.dumps({"tasks": tasks, "lm_eval": lm_eval}))
    store.finish(a, 1.0)
    (align,) = [step for step in plan.steps.values() if step.kind == "align"]
    store.out(align).mkdir(parents=True)
    lines = [
        {"step": n, "tokens": 100 * n, "loss": 8.0 / n, "tokens_per_s": 10.0 * n} for n in (1, 2, 4)
    ]
    (store.out(align) / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    store.finish(align, 120.0)
    return lambda page: Request([path], store.root, page=page)


def test_only_what_stands_between_the_markers_changes(request_of, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- experiment trial -->\nold\n<!-- end -->\nAfter.\n")
    assert show(request_of(page), lambda _: None) == 1  # row b is missing
    text = page.read_text()
    assert text.startswith("Before.\n<!-- experiment trial -->\nRetrieval: 2 samples at each of 5")
    assert text.endswith("\n<!-- end -->\nAfter.\n") and "old" not in text
    for line in (
        "| `facts` | 100 | 1K |",
        "| a | 0.750 | 0.250 |",
        "| b | not run | not run |",
        "Of lm-eval's sets the first 20 questions.",
        "| questions | a | b |",
        "| sciq/acc | 0.500 | not run |",
        "| b | align | 4 | 400 | 2.0 | 20 | 8 → 2 |",
        "- b, seed 0: missing",
    ):
        assert line in text
    once = text
    show(request_of(page), lambda _: None)
    assert page.read_text() == once


def test_a_page_without_a_place_is_refused_and_kept(request_of, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- experiment other -->\n<!-- end -->\n")
    with pytest.raises(HydraError, match=r"no place .*<!-- experiment trial -->"):
        show(request_of(page), lambda _: None)
    assert page.read_text() == "<!-- experiment other -->\n<!-- end -->\n"
    with pytest.raises(HydraError, match=r"--page .*gone\.md cannot be read"):
        show(request_of(tmp_path / "gone.md"), lambda _: None)
