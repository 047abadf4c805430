"""Joint selection: the gated decoder, the gates and their budget, results, restarts, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import HeadMap
from megatron_hydra.ops.kernels import Kernels
from megatron_hydra.selection import (
    Constraints,
    SelectionOptions,
    learned_gates,
    patching,
    recut,
    select_heads,
)
from megatron_hydra.selection import select as select_module
from megatron_hydra.selection.effects import Solved
from megatron_hydra.selection.gate_sweep import (
    BEGIN,
    LIMIT,
    Draw,
    GateSweep,
    SweepOptions,
    expected_cache,
    expected_cost,
    open_probability,
    sample_gates,
)
from megatron_hydra.selection.gated_decoder import GatedDecoder, mix
from megatron_hydra.selection.plots import draw_head_map
from megatron_hydra.selection.prompts import PromptPair, make_batches
from megatron_hydra.selection.ranking import rank_heads
from megatron_hydra.selection.runner import DecoderRunner
from megatron_hydra.selection.trust import report_lines
from megatron_hydra.stopping import Stopped
from tests.selection.helpers import VOCABULARY, Pairs, random_pairs, tiny_model
from tools import head_map as head_map_tool

LAYERS, HEADS, GROUP = 3, 6, 2

SMALL = SelectionOptions(
    num_prompts=6,
    min_prompts=4,
    solved="off",
    align_tokens=120,
    gate_tokens=1000,
    gate_steps=50,
)


def solved_pairs(count: int) -> list[PromptPair]:
    """The random pairs whose corruption lowers the tiny model's readout most."""
    drawn = random_pairs([7, 9, 8, 7, 9, 8] * 3)
    (batch,) = make_batches(drawn, 10**6)
    runs = patching.baseline(DecoderRunner(tiny_model("llama")), batch)
    gaps = dict(zip(batch.index, (runs.clean - runs.corrupted).tolist(), strict=True))
    best = sorted(sorted(gaps, key=lambda i: -abs(gaps[i]))[:count])
    return [
        drawn[i]
        if gaps[i] > 0
        else dataclasses.replace(drawn[i], clean=drawn[i].corrupted, corrupted=drawn[i].clean)
        for i in best
    ]


TASK = Pairs("random", solved_pairs(6))


def decoder_of(family: str = "qwen3") -> GatedDecoder:
    text = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    return GatedDecoder(DecoderRunner(tiny_model(family)), [text])


def some_ids(count: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def text(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(3)
    lines = [
        json.dumps({"tokens": torch.randint(VOCABULARY, (n,), generator=generator).tolist()})
        for n in (12, 9, 11, 10)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "text.jsonl")


# -- the gated decoder -----------------------------------------------------------------------------


def test_all_gates_at_one_are_the_teacher(family: str) -> None:
    decoder, ids = decoder_of(family), some_ids()
    gated = decoder.forward(ids, torch.ones(1, LAYERS, HEADS))
    assert torch.equal(gated, decoder.forward(ids, None))
    logits = decoder.runner.model(ids).logits
    torch.testing.assert_close(decoder.runner.logits(gated), logits, atol=1e-4, rtol=1e-4)


def test_all_gates_at_zero_are_the_recurrent_branch(family: str) -> None:
    """transformers' own model gives the same if the branch's outputs replace those of its heads."""
    decoder, ids = decoder_of(family), some_ids()
    gated = decoder.runner.logits(decoder.forward(ids, torch.zeros(1, LAYERS, HEADS)))
    handles = []
    for number, layer in enumerate(decoder.runner.layers):
        seen: dict[str, torch.Tensor] = {}
        handles += [
            layer.input_layernorm.register_forward_hook(
                lambda _, __, out, seen=seen: seen.update(x=out)
            ),
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, __, number=number, seen=seen: (
                    decoder.recurrent(number, seen["x"]).flatten(2),
                )
            ),
        ]
    replaced = decoder.runner.model(ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(gated, replaced, atol=1e-4, rtol=1e-4)
    assert (gated - decoder.runner.model(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_trainings_kernels_compute_the_same(family: str) -> None:
    """As on a GPU, one row has several documents: output, and gradients of gates and all weights."""
    ids = some_ids(3, 11)
    gates = torch.rand(1, LAYERS, HEADS, generator=torch.Generator().manual_seed(4))
    weights = torch.randn(3, 11, 48, generator=torch.Generator().manual_seed(5))
    outputs, gradients = [], []
    for kernels in (None, Kernels()):
        decoder = decoder_of(family)
        decoder.kernels = kernels
        parameters = [p.requires_grad_() for b in decoder.branches for p in b.parameters()]
        leaf = gates.clone().requires_grad_()
        outputs.append(decoder.forward(ids, leaf))
        gradients.append(torch.autograd.grad((outputs[-1] * weights).sum(), [leaf, *parameters]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert all(g.abs().max() > 0 for g in gradients[0])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_the_branch_has_the_students_norm_and_scale() -> None:
    """At every token of the calibration text, every head's output is as large as the teacher's."""
    decoder = decoder_of()
    out = decoder.recurrent(1, torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)))
    gamma = decoder.branches[1].gamma
    size = out.square().mean(-1).sqrt()
    # If a head has written almost nothing yet, the norm's epsilon changes the result.
    torch.testing.assert_close(size, gamma.expand_as(size), rtol=0.02, atol=0)
    assert gamma.max() > 1.2 * gamma.min()


def test_one_gate_mixes_one_head() -> None:
    a, b = (torch.randn(2, 3, HEADS, 4) for _ in range(2))
    gates = torch.zeros(1, HEADS)
    gates[0, 2], gates[0, 4] = 1.0, 0.25
    mixed = mix(a, b, gates)
    assert torch.equal(mixed[:, :, 2], a[:, :, 2])
    assert torch.equal(mixed[:, :, [0, 1, 3, 5]], b[:, :, [0, 1, 3, 5]])
    torch.testing.assert_close(mixed[:, :, 4], 0.25 * a[:, :, 4] + 0.75 * b[:, :, 4])


def test_gradients_of_gates_are_those_of_finite_differences() -> None:
    decoder, ids = decoder_of(), some_ids()
    teacher = decoder.forward(ids, None).detach().flatten(0, 1)

    def loss(gates: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        student = decoder.forward(ids, gates, recompute).flatten(0, 1)
        return decoder.divergence(student, teacher).mean()

    gates = 0.2 + 0.6 * torch.rand(1, LAYERS, HEADS, generator=torch.Generator().manual_seed(4))
    found = []
    for recompute in (False, True):
        leaf = gates.clone().requires_grad_(True)
        loss(leaf, recompute).backward()
        found.append(leaf.grad[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    step, measured = 1e-2, torch.zeros(LAYERS, HEADS)
    with torch.no_grad():
        for place in itertools.product(range(LAYERS), range(HEADS)):
            moved = torch.zeros_like(gates)
            moved[0][place] = step
            measured[place] = (loss(gates + moved) - loss(gates - moved)) / (2 * step)
    assert found[0].abs().max() > 0.01
    assert (found[0] - measured).abs().max() < 0.02 * found[0].abs().max()


def test_the_divergence_is_that_of_all_logits_at_once() -> None:
    decoder = decoder_of()
    a, b = (torch.randn(2500, 48, generator=torch.Generator().manual_seed(i)) for i in (5, 6))
    ours, theirs = (decoder.runner.logits(x).log_softmax(-1) for x in (a, b))
    expected = (theirs.exp() * (theirs - ours)).sum(-1)
    torch.testing.assert_close(decoder.divergence(a, b), expected, rtol=1e-4, atol=1e-5)


# -- alignment -------------------------------------------------------------------------------------


def test_heads_that_stay_the_teachers_have_no_loss_and_padding_does_not_count() -> None:
    decoder, ids = decoder_of(), some_ids()
    real = torch.ones_like(ids, dtype=torch.bool)
    everything = decoder.alignment_losses(ids, real, torch.ones(2, LAYERS, HEADS))
    assert all(float(loss) < 1e-10 for loss in everything)
    nothing = torch.zeros(2, LAYERS, HEADS)
    alone = [float(x) for x in decoder.alignment_losses(ids[:1], real[:1], nothing[:1])]
    real[1] = False
    both = [float(x) for x in decoder.alignment_losses(ids, real, nothing)]
    np.testing.assert_allclose(both, alone, rtol=1e-5)
    assert min(alone) > 0


def test_the_alignment_learns_and_leaves_the_teacher_alone(text: str) -> None:
    decoder, ids = decoder_of(), some_ids()
    before = {n: p.clone() for n, p in decoder.runner.model.named_parameters()}
    options = learned_gates.GateOptions(40 * 24, 50 * 24, 50, 0.5, 0)

    def batches(step: int) -> Any:
        yield 1.0, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(2, LAYERS, HEADS)

    def losses() -> torch.Tensor:
        return torch.tensor([float(x) for x in decoder.alignment_losses(*next(batches(0))[1:])])

    first = losses()
    task = learned_gates._Alignment(decoder, options, batches)
    assert len(list(task.run())) == options.align_steps == 40
    assert (losses() < 0.7 * first).all()
    for name, parameter in decoder.runner.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not any(p.requires_grad for branch in decoder.branches for p in branch.parameters())


def test_text_is_padded_and_shared_out_without_loss() -> None:
    pieces = [torch.arange(1, n) for n in (5, 9, 3, 4)]
    batches = list(learned_gates._text_batches(pieces, 8))
    assert [tuple(ids.shape) for ids, _ in batches] == [(2, 3), (1, 4), (1, 8)]
    found = sorted(ids[row][real[row]].tolist() for ids, real in batches for row in range(len(ids)))
    assert found == sorted(piece.tolist() for piece in pieces)


# -- gates and their cost --------------------------------------------------------------------------


def test_the_expected_cache_is_that_of_all_states_of_a_group() -> None:
    opened = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for size in (1, 2, 3, 6):
        groups = opened.reshape(-1, size)
        in_cache = torch.zeros(len(groups), dtype=torch.float64)
        for state in itertools.product((0.0, 1.0), repeat=size):
            states = torch.tensor(state, dtype=torch.float64)
            chance = (states * groups + (1 - states) * (1 - groups)).prod(-1)
            in_cache += chance * max(state)
        torch.testing.assert_close(expected_cache(opened, size), in_cache.mean())
    torch.testing.assert_close(expected_cost(opened, 3, 1.0), opened.mean())
    torch.testing.assert_close(expected_cost(opened, 3, 0.0), expected_cache(opened, 3))


def test_a_head_whose_group_is_open_anyway_costs_less() -> None:
    opened = torch.tensor([[0.9, 0.5, 0.1, 0.5]], requires_grad=True)
    (slope,) = torch.autograd.grad(expected_cost(opened, 2, 0.25), opened)
    assert slope[0, 1] < slope[0, 3]
    torch.testing.assert_close(slope[0, 1], torch.tensor(0.75 * 0.1 / 2 + 0.25 / 4))


def test_samples_open_with_the_given_probability_and_are_mostly_zero_or_one() -> None:
    logits = torch.linspace(-3, 3, 7, dtype=torch.float64)[None]
    count = 20001  # midpoints of equal intervals: frequencies to 1 / count
    uniform = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None, None]
    samples = sample_gates(logits, uniform.expand(-1, 1, 7), 1 / 3)
    share = (samples > 0).double().mean(0)
    torch.testing.assert_close(share, open_probability(logits, 1 / 3), atol=2 / count, rtol=0)
    between = ((samples > 0) & (samples < 1)).double().mean(0)
    assert between.max() < 0.4
    leaf = logits.clone().requires_grad_(True)
    uniform = 0.1 + 0.8 * torch.rand(3, 1, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sample_gates(x, uniform, 1 / 3), leaf, eps=1e-7)


# -- the sweep -------------------------------------------------------------------------------------


def backups(step: int, draw: Draw) -> dict[str, float]:
    """The loss of four heads in one layer.

    Heads 0 and 1 are backups of each other: without both the loss is 6. Head 2 alone is worth 1, head 3
    nothing.
    """
    gates = draw(8)[:, 0]
    loss = (6 * (1 - gates[:, 0]) * (1 - gates[:, 1]) + (1 - gates[:, 2])).mean()
    loss.backward()
    return {"loss": float(loss.detach())}


def swept(seed: int, steps: int = 150) -> tuple[GateSweep, list[dict[str, float]]]:
    """:func:`backups`, each with its own cache."""
    sweep = GateSweep((1, 4), 1, SweepOptions(steps=steps, seed=seed))
    return sweep, list(sweep.run(backups))


@pytest.mark.parametrize("seed", range(4))
def test_only_one_of_two_backup_heads_is_kept(seed: int) -> None:
    """If one head closes at a time, neither backup has an effect, and head 2 has the whole effect."""
    sweep, _ = swept(seed)
    ranking = [head for _, head in rank_heads(sweep.openness.numpy())]
    assert ranking[0] in (0, 1)
    assert ranking[1] == 2
    assert set(ranking[2:]) == {0, 1, 3} - {ranking[0]}


def test_the_budget_is_kept_from_all_heads_to_none() -> None:
    sweep, records = swept(0)
    costs = [record["cost"] for record in records]
    targets = [record["target"] for record in records]
    # The loss may close gates earlier; one gate is a quarter of the cost.
    assert all(cost <= target + 0.1 for cost, target in zip(costs, targets, strict=True))
    assert targets == sorted(targets, reverse=True)
    assert costs[0] > 0.9
    assert costs[-1] < 0.1
    assert (sweep.logits.abs() <= LIMIT).all()
    assert BEGIN < LIMIT
    assert all(record["penalty"] >= 0 for record in records)


def test_a_sweep_resumes_and_depends_on_the_seed() -> None:
    whole, records = swept(1, steps=60)
    assert swept(1, steps=60)[1] == records
    assert swept(2, steps=60)[1] != records
    options = SweepOptions(steps=60, seed=1)
    first = GateSweep((1, 4), 1, options)
    begun = list(itertools.islice(first.run(backups), 25))
    second = GateSweep((1, 4), 1, options)
    second.load(first.state())
    assert begun + list(second.run(backups)) == records
    assert torch.equal(second.openness, whole.openness)


# -- from model to map -----------------------------------------------------------------------------


def gates_map(text: str, **arguments: Any) -> HeadMap:
    options = dataclasses.replace(SMALL, text=text, **arguments.pop("options", {}))
    arguments = {"ratio": "2:1", "tasks": [TASK], **arguments}
    return select_heads(tiny_model("llama"), strategy="learned_gates", options=options, **arguments)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeadMap, str]:
    folder = tmp_path_factory.mktemp("text")
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 48).reshape(4, 12)
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"tokens": row.tolist()}) + "\n" for row in tokens))
    return gates_map(str(path)), str(path)


def test_the_map_has_the_curve_and_a_ranking_of_all_heads(
    found: tuple[HeadMap, str], tmp_path: Path
) -> None:
    head_map, _ = found
    assert head_map.num_full_attention == LAYERS * HEADS // 3
    assert sorted(head_map.ranking) == list(itertools.product(range(LAYERS), range(HEADS)))
    gates = head_map.details["gates"]
    assert gates["sweep"]["step"][-1] == SMALL.gate_steps
    curve = gates["curve"]
    counts = [row["heads"] for row in curve]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (LAYERS * HEADS, 0)
    dense, none = curve[0]["by"]["learned_gates"], curve[-1]["by"]["learned_gates"]
    assert (dense["cache"], none["cache"]) == (1.0, 0.0)
    assert abs(dense["text_divergence"]) < 1e-6
    assert none["text_divergence"] > 1e-3
    assert [name for name, _ in report_lines(head_map.details)].count("gates") == len(curve)
    names = [path.name for path in draw_head_map(head_map, tmp_path / "map")]
    assert "map_gates.png" in names


def test_maps_of_other_ratios_are_nested(found: tuple[HeadMap, str]) -> None:
    head_map, _ = found
    chosen = []
    for ratio in ("dense", "1:1", "2:1", "5:1", "8:1", "17:1", "all-gdn"):
        cut = recut(head_map, ratio)
        heads = {(i, h) for i, row in enumerate(cut.full_attention_heads) for h in row}
        assert heads == set(head_map.ranking[: len(heads)])
        chosen.append(heads)
    assert [len(heads) for heads in chosen] == [18, 9, 6, 3, 2, 1, 0]
    assert all(few <= many for many, few in itertools.pairwise(chosen))
    each = recut(head_map, "5:1", Constraints(min_per_layer=1))
    assert [len(row) for row in each.full_attention_heads] == [1, 1, 1]


def test_another_ranking_or_ratio_does_not_change_the_learned_ranking(
    found: tuple[HeadMap, str], tmp_path: Path
) -> None:
    """The other ranking's curve is also measured, and a cut of the map is the map of that ratio."""
    head_map, path = found
    backwards = dataclasses.replace(
        head_map, strategy="attribution", ranking=tuple(reversed(head_map.ranking))
    )
    backwards.save(tmp_path / "other.json")
    both = gates_map(path, ratio="5:1", options={"compare": (str(tmp_path / "other.json"),)})
    assert both.ranking == head_map.ranking
    assert both.full_attention_heads == recut(head_map, "5:1").full_attention_heads
    for row, alone in zip(
        both.details["gates"]["curve"], head_map.details["gates"]["curve"], strict=True
    ):
        assert row["by"]["learned_gates"] == alone["by"]["learned_gates"]
        assert set(row["by"]) == {"learned_gates", "attribution"}


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_map(
    found: tuple[HeadMap, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stops in the alignment (of six steps), then in the gates' sweep; the map is the same."""
    head_map, path = found
    again = {"work_folder": tmp_path / "work", "output": tmp_path / "map.json"}
    for stop_after, gates_begun in ((3, False), (30, True)):
        asked = itertools.count(1)
        with monkeypatch.context() as patched:
            patched.setattr(
                learned_gates,
                "stop_requested",
                lambda asked=asked, last=stop_after: next(asked) > last,
            )
            with pytest.raises(Stopped):
                gates_map(path, **again)
        assert not (tmp_path / "map.json").exists()
        (kept,) = (tmp_path / "work").iterdir()
        assert bool(list(kept.glob("gates*.safetensors"))) == gates_begun
    assert gates_map(path, **again).to_dict() == head_map.to_dict()
    assert not (tmp_path / "work").exists()


def test_held_out_prompts_are_not_learned_from() -> None:
    solved = Solved(TASK.pairs, [0, 1, 3, 4, 5], np.zeros(5), np.zeros(5))
    materials = learned_gates._TrainingData.of({"random": ["random"]}, {"random": solved}, [], {})
    (learned,) = materials.learned["random"].values()
    assert materials.asked["random"] == [TASK.pairs[4]]
    assert learned == [TASK.pairs[i] for i in (0, 1, 3, 5)]
    drawn = materials.draw_prompts(np.random.default_rng(0), 40)
    assert set(drawn) <= set(learned)
    assert sum(p.num_tokens for p in drawn) <= 40
    assert len(materials.draw_prompts(np.random.default_rng(0), 1)) == 1


def test_an_answers_divergence_is_the_mean_over_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = decoder_of()
    learner = object.__new__(learned_gates._Learner)
    learner.decoder, learner.runner, learner.recompute = decoder, decoder.runner, False
    gates = torch.zeros(1, LAYERS, HEADS)
    (batch,) = make_batches(TASK.pairs[:3], 10**6)
    streams = [learner._at_answers(batch, g) for g in (gates, None)]
    found = learner._answer_divergence(batch, *streams)
    for row, index in enumerate(batch.index):
        pair = TASK.pairs[index]
        ids = torch.tensor([pair.clean + pair.answer[:-1]])
        spans = [decoder.forward(ids, g)[0, len(pair.clean) - 1 :] for g in (gates, None)]
        torch.testing.assert_close(
            found[row], decoder.divergence(*spans).mean(), rtol=1e-4, atol=1e-5
        )


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_steps": 10}, "--gate-steps must be at least 50"),
        ({"gate_tokens": 60, "gate_steps": 70}, "at most --gate-tokens"),
        ({"align_tokens": 0}, "--align-tokens must be at least 1"),
        ({"head_cost": 1.5}, "--head-cost 1.5: must be from 0 to 1"),
    ],
)
def test_invalid_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(HydraError, match=message):
        dataclasses.replace(SMALL, **options)


def test_options_of_gates_are_refused_by_other_strategies() -> None:
    match = (
        "--align-tokens has no effect with --strategy global_interp; it belongs to learned_gates"
    )
    with pytest.raises(HydraError, match=match):
        select_heads(tiny_model("llama"), strategy="global_interp", tasks=[TASK], options=SMALL)


def test_unusable_inputs_are_refused_before_training(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_module, "load_runner", None)
    with pytest.raises(HydraError, match=r"no tokenizer to encode .*--text FILE\.jsonl"):
        gates_map("")
    with pytest.raises(HydraError, match=r"missing\.jsonl cannot be read"):
        gates_map(str(tmp_path / "missing.jsonl"))
    blind = select_heads(tiny_model("llama"), ratio="2:1", strategy="layerwise")
    blind.save(tmp_path / "blind.json")
    with pytest.raises(HydraError, match="strategy layerwise gives no ranking"):
        gates_map(text, options={"compare": (str(tmp_path / "blind.json"),)})
    monkeypatch.setattr(select_module.Ranks, "__init__", lambda ranks: vars(ranks).update(size=2))
    monkeypatch.setattr(select_module.Ranks, "close", lambda ranks: None)
    with pytest.raises(HydraError, match="one process, but torchrun started 2"):
        gates_map(text)


def test_the_command_cuts_a_map(
    found: tuple[HeadMap, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "map.json", tmp_path / "cut.json"
    found[0].save(source)

    def cut(*arguments: str) -> int:
        words = ["head_map.py", "cut", str(source), "--output", str(output), *arguments]
        monkeypatch.setattr("sys.argv", words)
        return head_map_tool.main()

    assert cut("--ratio", "5:1") == 0
    made = HeadMap.load(output)
    assert (made.ratio, made.num_full_attention) == ("5:1", 3)
    assert made.details["cut_from"] == found[0].fingerprint()
    assert cut("--ratio", "2:1") == 2
    assert HeadMap.load(output).ratio == "5:1"
    assert cut("--ratio", "2:1", "--granularity", "kv_group", "--force") == 0
    assert HeadMap.load(output).granularity == "kv_group"
    assert cut("--ratio", "2:1", "--strategy", "global_interp", "--force") == 2  # other scores
    dataclasses.replace(found[0], details={}).save(source)
    assert cut("--ratio", "2:1", "--force") == 2
