"""The planner against a real training step: bytes of torch's allocator, FLOPs of torch's counter, operators.

Operators are those that torch dispatches until all gradients exist.

The slow tests print the table of docs/planning.md:
``pytest tests/planning/test_measured.py -m slow -s``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planning import cases

MEMORY, FLOPS, OPERATORS = 0.10, 0.02, 0.15
"""Relative error bounds that the planner promises."""


def _compare(named: dict[str, tuple], processes: int, folder: Path) -> list[str]:
    """Rows of a table; fails if a figure is outside its bound."""
    rows, wrong = [], []
    results = cases.measure(named, processes, folder)
    assert len(results) == len(named) * processes
    for result in sorted(results, key=lambda r: (list(named).index(r["name"]), r["rank"])):
        model, body = named[result["name"]]
        memory, flops, launches = cases.predict(model, body, result["rank"])
        off = memory / result["peak"] - 1, flops / result["flops"] - 1
        by_operators = launches / result["operators"] - 1
        rows.append(
            f"| {result['name']} | {result['rank']} | {result['peak'] / 1e6:.1f} | {memory / 1e6:.1f} | "
            f"{off[0]:+.1%} | {result['flops'] / 1e9:.3f} | {flops / 1e9:.3f} | {off[1]:+.2%} | "
            f"{result['operators']:,} | {launches:,.0f} | {by_operators:+.0%} |"
        )
        if abs(off[0]) > MEMORY or abs(off[1]) > FLOPS or abs(by_operators) > OPERATORS:
            wrong.append(rows[-1])
    print("\n".join(["", *rows]))
    assert not wrong, "\n".join(wrong)
    return rows


def test_one_rank(tmp_path: Path) -> None:
    """A short HydraHead run, which has every part of a layer."""
    body = cases.run_config(length=512)
    _compare({"hydrahead": (cases.MODELS["hydrahead"], body)}, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
def test_every_kind_of_model_under_every_layout(layout: str, tmp_path: Path) -> None:
    parallel = cases.LAYOUTS[layout]
    body = cases.run_config(parallel=parallel)
    named = {f"{kind}, {layout}": (model, body) for kind, model in cases.MODELS.items()}
    _compare(named, 2 if parallel else 1, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_precision_verbs_and_recomputation(tmp_path: Path) -> None:
    again = {"granularity": "selective", "modules": ["attention", "mlp"]}
    parts = {"granularity": "selective", "modules": ["fa", "gdn", "tail"]}
    bodies = {
        "bf16": cases.run_config(precision="bf16"),
        "distill": cases.run_config("distill"),
        "align": cases.run_config("align"),
        "recompute selective": cases.run_config(recompute=again),
        "recompute parts": cases.run_config(recompute=parts),
        "recompute full": cases.run_config(recompute={"granularity": "full"}),
    }
    model = cases.MODELS["hydrahead"]
    _compare({f"hydrahead, {name}": (model, body) for name, body in bodies.items()}, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pipeline(tmp_path: Path) -> None:
    batch = {"micro_batch_size": 1, "global_batch_size": 3}
    body = cases.run_config(parallel={"pipeline": 2}, batch=batch)
    _compare({"hydrahead, pp2": (cases.MODELS["hydrahead"], body)}, 2, tmp_path)
