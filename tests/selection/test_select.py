"""From model to map: strategies, solved prompts, resuming, the commands."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.head_map import OLD_STRATEGY_NAMES, HeadMap, _warn_renamed
from megatron_hydra.selection import (
    STRATEGIES,
    Placement,
    SelectionOptions,
    knockout,
    noising,
    patching,
    recut,
    select_heads,
)
from tests.selection.helpers import Pairs, tiny_model
from tests.selection.planted import Planted, induction_pairs, plant
from tools import head_map as head_map_tool
from tools import select_heads as select_heads_tool

OPTIONS = SelectionOptions(num_prompts=8, min_prompts=4)


ONE_EACH = SelectionOptions(min_per_layer=1)
TASK = Pairs("planted", induction_pairs(8, 0))


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(0)


@pytest.fixture(scope="module")
def folder(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    planted.model.save_pretrained(path)
    rows = [
        {"clean": p.clean, "corrupted": p.corrupted, "answer": p.answer, "wrong_answer": p.wrong}
        for p in TASK.pairs
    ]
    (path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def heads_of(head_map: HeadMap) -> set[tuple[int, int]]:
    return {(layer, h) for layer, hs in enumerate(head_map.full_attention_heads) for h in hs}


def test_interp_chooses_the_planted_circuit(planted: Planted) -> None:
    head_map = select_heads(
        planted.model, ratio="5:1", strategy="global_interp", tasks=[TASK], options=OPTIONS
    )
    assert heads_of(head_map) == set(planted.receivers + planted.senders)
    assert head_map.strategy == "global_interp"
    assert head_map.prompts_fingerprint.startswith("sha256:")
    assert np.array(head_map.scores["planted"]).shape == (5, 6)
    found = head_map.details["capabilities"]["planted"]
    assert found["receivers"] == sorted(map(list, planted.receivers))
    assert found["rounds"] == [
        {"round": 1, "added": sorted(map(list, planted.senders))},
        {"round": 2, "added": []},
    ]
    receiver, sender, kappa = (
        np.array(found["effects"][n]) for n in ("receiver", "sender", "kappa")
    )
    np.testing.assert_array_equal(
        np.array(head_map.scores["planted"]), np.maximum(receiver, sender) * kappa
    )
    facts = head_map.details["prompts"]["planted"]
    assert (facts["drawn"], facts["solved"], facts["dropped"]) == (8, 8, 0)


def test_our_former_scoring_has_its_own_name(planted: Planted) -> None:
    options = dataclasses.replace(OPTIONS, effects=("direct", "total"), attribution=True)
    head_map = select_heads(
        planted.model, ratio="5:1", strategy="interp_denoise", tasks=[TASK], options=options
    )
    assert heads_of(head_map) == set(planted.receivers + planted.senders)
    task = head_map.details["tasks"]["planted"]
    assert task["receivers"] == sorted(map(list, planted.receivers))
    assert set(task["effects"]) == {
        *("direct", "total", "attribution"),
        *("sender_q", "sender_k", "sender_v", "sender_qkv"),
    }
    # The softmaxes are saturated, so the first order misses the senders, and no bound can be tested.
    assert -1 <= task["attribution_spearman"]["total"] <= 1


@pytest.mark.parametrize(
    ("strategy", "options", "flag", "owner"),
    [
        ("global_interp", {"sender_weight": 0.3}, "--sender-weight", "interp_denoise"),
        ("layer_interp", {"senders": False}, "--no-senders", "interp_denoise"),
        ("interp_denoise", {"max_rounds": 1}, "--max-rounds", "global_interp_c, global_interp"),
        ("attention_mass", {"control": False}, "--no-control", "global_interp_c, global_interp"),
    ],
)
def test_options_of_another_scoring_are_refused(
    strategy: str, options: dict, flag: str, owner: str, planted: Planted
) -> None:
    wrong = dataclasses.replace(OPTIONS, **options)
    match = f"{flag} has no effect with --strategy {strategy}; it belongs to {owner}"
    with pytest.raises(HydraError, match=match):
        select_heads(planted.model, strategy=strategy, tasks=[TASK], options=wrong)


# learned_gates reads text
@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"learned_gates"}))
def test_every_strategy_gives_a_reproducible_map(strategy: str, planted: Planted) -> None:
    def run(seed: int) -> HeadMap:
        return select_heads(
            planted.model,
            ratio="5:1",
            strategy=strategy,
            tasks=[TASK],
            seed=seed,
            options=OPTIONS,
        )

    first = run(1)
    assert first.to_dict() == run(1).to_dict()
    expected = 6 if strategy.startswith("layerwise") else 5
    assert first.num_full_attention == expected
    if strategy in ("layer_random", "layer_interp", "fixed", "global_interp_c"):
        assert [len(x) for x in first.full_attention_heads] == [1] * 5
    if strategy in ("global_random", "layer_random"):
        assert heads_of(first) != heads_of(run(2))
    if strategy == "fixed":
        assert heads_of(first) == {(layer, 0) for layer in range(5)}
    if strategy == "attribution":
        spearman = first.details["tasks"]["planted"]["attribution_spearman"]["total"]
        assert -1 <= spearman <= 1
    if strategy == "attention_mass":
        assert planted.decoy in heads_of(first)


def test_at_least_one_head_in_every_layer_and_then_the_best(planted: Planted) -> None:
    """As many as fit, then the rest by score: the paper's Global-Interp-C."""

    def run(**arguments: Any) -> HeadMap:
        return select_heads(planted.model, ratio="2:1", tasks=[TASK], options=OPTIONS, **arguments)

    found, free = run(), run(strategy="global_interp")
    assert found.strategy == "global_interp_c"
    assert found.scores == free.scores
    chosen = heads_of(found)
    assert len(chosen) == len(heads_of(free)) == 10
    first = {next(h for h in found.ranking if h[0] == layer) for layer in range(5)}
    rest = [head for head in found.ranking if head not in first]
    assert chosen == first | set(rest[:5])
    assert heads_of(recut(found, "2:1", strategy="global_interp")) == heads_of(free)
    even = recut(found, "2:1", strategy="layer_interp")
    assert (even.strategy, [len(x) for x in even.full_attention_heads]) == ("layer_interp", [2] * 5)
    with pytest.raises(
        HydraError, match="only global_interp_c, global_interp, layer_interp can use"
    ):
        recut(found, "2:1", strategy="attention_mass")


def test_fewer_heads_than_layers_are_refused_with_advice(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching, "baseline", None)
    match = "global_interp_c needs 5 FA heads, 1 in each of 5 layers; --ratio 9:1 gives 3"
    with pytest.raises(HydraError, match=f"{match}.*--strategy global_interp$"):
        select_heads(planted.model, ratio="9:1", tasks=[TASK], options=OPTIONS)


@pytest.mark.parametrize(("old", "new"), OLD_STRATEGY_NAMES.items())
def test_old_names_are_accepted_with_a_warning(
    old: str, new: str, planted: Planted, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_renamed.cache_clear()
    options = dataclasses.replace(OPTIONS, max_rounds=0, control=False)
    options = options if "interp" in new else OPTIONS
    found = [
        select_heads(planted.model, ratio="5:1", strategy=name, tasks=[TASK], options=options)
        for name in (old, old, new)
    ]
    assert found[0].to_dict() == found[2].to_dict()
    assert found[0].strategy == new
    assert caplog.text.count(f"strategy {old} was renamed to {new}") == 1


def test_the_layer_whose_attention_decides_is_kept_whole(planted: Planted) -> None:
    found = select_heads(
        planted.model, ratio="4:1", strategy="layerwise_effects", tasks=[TASK], options=OPTIONS
    )
    (receivers,) = {layer for layer, _ in planted.receivers}
    assert [i for i, heads in enumerate(found.full_attention_heads) if heads] == [receivers]


def test_the_map_does_not_depend_on_the_name_of_a_path(folder: Path, planted: Planted) -> None:
    """The folder and the loaded model give the same identity and map, except the name."""
    by_path = select_heads(folder, ratio="5:1", tasks=[TASK], options=OPTIONS)
    by_model = select_heads(planted.model, ratio="5:1", tasks=[TASK], options=OPTIONS)
    by_path.check_model(by_model.model)
    assert by_path.to_dict() | {"model": 0} == by_model.to_dict() | {"model": 0}


def test_prompts_that_the_model_does_not_solve_are_dropped_and_counted(planted: Planted) -> None:
    spoilt = [dataclasses.replace(p, answer=p.wrong, wrong=p.answer) for p in TASK.pairs[:3]]
    task = Pairs("mixed", spoilt + TASK.pairs[3:])
    head_map = select_heads(planted.model, ratio="5:1", tasks=[task], options=OPTIONS)
    facts = head_map.details["prompts"]["mixed"]
    assert (facts["drawn"], facts["solved"], facts["dropped"]) == (8, 5, 3)
    good = Pairs("mixed", TASK.pairs[3:])
    alone = select_heads(planted.model, ratio="5:1", tasks=[good], options=OPTIONS)
    np.testing.assert_allclose(head_map.scores["mixed"], alone.scores["mixed"], atol=1e-5)
    strict = dataclasses.replace(OPTIONS, min_prompts=6)
    with pytest.raises(HydraError, match="mixed: the model solves 5 of 8 prompts, at least 6"):
        select_heads(planted.model, ratio="5:1", tasks=[task], options=strict)


def test_a_killed_run_continues_to_the_same_map(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the senders' effects; the second start computes only what is left."""
    options = dataclasses.replace(OPTIONS, tokens_per_batch=440)
    expected = select_heads(planted.model, ratio="5:1", tasks=[TASK], options=options)
    real, layers = noising.sender_falls, []

    def counted(*args: Any, die_after: int = 10_000) -> Iterator:
        for result in real(*args):
            layers.append(result[0])
            yield result
            if len(layers) == die_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(noising, "sender_falls", lambda *a: counted(*a, die_after=4))
    again = {"ratio": "5:1", "tasks": [TASK], "options": options, "work_folder": tmp_path / "work"}
    with pytest.raises(KeyboardInterrupt):
        select_heads(planted.model, **again)
    (kept,) = (tmp_path / "work").iterdir()
    assert len(list(kept.glob("senders-*.safetensors"))) == 4
    layers.clear()
    monkeypatch.setattr(noising, "sender_falls", counted)
    assert select_heads(planted.model, **again).to_dict() == expected.to_dict()
    batches = 2  # batches of four prompts: 440 / 4 tokens hold four pairs of 13
    # The first round ends at the receivers' layer, the second one at their senders' layer.
    rounds = [max(layer for layer, _ in heads) for heads in (planted.receivers, planted.senders)]
    assert len(layers) == sum(rounds) * batches - 4
    assert not (tmp_path / "work").exists()


def test_nothing_measured_is_lost_when_the_map_cannot_be_saved(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another ratio or weight reuses the measured effects."""
    arguments = {"tasks": [TASK], "options": OPTIONS, "work_folder": tmp_path / "work"}
    with monkeypatch.context() as patched:
        patched.setattr(HeadMap, "save", lambda self, path: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            select_heads(planted.model, ratio="5:1", output=tmp_path / "map.json", **arguments)
    expected = select_heads(
        planted.model, ratio="9:1", strategy="global_interp", tasks=[TASK], options=OPTIONS
    )
    monkeypatch.setattr(patching, "baseline", None)
    for effect in ("receiver_falls", "sender_falls"):
        monkeypatch.setattr(noising, effect, None)
    monkeypatch.setattr(knockout, "knock_out", None)
    output = tmp_path / "map.json"
    found = select_heads(
        planted.model, ratio="9:1", strategy="global_interp", output=output, **arguments
    )
    assert found.to_dict() == expected.to_dict() == HeadMap.load(output).to_dict()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_weights": {"other": 1.0}}, "--task-weight other: no such task"),
        ({"min_per_layer": 3}, "--min-per-layer 3 needs 15 FA"),
    ],
)
@pytest.mark.parametrize("strategy", ["global_interp", "attention_mass"])
def test_mistakes_are_found_before_anything_is_measured(
    strategy: str,
    options: dict,
    message: str,
    planted: Planted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patching, "baseline", None)
    wrong = dataclasses.replace(OPTIONS, **options)
    with pytest.raises(HydraError, match=message):
        select_heads(planted.model, ratio="5:1", strategy=strategy, tasks=[TASK], options=wrong)


def test_tasks_whose_names_are_alike_keep_apart(planted: Planted, tmp_path: Path) -> None:
    alike = [Pairs("x=1", induction_pairs(4, 0)), Pairs("x_1", induction_pairs(4, 1))]
    expected = select_heads(planted.model, ratio="5:1", tasks=alike, options=OPTIONS)
    found = select_heads(
        planted.model, ratio="5:1", tasks=alike, options=OPTIONS, work_folder=tmp_path
    )
    assert found.to_dict() == expected.to_dict()


def test_results_for_other_inputs_are_not_used(planted: Planted, tmp_path: Path) -> None:
    options = {"ratio": "5:1", "tasks": [TASK]}
    (tmp_path / "work" / "0123456789abcdef").mkdir(parents=True)
    select_heads(planted.model, **options, options=OPTIONS, work_folder=tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["0123456789abcdef"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "best"}, "--strategy best: must be one of global_interp_c"),
        ({"ratio": "7"}, "ratio '7' is not understood"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": [TASK, TASK]}, "planted is given twice"),
        ({"tasks": ["facts"]}, "no tokenizer"),
        (
            {"tasks": ["retrieval"]},
            "haystack=filler generates text, but the model folder has no tokenizer",
        ),
        ({"tasks": ["general", "facts"]}, "facts is given twice"),
        ({"strategy": "layerwise", "options": ONE_EACH}, "whole layers do not support"),
    ],
)
def test_impossible_selections_are_refused(arguments: dict, message: str, planted: Planted) -> None:
    with pytest.raises(HydraError, match=message):
        select_heads(planted.model, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solved": "yes"}, "--solved yes"),
        ({"effects": ("indirect",)}, "--effects"),
        ({"effects": ("total",)}, "--receiver-effect direct"),
        ({"receiver_effect": "both"}, "--receiver-effect both"),
        ({"min_prompts": 0}, "--min-prompts 0"),
        ({"check_heads": 1}, "--check-heads"),
        ({"num_receivers": 0}, "--num-receivers 0"),
        ({"max_rounds": -1}, "--max-rounds at least 0"),
        ({"probe_tokens": 0}, "--probe-tokens must be at least 1"),
    ],
)
def test_options_that_contradict_are_refused(options: dict, message: str) -> None:
    with pytest.raises(HydraError, match=message):
        SelectionOptions(**options)


def test_answers_outside_the_context_give_no_attention_mass(planted: Planted) -> None:
    absent = [next(t for t in range(16) if t not in p.clean + p.corrupted) for p in TASK.pairs]
    pairs = [dataclasses.replace(p, answer=(a,)) for p, a in zip(TASK.pairs, absent, strict=True)]
    options = dataclasses.replace(OPTIONS, solved="off", min_prompts=1)
    with pytest.raises(HydraError, match="needs answers that occur in their prompt"):
        select_heads(
            planted.model, strategy="attention_mass", tasks=[Pairs("t", pairs)], options=options
        )


def test_the_receiver_effect_alone_is_measured_unless_more_is_asked_for() -> None:
    assert SelectionOptions().exact_effects == ("direct",)
    assert SelectionOptions(receiver_effect="total").exact_effects == ("total",)


def test_sliding_window_models_are_refused() -> None:
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(HydraError, match="sliding-window"):
        select_heads(model, ratio="5:1", tasks=["induction"])


def test_placement_errors_name_the_flag() -> None:
    with pytest.raises(HydraError, match="--device nowhere"):
        Placement(device="nowhere").devices(0)
    with pytest.raises(HydraError, match="--dtype fp8"):
        Placement(dtype="fp8").torch_dtype([])


# -- the commands ------------------------------------------------------------------------------


def run(tool: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    return tool.main()


def test_select_heads_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "maps" / "map.json"
    arguments = ["--hf-path", folder, "--ratio", "5:1", "--output", output]
    arguments += ["--tasks", f"jsonl:{folder / 'prompts.jsonl'}", "induction:length=10"]
    arguments += [
        "--num-prompts",
        8,
        "--min-prompts",
        4,
        "--task-weight",
        "induction:length=10=0.5",
    ]
    assert run(select_heads_tool, monkeypatch, *arguments) == 0
    head_map = HeadMap.load(output)
    assert set(head_map.scores) == {"jsonl:prompts.jsonl", "induction:length=10"}
    assert head_map.details["options"]["task_weights"] == {"induction:length=10": 0.5}
    assert {p.name for p in output.parent.iterdir()} == {
        "map.json",
        *(
            f"map_{w}.png"
            for w in ("capabilities", "overlap", "unified", "distribution", "layers", "trust")
        ),
    }
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in output.parent.glob("*.png"))
    before = output.read_bytes()
    capsys.readouterr()
    assert run(select_heads_tool, monkeypatch, *arguments) == 2
    assert "exists; give --force" in capsys.readouterr().err
    assert run(select_heads_tool, monkeypatch, *arguments, "--force", "--no-pictures") == 0
    assert output.read_bytes() == before


def test_head_map_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    maps = []
    for seed in (1, 2):
        maps.append(tmp_path / f"{seed}.json")
        select_heads(folder, ratio="5:1", strategy="global_random", seed=seed).save(maps[-1])
    assert run(head_map_tool, monkeypatch, "show", maps[0]) == 0
    assert "5 layers, 6 query heads on 3 KV heads" in capsys.readouterr().out
    by_effects = tmp_path / "effects.json"
    options = dataclasses.replace(OPTIONS, senders=False, attribution=True)
    former = {"strategy": "interp_denoise", "tasks": [TASK], "options": options}
    select_heads(folder, ratio="5:1", output=by_effects, **former)
    assert run(head_map_tool, monkeypatch, "show", by_effects) == 0
    spearman = HeadMap.load(by_effects).details["tasks"]["planted"]["attribution_spearman"]
    line = f"planted: rank correlation with the direct effect {spearman['direct']:.2f}"
    assert line in capsys.readouterr().out
    assert run(head_map_tool, monkeypatch, "diff", maps[0], maps[0]) == 0
    assert run(head_map_tool, monkeypatch, "diff", *maps) == 1
    assert f"only in {maps[1]}" in capsys.readouterr().out
    assert run(head_map_tool, monkeypatch, "validate", maps[0], "--hf-path", folder) == 0
    chosen = HeadMap.load(maps[0]).full_attention_heads
    named = [f"{layer}.{h}" for layer, heads in enumerate(chosen) for h in heads]
    made = ["make", "--hf-path", folder, "--output", tmp_path / "made.json", "--heads"]
    assert run(head_map_tool, monkeypatch, *made, *named) == 0
    assert run(head_map_tool, monkeypatch, "diff", maps[0], tmp_path / "made.json") == 0
    assert run(head_map_tool, monkeypatch, "validate", tmp_path / "made.json") == 0
    capsys.readouterr()
    assert run(head_map_tool, monkeypatch, *made, *named) == 2
    assert "made.json exists; give --force" in capsys.readouterr().err
    assert run(head_map_tool, monkeypatch, *made, "0-3", "--force") == 2
    assert "--heads 0-3: write LAYER.HEAD" in capsys.readouterr().err
    tiny_model("qwen3").save_pretrained(tmp_path / "other")
    other = ["validate", maps[0], "--hf-path", tmp_path / "other"]
    assert run(head_map_tool, monkeypatch, *other) == 2
    assert "its num_layers is 5, that of" in capsys.readouterr().err
    maps[1].write_text("{")
    assert run(head_map_tool, monkeypatch, "validate", maps[1]) == 2
    assert f"{maps[1]} is not valid JSON" in capsys.readouterr().err
