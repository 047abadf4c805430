from __future__ import annotations

import json

from megatron_hydra.config.loading import to_dict
from megatron_hydra.config.run import CheckpointConfig, RunConfig
from megatron_hydra.experiments import actions
from megatron_hydra.experiments.plan import Step


def test_exported_code_is_run_only_as_it_was_exported(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "modeling.py").write_text("a = 1\n")
    assert not actions._is_as_exported(out)
    (tmp_path / actions.CODE).write_text(json.dumps(actions._code(out)))
    assert actions._is_as_exported(out)
    (out / "modeling.py").write_text("a = 2\n")
    assert not actions._is_as_exported(out)
    (out / "modeling.py").write_text("a = 1\n")
    (out / "more.py").write_text("")
    assert not actions._is_as_exported(out)


def stage_in(tmp_path, monkeypatch, save_optimizer):
    """Run a stage whose folder holds a stopped try; what the trainer finds there."""
    found = []

    def trainer(config):
        found.append((tmp_path / "out" / "checkpoints" / "step_1").exists())
        assert config.output == str(tmp_path / "out")
        assert config.student.checkpoint == str(tmp_path / "student")
        return 0

    monkeypatch.setattr("megatron_hydra.training.loop.run_training", trainer)
    (tmp_path / "out" / "checkpoints" / "step_1").mkdir(parents=True)
    config = RunConfig(verb="finetune", checkpoint=CheckpointConfig(save_optimizer=save_optimizer))
    params = {"config": to_dict(config), "processes": 1, "data": {}}
    step = Step("k", "finetune", "stage", "t", params, {}, {"teacher_hf": "hf"})
    actions.stage(actions.Context(step, tmp_path / "out", {"student": tmp_path / "student"}))
    return found


def test_a_stopped_stage_that_cannot_be_resumed_begins_anew(tmp_path, monkeypatch):
    assert stage_in(tmp_path, monkeypatch, save_optimizer=False) == [False]


def test_a_stopped_stage_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    assert stage_in(tmp_path, monkeypatch, save_optimizer=True) == [True]
