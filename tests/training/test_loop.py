"""One process, every verb: resuming is exact, stops are clean, faults do not change the weights."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config import apply_overrides, load_run_config
from megatron_hydra.config.run import RunConfig
from megatron_hydra.conversion.convert import hf_to_megatron
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.errors import HydraError
from megatron_hydra.stopping import REQUEUE_EXIT_CODE
from megatron_hydra.training import loop
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.run_folder import lock_output, step_folders
from tests.training import tiny

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def _config(inputs: Path, output: Path, verb: str, *overrides: str) -> RunConfig:
    config = tiny.run_config(inputs, verb, "unused", schedule={"steps": STEPS, "warmup_steps": 1})
    config = dataclasses.replace(config, output=str(output))
    return apply_overrides(config, list(overrides))


_everything = tiny.everything


def _assert_same_run(got: Path, expected: Path) -> None:
    timeless = [
        [{k: v for k, v in line.items() if k not in tiny.OF_THE_CLOCK} for line in lines]
        for lines in (tiny.read_metrics(run) for run in (got, expected))
    ]
    assert timeless[0] == timeless[1]
    tensors = [_everything(run / "checkpoints") for run in (got, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    different = [k for k, t in tensors[0].items() if not torch.equal(t, tensors[1][k])]
    assert different == []


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Run ``action`` just before ``step`` (1-based)."""
    original, count = loop.train_step, [0]

    def patched(*args, **kwargs):
        count[0] += 1
        if count[0] == step:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", patched)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished distillation."""
    output = tmp_path_factory.mktemp("undisturbed")
    assert run_training(_config(inputs, output, "distill")) == 0
    return output


def test_stop_by_signal_and_resume_are_exact(
    inputs: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(inputs, tmp_path, "distill")
    _at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert run_training(config) == REQUEUE_EXIT_CODE
    monkeypatch.undo()
    assert [line["step"] for line in tiny.read_metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000003\n"
    assert run_training(config) == 0
    _assert_same_run(tmp_path, undisturbed)


def test_death_between_checkpoints_repeats_no_step(
    inputs: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    config = _config(inputs, tmp_path, "distill", "checkpoint.interval=2")
    _at_step(monkeypatch, 6, die)
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    monkeypatch.undo()
    assert len(tiny.read_metrics(tmp_path)) == 5
    # A run killed while saving leaves files that are invisible; they are removed.
    leftover = tmp_path / "checkpoints/.step_00000005.tmp"
    (leftover / "weights").mkdir(parents=True)
    assert run_training(config) == 0
    assert not leftover.exists()
    _assert_same_run(tmp_path, undisturbed)


def test_a_stop_saves_the_optimizer_even_if_the_last_checkpoint_omits_it(
    inputs: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(inputs, tmp_path, "distill", "checkpoint.save_optimizer=false")
    _at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_training(config) == REQUEUE_EXIT_CODE
    monkeypatch.undo()
    assert run_training(config) == 0
    small, whole = (_everything(run / "checkpoints") for run in (tmp_path, undisturbed))
    assert whole.keys() - small.keys() == {key for key in whole if key.startswith("optimizer.")}
    assert all(torch.equal(small[key], whole[key]) for key in small)
    with pytest.raises(HydraError, match=r"save_optimizer=false and cannot be resumed"):
        run_training(apply_overrides(config, [f"schedule.steps={STEPS + 1}"]))


def test_finished_run_is_not_run_again(undisturbed: Path, inputs: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_text()
    assert run_training(_config(inputs, undisturbed, "distill")) == 0
    assert (undisturbed / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.resume=never"], "checkpoint.resume is 'never'"),
        (["verb=finetune", "teacher.checkpoint="], "was made by verb distill"),
        (["data.seed=1"], "data.seed was 1234 and is 1 now"),
    ],
)
def test_resuming_another_run_is_refused(
    inputs: Path, undisturbed: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(HydraError, match=message):
        run_training(_config(inputs, undisturbed, "distill", *overrides))


def test_resuming_with_another_student_is_refused(inputs: Path, tmp_path: Path) -> None:
    """This holds even if its weights would fit: every layer has as many FA heads, but others."""
    weights = tiny.teacher_weights()
    swapped = dataclasses.replace(tiny.student_config(), full_attention_heads=((0, 6), ()))
    save_canonical(tmp_path / "swapped", initialise_student(weights, swapped), swapped)
    retrained = tiny.student_config()
    others = initialise_student(tiny.teacher_weights(seed=1), retrained)
    save_canonical(tmp_path / "retrained", others, retrained)
    config = _config(inputs, tmp_path / "run", "finetune", "schedule.steps=2")
    assert run_training(config) == 0
    before = (tmp_path / "run/config.yaml").read_text()
    for name, message in (
        ("swapped", r"full_attention_heads of its student differs from .*/swapped"),
        ("retrained", r"its student was .*/student \(sha256:.*, this run's is .*/retrained \("),
    ):
        other = [f"student.checkpoint={tmp_path / name}", "schedule.steps=4"]
        with pytest.raises(HydraError, match=message):
            run_training(apply_overrides(config, other))
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_damaged_checkpoint_is_refused_and_fallback_is_explicit(
    inputs: Path, tmp_path: Path
) -> None:
    config = _config(
        inputs,
        tmp_path,
        "finetune",
        "schedule.steps=4",
        "checkpoint.interval=1",
        "checkpoint.keep=2",
    )
    assert run_training(config) == 0
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000003", "step_00000004"]
    weights = next((folder / "step_00000004/weights").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(HydraError, match=r"was changed; checkpoint\.resume=fallback"):
        run_training(config)
    assert run_training(apply_overrides(config, ["checkpoint.resume=fallback"])) == 0
    assert [line["step"] for line in tiny.read_metrics(tmp_path)] == [1, 2, 3, 4]
    store.verify_manifest(folder / "step_00000004")


def test_a_second_run_in_the_same_folder_is_refused(inputs: Path, tmp_path: Path) -> None:
    config = _config(inputs, tmp_path, "finetune", "schedule.steps=2")
    with (
        lock_output(tmp_path),
        pytest.raises(HydraError, match="is in use by another run that has not ended"),
    ):
        run_training(config)
    assert run_training(config) == 0


def test_nonexistent_student_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(HydraError, match=r"nowhere does not exist"):
        run_training(_config(inputs, tmp_path, "finetune", "student.checkpoint=nowhere"))


def _poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss NaN in the given steps (1-based; a step has two micro-batches)."""
    from megatron_hydra.transfer import finetune

    original, calls = finetune.final_hidden_states, [0]

    def patched(*args):
        calls[0] += 1
        hidden = original(*args)
        return hidden * float("nan") if (calls[0] + 1) // 2 in steps else hidden

    monkeypatch.setattr(finetune, "final_hidden_states", patched)


def test_a_step_without_finite_loss_changes_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(
        inputs, tmp_path, "finetune", "checkpoint.interval=1", "schedule.steps=3",
        "checkpoint.keep=0", "optimizer.weight_decay=0",
    )  # fmt: skip
    _poison(monkeypatch, {2})
    assert run_training(config) == 0
    metrics = tiny.read_metrics(tmp_path)
    assert [line.get("skipped", False) for line in metrics] == [False, True, False]
    assert metrics[1]["loss"] is None
    assert "step 2: loss or gradient is not finite" in caplog.text
    assert "Samples of data-parallel rank 0" in caplog.text
    folder = tmp_path / "checkpoints"
    assert not (folder / "step_00000002").exists()
    after = _everything(folder / "step_00000003")
    assert all(torch.isfinite(t).all() for t in after.values() if t.is_floating_point())


@pytest.mark.parametrize("verb", ["align", "finetune"])
def test_a_step_without_a_learned_token_changes_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    verb: str,
) -> None:  # fmt: skip
    """It applies neither weight decay nor momentum, and adds no loss of 0 to the losses that detect spikes."""
    config = _config(
        inputs, tmp_path, verb, "checkpoint.interval=1", "schedule.steps=3", "checkpoint.keep=0",
        "optimizer.weight_decay=0.5", "faults.spike_factor=3", "faults.spike_window=1",
    )  # fmt: skip
    original, steps = loop.train_step, [0]

    def masked_in_step_two(train_state, batches, *rest):
        steps[0] += 1
        if steps[0] == 2:
            batches = [
                dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
                for batch in batches
            ]
        return original(train_state, batches, *rest)

    monkeypatch.setattr(loop, "train_step", masked_in_step_two)
    assert run_training(config) == 0
    metrics = tiny.read_metrics(tmp_path)
    assert [line.get("skipped", False) for line in metrics] == [False, True, False]
    assert metrics[1]["loss"] is None
    assert "step 2: no token of the global batch has a loss" in caplog.text
    assert not (tmp_path / "checkpoints" / "step_00000002").exists()


def test_a_save_due_on_a_skipped_step_happens_after_the_next_good_step(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(inputs, tmp_path, "finetune", "checkpoint.interval=2", "checkpoint.keep=0")
    _poison(monkeypatch, {2})
    assert run_training(config) == 0
    steps = [path.name for path in step_folders(tmp_path / "checkpoints")]
    assert steps == ["step_00000003", "step_00000004", "step_00000006"]


def test_too_many_bad_steps_end_the_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(
        inputs, tmp_path, "finetune", "checkpoint.interval=1", "faults.max_skipped_steps=1"
    )
    _poison(monkeypatch, {2, 3, 4, 5, 6})
    with pytest.raises(
        HydraError, match=r"2 steps in a row were skipped, faults\.max_skipped_steps is 1"
    ):
        run_training(config)
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000001\n"


def test_every_verb_trains_and_writes_a_record(inputs: Path, tmp_path: Path) -> None:
    """align -> distill -> finetune, each from the last one; histories add up."""
    student = inputs / "student"
    for verb in ("align", "distill", "finetune"):
        config = _config(
            inputs, tmp_path / verb, verb, "optimizer.lr=3e-3", "schedule.steps=12",
            f"student.checkpoint={student}",
        )  # fmt: skip
        assert run_training(config) == 0
        losses = [line["loss"] for line in tiny.read_metrics(tmp_path / verb)]
        assert sum(losses[-3:]) < sum(losses[:3]), (verb, losses)
        student = tmp_path / verb / "checkpoints"
    provenance = store.read_manifest(store.resolve_checkpoint(student))["provenance"]
    assert provenance["stage"] == "finetune"
    assert provenance["tokens"] == 12 * 4 * tiny.SEQUENCE
    stages = [record.get("stage") for record in provenance["history"]]
    assert stages[-2:] == ["align", "distill"]
    assert provenance["history"][-2]["inputs"]["teacher"]["fingerprint"].startswith("sha256:")
    assert store.read_model_config(student) == tiny.student_config()


def test_megatron_logs_no_warning(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each release has other warnings; warnings that no user can act on would hide useful ones."""
    for steps in (2, 4):  # a new run, then a resumed one
        overrides = [f"schedule.steps={steps}", "checkpoint.interval=2"]
        assert run_training(_config(inputs, tmp_path, "distill", *overrides)) == 0
    warned = [r for r in caplog.records if r.name.startswith("megatron.") and r.levelno >= 30]
    assert not [record.getMessage() for record in warned]


def test_pretraining_starts_from_a_model_that_transformers_has_made(
    inputs: Path, tmp_path: Path
) -> None:
    """As in docs/training.md, with the shipped config."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "dense")
    config = load_run_config(
        [ROOT / "configs/tiny/pretrain.yaml"],
        [f"student.checkpoint={tmp_path / 'dense'}", f"output={tmp_path / 'run'}",
         f"data.blend.0.path={inputs / 'text'}", f"data.sequence_length={tiny.SEQUENCE}",
         "schedule.steps=12", "schedule.warmup_steps=2", "optimizer.lr=3e-3",
         "logging.progress=false"],
    )  # fmt: skip
    assert run_training(config) == 0
    losses = [line["loss"] for line in tiny.read_metrics(tmp_path / "run")]
    assert sum(losses[-3:]) < sum(losses[:3])
    model = store.read_model_config(tmp_path / "run/checkpoints")
    assert not model.is_hybrid
    assert model.source["fingerprint"] == ""  # these are no longer the weights of the conversion


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_that_reaches_the_optimizer_is_clipped(
    clip: float, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, norms = loop.train_step, []

    def patched(train_state, *rest):
        optimizer = train_state.optimizer

        def noted():
            norms.append(float(optimizer.get_grad_norm()))
            return type(optimizer).step_with_ready_grads(optimizer)

        optimizer.step_with_ready_grads = noted
        return original(train_state, *rest)

    monkeypatch.setattr(loop, "train_step", patched)
    config = _config(
        inputs, tmp_path, "finetune", "schedule.steps=2", f"optimizer.clip_grad={clip}"
    )
    assert run_training(config) == 0
    before = [line["grad_norm"] for line in tiny.read_metrics(tmp_path)]
    assert min(before) > 0.1
    assert norms == pytest.approx([clip or norm for norm in before], rel=1e-4)


def test_align_trains_only_the_hybrid_attention(inputs: Path, tmp_path: Path) -> None:
    assert run_training(_config(inputs, tmp_path, "align", "schedule.steps=2")) == 0
    before, after = (
        store.load_canonical(folder) for folder in (inputs / "student", tmp_path / "checkpoints")
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(".self_attention." in key for key in changed)
