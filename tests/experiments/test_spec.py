from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.spec import load_experiment
from tests.experiments.conftest import CONFIGS


def test_variants_and_axes_become_rows_times_seeds(write):
    experiment = load_experiment(
        write(
            """
variants:
  dense: {hf_model: teacher}
axes:
  hydra.fusion: [scale, gated]
  norm:
    with: {}
    without: {hydra: {fusion_norm: none}}
"""
        )
    )
    assert experiment.variants == (
        "dense",
        "fusion scale, with",
        "fusion scale, without",
        "fusion gated, with",
        "fusion gated, without",
    )
    assert len(experiment.cells) == 5 * 2
    last = experiment.cells[-1]
    assert (last.variant, last.seed) == ("fusion gated, without", 1)
    assert last.spec.hydra == {"fusion": "gated", "fusion_norm": "none"}
    assert [name for name, _ in last.stages] == ["align", "distill"]


def test_a_row_changes_single_keys_of_a_section(write):
    path = write("variants: {long: {stages: {align: {set: {schedule.steps: 9}}}}}")
    ((_, align), _) = load_experiment(path).cells[0].stages
    assert align.set == {"schedule.steps": 9, "schedule.warmup_steps": 1}
    assert len(align.configs) == 2
    changes = {"seeds": [7], "base": {"stages": {"align": {"set": {"schedule.warmup_steps": 0}}}}}
    (cell,) = load_experiment(path, changes=changes).cells
    assert cell.seed == 7
    assert cell.stages[0][1].set == {"schedule.steps": 9, "schedule.warmup_steps": 0}


def test_a_stage_can_be_left_out(write):
    path = write("variants: {short: {stages: {align: {skip: true}}}}")
    assert [name for name, _ in load_experiment(path).cells[0].stages] == ["distill"]


def test_an_included_file_is_under_this_one(write, tmp_path):
    write("table: {train_length: 128}", name="base")
    path = tmp_path / "top.yaml"
    path.write_text("include: base.yaml\ntitle: Top\nbase: {selection: {ratio: '3:1'}}\n")
    path.write_text(path.read_text() + "variants: {one: {}}\n")
    experiment = load_experiment(path)
    assert (experiment.name, experiment.title, experiment.seeds) == ("top", "Top", (0, 1))
    assert experiment.table.train_length == 128
    assert experiment.cells[0].spec.selection.ratio == "3:1"
    assert experiment.cells[0].spec.selection.num_prompts == 6


def test_constants_come_from_the_included_file_or_from_another_base(write, tmp_path):
    rest = "constants: {window: 64, far: {lengths: [512], samples: 3}, bars: [512]}\n"
    small = write(rest, name="small")
    large = write(rest.replace("64", "4096").replace("512", "8192"), name="large")
    path = tmp_path / "top.yaml"
    path.write_text(
        "include: small.yaml\nconstants: {bars: [9]}\nbase: {evaluation: $far}\n"
        "variants: {a: {hydra: {mixer: token, window: $window}}}\ntable: {bars: $bars}\n"
    )
    found = [load_experiment(path), load_experiment(path, small), load_experiment(path, large)]
    specs = [experiment.cells[0].spec for experiment in found]
    assert [spec.hydra["window"] for spec in specs] == [64, 64, 4096]
    assert [spec.evaluation.lengths for spec in specs] == [(512,), (512,), (8192,)]
    assert specs[2].evaluation.samples == 3 and specs[2].evaluation.tasks  # as in the base
    assert found[2].table.bars == (9,)


def test_files_include_one_another_in_a_row_and_not_in_a_ring(write, tmp_path):
    write("constants: {n: 1, m: 1}\n", name="low")
    (tmp_path / "middle.yaml").write_text(
        "include: low.yaml\nconstants: {m: 2}\nbase: {selection: {num_prompts: $m}}\n"
    )
    top = tmp_path / "top.yaml"
    top.write_text("include: middle.yaml\nvariants: {a: {evaluation: {samples: $n}}}\n")
    spec = load_experiment(top).cells[0].spec
    assert (spec.selection.num_prompts, spec.evaluation.samples) == (2, 1)
    assert spec.evaluation.lengths == (128, 256)  # from the lowest base
    (tmp_path / "low.yaml").write_text("include: middle.yaml\n")
    with pytest.raises(HydraError, match=r"low\.yaml includes .*middle\.yaml"):
        load_experiment(top)


def test_paths_are_relative_to_the_file_they_stand_in(write, tmp_path):
    (tmp_path / "shared" / "model").mkdir(parents=True)
    (tmp_path / "shared" / "low.yaml").write_text(
        "base:\n  teacher: {model: model}\n  student: {calibration_file: c.jsonl}\n"
        "  selection: {tasks: ['jsonl:p.jsonl', induction]}\n"
        "  stages: {align: {configs: [../run.yaml]}}\n"
        "  evaluation: {tasks: ['qa:q.json', niah_single_1], lengths: [9], haystack: '{prepare}/h', "
        "lm_eval: [x], lm_eval_include: tasks}\n"
    )
    top = tmp_path / "top.yaml"
    top.write_text(
        "include: shared/low.yaml\nvariants: {a: {evaluation: {haystack: h.txt}}, b: {hf_model: model}}\n"
    )
    a, b = (cell.spec for cell in load_experiment(top).cells if cell.seed == 0)
    low = tmp_path / "shared"
    assert a.teacher.model == str(low / "model")
    assert a.student.calibration_file == str(low / "c.jsonl")
    assert a.selection.tasks == (f"jsonl:{low / 'p.jsonl'}", "induction")
    assert a.evaluation.tasks == (f"qa:{low / 'q.json'}", "niah_single_1")
    assert a.evaluation.lm_eval_include == str(low / "tasks")
    assert a.stages["align"]["configs"] == [str(low / "../run.yaml")]
    assert (a.evaluation.haystack, b.evaluation.haystack) == (
        str(tmp_path / "h.txt"),
        "{prepare}/h",
    )
    assert b.hf_model == "model"  # no such folder beside top.yaml, so it is a Hub name


@pytest.mark.parametrize(
    "tokens, scale, schedule",
    [
        (1000, 1.0, {"steps": 10, "warmup_steps": 2}),
        (1001, 1.0, {"steps": 11, "warmup_steps": 3}),
        (1000, 0.01, {"steps": 1, "warmup_steps": 0}),
        (0, 1.0, {}),
    ],
)
def test_a_budget_in_tokens_is_a_number_of_steps(write, tokens, scale, schedule):
    from tests.experiments.conftest import BODY

    body = BODY.replace("set: {{schedule.steps: 2, schedule.warmup_steps: 1}}", "warmup: 0.2")
    path = write(f"variants: {{a: {{stages: {{align: {{tokens: {tokens}}}}}}}}}", body=body)
    ((_, align), (_, distill)) = load_experiment(path, tokens_scale=scale).cells[0].stages
    assert align.schedule(100) == schedule
    assert distill.schedule(100) == {}


REAL = CONFIGS / "experiments" / "real"


REAL_BASES = {REAL / "base.yaml", REAL / "half.yaml"}


@pytest.mark.parametrize("base", ["real/base", "real/half", "shared/tiny", "shared/qwen3_1.7b"])
def test_the_real_experiments_expand_at_any_scale(base):
    for path in set(REAL.glob("*.yaml")) - REAL_BASES:
        experiment = load_experiment(path, CONFIGS / "experiments" / f"{base}.yaml")
        assert experiment.paper and len(experiment.variants) > 1
        for cell in experiment.cells:
            for name, stage in cell.stages:
                assert all(Path(config).is_file() for config in stage.configs), (cell.name, name)


@pytest.mark.parametrize(
    "base, model, seeds",
    [
        (None, "quickstart", 3),
        ("shared/qwen3_1.7b.yaml", "Qwen/Qwen3-1.7B", 3),
        ("real/base.yaml", "HuggingFaceTB/SmolLM2-135M-Instruct", 1),
        ("real/half.yaml", "HuggingFaceTB/SmolLM2-135M-Instruct", 1),
    ],
)
def test_the_shipped_experiments_expand_at_any_scale(base, model, seeds):
    base = base and CONFIGS / "experiments" / base
    for path in (CONFIGS / "experiments").glob("*.yaml"):
        experiment = load_experiment(path, base)
        assert len(experiment.cells) == seeds * len(experiment.variants) and experiment.paper
        assert {cell.spec.teacher.model for cell in experiment.cells} == {model}
        tiny = [cell.name for cell in experiment.cells if "tiny:" in str(cell.spec)]
        assert bool(tiny) == (base is None)  # with another base, no tiny setting remains


@pytest.mark.parametrize(
    "rest, words",
    [
        ("rows: {}", ["trial.yaml", "unknown key 'rows'"]),
        ("variants: {a: {hydra: {fusoin: scale}}}", ["row 'a'", "fusoin", "fusion"]),
        ("variants: {a: {hydra: {fusion: sum}}}", ["row 'a'", "fusion", "'scale'"]),
        ("variants: {a: {selection: {stratgy: x}}}", ["row 'a'", "selection.stratgy", "strategy"]),
        ("variants: {a: {stages: {align: {step: 3}}}}", ["row 'a', stages.align", "'step'"]),
        ("variants: {a: {stages: {more: {}}}}", ["stages.more", "configs names no file"]),
        ("variants: {a: {evaluation: {lengths: []}}}", ["row 'a'", "tasks and lengths"]),
        ("variants: {a: {teacher: {model: ''}}}", ["row 'a'", "either model or train"]),
        ("variants: {a: {hf_model: x, hydra: {fusion: gated}}}", ["row 'a'", "do not apply"]),
        ("variants: {a: [1]}", ["variants.a", "a mapping"]),
        ("variants: {a: {hydra: {window: $w}}}", ["trial.yaml", "hydra", "no constant", "'w'"]),
        (
            "variants: {a: {evaluation: {model_config: {hydra: {window: 1}}}}}",
            ["row 'a'", "'hydra' decides what is trained"],
        ),
        ("variants: {a: {hf_revision: v2}}", ["row 'a'", "hf_revision"]),
        (
            "variants: {a: {stages: {align: {tokens: 100}}}}",
            ["row 'a', stages.align", "both tokens and schedule.steps"],
        ),
        ("variants: {a: {stages: {align: {tokens: -1}}}}", ["stages.align", "0 or more"]),
        ("variants: {a: {stages: {align: {warmup: 1}}}}", ["stages.align", "warmup"]),
        ("variants: {a: {evaluation: {lm_eval_limit: -1}}}", ["row 'a'", "lm_eval_limit"]),
        (
            "variants: {a: {student: {half_life: [5]}}}",
            ["row 'a'", "student.half_life 5: must be two"],
        ),
        ("variants: {a: {student: {init: far}}}", ["row 'a'", "student.init"]),
        ("variants: {a: {evaluation: {lm_eval_include: x}}}", ["row 'a'", "no task of lm_eval"]),
        ("variants: {a: {selection: {effects: direct}}}", ["row 'a'", "selection.effects"]),
        (
            "variants: {a: {selection: {num_receivers: 0}}}",
            ["row 'a'", "selection.num_receivers 0: must be at least 1"],
        ),
        (
            "variants: {a: {evaluation: {tasks: [], lm_eval: [arc_easy]}}}",
            ["row 'a'", "tasks and lengths, or lm_eval"],
        ),
        ("variants: {a: {}}\ntable: {baseline: b}", ["table.baseline 'b'"]),
        ("axes: {hydra.fusion: scale}", ["axes.hydra.fusion", "a list of values"]),
        ("title: again\nvariants: {a: {}}", ["given twice"]),
        ("{}", ["not valid YAML"]),
        ("", ["no rows"]),
    ],
)
def test_what_is_wrong_is_named(write, rest, words):
    with pytest.raises(HydraError) as caught:
        load_experiment(write(rest))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_seed_counts_once(write):
    from tests.experiments.conftest import BODY

    path = write("variants: {a: {}}", body=BODY.replace("[0, 1]", "[0, 0]"))
    with pytest.raises(HydraError, match="each one once"):
        load_experiment(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(HydraError, match=r"gone\.yaml cannot be read"):
        load_experiment(tmp_path / "gone.yaml")
