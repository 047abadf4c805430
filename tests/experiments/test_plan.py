"""Keys of steps: what shares a step, and what must not."""

from __future__ import annotations

import shutil

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.plan import make_plan
from megatron_hydra.experiments.spec import load_experiment
from tests.experiments.conftest import CONFIGS


def steps(plan, name):
    """kind → key of the steps of the cell that begins with ``name``."""
    (key,) = [key for cell, key in plan.cells.items() if name in cell]
    return {plan.steps[k].kind: k for k in plan.ancestors(key)}


def planned(path):
    return make_plan(load_experiment(path).cells)


ALL = ["prepare", "select", "convert", "teacher", "align", "distill", "export", "evaluate"]


@pytest.mark.parametrize(
    "change, first",
    [
        ("selection: {ratio: '3:1'}", "select"),
        ("selection: {strategy: random}", "select"),
        ("hydra: {fusion: gated}", "convert"),
        ("student: {half_life: [8, 64]}", "convert"),
        ("stages: {align: {set: {optimizer.lr: 1.0e-3}}}", "align"),
        ("stages: {distill: {set: {loss.kl_weight: 0.5}}}", "distill"),
        ("evaluation: {samples: 3}", "evaluate"),
        ("evaluation: {tasks: [megatron_hydra.experiments.tiny:text]}", "evaluate"),
    ],
)
def test_a_change_leaves_the_steps_before_it(write, change, first):
    plan = planned(write(f"variants: {{plain: {{}}, changed: {{{change}}}}}"))
    plain, changed = steps(plan, "plain / seed 0"), steps(plan, "changed / seed 0")
    assert list(plain) == list(changed) or "random" in change
    at = ALL.index(first)
    same = [kind for kind in ALL if kind in changed and plain[kind] == changed[kind]]
    assert same == [
        kind for kind in ALL if kind in changed and (ALL.index(kind) < at or kind == "teacher")
    ]


def test_what_is_left_at_its_default_is_the_same_step(write):
    plan = planned(write("variants: {plain: {}, same: {selection: {strategy: interp}}}"))
    assert steps(plan, "plain / seed 1") == steps(plan, "same / seed 1")
    assert len(plan.steps) == 2 * 7 + 1


def test_seeds_share_only_what_has_none(write):
    plan = planned(write("variants: {a: {}, whole: {selection: {strategy: layerwise}}}"))
    first, second = steps(plan, "/ a / seed 0"), steps(plan, "/ a / seed 1")
    assert [kind for kind in ALL if first[kind] == second[kind]] == ["teacher"]
    first, second = steps(plan, "whole / seed 0"), steps(plan, "whole / seed 1")
    assert [kind for kind in ALL if first[kind] == second[kind]] == ["select", "teacher"]


def test_all_gdn_needs_no_prompts_whatever_the_strategy(write):
    plan = planned(
        write(
            """variants:
  one: {selection: {ratio: all-gdn}}
  other: {selection: {ratio: all-gdn, strategy: random}}
"""
        )
    )
    assert steps(plan, "one / seed 0") == steps(plan, "other / seed 0")


def test_keys_do_not_depend_on_places(write, tmp_path):
    here = planned(write("variants: {a: {}}"))
    other = tmp_path / "elsewhere"
    shutil.copytree(CONFIGS / "quickstart", other / "quickstart")
    moved = (tmp_path / "trial.yaml").read_text().replace(str(CONFIGS), str(other))
    (other / "trial.yaml").write_text(moved)
    assert list(planned(other / "trial.yaml").steps) == list(here.steps)


def test_keys_follow_the_content_of_files(write, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    rest = "variants: {a: {hf_model: teacher, evaluation: {tasks: [questions.jsonl]}}}"
    before = planned(write(rest))
    assert before.steps == planned(write(rest)).steps
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    after = planned(write(rest))
    assert not set(before.steps) & set(after.steps)


def test_a_skipped_stage_leaves_the_batches_of_the_next(write):
    plan = planned(write("variants: {a: {}, b: {stages: {align: {skip: true}}}}"))
    with_align, without = steps(plan, "/ a / seed 1"), steps(plan, "/ b / seed 1")
    assert "align" not in without
    seeds = [
        plan.steps[found["distill"]].params["config"]["data"]["seed"]
        for found in (with_align, without)
    ]
    assert seeds == [1001, 1001]
    assert plan.steps[without["distill"]].inputs["student"] == without["convert"]


def test_a_bad_override_names_the_cell(write):
    path = write("variants: {a: {stages: {align: {set: {schedule.stepz: 3}}}}}")
    with pytest.raises(HydraError, match=r"trial / a / seed 0: .*schedule\.stepz"):
        planned(path)


def test_missing_files_are_named(write):
    path = write("variants: {a: {evaluation: {tasks: [gone.jsonl]}}}")
    with pytest.raises(HydraError, match=r"gone\.jsonl cannot be read"):
        planned(path)
    path = write("variants: {a: {stages: {align: {configs: [gone.yaml]}}}}")
    with pytest.raises(HydraError, match=r"gone\.yaml"):
        planned(path)


def test_the_shipped_experiments_expand_and_share():
    files = sorted((CONFIGS / "experiments").glob("*.yaml"))
    experiments = [load_experiment(path) for path in files]
    assert {e.name for e in experiments} >= {
        "fusion",
        "structure",
        "selection",
        "granularity",
        "ratio",
        "length",
    }
    assert all(e.seeds == (0, 1, 2) and e.paper for e in experiments)
    plan = make_plan(cell for e in experiments for cell in e.cells)
    alone = sum(len(plan.ancestors(key)) for key in plan.cells.values())
    assert len(plan.steps) < 0.6 * alone
    ratio = steps(plan, "ratio / HydraHead 7:1 / seed 2")
    assert ratio == steps(plan, "selection / interp / seed 2")
    assert ratio == steps(plan, "fusion / scale, norm / seed 2")
    length = steps(plan, "length / HydraHead 7:1 / seed 2")
    assert [kind for kind in ratio if ratio[kind] != length[kind]] == ["evaluate"]


@pytest.mark.parametrize("mixer", ["token", "parallel"])
def test_heads_that_are_both_need_no_selection(write, mixer):
    plan = planned(write(f"variants: {{a: {{}}, both: {{hydra: {{mixer: {mixer}}}}}}}"))
    plain, both = steps(plan, "a / seed 0"), steps(plan, "both / seed 0")
    assert set(plain) - set(both) == {"select"}
    assert plain["teacher"] == both["teacher"] and plain["convert"] != both["convert"]
