from __future__ import annotations

import json
import sys

import pytest

from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.run import CheckpointConfig, DataConfig, RunConfig, SourceConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.experiments import actions, fingerprint
from megatron_hydra.experiments.plan import PLACE, Step
from megatron_hydra.experiments.spec import EvaluationSpec, SelectionSpec, as_plain
from megatron_hydra.hf.export_files import auto_map, carries_our_code, hf_export_files
from megatron_hydra.hf_identity import model_identity_from_hf
from megatron_hydra.quickstart.shipped import shipped_teacher
from megatron_hydra.stopping import REQUEUE_EXIT_CODE, Stopped, StopRequest
from tests.test_head_map import tiny_map


def test_the_packages_own_code_is_run_and_no_other(tmp_path, monkeypatch):
    """Code beside the weights never runs, whoever wrote it. An export's own code runs if it is ours."""
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map()}))
    trusted = []

    def load(folder, trust_remote_code, **_):
        trusted.append(trust_remote_code and carries_our_code(folder))

    monkeypatch.setattr("megatron_hydra.hf_loading.load_hf_model", load)
    monkeypatch.setattr("megatron_hydra.hf_loading.find_tokenizer", load)
    monkeypatch.setattr("megatron_hydra.evaluation.evaluate", lambda *_, **__: None)
    evaluation = {
        "trust_remote_code": False, "dtype": "fp32", "device": "cpu", "lengths": [1],
        "depths": [0.5], "samples": 1, "batch_tokens": 1, "cache_length": 1,
    }  # fmt: skip
    places = {"tasks": [], "haystack": "", "model": str(tmp_path)}
    step = Step("k", "evaluate", "evaluate", "t", {"evaluation": evaluation, "seed": 0}, {}, places)

    def evaluate(**inputs):
        actions.evaluate(actions.Context(step, tmp_path / "out", inputs))
        answers, trusted[:] = list(trusted), []
        return answers

    name = next(iter(hf_export_files()))
    (tmp_path / name).write_text("raise SystemExit")
    assert evaluate() == [False, False]  # a user's folder does not change
    assert evaluate(model=tmp_path) == [True, True]
    (tmp_path / "more.py").write_text("")
    assert evaluate(model=tmp_path) == [False, False]


def test_a_map_made_before_is_taken_for_its_own_teacher_only(tmp_path):
    teacher = shipped_teacher()
    source = tmp_path / "map.json"

    def take(**facts):
        tiny_map(model=model_identity_from_hf(teacher), **facts).save(source)
        step = Step(
            "k", "select", "select", "t", {"head_map": fingerprint.of_file(source)}, {},
            {"teacher_hf": str(teacher), "head_map": str(source)},
        )  # fmt: skip
        return actions.Context(step, tmp_path / "out", {})

    layers = model_identity_from_hf(teacher).num_layers
    right = {"full_attention_heads": ((0,),) * layers, "scores": {}, "ranking": ()}
    actions.select(take(**right))
    assert (tmp_path / "out" / actions.HEAD_MAP).read_bytes() == source.read_bytes()
    assert (tmp_path / "out" / "head_map_layers.png").exists()
    context = take(**right)
    source.write_text(source.read_text() + "\n")
    with pytest.raises(HydraError, match="has changed since this run was planned"):
        actions.select(context)
    tiny_map().save(source)
    context.step.params["head_map"] = fingerprint.of_file(source)
    with pytest.raises(HydraError, match=r"map\.json"):
        actions.select(context)


def run_stage(tmp_path, monkeypatch, status=0):
    """Run a stage whose folder holds a stopped try, with a trainer that ends with ``status``."""
    found = []

    def trainer(config):
        found.append((tmp_path / "out" / "checkpoints" / "step_1").exists())
        assert config.output == str(tmp_path / "out")
        assert config.student.checkpoint == str(tmp_path / "student")
        return status

    monkeypatch.setattr("megatron_hydra.training.loop.run_training", trainer)
    (tmp_path / "out" / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)
    config = RunConfig(verb="finetune", checkpoint=CheckpointConfig(save_optimizer=False))
    params = {"config": to_dict(config), "processes": 1, "data": {}}
    step = Step(
        "k", "finetune", "stage", "t", params, {}, {"teacher_hf": "hf", "data": {}, "cache_dir": ""}
    )
    actions.stage(actions.Context(step, tmp_path / "out", {"student": tmp_path / "student"}))
    return found


def test_a_stopped_stage_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """A stopped run saves its optimizer, even if the config does not ask for it."""
    assert run_stage(tmp_path, monkeypatch) == [True]


def test_a_stopped_stage_is_no_failure(tmp_path, monkeypatch):
    for status, error in ((REQUEUE_EXIT_CODE, Stopped), (2, HydraError)):
        with pytest.raises(error):
            run_stage(tmp_path, monkeypatch, status)


_UNTIL_TERMINATED = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_stop_reaches_the_processes_of_a_step():
    """Only this process gets SIGTERM; its steps count as stopped, whatever their exit status."""
    with StopRequest(), pytest.raises(Stopped):
        actions._run([sys.executable, "-c", _UNTIL_TERMINATED])
    with pytest.raises(HydraError, match="exit status 3"):
        actions._run([sys.executable, "-c", "raise SystemExit(3)"])


def test_data_are_read_where_they_are(tmp_path, monkeypatch):
    """A step's config has no paths: its places give them. Generated parts have no path."""
    read = []
    monkeypatch.setattr(
        "megatron_hydra.training.loop.run_training",
        lambda config: (
            read.extend(part.path for part in config.data.blend)
            or read.append(config.data.cache_dir)
            or 0
        ),
    )
    blend = (SourceConfig("synthetic", task="needles"), SourceConfig(path=PLACE))
    params = {"config": to_dict(RunConfig(data=DataConfig(blend))), "processes": 1, "data": {}}
    places = {"teacher_hf": "hf", "data": {"1": "/data/text"}, "cache_dir": "/packs"}
    step = Step("k", "finetune", "stage", "t", params, {}, places)
    actions.stage(actions.Context(step, tmp_path / "out", {"student": tmp_path}))
    assert read == ["", "/data/text", "/packs"]


def test_later_keys_reach_what_they_are_for(tmp_path, monkeypatch):
    given = {}
    select = {
        "task_weights": {"a": 2.0},
        "effects": ("direct",),
        "check_heads": 5,
        "gate_steps": 70,
    }
    monkeypatch.setattr(
        "megatron_hydra.selection.select_heads", lambda *_, **words: given.update(words)
    )
    monkeypatch.setattr("megatron_hydra.selection.plots.draw_head_map", lambda *_: [])
    body = as_plain(SelectionSpec(**select))
    body |= {"text": {"name": "text.jsonl", "content": "hash"}}
    places = {"tasks": [], "text": "{prepare}/text.jsonl"}
    step = Step("k", "select", "select", "t", {"selection": body}, {}, places)
    inputs = {"teacher_hf": tmp_path, "prepare": tmp_path / "made"}
    actions.select(actions.Context(step, tmp_path / "out", inputs))
    assert {name: getattr(given["options"], name) for name in select} == select
    assert given["options"].text == str(tmp_path / "made" / "text.jsonl")

    settings = []
    for name in ("hf_loading.load_hf_model", "hf_loading.find_tokenizer"):
        monkeypatch.setattr(f"megatron_hydra.{name}", lambda *_, **__: None)
    monkeypatch.setattr(
        "megatron_hydra.evaluation.evaluate", lambda *words, **_: settings.append(words[4])
    )
    body = as_plain(EvaluationSpec(prefill_chunk=64, lm_eval=("arc_easy",), lm_eval_limit=7))
    places = {"tasks": [], "haystack": "", "model": str(tmp_path), "lm_eval_include": "/tasks"}
    step = Step("k", "evaluate", "evaluate", "t", {"evaluation": body, "seed": 0}, {}, places)
    actions.evaluate(actions.Context(step, tmp_path / "out", {}))
    assert (settings[0].prefill_chunk, settings[0].lm_eval) == (64, ("arc_easy",))
    assert (settings[0].lm_eval_include, settings[0].lm_eval_limit) == ("/tasks", 7)


def test_several_processes_score_what_one_scores(tmp_path):
    """All options reach them: prompts are cut by depths, samples and seed."""
    teacher = shipped_teacher()
    tasks = ["megatron_hydra.experiments.tiny:single", "megatron_hydra.experiments.tiny:facts"]
    spec = EvaluationSpec(
        tasks=tuple(tasks), lengths=(128, 256), depths=(0.0, 1.0), samples=2, batch_tokens=512,
        prefill_chunk=64, dtype="fp32", device="cpu", cache_length=32,
    )  # fmt: skip
    body = as_plain(spec)
    results = []
    for processes in (1, 2):
        places = {"tasks": tasks, "haystack": "", "model": str(teacher), "processes": processes}
        params = {"evaluation": body, "seed": 3}
        step = Step("k", "evaluate", "evaluate", "t", params, {}, places)
        out = tmp_path / str(processes)
        actions.evaluate(actions.Context(step, out, {}))
        results.append(json.loads((out / "results.json").read_text()))
        for cells in results[-1]["tasks"].values():
            for cell in cells.values():
                del cell["seconds"]
    assert results[0] == results[1]
    assert results[0]["settings"]["seed"] == 3 and results[0]["cache"]
