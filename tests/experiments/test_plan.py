"""Keys of steps: which cells share a step, and which must not."""

from __future__ import annotations

import hashlib
import os
import shutil

import huggingface_hub
import pytest

from megatron_hydra.data.manifest import Manifest, file_record
from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import fingerprint
from megatron_hydra.experiments.command import Request, run, show
from megatron_hydra.experiments.plan import _DRAWN, _SEEDLESS, make_plan
from megatron_hydra.experiments.spec import load_experiment
from megatron_hydra.selection import STRATEGIES, SelectionOptions
from tests.experiments.conftest import CONFIGS
from tests.test_head_map import tiny_map


def steps(plan, name):
    """Kind → key, for the steps of the cell whose name begins with ``name``."""
    (key,) = [key for cell, key in plan.cells.items() if name in cell]
    return {plan.steps[k].kind: k for k in plan.ancestors(key)}


def planned(path):
    return make_plan(load_experiment(path).cells)


ALL = ["prepare", "select", "convert", "teacher", "align", "distill", "export", "evaluate"]


@pytest.mark.parametrize(
    "change, first",
    [
        ("selection: {ratio: '7:1'}", "select"),
        ("selection: {strategy: global_random}", "select"),
        ("hydra: {fusion: gated}", "convert"),
        ("evaluation: {model_config: {rope_parameters: {rope_type: yarn}}}", "evaluate"),
        ("hydra: {fa_gate_bias: false}", "convert"),
        ("student: {half_life: [8, 64]}", "convert"),
        ("student: {init: statistics}", "convert"),
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
    plan = planned(write("variants: {plain: {}, same: {selection: {strategy: global_interp_c}}}"))
    assert steps(plan, "plain / seed 1") == steps(plan, "same / seed 1")
    assert len(plan.steps) == 2 * 7 + 1


def test_a_name_from_before_is_the_same_step(write):
    plan = planned(
        write(
            """variants:
  old: {selection: {strategy: random}}
  new: {selection: {strategy: global_random}}
"""
        )
    )
    assert steps(plan, "/ old / seed 1") == steps(plan, "/ new / seed 1")


def test_strategies_without_prompts_are_known_as_such():
    without = {name for name, one in STRATEGIES.items() if not one.stages(SelectionOptions())}
    assert without == {*_SEEDLESS, *_DRAWN}


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
  other: {selection: {ratio: all-gdn, strategy: global_random}}
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


@pytest.mark.parametrize(
    "stage, words",
    [
        ("processes: 5", r"global_batch_size 16 is not a multiple of .*16·5"),
        ("processes: 3, set: {parallel.tensor: 2}", "does not divide the 3 processes"),
        ("set: {parallel.context: 2}", "2 processes, one a GPU, but this run has 1"),
    ],
)
def test_processes_that_do_not_fit_a_stage_are_refused_before_any_step(write, stage, words):
    with pytest.raises(HydraError, match=rf"a / seed 0: stages.align, processes: \d: .*{words}"):
        planned(write(f"variants: {{a: {{stages: {{align: {{{stage}}}}}}}}}"))


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
        "architecture",
        "fusion",
        "granularity",
        "length",
        "ratio",
        "selection",
        "stages",
        "structure",
    }
    assert all(e.seeds == (0, 1, 2) and e.paper for e in experiments)
    plan = make_plan(cell for e in experiments for cell in e.cells)
    alone = sum(len(plan.ancestors(key)) for key in plan.cells.values())
    assert len(plan.steps) < 0.6 * alone
    ratio = steps(plan, "ratio / HydraHead 7:1 / seed 2")
    assert ratio == steps(plan, "selection / global_interp_c / seed 2")
    assert ratio == steps(plan, "fusion / scale, norm / seed 2")
    length = steps(plan, "length / HydraHead 7:1 / seed 2")
    assert [kind for kind in ratio if ratio[kind] != length[kind]] == ["evaluate"]


@pytest.mark.parametrize("mixer", ["token", "parallel"])
def test_heads_that_are_both_need_no_selection(write, mixer):
    plan = planned(write(f"variants: {{a: {{}}, both: {{hydra: {{mixer: {mixer}}}}}}}"))
    plain, both = steps(plan, "a / seed 0"), steps(plan, "both / seed 0")
    assert set(plain) - set(both) == {"select"}
    assert plain["teacher"] == both["teacher"] and plain["convert"] != both["convert"]


def test_a_change_between_the_ends_of_a_large_file_is_another_file(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(65 * 2**20)
    before = fingerprint.of_file(path)
    assert before == hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    with open(path, "r+b") as file:
        file.seek(30 * 2**20)
        file.write(b"x")
    os.utime(path, ns=(1, 1))  # a coarse clock may give two writes the same time
    assert fingerprint.of_file(path) != before


def test_a_file_is_read_once(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(fingerprint, "sha256_of_file", lambda path: reads.append(path) or "0" * 64)
    (tmp_path / "a").write_text("a")
    assert fingerprint.of_file(tmp_path / "a") == fingerprint.of_file(tmp_path / "a")
    assert reads == [tmp_path / "a"]


def indexed(prefix, tokens):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".bin", tokens), (".idx", b"index")):
        prefix.with_suffix(suffix).write_bytes(content)


BLEND = (
    "variants: {a: {stages: {distill: {set: "
    "{data.blend: [{path: PREFIX}], data.cache_dir: CACHE}}}}}"
)


@pytest.mark.parametrize("shipped, steps, rate", [("base", 400, 8e-3), ("half", 200, 1e-3)])
def test_the_chain_plans_with_its_own_base(tmp_path, monkeypatch, shipped, steps, rate):
    """Every stage's config is read and has the budget's steps; model and data are stand-ins."""
    from megatron_hydra.quickstart.shipped import shipped_teacher

    real = CONFIGS / "experiments" / "real"
    base = tmp_path / "base.yaml"
    (tmp_path / "text.jsonl").write_text('{"tokens": [1, 2]}\n')
    base.write_text(
        f"include: {real / shipped}.yaml\nbase: {{teacher: {{model: {shipped_teacher()}}}}}\n"
        f"constants: {{gates: {{strategy: learned_gates, text: {tmp_path / 'text.jsonl'}}}}}\n"
    )
    for name in ("prose", "docs", "long"):
        indexed(tmp_path / "data" / "smollm2_135m" / name, name.encode())
    monkeypatch.chdir(tmp_path)

    files = [*(CONFIGS / "experiments").glob("*.yaml"), *(real.glob("*.yaml"))]
    tables = [load_experiment(path, base) for path in files if path.stem not in ("base", "half")]
    assert make_plan((cell for table in tables for cell in table.cells), fetch=False).cells

    def planned(*names):
        cells = [c for name in names for c in load_experiment(real / name, base).cells]
        return make_plan(cells, fetch=False).steps

    chain, both = planned("chain.yaml"), planned("chain.yaml", "reasoning.yaml")
    new = [step.action for key, step in both.items() if key not in chain]
    assert new == ["evaluate"] * 4  # questions train nothing

    def training(scale):
        cells = load_experiment(real / "chain.yaml", base, tokens_scale=scale).cells
        found = make_plan(cells, fetch=False).steps.values()
        return {step.kind: step.params["config"] for step in found if step.action == "stage"}

    assert training(1.0)["align"]["optimizer"]["lr"] == rate
    for scale, count in ((1.0, steps), (0.1, steps // 10)):
        configs = training(scale)
        assert list(configs) == ["align", "distill", "finetune"]
        assert {config["schedule"]["steps"] for config in configs.values()} == {count}
        lengths = [config["data"]["sequence_length"] for config in configs.values()]
        assert lengths == [512, 1024, 16384]


def test_a_folder_of_tasks_counts_by_content(write, tmp_path):
    def key():
        rest = "variants: {a: {evaluation: {lm_eval: [x], lm_eval_include: tasks}}}"
        plan = make_plan(load_experiment(write(rest)).cells, fetch=False)
        return steps(plan, "/ a / seed 0")["evaluate"]

    with pytest.raises(HydraError, match="tasks is not a folder"):
        key()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "x.yaml").write_text("task: x\n")
    first = key()
    assert first == key()
    (tmp_path / "tasks" / "__pycache__").mkdir()
    (tmp_path / "tasks" / "__pycache__" / "x.pyc").write_bytes(b"written by the first run")
    assert first == key()
    (tmp_path / "tasks" / "x.yaml").write_text("task: x \n")
    assert first != key()


def test_data_count_by_content_and_not_by_place(write, tmp_path, monkeypatch):
    def distill(prefix, cache_dir="''"):
        plan = planned(write(BLEND.replace("PREFIX", str(prefix)).replace("CACHE", cache_dir)))
        return plan.steps[steps(plan, "/ a / seed 0")["distill"]]

    indexed(tmp_path / "one" / "text", b"12345678")
    indexed(tmp_path / "two" / "words", b"12345678")
    indexed(tmp_path / "three" / "text", b"1234x678")
    first = distill(tmp_path / "one" / "text")
    monkeypatch.chdir(tmp_path)
    assert distill("two/words").key == first.key  # relative to the working folder
    assert distill("two/words").places["data"] == {"0": str(tmp_path / "two" / "words")}
    packed = distill("two/words", "packs")
    assert (packed.key, packed.places["cache_dir"]) == (first.key, "packs")
    assert distill(tmp_path / "three" / "text").key != first.key
    with pytest.raises(HydraError, match=r"gone\.idx does not exist"):
        distill("gone")


def test_validation_counts_by_content_and_steps_without_it_are_those_of_before(write, tmp_path):
    def distill(more):
        text = BLEND.replace("PREFIX", str(tmp_path / "one")).replace("CACHE", "''" + more)
        return planned(write(text)), "/ a / seed 0"

    def step(more=""):
        plan, cell = distill(more)
        return plan.steps[steps(plan, cell)["distill"]]

    for name, content in (("one", b"1"), ("two", b"2"), ("three", b"2"), ("four", b"4")):
        indexed(tmp_path / name, content)
    config = step().params["config"]
    assert "validation" not in config
    assert "held_out" not in config["data"]
    assert "patience" not in config["schedule"]
    assert step(", data.held_out: 0.5").key != step().key

    def validated(name):
        blend = f"[{{path: {tmp_path / name}}}]"
        return step(f", validation.interval: 5, validation.blend: {blend}")

    assert validated("two").places["data"]["validation.0"] == str(tmp_path / "two")
    assert validated("two").key == validated("three").key
    assert len({step().key, validated("two").key, validated("four").key}) == 3


def test_a_manifest_saves_reading_the_data(tmp_path, monkeypatch):
    prefix = tmp_path / "data" / "text"
    indexed(prefix, b"12345678")
    read = fingerprint.of_data(str(prefix))
    records = [file_record(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
    tokenizer = {"name": "a tokenizer", "fingerprint": "sha256:0"}
    Manifest({}, tokenizer, {}, "all", *records).save(f"{prefix}.json")
    monkeypatch.setattr(fingerprint, "of_file", lambda path: pytest.fail(f"{path} is read"))
    assert fingerprint.of_data(str(prefix)) == read
    prefix.with_suffix(".bin").write_bytes(b"1234x678")
    with pytest.raises(HydraError, match="stale"):
        fingerprint.of_data(str(prefix))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake Hub with one model and an empty cache; returns the calls."""
    calls = []
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")

    def snapshot_download(name, revision, allow_patterns, local_files_only=False):
        if local_files_only:
            raise OSError("not in the cache")
        calls.append((name, revision, "*.py" in allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_table_downloads_no_model(write, tmp_path, hub):
    rows = "variants: {a: {}, b: {hf_model: owner/name, hf_revision: v2}}"
    path = write(rows)
    lines = []
    assert show(Request([path], tmp_path / "s"), lines.append) == 1
    assert run(Request([path], tmp_path / "s", dry_run=True), lines.append) == 0
    assert "4 of 4 cells are not there" in lines[2] and not hub
    planned(path)
    assert hub == [("owner/name", "v2", False)] * 2  # two seeds; the second finds it in the cache
    with pytest.raises(HydraError, match="is not a folder"):  # a path is not a model's name
        make_plan(load_experiment(write("variants: {a: {hf_model: ./b}}")).cells, fetch=False)


def test_code_is_fetched_of_a_model_that_is_trusted(write, hub):
    planned(write("variants: {a: {hf_model: o/n, evaluation: {trust_remote_code: true}}}"))
    assert hub[0] == ("o/n", None, True)


@pytest.mark.parametrize(
    "change, first",
    [
        ("selection: {check_heads: 24, task_weights: {}}", None),
        ("evaluation: {lm_eval: [], prefill_chunk: null}", None),
        ("evaluation: {processes: 4}", None),  # they share the work; results are the same
        ("selection: {effects: [direct]}", "select"),
        ("selection: {task_weights: {facts: 2.0}}", "select"),
        ("evaluation: {prefill_chunk: 64}", "evaluate"),
    ],
)
def test_later_keys_count_where_they_differ_from_their_default(write, change, first):
    plan = planned(write(f"variants: {{plain: {{}}, changed: {{{change}}}}}"))
    plain, changed = steps(plan, "plain / seed 0"), steps(plan, "changed / seed 0")
    differing = [kind for kind in ALL if plain[kind] != changed[kind]]
    assert differing[:1] == ([] if first is None else [first])
    body = plan.steps[plain["select"]].params["selection"]
    assert "check_heads" not in body  # its hash is that of versions without this key


def test_text_of_a_selection_is_prepared_or_hashed(write, tmp_path):
    gates = "strategy: learned_gates, text:"
    (tmp_path / "text.jsonl").write_text("one")
    (tmp_path / "map.json").write_text("{}")
    path = write(
        f"variants: {{made: {{selection: {{{gates} '{{prepare}}/calibration.jsonl'}}}}, "
        f"given: {{selection: {{{gates} text.jsonl, compare: [map.json]}}}}}}"
    )

    def select(name):
        plan = planned(path)
        return plan.steps[steps(plan, f"{name} / seed 0")["select"]]

    made, given = select("made"), select("given")
    assert "prepare" in made.inputs
    assert made.places["text"] == made.params["selection"]["text"] == "{prepare}/calibration.jsonl"
    assert given.places["text"] == str(tmp_path / "text.jsonl")
    assert given.params["selection"]["text"]["name"] == "text.jsonl"
    assert given.places["compare"] == [str(tmp_path / "map.json")]
    assert [file["name"] for file in given.params["selection"]["compare"]] == ["map.json"]
    (tmp_path / "text.jsonl").write_text("two")
    assert select("given").key != given.key
    assert select("made").key == made.key


def test_a_map_made_before_is_taken_by_the_rows_that_it_fits(write, tmp_path):
    def save(name, **facts):
        tiny_map(**facts).save(tmp_path / name)

    save("seven.json", ratio="7:1", strategy="global_interp_c")
    save("drawn.json", ratio="7:1", strategy="random", seed=1)
    given = "head_maps: [seven.json, drawn.json], ratio:"
    path = write(
        f"variants: {{plain: {{}}, seven: {{selection: {{{given} '7:1'}}}}, "
        f"three: {{selection: {{{given} '3:1'}}}}, three_alone: {{selection: {{ratio: '3:1'}}}}, "
        f"drawn: {{selection: {{strategy: global_random, {given} '7:1'}}}}}}"
    )

    def select(name):
        plan = planned(path)
        return plan.steps[steps(plan, f"/ {name} / seed 0")["select"]]

    seven = select("seven")
    assert set(seven.params) == {"model", "head_map"}
    assert seven.places["head_map"] == str(tmp_path / "seven.json")
    assert select("three").key == select("three_alone").key
    plan = planned(path)
    of_seed = [plan.steps[steps(plan, f"/ drawn / seed {n}")["select"]] for n in (0, 1)]
    assert ["head_map" in step.params for step in of_seed] == [False, True]
    save("seven.json", ratio="7:1", strategy="global_interp_c", prompts_fingerprint="other")
    assert select("seven").key != seven.key
    save("drawn.json", ratio="7:1", strategy="global_interp_c")
    with pytest.raises(HydraError, match=r"seven\.json and .*drawn\.json both have"):
        planned(path)


def test_the_shipped_experiments_plan_with_a_real_models_recipe(tmp_path, monkeypatch):
    """Every stage's config is read; model and data are stand-ins."""
    from megatron_hydra.quickstart.shipped import shipped_teacher

    shared = CONFIGS / "experiments" / "shared" / "qwen3_1.7b.yaml"
    base = tmp_path / "base.yaml"
    text = shared.read_text().replace("Qwen/Qwen3-1.7B", str(shipped_teacher()))
    (tmp_path / "text.jsonl").write_text('{"tokens": [1, 2]}\n')
    text = text.replace("../../data/qwen3_1.7b/", f"{tmp_path}/")
    base.write_text(text.replace("../../", f"{CONFIGS}/"))
    for name in ("fineweb_edu", "finemath", "stack_edu", "smoltalk", "finepdfs", "pg19"):
        indexed(tmp_path / "data" / name, name.encode())
    monkeypatch.chdir(tmp_path)
    cells = [
        cell
        for path in sorted((CONFIGS / "experiments").glob("*.yaml"))
        for cell in load_experiment(path, base).cells
        if cell.seed == 0
    ]
    plan = make_plan(cells, fetch=False)
    assert len(plan.cells) == len(cells)
    verbs = {
        step.kind: step.params["config"]["verb"]
        for step in plan.steps.values()
        if step.action == "stage"
    }
    assert verbs == {"align": "align", "distill": "distill", "finetune": "finetune"}
    budget = steps(plan, "ratio / dense, same budget / seed 0")
    assert "align" not in budget and budget == steps(
        plan, "length / dense, same budget / seed 0"
    ) | {"evaluate": budget["evaluate"]}
