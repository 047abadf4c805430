"""A resumed run applies or refuses each changed key."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.config import apply_overrides, to_dict
from megatron_hydra.config.run import OptimizerConfig, RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.training import loop
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.resume_rules import (
    MEANINGS,
    RULES,
    changes,
    keys_of,
    refuse_changes,
    rule_of,
    rules_as_table,
)
from tests.training import tiny

KEYS = dict(keys_of(to_dict(RunConfig())))
DOCS = Path(__file__).parents[2] / "docs/training.md"


def test_every_key_of_a_run_has_a_rule_and_every_rule_a_key() -> None:
    for key in KEYS:
        assert rule_of(key)[0] in MEANINGS
    for rule in RULES:
        assert rule in KEYS or any(key.startswith(f"{rule}.") for key in KEYS), rule


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    assert rules_as_table() in DOCS.read_text(encoding="utf-8")


def _other(key: str, value: Any) -> str:
    """An override that gives a key another value of its type."""
    options = {
        "verb": "finetune", "precision": "fp32", "data.packing": "concat_chunk",
        "schedule.kind": "constant", "parallel.fa_partition": "sequence",
        "recompute.granularity": "full", "checkpoint.resume": "never", "logging.wandb": "offline",
        "data.blend": "[{path: x}]", "recompute.modules": "[mlp]", "loss.logits": "weights",
        "validation.blend": "[{path: x}]", "validation.probes": "[{path: x}]",
    }  # fmt: skip
    if key in options:
        return options[key]
    if key.startswith("backend."):
        return "one" if key == "backend.streams" else "local" if "impl" in key else "torch"
    if isinstance(value, bool):
        return str(not value).lower()
    return str(value + 1) if isinstance(value, (int, float)) else "x"


@pytest.mark.parametrize("key", KEYS)
def test_a_change_of_any_key_is_seen_and_treated_by_its_rule(key: str) -> None:
    saved = json.loads(json.dumps(to_dict(RunConfig())))
    config = apply_overrides(RunConfig(), [f"{key}={_other(key, KEYS[key])}"])
    assert [change.key for change in changes(saved, config)] == [key]
    if rule_of(key)[0] == "refused":
        with pytest.raises(HydraError, match=f"cannot resume: {key} was .* and is .* now"):
            refuse_changes(saved, config)
    else:
        assert [change.key for change in refuse_changes(saved, config)] == [key]


def test_equal_configs_have_no_changes_whatever_json_makes_of_them() -> None:
    config = apply_overrides(RunConfig(), ["data.blend=[{path: x, upsample: {0: 0.5, 8: 2}}]"])
    saved = json.loads(json.dumps(to_dict(config)))
    assert refuse_changes(saved, config) == []
    del saved["faults"], saved["optimizer"]["eps"]  # of a version without these keys
    assert refuse_changes(saved, config) == []


# -- a real run -------------------------------------------------------------------------------

_NEW = OptimizerConfig(
    lr=2e-3, min_lr=1e-4, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-4, clip_grad=0.5
)


def _run(inputs: Path, output: Path, *overrides: str) -> int:
    sections = {
        "schedule": {"steps": 4, "warmup_steps": 1},
        "checkpoint": {"interval": 2, "keep": 0},
    }
    config = tiny.run_config(inputs, "finetune", "unused", **sections)
    return run_training(apply_overrides(config, [f"output={output}", *overrides]))


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that was stopped after the second."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    assert _run(inputs, output, "schedule.steps=2") == 0
    return output


def _copy(stopped: Path, to: Path) -> Path:
    shutil.copytree(stopped, to)
    return to


def test_every_setting_of_the_optimizer_given_anew_is_used(
    inputs: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[dict[str, Any]] = []
    step = loop.train_step

    def noted(train_state, *args):
        if not groups:
            groups.extend(dict(group) for group in train_state.optimizer.param_groups)
            clip = train_state.config.optimizer.clip_grad
            groups.extend([]) if clip == _NEW.clip_grad else groups.clear()
        return step(train_state, *args)

    monkeypatch.setattr(loop, "train_step", noted)
    output = _copy(stopped, tmp_path / "run")
    new = dataclasses.asdict(_NEW)
    assert _run(inputs, output, *(f"optimizer.{key}={value}" for key, value in new.items())) == 0
    assert groups
    for group in groups:
        assert group["betas"] == (_NEW.beta1, _NEW.beta2)
        assert (group["eps"], group["max_lr"], group["min_lr"]) == (_NEW.eps, _NEW.lr, _NEW.min_lr)
        assert _NEW.min_lr < group["lr"] <= _NEW.lr
        assert group["weight_decay"] in (_NEW.weight_decay, 0.0)
    assert {group["weight_decay"] for group in groups} == {_NEW.weight_decay, 0.0}
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    (resume,) = [event for event in events if event["event"] == "resume"]
    changed = {f"optimizer.{key}" for key in new}
    assert changed <= resume["changed"].keys()
    assert resume["changed"]["optimizer.beta2"] == [0.95, 0.9]


@pytest.fixture(scope="module")
def unchanged(inputs: Path, stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The resumed run without changes."""
    output = _copy(stopped, tmp_path_factory.mktemp("unchanged") / "run")
    assert _run(inputs, output) == 0
    return output


@pytest.mark.parametrize("key", ["beta1", "beta2", "eps"])
def test_the_update_is_made_with_the_new_value(
    inputs: Path, stopped: Path, unchanged: Path, tmp_path: Path, key: str
) -> None:
    """The weights after the resume differ from those without the change."""
    output = _copy(stopped, tmp_path / "run")
    assert _run(inputs, output, f"optimizer.{key}={getattr(_NEW, key)}") == 0
    same, other = (tiny.everything(run / "checkpoints") for run in (unchanged, output))
    weights = [name for name in same if "linear" in name and not name.startswith("optimizer")]
    assert weights
    assert not all(torch.equal(same[name], other[name]) for name in weights)


@pytest.mark.parametrize(
    "override",
    ["parallel.distributed_optimizer=false", "seed=5", "data.seed=5", "batch.global_batch_size=2"],
)
def test_changes_that_cannot_be_applied_are_refused_and_nothing_is_written(
    inputs: Path, stopped: Path, tmp_path: Path, override: str
) -> None:
    output = _copy(stopped, tmp_path / "run")
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with pytest.raises(HydraError, match=f"cannot resume: {override.split('=')[0]} was"):
        _run(inputs, output, override)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
