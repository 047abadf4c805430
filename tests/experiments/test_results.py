"""Tables and pictures from made-up cells: every seed shows, and what is missing is said."""

from __future__ import annotations

import json
import re

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.plan import make_plan
from megatron_hydra.experiments.plots import draw
from megatron_hydra.experiments.results import collect
from megatron_hydra.experiments.spec import load_experiment
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.experiments.table import markdown

ROWS = """
variants: {a: {hf_model: teacher}, b: {hf_model: teacher, evaluation: {samples: 3}}}
table: {baseline: a, train_length: 128}
"""


@pytest.fixture
def made(write, tmp_path):
    """Makes the results of cells with the given accuracies at 128; twice as much at 256."""

    def make(values):
        experiment = load_experiment(write(ROWS))
        plan, store = make_plan(experiment.cells), StepStore(tmp_path / "s")
        for cell in experiment.cells:
            step = plan.steps[plan.cells[cell.name]]
            value = values.get((cell.variant, cell.seed))
            if isinstance(value, str):
                store.fail(step, value)
            elif value is not None:
                store.out(step).mkdir(parents=True)
                cells = {"128": {"accuracy": value}, "256": {"accuracy": 2 * value}}
                body = {"tasks": {"facts": cells}, "cache": {"kv_bytes_per_token": 64.0}}
                body["cache"]["state_bytes"] = 0.0
                (store.out(step) / "results.json").write_text(json.dumps(body))
                store.finish(step, 1.0)
        return collect(experiment, plan, store)

    return make


def line(text, start):
    found, *_ = re.findall(rf"^\| {re.escape(start)} \|.*$", text, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_mean_and_spread_over_seeds(made):
    text = markdown(made({("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.1, ("b", 1): 0.5}))
    assert line(text, "")[:3] == ["", "facts@128", "facts@256"]
    assert line(text, "**a**") == ["**a**", "0.300 ± 0.141", "0.600 ± 0.283", "", "64", "0"]
    # Paired: −0.1 and +0.1. (Rows of the third table begin with a seed.)
    assert line(text, "b")[1] == "+0.000 ± 0.141"
    assert line(text, "a | 1")[2:4] == ["0.400", "0.800"]
    assert "not there" not in text


def test_no_seed_is_dropped_in_silence(made):
    results = made({("a", 0): 0.2, ("a", 1): "no memory", ("b", 0): 0.5})
    text = markdown(results)
    assert line(text, "**a**")[1] == "0.200 ± 0.000 [1 of 2]"
    assert "2 of 4 cells are not there" in text
    assert re.search(r"a, seed 1: failed: evaluate failed, log .*log\.txt", text)
    assert "b, seed 1: missing" in text
    assert line(text, "b | 1")[-1] == "missing"
    assert [cell.variant for cell in results.failed()] == ["a"]
    assert results.to_dict()["cells"][1]["state"] == "failed"


def test_rows_without_any_cell_say_so(made):
    text = markdown(made({("a", 0): "x", ("a", 1): "x", ("b", 0): 0.5}))
    assert line(text, "**a**")[1:3] == ["failed", "failed"]
    assert line(text, "a | 0")[-1].startswith("failed (evaluate: ")


def test_pictures(made, tmp_path):
    results = made({("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.1})
    paths = draw(results, tmp_path / "pictures")
    assert [path.name for path in paths] == ["trial_facts.png", "trial_bars.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_columns_must_be_task_at_length(write, tmp_path):
    experiment = load_experiment(write("variants: {a: {hf_model: teacher}}\ntable: {columns: [x]}"))
    results = collect(experiment, make_plan(experiment.cells), StepStore(tmp_path / "s"))
    with pytest.raises(HydraError, match="task@length"):
        markdown(results)
