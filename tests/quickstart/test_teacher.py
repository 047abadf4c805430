from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from megatron_hydra.hf_loading import load_hf_model
from megatron_hydra.quickstart import teacher
from megatron_hydra.quickstart.shipped import shipped_teacher
from megatron_hydra.quickstart.tasks import TRAIN_LENGTH


@pytest.fixture(scope="module")
def model():
    return load_hf_model(shipped_teacher(), dtype="fp32", device="cpu")


def test_shipped_files():
    names = {path.name for path in shipped_teacher().iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "text.txt", "NOTICE.txt"} <= names
    assert (shipped_teacher() / "model.safetensors").stat().st_size < 8 * 2**20
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (shipped_teacher() / "NOTICE.txt").read_text()


def test_shipped_teacher_has_the_scripts_shape(model):
    wanted = teacher.teacher_config(model.config.vocab_size)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        assert getattr(model.config, field) == getattr(wanted, field)
    assert model.config.num_hidden_layers * model.config.num_attention_heads >= 32
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_shipped_teacher_retrieves_at_its_length_and_not_far_beyond(model, tasks):
    assert teacher.accuracy(model, tasks, TRAIN_LENGTH, 16, seed=11) >= 0.95
    assert teacher.accuracy(model, tasks, 8 * TRAIN_LENGTH, 4, seed=11) < 0.5


def test_batches_follow_the_phase(tasks):
    rng = np.random.default_rng(0)
    phase = teacher.CURRICULUM[-1]
    batch = teacher.draw(tasks, phase, 100, rng)
    assert all(len(sample.tokens) == phase.length for sample in batch)
    with_facts = [s for s in batch if len(s.answers) and len(s.answers) < phase.length // 2]
    assert 50 < len(with_facts) < 90  # 70 % needles; 10 % copying, whose answers are most positions


def test_training_script_writes_a_model(tmp_path, monkeypatch, capsys):
    short = [dataclasses.replace(phase, steps=2) for phase in teacher.CURRICULUM]
    monkeypatch.setattr(teacher, "CURRICULUM", tuple(short))
    monkeypatch.setattr(teacher, "accuracy", lambda *_, **__: 0.0)
    arguments = ["teacher", "--output", str(tmp_path / "t"), "--batch", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    assert teacher.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["128"] == 0.0
    made = load_hf_model(tmp_path / "t", device="cpu")
    assert torch.isfinite(made(torch.arange(8)[None]).logits).all()
    assert teacher.main() == 2
