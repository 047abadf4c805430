"""Every layout trains like one process: losses (also held-out), gradients, optimizer state, faults."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.config import apply_overrides
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.training.checkpoint import TRAINING_FILE
from megatron_hydra.training.loop import run_training
from megatron_hydra.training.sinks import scalars
from megatron_hydra.transfer.answers import AnswerCount
from tests.parallel.launch import ROOT, forked, torchrun
from tests.training import tiny
from tests.training.test_loop import _everything

pytestmark = pytest.mark.parallel

STEPS = 3
ODD_VOCABULARY = tiny.VOCABULARY + 5
"""A size that is not a multiple of any number of tensor-parallel ranks.

It also decides the random weights. With 65 tokens, a relative change of 6e-8 in the weights changes a gradient
by up to 1.6e-4 in one process, more than the bound between layouts; with 69 tokens by 1.4e-5.
"""
VERBS = ("align", "distill", "finetune", "pretrain")
LAYOUTS = {
    "tp2-cp2": ["parallel.tensor=2", "parallel.context=2"],
    "tp2-sp-pp2": ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"],
    "tp2-sp-seq-pp2": [
        "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2",
        "parallel.fa_partition=sequence",
    ],
    "tp4-sp-seq": ["parallel.tensor=4", "parallel.sequence=true", "parallel.fa_partition=sequence"],
    "tp4": ["parallel.tensor=4"],
    "cp4": ["parallel.context=4"],
    "cp2-dp2": ["parallel.context=2"],
    "dp2-pp2": ["parallel.pipeline=2"],
    "dp2-pp2-vp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "pp4": ["parallel.pipeline=4"],
    "dp4": [],
    "tp2-dp2-overlap": [
        "parallel.tensor=2",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ],
    "cp2-dp2-plain": ["parallel.context=2", "parallel.distributed_optimizer=false"],
    "tp2-cp2-full": ["parallel.tensor=2", "parallel.context=2", "recompute.granularity=full"],
    "cp2-dp2-selective": [
        "parallel.context=2", "recompute.granularity=selective",
        "recompute.modules=[attention, mlp]",
    ],
    "tp2-cp2-parts": [
        "parallel.tensor=2", "parallel.context=2", "recompute.granularity=selective",
        "recompute.modules=[fa, gdn, tail]",
    ],
    "tp2-seq-dp2": ["parallel.tensor=2", "parallel.fa_partition=sequence"],
    "tp2-sp-cp2": ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
}  # fmt: skip
# Documents of 13 tokens: two context-parallel shards of 24 cut the second document's answer in two.
PROBES = [{"kind": "synthetic", "task": "tiny_answers", "options": {"document": 13}}]
FAST = [
    ("align", "tp2-sp-seq-pp2"),
    ("align", "tp4"),  # some ranks have no FA head, and stage 1's inputs need no gradient
    ("distill", "dp2-pp2-vp2"),
    ("finetune", "cp2-dp2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and runs of this module. In all runs, tensor parallelism pads the vocabulary."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny.write_all(folder, dataclasses.replace(tiny.DEEP, vocab_size=ODD_VOCABULARY))
    return folder


def _sections(verb: str) -> dict:
    # Documents of one, several and many shards; batches that four replicas can share.
    return {
        "schedule": {"steps": STEPS, "warmup_steps": 1},
        "batch": {"micro_batch_size": 1, "global_batch_size": 4},
        "checkpoint": {"interval": 1, "keep": 0},  # the one of step 1 has its gradients
        # Five sequences are not a multiple of the replicas; validation is after step 2 and at the end.
        "data": {"held_out": 0.25},
        "validation": {"interval": 2, "sequences": 5, "probes": [] if verb == "align" else PROBES},
    }


def _case(verb: str, layout: str, *, overrides: Sequence[str] = (), **more) -> dict:
    return {
        "verb": verb, "output": f"{verb}-{layout}", "overrides": [*LAYOUTS[layout], *overrides],
        "sections": _sections(verb), **more,
    }  # fmt: skip


def _train_one(folder: Path, verb: str, overrides: Sequence[str] = ()) -> int:
    """Train in one process."""
    config = tiny.run_config(folder, verb, f"{verb}-one", **_sections(verb))
    with mock.patch.object(AnswerCount, "add", tiny.often_right(AnswerCount.add)):
        return run_training(apply_overrides(config, overrides))


def _reference(folder: Path, verb: str) -> Path:
    """The run of one process, which is made once."""
    output = folder / f"{verb}-one"
    if not output.exists():
        assert _train_one(folder, verb) == 0
    return output


def _run(folder: Path, cases: list[dict], processes: int = 4) -> dict[str, list]:
    """Outcomes of all ranks by output folder; if several cases share a folder, the last one's."""
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    text = forked(
        "tests.parallel.training_runs", processes, str(folder), str(listing), timeout=1700
    )
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"output"')]
    return {line["output"]: line["outcomes"] for line in lines}


def _relative(got: float, expected: float) -> float:
    return abs(got - expected) / abs(expected)


def _assert_equal_training(folder: Path, verb: str, layout: str) -> None:
    reference = _reference(folder, verb)
    runs = [tiny.read_metrics(run) for run in (folder / f"{verb}-{layout}", reference)]
    assert [len(run) for run in runs] == [STEPS, STEPS]
    for got, expected in zip(*runs, strict=True):
        assert _relative(got["loss"], expected["loss"]) < 1e-5, (verb, layout, got, expected)
        # Gradients of equal weights agree closely; later each update increases the rounding.
        limit = 1e-4 if got["step"] == 1 else 1e-3
        assert _relative(got["grad_norm"], expected["grad_norm"]) < limit, (verb, layout, got)
        assert got["loss_tokens"] == expected["loss_tokens"]
    _assert_equal_validations(*runs)
    _assert_equal_gradients(folder / f"{verb}-{layout}", reference)
    states = [_everything(run / "checkpoints") for run in (folder / f"{verb}-{layout}", reference)]
    names = {name for name in states[1] if name != "rng_state"}
    if "plain" in layout:  # in fp32, the plain optimizer needs no main copy of the parameters
        names = {name for name in names if not name.startswith("optimizer.state.param.")}
    assert names == {name for name in states[0] if name != "rng_state"}
    for name in names:
        got, expected = (state[name] for state in states)
        error = (got - expected).norm() / (expected.norm() + 1e-6)
        assert error < 1e-3, (verb, layout, name, float(error))


def _assert_equal_validations(got: list[dict], expected: list[dict]) -> None:
    """Every number of the lines, also those of a source or a layer."""
    found = [
        {line["step"]: scalars(line["validation"]) for line in run if "validation" in line}
        for run in (got, expected)
    ]
    assert list(found[0]) == list(found[1]) == [2, STEPS]
    for step, numbers in found[1].items():
        assert numbers["loss"] > 0
        assert numbers["sources/text/loss"] == numbers["loss"]
        assert found[0][step] == pytest.approx(numbers, rel=1e-5)
        if "probes/tiny_answers/accuracy" in numbers:
            assert 0 < numbers["probes/tiny_answers/accuracy"] < 1


def _assert_equal_gradients(run: Path, reference: Path) -> None:
    """Every parameter's gradient of step 1, in full form: Adam's first moment is a multiple of it."""
    first = [
        {
            name: tensor
            for name, tensor in _everything(output / "checkpoints/step_00000001").items()
            if ".exp_avg." in name
        }
        for output in (run, reference)
    ]
    assert first[0].keys() == first[1].keys()
    assert len(first[1]) > 10
    # What is exactly zero in theory (a key bias, say) is measured against the whole gradient.
    floor = 1e-3 * float(torch.stack([moment.norm() for moment in first[1].values()]).norm())
    for name, expected in first[1].items():
        error = float((first[0][name] - expected).norm() / expected.norm().clamp_min(floor))
        assert error < 1e-4, (run.name, name, error)


def _assert_masters_are_the_weights(run: Path) -> None:
    """In fp32 every saved master weight equals its weight, bit for bit, so it was cut at the right place."""
    saved = _everything(run / "checkpoints")
    prefix = "optimizer.state.param."
    masters = {name for name in saved if name.startswith(prefix)}
    assert len(masters) > 20
    wrong = [name for name in masters if not torch.equal(saved[name], saved[name[len(prefix) :]])]
    assert not wrong


@pytest.mark.timeout(900)
def test_fast_layouts_equal_one_process(folder: Path) -> None:
    """All ranks also act on a NaN or a stop signal of one rank, and many gradient buckets work."""
    overlap = ["parallel.overlap_grad_reduce=true"]
    faults = [
        _case("finetune", "cp2-dp2", output="finetune-buckets", overrides=overlap, bucket_size=1),
        _case("finetune", "cp2-dp2", output="nan", fault="nan"),
        _case("finetune", "cp2-dp2", output="signal", fault="signal"),
        _case("finetune", "tp2-cp2", output="signal", fault=""),  # resumes under another layout
    ]
    outcomes = _run(folder, [_case(*pair) for pair in FAST] + faults)
    for verb, layout in FAST:
        assert outcomes[f"{verb}-{layout}"] == [0] * 4
        _assert_equal_training(folder, verb, layout)

    assert outcomes["finetune-buckets"] == [0] * 4
    _assert_equal_training(folder, "finetune", "buckets")
    _assert_masters_are_the_weights(folder / "finetune-buckets")

    assert outcomes["nan"] == [0] * 4
    skipped = [line.get("skipped", False) for line in tiny.read_metrics(folder / "nan")]
    assert skipped == [False, True, False]
    assert all(
        torch.isfinite(t).all() for t in store.load_canonical(folder / "nan/checkpoints").values()
    )

    assert outcomes["signal"] == [0] * 4  # the resumed run; the line before is the stopped one
    assert (folder / "signal/checkpoints/step_00000002").is_dir()
    losses = [
        [line["loss"] for line in tiny.read_metrics(run)]
        for run in (folder / "signal", _reference(folder, "finetune"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


PADDED = [
    ("distill", "tp4"), ("distill", "cp4"), ("distill", "tp2-sp-cp2"), ("align", "tp4"),
    ("align", "cp4"), ("align", "tp2-sp-cp2"),
]  # fmt: skip


@pytest.mark.slow
def test_padding_an_indivisible_length_does_not_change_training(tmp_path: Path) -> None:
    """49 tokens: tensor-parallel ranks also cut a stream for shared KV groups, without a key for it."""
    tiny.write_all(tmp_path, tiny.DEEP)
    overrides = ["data.sequence_length=49"]
    for verb in ("distill", "align"):
        assert _train_one(tmp_path, verb, overrides) == 0
    outcomes = _run(tmp_path, [_case(*pair, overrides=overrides) for pair in PADDED])
    for verb, layout in PADDED:
        assert outcomes[f"{verb}-{layout}"] == [0] * 4
        _assert_equal_training(tmp_path, verb, layout)


ODD_CASES = [
    ("distill", "tp2-sp-pp2"), ("finetune", "tp4"), ("align", "tp4"), ("distill", "tp2-cp2"),
]  # fmt: skip


def _odd_vocabulary(folder: Path, cases: list[tuple[str, str]], *, tied: bool) -> None:
    """Train with a padded vocabulary; compare with one process; check the saved tensors."""
    model = dataclasses.replace(tiny.DEEP, vocab_size=ODD_VOCABULARY, tie_embeddings=tied)
    tiny.write_all(folder, model)
    for verb in {verb for verb, _ in cases}:
        assert _train_one(folder, verb) == 0
    resumed = _case("finetune", "tp4", output="resumed", overrides=["schedule.steps=2"])
    goes_on = _case("finetune", "tp2-cp2", output="resumed")
    outcomes = _run(folder, [*(_case(*pair) for pair in cases), resumed, goes_on])
    for verb, layout in cases:
        assert outcomes[f"{verb}-{layout}"] == [0] * 4
        _assert_equal_training(folder, verb, layout)
        saved = _everything(folder / f"{verb}-{layout}/checkpoints")
        tables = ["embedding.word_embeddings.weight"] + ["output_layer.weight"] * (not tied)
        names = [
            f"{prefix}{table}" for table in tables for prefix in ("", "optimizer.state.exp_avg.")
        ]
        if verb == "align":  # align trains no vocabulary table
            names = tables
        for name in names:
            assert saved[name].shape == (ODD_VOCABULARY, model.hidden_size), name
    assert outcomes["resumed"] == [0] * 4  # a state saved with one padding resumes under another
    state = _everything(folder / "resumed/checkpoints")
    assert len(state) > 20
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.slow
def test_a_padded_vocabulary_trains_as_one_that_is_not(tmp_path: Path) -> None:
    """Two ranks with tied tables."""
    tiny.write_all(tmp_path, dataclasses.replace(tiny.TEACHER, vocab_size=ODD_VOCABULARY))
    assert _train_one(tmp_path, "distill") == 0
    case = _case("distill", "dp4", output="distill-tp2", overrides=["parallel.tensor=2"])
    assert _run(tmp_path, [case], processes=2)["distill-tp2"] == [0] * 2
    _assert_equal_training(tmp_path, "distill", "tp2")
    saved = _everything(tmp_path / "distill-tp2/checkpoints")
    for prefix in ("", "optimizer.state.exp_avg."):
        table = saved[f"{prefix}embedding.word_embeddings.weight"]
        assert table.shape == (ODD_VOCABULARY, tiny.TEACHER.hidden_size)


@pytest.mark.slow
def test_a_padded_vocabulary_under_more_layouts(tmp_path: Path) -> None:
    _odd_vocabulary(tmp_path, ODD_CASES[:2], tied=True)


@pytest.mark.slow
def test_a_padded_vocabulary_with_an_lm_head_of_its_own(tmp_path: Path) -> None:
    _odd_vocabulary(tmp_path, ODD_CASES, tied=False)


ALL = tuple(range(8))
SHAPES = {
    "uneven": ({"num_query_heads": 6, "num_kv_heads": 2}, ((0, 1, 4), (), (5,), (2, 3)), {}),
    "one-kv": ({"num_kv_heads": 1}, ((0, 3), (), (1, 2, 7), (5,)), {"gdn_kv": "gqa"}),
    "all-fa": ({}, (ALL, (), ALL, (2,)), {}),
    "shared": ({}, ((1, 6, 7), (), ALL, (2,)), {"qkv": "shared"}),
}
"""Changes of the teacher's shape, FA heads and switches that give no multiple of the ranks."""

SHAPED = {
    "uneven": [("align", "tp4"), ("distill", "dp2-pp2-vp2")],
    "one-kv": [("distill", "tp2-cp2")],
    "all-fa": [("align", "tp2-sp-seq-pp2")],
    "shared": [("distill", "tp2-sp-seq-pp2"), ("align", "tp2-cp2")],
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(SHAPES))
def test_head_shapes_train_as_in_one_process(tmp_path: Path, shape: str) -> None:
    changes, heads, switches = SHAPES[shape]
    teacher = dataclasses.replace(tiny.DEEP, **changes)
    student = dataclasses.replace(
        teacher, hydra=HydraConfig(**switches), full_attention_heads=heads
    )
    weights = tiny.teacher_weights(teacher)
    tiny.write_text(tmp_path)
    store.save_canonical(tmp_path / "teacher", weights, teacher)
    store.save_canonical(tmp_path / "student", initialise_student(weights, student), student)
    outcomes = _run(tmp_path, [_case(*pair) for pair in SHAPED[shape]])
    for verb, layout in SHAPED[shape]:
        assert outcomes[f"{verb}-{layout}"] == [0] * 4
        _assert_equal_training(tmp_path, verb, layout)


RESUMED = [("tp2-sp-seq-pp2", "cp2-dp2"), ("dp2-pp2-vp2", "tp4-sp-seq")]


def _stopped_and_resumed(first: str, second: str, name: str, overrides: Sequence[str]) -> list:
    """Two cases: a run stops after step 2 under one layout, and resumes to the end under another."""
    common = {"output": f"distill-{name}", "overrides": overrides}
    return [_case("distill", first, fault="signal", **common), _case("distill", second, **common)]


@pytest.mark.slow
def test_optimizer_state_resumes_under_another_layout_and_partition(folder: Path) -> None:
    """Every final tensor equals that of one process that was never stopped."""
    bf16 = ["precision=bf16"]
    cases = [_case("distill", "tp2-cp2", output="distill-bf16", overrides=bf16)]
    cases += _stopped_and_resumed("tp2-sp-seq-pp2", "cp2-dp2", "bf16-resumed", bf16)
    for first, second in RESUMED:
        cases += _stopped_and_resumed(first, second, f"{first}-{second}", [])
    outcomes = _run(folder, cases)
    for first, second in RESUMED:
        assert outcomes[f"distill-{first}-{second}"] == [0] * 4
        assert (folder / f"distill-{first}-{second}/checkpoints/step_00000002").is_dir()
        _assert_equal_training(folder, "distill", f"{first}-{second}")
    # The number of replicas is not a key, but the log says that it has changed.
    lines = (folder / "distill-tp2-sp-seq-pp2-cp2-dp2/events.jsonl").read_text().splitlines()
    events = {event["event"]: event for event in map(json.loads, lines)}
    assert events["resume"]["changed"]["parallel (data-parallel size)"] == [1, 2]
    assert events["reading changed"]["data_parallel_size"] == [1, 2]

    assert outcomes["distill-bf16-resumed"] == outcomes["distill-bf16"] == [0] * 4
    resumed, expected = (
        _everything(folder / f"distill-{run}/checkpoints") for run in ("bf16-resumed", "bf16")
    )
    # Moments follow gradients, which bf16 rounds (γ's by 0.75 here). The error would be 1 for a lost state and
    # 1.4 for another parameter's state.
    for kind, limit in (("param", 0.05), ("exp_avg", 0.9), ("exp_avg_sq", 0.9)):
        names = [name for name in expected if name.startswith(f"optimizer.state.{kind}.")]
        assert len(names) > 10
        whole = torch.stack([expected[name].norm() for name in names]).norm()
        for name in names:
            floor = torch.maximum(expected[name].norm(), 1e-2 * whole)
            assert (resumed[name] - expected[name]).norm() < limit * floor, name


@pytest.mark.slow
def test_a_changed_blend_batch_and_number_of_replicas_equal_one_process(
    folder: Path,
) -> None:
    """Equal losses, learning rates, weights, optimizer, and record of read data."""
    (folder / "other").mkdir()
    other = tiny.write_text(folder / "other", documents=41, longest=30)
    blend = f"data.blend=[{{path: {folder / 'text'}}}, {{path: {other}, weight: 2}}]"
    # Another blend holds out other documents, so its held-out losses differ.
    common = ["validation.interval=0", "data.packing=split_long"]
    changed = [*common, blend, "batch.global_batch_size=8", "data.phase=2"]
    first, last = f"schedule.steps={STEPS - 1}", f"schedule.steps={STEPS + 1}"
    ends = (("dp4", "dp4"), ("tp2-cp2", "cp2-dp2"), ("dp2-pp2", "tp2-cp2"))
    cases = []
    for before, after in ends:
        output = {"output": f"finetune-changed-{before}-{after}"}
        cases += [
            _case("finetune", before, overrides=[*common, first], **output),
            _case("finetune", after, overrides=[*changed, last], **output),
        ]
    outcomes = _run(folder, cases)
    reference = folder / "finetune-changed-one"
    for overrides in ([*common, first], [*changed, last]):
        assert _train_one(folder, "finetune", [f"output={reference}", *overrides]) == 0
    expected, state = tiny.read_metrics(reference), _everything(reference / "checkpoints")
    read = _data_read(reference)
    assert [span["global_batch_size"] for span in read["spans"]] == [4, 8]
    samples = [source["samples"] for source in read["sources"]]
    assert sum(samples) == 4 * 2 + 8 * 2
    assert min(samples) > 0
    for before, after in ends:
        run = folder / f"finetune-changed-{before}-{after}"
        assert outcomes[run.name] == [0] * 4
        metrics = tiny.read_metrics(run)
        assert [line["tokens"] for line in metrics] == [line["tokens"] for line in expected]
        for got, line in zip(metrics, expected, strict=True):
            assert _relative(got["loss"], line["loss"]) < 1e-5, (run.name, got, line)
            assert got["lr"] == line["lr"]
        found = _everything(run / "checkpoints")
        names = {name for name in state if name != "rng_state"}
        assert names == {name for name in found if name != "rng_state"}
        for name in names:
            error = (found[name] - state[name]).norm() / (state[name].norm() + 1e-6)
            assert error < 1e-3, (run.name, name, float(error))
        # Only the record of micro-batches and replicas differs.
        mine = _data_read(run)
        replicas = [span["data_parallel_size"] for span in mine["spans"]]
        assert replicas == [
            {"dp4": 4, "dp2-pp2": 2, "cp2-dp2": 2, "tp2-cp2": 1}[x] for x in (before, after)
        ]
        for span in (*mine["spans"], *read["spans"]):
            span.pop("data_parallel_size")
        assert mine == read
        read = _data_read(reference)


def _data_read(run: Path) -> dict:
    """The last checkpoint's record of all read data."""
    body = json.loads((store.resolve_checkpoint(run / "checkpoints") / TRAINING_FILE).read_text())
    return {key: body["data"][key] for key in ("sources", "spans")}


UNDISTURBED = [
    ("finetune", "tp2-dp2-overlap"), ("distill", "dp2-pp2-vp2"), ("align", "tp2-sp-seq-pp2"),
    ("distill", "tp2-cp2-full"),
]  # fmt: skip


@pytest.mark.slow
def test_training_does_not_notice_its_validations_under_any_layout(folder: Path) -> None:
    """Validating after every step or never gives the same bits, also if weights are gathered late."""
    cases = []
    for verb, layout in UNDISTURBED:
        for name, interval in (("with", 1), ("without", 0)):
            overrides = [f"validation.interval={interval}"]
            cases.append(_case(verb, layout, output=f"{name}-{verb}-{layout}", overrides=overrides))
    outcomes = _run(folder, cases)
    for verb, layout in UNDISTURBED:
        runs = [folder / f"{name}-{verb}-{layout}" for name in ("with", "without")]
        assert outcomes[runs[0].name] == outcomes[runs[1].name] == [0] * 4
        lines = [tiny.read_metrics(run) for run in runs]
        assert ["validation" in line for line in lines[0]] == [True] * STEPS
        hidden = (*tiny.OF_THE_CLOCK, "validation")
        timeless = [[{k: v for k, v in e.items() if k not in hidden} for e in run] for run in lines]
        assert timeless[0] == timeless[1]
        states = [_everything(run / "checkpoints") for run in runs]
        different = [k for k, t in states[0].items() if not torch.equal(t, states[1][k])]
        assert different == [], (verb, layout)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_layout_equals_one_process(folder: Path, verb: str) -> None:
    # align computes gradients within the forward, so no backward can overlap.
    layouts = [layout for layout in LAYOUTS if verb != "align" or "overlap" not in layout]
    outcomes = _run(folder, [_case(verb, layout) for layout in layouts])
    for layout in layouts:
        assert outcomes[f"{verb}-{layout}"] == [0] * 4
        _assert_equal_training(folder, verb, layout)


@pytest.mark.slow
def test_bf16_layouts_follow_one_process(folder: Path) -> None:
    """Losses equal those of fp32 within bf16's rounding; main parameters are fp32."""
    layouts = ("tp2-cp2", "tp2-sp-seq-pp2", "dp2-pp2", "dp2-pp2-vp2", "cp2-dp2-selective")
    cases = []
    for layout in layouts:
        cases.append(
            _case("distill", layout, output=f"bf16-{layout}", overrides=["precision=bf16"])
        )
    outcomes = _run(folder, cases)
    expected = [line["loss"] for line in tiny.read_metrics(_reference(folder, "distill"))]
    for layout in layouts:
        assert outcomes[f"bf16-{layout}"] == [0] * 4
        got = [line["loss"] for line in tiny.read_metrics(folder / f"bf16-{layout}")]
        assert got == pytest.approx(expected, rel=2e-2)
        state = _everything(folder / f"bf16-{layout}/checkpoints")
        main = {
            name: tensor
            for name, tensor in state.items()
            if name.startswith("optimizer.state.param.")
        }
        assert len(main) > 10
        assert {tensor.dtype for tensor in main.values()} == {torch.float32}
        assert {tensor.dtype for name, tensor in state.items() if name.endswith("gdn.A_log")} == {
            torch.float32
        }
        assert any(tensor.dtype == torch.bfloat16 for tensor in state.values())


@pytest.mark.slow
def test_command_line_writes_the_losses_of_one_process(folder: Path) -> None:
    """The README's command, with a config file."""
    from megatron_hydra.config import to_yaml

    config = tiny.run_config(folder, "distill", "command-line", **_sections("distill"))
    config = apply_overrides(config, ["validation.probes=[]"])  # a task that this test defines
    path = folder / "distill.yaml"
    path.write_text(to_yaml(config))
    torchrun(
        "megatron_hydra.train", 4, "--config", str(path),
        "parallel.tensor=2", "parallel.context=2", timeout=1700,
    )  # fmt: skip
    got, expected = (
        [line["loss"] for line in tiny.read_metrics(run)]
        for run in (folder / "command-line", _reference(folder, "distill"))
    )
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_hung_rank_ends_the_job_with_stacks(folder: Path) -> None:
    case = _case("finetune", "dp4", output="hung", fault="hang")
    case["overrides"] = ["faults.timeout_seconds=6"]
    listing = folder / "hang.json"
    listing.write_text(json.dumps([case]))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "tests.parallel.training_runs", str(folder), str(listing),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "train_step" in done.stderr
    assert "Timeout (0:00:06)" in done.stderr  # the watchdog's, before the hang ends


def test_layout_that_cannot_work_is_refused_before_anything_starts(folder: Path) -> None:
    from megatron_hydra.errors import HydraError
    from megatron_hydra.training.dry_run import describe_layout

    config = tiny.run_config(folder, "finetune", "unused", parallel={"tensor": 16})
    with pytest.raises(HydraError, match=r"parallel\.tensor is 16, but the student has 8"):
        describe_layout(dataclasses.replace(config), world_size=16)
