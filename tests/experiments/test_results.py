"""Tables and pictures from made-up cells: every seed appears, and missing cells are named."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.storage import CellStore
from megatron_hydra.experiments import fingerprint, plots
from megatron_hydra.experiments.page import section
from megatron_hydra.experiments.plan import make_plan
from megatron_hydra.experiments.plots import draw
from megatron_hydra.experiments.results import Results, Training, collect
from megatron_hydra.experiments.spec import load_experiment
from megatron_hydra.experiments.store import StepStore
from megatron_hydra.experiments.table import markdown

ROWS = """
variants: {a: {hf_model: teacher}, b: {hf_model: teacher, evaluation: {samples: 3}}}
table: {baseline: a, train_length: 128}
"""


@pytest.fixture
def made(write, tmp_path):
    """Make results of cells: the given accuracies at length 128, twice as much at 256."""

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
    assert line(text, "**a**") == [
        "**a**", "0.300 ± 0.141", "0.600 ± 0.283", "all", "64", "0",
    ]  # fmt: skip
    # Paired differences: −0.1 and +0.1. Rows of the third table begin with a seed.
    assert line(text, "b")[1] == "+0.000 ± 0.141"
    assert line(text, "a | 1")[2:4] == ["0.400", "0.800"]
    assert "not there" not in text


def test_what_taking_places_gets_right_is_subtracted(write, tmp_path):
    """Three of four answers are the first fact, which is asked for in half of the questions."""
    experiment = load_experiment(write(ROWS))
    plan, store = make_plan(experiment.cells), StepStore(tmp_path / "s")
    picks = {"asked": [0.5, 0.5], "picked": [0.75, 0.25]}
    for cell, accuracy in zip(experiment.cells[:2], (0.75, 0.5), strict=True):
        step = plan.steps[plan.cells[cell.name]]
        store.out(step).mkdir(parents=True)
        lengths = {"128": {"accuracy": accuracy, **picks}, "256": {"accuracy": accuracy}}
        (store.out(step) / "results.json").write_text(json.dumps({"tasks": {"facts": lengths}}))
        store.finish(step, 1.0)
    results = collect(experiment, plan, store)
    assert [cell.compared for cell in results.cells[:2]] == [
        {"facts@128": 0.25},
        {"facts@128": 0.0},
    ]
    text = markdown(results)
    assert "Right above by place" in text
    assert line(text, "a")[1] == "0.125 ± 0.177"  # the first table that has the row's name in plain
    page = "\n".join(section(results))
    corner = "`facts`, above by place"
    assert line(page, corner) == [corner, "128", "256"]
    assert [row.split("|")[2].strip() for row in page.split(corner)[1].splitlines()[2:4]] == [
        "0.125 ± 0.177", "not run",
    ]  # fmt: skip
    assert line(page, "a")[1:] == ["0.625 ± 0.177", "0.625 ± 0.177"]
    assert page.split(corner)[1].splitlines()[2].split("|")[3].strip() == "not counted"
    plain = tuple(dataclasses.replace(cell, compared={}) for cell in results.cells)
    assert "above by place" not in "\n".join(section(Results(experiment, plain)))


def test_no_seed_is_dropped_in_silence(made):
    results = made({("a", 0): 0.2, ("a", 1): "no memory", ("b", 0): 0.5})
    text = markdown(results)
    assert line(text, "**a**")[1] == "0.200 [1 of 2]"
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


def test_a_stopped_evaluation_shows_its_finished_lengths(write, tmp_path):
    experiment = load_experiment(write(ROWS))
    plan, store = make_plan(experiment.cells), StepStore(tmp_path / "s")
    step = plan.steps[plan.cells[experiment.cells[0].name]]
    cells = CellStore(store.out(step), {"seed": 0}, False)
    for length, value in ((256, 0.25), (128, 0.75)):
        cells.save("facts, two words", length, {"accuracy": value})
    cells.save("lm-eval 0.4 arc_easy", 0, {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1}})
    results = collect(experiment, plan, store)
    text = markdown(results)
    assert line(text, "")[:3] == ["", "facts, two words@128", "facts, two words@256"]
    assert line(text, "**a**")[1:4] == ["0.750 [1 of 2]", "0.250 [1 of 2]", "all"]
    assert line(text, "arc_easy/acc")[1:] == ["0.500 [1 of 2]", "not run"]
    assert line(text, "a | 0")[-1] == "unfinished"
    assert "4 of 4 cells are not there, or only in part" in text and "a, seed 0: unfinished" in text
    store.fail(step, "no memory")
    (failed,) = collect(experiment, plan, store).failed()
    assert failed.accuracy == results.cells[0].accuracy


def test_the_code_of_an_unfinished_rows_steps_counts(write, tmp_path):
    experiment = load_experiment(write("variants: {token: {hydra: {mixer: token, window: 64}}}"))
    plan, store = make_plan(experiment.cells), StepStore(tmp_path / "s")
    cell = experiment.cells[0]
    first = plan.steps[plan.ancestors(plan.cells[cell.name])[0]]
    assert collect(experiment, plan, store).cells[0].sources == ()
    store.out(first).mkdir(parents=True)
    store.finish(first, 1.0)
    found = collect(experiment, plan, store).cells[0]
    assert (found.state, found.sources) == ("missing", (fingerprint.of_package(),))


def test_heads_of_rows_without_a_head_map(write, tmp_path):
    """The picture shows all heads only if all attend to everything; it leaves out other models."""
    (tmp_path / "other").mkdir()
    experiment = load_experiment(
        write(
            "variants: {teacher: {hf_model: teacher}, other: {hf_model: other}, "
            "token: {hydra: {mixer: token, window: 64}}, both: {hydra: {mixer: parallel}}}"
        )
    )
    plan, store = make_plan(experiment.cells), StepStore(tmp_path / "s")
    for key in plan.cells.values():
        store.out(plan.steps[key]).mkdir(parents=True, exist_ok=True)
        body = {"tasks": {"facts": {"128": {"accuracy": 0.5}}}}
        (store.out(plan.steps[key]) / "results.json").write_text(json.dumps(body))
        store.finish(plan.steps[key], 1.0)
    text = markdown(collect(experiment, plan, store))
    names = {"teacher": "all", "other": "–", "token": "window 64", "both": "all, beside GDN"}
    assert {name: line(text, f"**{name}**")[2] for name in names} == names
    assert {name: line(text, f"{name} | 0")[3] for name in names} == names


def test_lm_eval_has_columns_of_its_own(write, tmp_path):
    rest = "variants: {a: {hf_model: teacher, evaluation: {lm_eval: [arc_easy]}}}"
    experiment = load_experiment(write(rest))
    plan, store = make_plan(experiment.cells, fetch=False), StepStore(tmp_path / "s")
    for number, key in enumerate(plan.cells.values()):
        store.out(plan.steps[key]).mkdir(parents=True)
        metrics = {"acc,none": 0.25 + number / 2, "acc_stderr,none": 0.1, "f1,strict": 0.5, "n": 3}
        body = {"tasks": {"facts": {"128": {"accuracy": 0.5}}}}
        body["lm_eval"] = {"tasks": {"arc_easy": metrics}}
        (store.out(plan.steps[key]) / "results.json").write_text(json.dumps(body))
        store.finish(plan.steps[key], 1.0)
    results = collect(experiment, plan, store)
    assert results.columns() == ["facts@128", "arc_easy/acc", "arc_easy/f1,strict"]
    text = markdown(results)
    assert line(text, "**a**")[1] == "0.500 ± 0.000" and "lm-eval's tasks" in text
    assert line(text, "questions") == ["questions", "a"]
    assert line(text, "arc_easy/acc") == ["arc_easy/acc", "0.500 ± 0.354"]
    table = dataclasses.replace(experiment.table, columns=("arc_easy/acc",), baseline="a")
    named = dataclasses.replace(results, experiment=dataclasses.replace(experiment, table=table))
    assert line(markdown(named), "**a**")[1] == "0.500 ± 0.354"  # named columns stay columns
    assert [path.name for path in draw(results, tmp_path)] == ["trial_bars.png"]


def test_differences_of_lm_evals_metrics_have_a_line_each(made):
    results = made({("a", 0): 0.25, ("a", 1): 0.5, ("b", 0): 0.75, ("b", 1): 0.5})
    cells = [
        dataclasses.replace(cell, accuracy={"sciq/acc": cell.accuracy["facts@128"]})
        for cell in results.cells
    ]
    text = markdown(dataclasses.replace(results, cells=tuple(cells)))
    values, gaps = text.split("Difference from **a**")
    assert line(values, "questions") == ["questions", "a", "b"]
    assert line(values, "sciq/acc") == ["sciq/acc", "0.375 ± 0.177", "0.625 ± 0.177"]
    assert line(gaps, "questions") == ["questions", "b"]
    assert line(gaps, "sciq/acc") == ["sciq/acc", "+0.250 ± 0.354"]  # +0.5 and 0


def drawn(results, monkeypatch, folder):
    """The axes of every picture, by file name."""
    figures = {}

    def save(figure, path, dpi):
        figures[path.name] = figure.axes[0]
        return path

    monkeypatch.setattr(plots, "write_figure_atomic", save)
    draw(results, folder)
    return figures


def test_curves_are_means_and_bands_reach_over_seeds(made, tmp_path, monkeypatch):
    results = made({("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.1})
    axes = drawn(results, monkeypatch, tmp_path)["trial_facts.png"]
    curves = {line.get_label(): line for line in axes.lines if line.get_label() in ("a", "b")}
    assert list(curves["a"].get_xdata()) == [128, 256]
    assert list(curves["a"].get_ydata()) == pytest.approx([0.3, 0.6])
    assert list(curves["b"].get_ydata()) == pytest.approx([0.1, 0.2])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.8))
    (mark,) = [line for line in axes.lines if line.get_label() not in ("a", "b")]
    assert list(mark.get_xdata()) == [128, 128]  # the length of training


def test_losses_are_in_the_order_of_the_stages(made, tmp_path, monkeypatch):
    """Also if the first row skips the first stage."""
    results = made({("a", 0): 0.2, ("b", 0): 0.1})
    stages = {"a": ("distill", "finetune"), "b": ("align", "distill", "finetune")}
    stage = Training(2, 20, 1.0, 1.0, ((10, 2.0), (20, 1.0)))
    cells = tuple(
        dataclasses.replace(cell, training=dict.fromkeys(stages[cell.variant], stage))
        if not cell.seed
        else cell
        for cell in results.cells
    )
    axes = drawn(dataclasses.replace(results, cells=cells), monkeypatch, tmp_path)[
        "trial_losses.png"
    ]
    panels = axes.figure.axes
    assert [panel.get_title() for panel in panels] == ["align", "distill", "finetune"]
    assert [len(panel.lines) for panel in panels] == [1, 2, 2]
    assert [text.get_text() for text in panels[-1].get_legend().get_texts()] == ["a", "b"]


def test_the_grid_has_every_row_and_marks_missing_values(made, tmp_path, monkeypatch):
    results = made({("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.1})
    cells = tuple(
        dataclasses.replace(
            cell, accuracy={k: v for k, v in cell.accuracy.items() if k == "facts@256"}
        )
        if cell.variant == "b"
        else cell
        for cell in results.cells
    )
    axes = drawn(dataclasses.replace(results, cells=cells), monkeypatch, tmp_path)["trial_grid.png"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["0.30", "0.60", "–", "0.20"]
    assert axes.get_title() == "facts"
    (mark,) = axes.lines
    assert list(mark.get_xdata()) == [0.5, 0.5]  # between 128, the length of training, and 256


def test_every_row_with_a_bar_is_in_the_legend(made, tmp_path, monkeypatch):
    """Also a row without a value at the first position."""
    results = made({("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.1, ("b", 1): 0.3})
    cells = tuple(
        dataclasses.replace(cell, accuracy={"facts@256": cell.accuracy["facts@256"]})
        if cell.variant == "b"
        else cell
        for cell in results.cells
    )
    results = dataclasses.replace(results, cells=cells)
    axes = drawn(results, monkeypatch, tmp_path)["trial_bars.png"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([0.3, 0.6, 0.4])


def test_pictures_are_written(made, tmp_path):
    paths = draw(made({("a", 0): 0.2}), tmp_path / "pictures")
    assert [path.name for path in paths] == ["trial_facts.png", "trial_grid.png", "trial_bars.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_columns_must_be_task_at_length(write, tmp_path):
    experiment = load_experiment(write("variants: {a: {hf_model: teacher}}\ntable: {columns: [x]}"))
    results = collect(experiment, make_plan(experiment.cells), StepStore(tmp_path / "s"))
    with pytest.raises(HydraError, match="task@length"):
        markdown(results)
