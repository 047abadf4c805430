"""Power laws over tokens: exact laws are found again, and too few rows are named."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.plots import draw
from megatron_hydra.experiments.results import CellResult, Results, Training
from megatron_hydra.experiments.scaling import fit, fit_law, fits
from megatron_hydra.experiments.spec import load_experiment
from megatron_hydra.experiments.table import markdown

TOKENS = (20e6, 40e6, 80e6, 160e6, 320e6)
ROWS = """
variants: {a: {}, b: {}, c: {}, d: {}, teacher: {hf_model: teacher}}
table: {train_length: 256, fit_rows: [a, b, c, d], fit_tokens: 1.0e+9}
"""


@pytest.mark.parametrize(
    ("floor", "scale", "exponent"), [(0.25, 300.0, 0.4), (0.0, 40.0, 0.25), (1.5, 1e5, 0.8)]
)
def test_an_exact_law_is_found_again(floor, scale, exponent):
    points = [(n, floor + scale * n**-exponent) for n in TOKENS]
    law = fit_law(points)
    assert law.exponent == pytest.approx(exponent, rel=0.02)
    assert law.residual < 1e-3 * points[0][1]
    for tokens in (1e7, 15e9):
        assert law(tokens) == pytest.approx(floor + scale * tokens**-exponent, rel=0.05, abs=0.02)


def test_a_law_never_rises_and_is_never_negative():
    rising = fit_law([(n, n / 1e9) for n in TOKENS])
    assert rising.scale == 0 and rising(15e9) == pytest.approx(sum(TOKENS) / len(TOKENS) / 1e9)
    falling = fit_law([(n, 1 - n / 4e8) for n in TOKENS])
    assert falling.floor >= 0 and falling(1e12) >= 0


def test_the_error_is_the_range_without_one_row():
    noise = (0, 0.02, -0.02, 0.02, 0)
    points = [(n, 0.2 + 100 * n**-0.3 + e) for n, e in zip(TOKENS, noise, strict=True)]
    whole = fit("loss", points)
    low, high = whole.range_at(15e9)
    assert len(whole.others) == 5 and low < whole.law(15e9) < high
    assert fit("loss", points[:3]).range_at(15e9) is None
    assert fit("loss", points[:2]).law is None
    assert fit("loss", [points[0], points[0], points[1]]).law is None


def cell(row, tokens, loss, accuracy):
    stage = Training(10, int(tokens / 2), 1.0, 1.0, ((1, 9.0),) * 9 + ((2, loss),))
    training = {"align": stage, "distill": dataclasses.replace(stage, curve=((1, 5.0),))}
    return CellResult(row, 0, "done", accuracy=accuracy, training=training)


def test_quantities_of_an_experiment(write, tmp_path):
    experiment = load_experiment(write(ROWS))
    made = [
        cell(row, n, 1 + 1e8 / n, {"x@128": 0.5, "x@256": 1.0, "x@512": 0.0, "q/perplexity": 4.0})
        for row, n in zip("abcd", TOKENS, strict=False)
    ]
    teacher = CellResult("teacher", 0, "done", accuracy={"x@128": 1.0})
    results = Results(experiment, (*made, teacher))
    found = {one.name: one for one in fits(results)}
    assert found["last loss of align"].points[0] == (20e6, 6.0)
    assert found["last loss of align"].law(1e9) == pytest.approx(1.1, rel=0.02)
    assert found["wrong answers to 256 tokens"].points[0][1] == 0.25
    assert found["wrong answers beyond 256 tokens"].law(1e9) == 1.0
    assert found["q/perplexity"].law(1e9) == 4.0
    text = markdown(results)
    assert "| last loss of align | 4 | 0.99" in text and "| 1 (does not fall) |" in text
    assert "at 1,000 M tokens" in text
    assert any(path.name.endswith("_fit.png") for path in draw(results, tmp_path))
    rest = (CellResult(row, 0, "missing") for row in "cd")
    few = markdown(Results(experiment, (*made[:2], *rest, teacher)))
    assert "| last loss of align | 2 | needs 3 rows |" in few


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{fit_rows: [a, e], fit_tokens: 1.0e+9}", "fit_rows has 'e', which is none of the rows"),
        ("{fit_rows: [a]}", "fit_rows needs table.fit_tokens"),
    ],
)
def test_wrong_keys_are_named(write, table, message):
    with pytest.raises(HydraError, match=message):
        load_experiment(write(f"variants: {{a: {{}}}}\ntable: {table}"))
