"""Held-out losses: values, no effect on training, resuming, early stopping."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.config import apply_overrides
from megatron_hydra.config.run import RunConfig
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.data.validation import ValidationStream
from megatron_hydra.errors import HydraError
from megatron_hydra.reporting.run_page import write_run_page
from megatron_hydra.stopping import REQUEUE_EXIT_CODE
from megatron_hydra.training import loop, validation
from megatron_hydra.training.loop import run_training
from megatron_hydra.transfer.answers import AnswerCount
from megatron_hydra.transfer.local_batch import LocalBatch
from tests.training import tiny

PROBES = (
    "[{kind: synthetic, task: tiny_answers}, "
    "{kind: synthetic, task: tiny_answers, options: {document: 12}}]"
)
STEPS, SEQUENCES = 6, 5  # 5 is not a multiple of any batch size or number of ranks
HELD_OUT = 0.25


def _slow(value: object) -> object:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, for validation's own blend."""
    folder = tmp_path_factory.mktemp("other") / "held_back"
    folder.mkdir()
    tiny.write_text(folder, documents=30)
    return folder / "text"


def _config(inputs: Path, output: Path, verb: str, *overrides: str) -> RunConfig:
    config = tiny.run_config(
        inputs, verb, "unused", schedule={"steps": STEPS, "warmup_steps": 1},
        data={"held_out": HELD_OUT}, validation={"interval": 2, "sequences": SEQUENCES},
    )  # fmt: skip
    config = dataclasses.replace(config, output=str(output))
    return apply_overrides(config, list(overrides))


def _losses(output: Path) -> list[tuple[int, float]]:
    lines = tiny.read_metrics(output)
    return [(line["step"], line["validation"]["loss"]) for line in lines if "validation" in line]


def _timeless(output: Path, *without: str) -> list[dict]:
    hidden = (*tiny.OF_THE_CLOCK, *without)
    return [
        {k: v for k, v in line.items() if k not in hidden} for line in tiny.read_metrics(output)
    ]


def _assert_equal_checkpoints(got: Path, expected: Path) -> None:
    tensors = [tiny.everything(run / "checkpoints") for run in (got, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    assert not [k for k, t in tensors[0].items() if not torch.equal(t, tensors[1][k])]


def _training_state(output: Path) -> dict:
    folder = store.resolve_checkpoint(output / "checkpoints")
    return json.loads((folder / "training.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished distillation with validation."""
    output = tmp_path_factory.mktemp("undisturbed")
    assert run_training(_config(inputs, output, "distill")) == 0
    return output


# -- validation does not change training ------------------------------------------------------------


@pytest.mark.parametrize("verb", ["align", "distill", _slow("finetune")])
def test_training_is_the_same_bit_for_bit(
    inputs: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal losses, gradients, weights, optimizer, generators and data position; also if data are random."""
    original = validation.run_micro_batches
    seen = []

    def watched(verb, chunks, *args, **kwargs):
        random.random(), np.random.random(), torch.rand(1)
        before = [b.grad_data.clone() for chunk in chunks for b in chunk.buffers]
        modules = [m for chunk in chunks for m in chunk.modules()]
        seen.append((torch.is_grad_enabled(), any(m.training for m in modules)))
        original(verb, chunks, *args, **kwargs)
        after = [b.grad_data for chunk in chunks for b in chunk.buffers]
        assert any(bool(buffer.any()) for buffer in before)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    monkeypatch.setattr(validation, "run_micro_batches", watched)
    for name, interval in (("with", 1), ("without", 0)):
        config = _config(inputs, tmp_path / name, verb, f"validation.interval={interval}")
        assert run_training(apply_overrides(config, ["schedule.steps=3"])) == 0
    assert seen == [(False, False)] * 3  # no graph, and evaluation mode
    runs = tmp_path / "with", tmp_path / "without"
    assert [len(_losses(run)) for run in runs] == [3, 0]
    assert _timeless(runs[0], "validation") == _timeless(runs[1], "validation")
    _assert_equal_checkpoints(*runs)
    states = [_training_state(run) for run in runs]
    assert states[0]["data"] == states[1]["data"]


# -- the value --------------------------------------------------------------------------------------


def test_the_value_depends_on_no_batch(inputs: Path, tmp_path: Path) -> None:
    """A step that changes no weight, so that all runs validate the same student."""
    losses = {}
    for micro in (1, 4):
        config = _config(
            inputs, tmp_path / f"{micro}", "align", f"batch.micro_batch_size={micro}",
            "validation.interval=1", "schedule.steps=2", "optimizer.lr=1e-30",
        )  # fmt: skip
        assert run_training(config) == 0
        (first, *_) = [line["validation"] for line in tiny.read_metrics(tmp_path / f"{micro}")]
        assert first["loss"] == pytest.approx(sum(first["layers"]))
        assert len(first["layers"]) == tiny.TEACHER.num_layers
        losses[micro] = first
    assert len({found["tokens"] for found in losses.values()}) == 1
    for found in losses.values():
        assert found["layers"] == pytest.approx(losses[1]["layers"], rel=1e-6)


@pytest.mark.parametrize("verb", ["align", "distill", _slow("finetune")])
def test_the_value_is_the_loss_of_training_on_the_same_sequences(
    inputs: Path, tmp_path: Path, verb: str
) -> None:
    """A run trains one step on exactly the held-out sequences: its loss equals that of a validation."""
    config = _config(inputs, tmp_path, verb, "optimizer.lr=1e-30")
    stream = ValidationStream(
        config.data, config.validation, micro_batch_size=1, dp_rank=0, dp_size=1,
        vocab_size=tiny.VOCABULARY,
    )  # fmt: skip
    wanted = list(stream.micro_batches(0))
    assert len(wanted) == SEQUENCES
    expected = _loss_of_one_step(config, tmp_path / "training", wanted)
    found = _loss_of_validation(config, tmp_path / "validation")
    assert found == pytest.approx(expected, rel=1e-6)


def _loss_of_one_step(config: RunConfig, output: Path, batches: list) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedStream, "micro_batches", lambda *_: batches)
        overrides = [f"output={output}", "schedule.steps=2", "validation.interval=0",
                     "batch.micro_batch_size=1"]  # fmt: skip
        assert run_training(apply_overrides(config, overrides)) == 0
    return tiny.read_metrics(output)[0]["loss"]


def _loss_of_validation(config: RunConfig, output: Path) -> float:
    overrides = [f"output={output}", "schedule.steps=2", "validation.interval=1"]
    assert run_training(apply_overrides(config, overrides)) == 0
    return _losses(output)[0][1]


def test_every_part_has_its_loss_and_the_whole_is_their_mean(
    inputs: Path, other: Path, tmp_path: Path
) -> None:
    blend = f"[{{path: {other}, weight: 3}}, {{task: copy_of_noise, kind: synthetic}}]"
    blend = blend.replace("copy_of_noise", "tests.training.test_validation:noise")
    config = _config(
        inputs, tmp_path, "distill", "data.held_out=0", f"validation.blend={blend}",
        "schedule.steps=2", "logging.interval=100", "logging.tensorboard=true",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_hydra.data.synthetic.importlib.metadata.packages_distributions",
                      lambda: {"tests": ["tests"]})  # fmt: skip
        assert run_training(config) == 0
    (line,) = tiny.read_metrics(tmp_path)
    found = line["validation"]
    assert found["sources"].keys() == {"text", "tests.training.test_validation:noise"}
    for part in ("loss", "kl", "ce"):
        sums = [numbers[part] * numbers["tokens"] for numbers in found["sources"].values()]
        assert found[part] == pytest.approx(sum(sums) / found["tokens"])
    noise = found["sources"]["tests.training.test_validation:noise"]
    assert noise["tokens"] == (tiny.SEQUENCE - 1)  # one of five sequences, without its first token
    assert list((tmp_path / "tensorboard").iterdir())


def noise(rng, length, tokenizer):
    """A generated task of random tokens."""
    from megatron_hydra.data.document import Document

    return [Document.all_trainable(rng.integers(0, tiny.VOCABULARY, length))]


def _answered_right(hidden: torch.Tensor, weight: torch.Tensor, batch: LocalBatch) -> list[bool]:
    """Plain twin: the loss of every document by itself, from all its logits."""
    said = (hidden @ weight.T).argmax(-1)
    right = []
    for first, end in itertools.pairwise(batch.packed.cu_seqlens):
        asked = batch.loss_mask[first:end] != 0
        if asked.any():
            right.append(bool((said[first:end] == batch.labels[first:end])[asked].all()))
    return right


@pytest.mark.parametrize("verb", ["finetune", _slow("distill")])
def test_probes_equal_a_plain_reference_and_do_not_change_the_loss(
    inputs: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, right = AnswerCount.add, []

    def noted(self, hidden, weight, first, batch):
        right.extend(_answered_right(hidden, weight, batch))
        original(self, hidden, weight, first, batch)

    monkeypatch.setattr(AnswerCount, "add", tiny.often_right(noted))
    for name, probes in (("with", PROBES), ("without", "[]")):
        overrides = [
            "schedule.steps=2",
            f"validation.probes={probes}",
            "validation.probe_sequences=5",
        ]
        assert run_training(_config(inputs, tmp_path / name, verb, *overrides)) == 0
    (found,) = [
        line["validation"] for line in tiny.read_metrics(tmp_path / "with") if "validation" in line
    ]
    short, longer = (found["probes"][f"tiny_answers{end}"] for end in (".0", ".1"))
    assert (short["documents"], longer["documents"]) == (5 * (48 // 5), 5 * (48 // 12))
    for probe, part in ((short, right[: 5 * 9]), (longer, right[5 * 9 :])):
        assert probe["accuracy"] == pytest.approx(sum(part) / len(part))
        assert probe["documents"] == len(part)
        assert 0 < sum(part) < len(part)
    assert _losses(tmp_path / "with") == _losses(tmp_path / "without")
    assert _timeless(tmp_path / "with", "validation") == _timeless(
        tmp_path / "without", "validation"
    )
    _assert_equal_checkpoints(tmp_path / "with", tmp_path / "without")
    write_run_page(tmp_path / "with", tmp_path / "page.html")
    assert "probes answered right" in (tmp_path / "page.html").read_text()


def test_the_page_shows_held_out_losses(undisturbed: Path, tmp_path: Path) -> None:
    write_run_page(undisturbed, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "held-out loss" in text
    assert "held-out kl" in text


# -- resuming ---------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_undisturbed_run(
    inputs: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = loop.train_step, itertools.count(1)

    def patched(*args):
        if next(count) == 4:  # a validation is due after this step
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(loop, "train_step", patched)
    config = _config(inputs, tmp_path, "distill")
    assert run_training(config) == REQUEUE_EXIT_CODE
    assert [step for step, _ in _losses(tmp_path)] == [2, 4]
    assert run_training(config) == 0
    assert _timeless(tmp_path) == _timeless(undisturbed)
    _assert_equal_checkpoints(tmp_path, undisturbed)
    states = [_training_state(run)["validation"] for run in (tmp_path, undisturbed)]
    assert states[0] == states[1]
    assert [tuple(entry) for entry in states[0]["history"]] == _losses(tmp_path)
    assert [step for step, _ in _losses(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation.sequences=4", r"validation\.sequences \(5 before, 4 now\) has changed"),
        ("data.held_out=0.3", r"data\.held_out was 0\.25 and is 0\.3 now"),
    ],
)
def test_other_held_out_data_is_refused_on_resume(
    inputs: Path, undisturbed: Path, override: str, message: str
) -> None:
    with pytest.raises(HydraError, match=message):
        run_training(_config(inputs, undisturbed, "distill", "schedule.steps=8", override))


@pytest.mark.slow
def test_a_run_may_resume_without_validation_and_with_it_again(
    inputs: Path, tmp_path: Path
) -> None:
    for steps, interval in ((2, 1), (4, 0), (6, 2)):
        overrides = [f"schedule.steps={steps}", f"validation.interval={interval}"]
        config = _config(inputs, tmp_path, "finetune", "optimizer.lr=1e-4", *overrides)
        assert run_training(config) == 0
    state = _training_state(tmp_path)["validation"]
    assert [step for step, _ in state["history"]] == [1, 2, 6]


# -- patience ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["align", _slow("distill"), _slow("finetune")])
def test_patience_ends_a_run_and_the_next_stage_starts_from_it(
    inputs: Path, tmp_path: Path, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = _config(
        inputs, tmp_path / verb, verb, "validation.interval=1", "schedule.steps=50",
        "schedule.patience=2", "schedule.min_improvement=100", "checkpoint.save_optimizer=false",
    )  # fmt: skip
    assert run_training(config) == 0
    # The first validation counts as an improvement; the next two do not.
    assert [step for step, _ in _losses(tmp_path / verb)] == [1, 2, 3]
    folder = store.resolve_checkpoint(tmp_path / verb / "checkpoints")
    assert folder.name == "step_00000003"
    provenance = store.read_manifest(folder)["provenance"]
    assert provenance["ended"].startswith("schedule.patience: 2 validations in a row")
    assert provenance["validation"]["waited"] == 2
    assert "the run ends after step 3: schedule.patience" in caplog.text
    lines = (tmp_path / verb / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert events[-1]["event"] == "end"
    assert events[-1]["reason"] == provenance["ended"]
    # The run has ended: the same command does nothing. With more patience it would need its optimizer.
    assert run_training(config) == 0
    assert len(tiny.read_metrics(tmp_path / verb)) == 3
    with pytest.raises(HydraError, match=r"save_optimizer=false and cannot be resumed"):
        run_training(apply_overrides(config, ["schedule.patience=3"]))
    following = _config(
        inputs, tmp_path / "next", "finetune", "schedule.steps=2",
        f"student.checkpoint={tmp_path / verb / 'checkpoints'}",
    )  # fmt: skip
    assert run_training(following) == 0
    history = store.read_manifest(store.resolve_checkpoint(tmp_path / "next/checkpoints"))
    assert history["provenance"]["history"][-1]["ended"] == provenance["ended"]


@pytest.mark.slow
def test_with_more_patience_an_ended_run_resumes_as_if_it_had_not_ended(
    inputs: Path, tmp_path: Path
) -> None:
    common = ["validation.interval=1", "schedule.steps=5", "schedule.min_improvement=100"]
    for name, patiences in (("twice", (2, 3)), ("once", (3,))):
        for patience in patiences:
            overrides = [*common, f"schedule.patience={patience}"]
            assert run_training(_config(inputs, tmp_path / name, "distill", *overrides)) == 0
    assert [step for step, _ in _losses(tmp_path / "twice")] == [1, 2, 3, 4]
    assert _timeless(tmp_path / "twice", "gamma_fa", "gamma_gdn") == _timeless(
        tmp_path / "once", "gamma_fa", "gamma_gdn"
    )
    _assert_equal_checkpoints(tmp_path / "twice", tmp_path / "once")


def test_a_run_that_improves_is_not_ended(inputs: Path, tmp_path: Path) -> None:
    config = _config(
        inputs, tmp_path, "align", "validation.interval=1", "schedule.patience=1",
        "optimizer.lr=1e-3",
    )  # fmt: skip
    assert run_training(config) == 0
    losses = [loss for _, loss in _losses(tmp_path)]
    assert len(losses) == STEPS
    assert losses == sorted(losses, reverse=True)
    assert math.isfinite(losses[-1])


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["validation.sequences=50"], r"validation\.sequences is 50: data\.blend\.0 .* has \d+"),
        (
            ["data.held_out=1e-9"],
            r"data\.held_out=1e-09 none of its 60 documents is held out; raise",
        ),
        (["data.held_out=0.999999"], r"none of its 60 documents is trained on; lower"),
    ],
)
def test_too_little_data_is_refused_before_the_first_step(
    inputs: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(HydraError, match=message):
        run_training(_config(inputs, tmp_path, "finetune", *overrides))
    assert not (tmp_path / "metrics.jsonl").exists()
