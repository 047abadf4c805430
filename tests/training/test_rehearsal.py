"""A rehearsal calls a run's layers on one device: every combination of heads, by the run's verb and layout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.model import layer_spec
from megatron_hydra.ops import self_check
from megatron_hydra.ops.kernels import Kernels
from megatron_hydra.parallel.world import start_world, stop_world
from megatron_hydra.training import rehearsal, setup
from megatron_hydra.training.rehearsal import Scene, rehearse, scenes, streams
from tests.training import tiny

TEACHER, STUDENT = tiny.TEACHER, tiny.student_config()


class _Seen:
    """Shapes of every call of the delta rule and of attention."""

    def __init__(self) -> None:
        self.calls: set[tuple[Any, ...]] = set()
        plain = Kernels()

        def delta_rule(q: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.calls.add(("gdn", tuple(q.shape), q.dtype, options.get("exchange") is not None))
            return plain.delta_rule(q, *args, **options)

        def attention(q: torch.Tensor, k: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.calls.add(("fa", tuple(q.shape)[1:], tuple(k.shape)[1:], q.dtype))
            return plain.attention(q, k, *args, **options)

        self.kernels = dataclasses.replace(plain, delta_rule=delta_rule, attention=attention)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> _Seen:
    found = _Seen()
    monkeypatch.setattr(layer_spec, "choose_kernels", lambda *args, **options: found.kernels)
    return found


def _config(tmp_path: Path, verb: str, **sections: Any) -> Any:
    return tiny.run_config(tmp_path, verb, "run", precision="bf16", **sections)


@pytest.mark.parametrize("verb", ["align", "distill", "finetune"])
def test_a_rehearsal_calls_what_a_step_calls(tmp_path: Path, seen: _Seen, verb: str) -> None:
    """The rehearsal has exactly the kernels, shapes and dtypes of the run's micro-batch."""
    config = _config(tmp_path, verb)
    teacher = TEACHER if verb != "finetune" else None
    for scene in scenes(config, STUDENT):
        assert list(rehearse(config, STUDENT, teacher, scene))
    rehearsed, seen.calls = seen.calls, set()

    world = start_world(config)
    try:
        with rehearsal.postponed():
            teachers = [] if teacher is None else setup.freeze(setup.build_chunks(teacher, config))
            act = rehearsal.VERBS[verb](config, world, teachers)
            chunks = setup.wrap_for_training(setup.build_chunks(STUDENT, config), act, config)
        for parts in (chunks, teachers):
            rehearsal._fill(list(parts), 0.0)
        for boundaries in streams(config).values():
            rehearsal._call(world, act, list(chunks), boundaries)
    finally:
        stop_world()
    assert rehearsed == seen.calls
    assert any(call[0] == "gdn" for call in rehearsed)
    assert any(call[0] == "fa" for call in rehearsed)


def test_scenes_are_every_combination_of_heads_once(tmp_path: Path) -> None:
    model = dataclasses.replace(
        STUDENT,
        num_layers=5,
        full_attention_heads=((1, 6), (), (1, 6), (0, 1, 2, 3, 4, 5, 6, 7), (2,)),
    )
    found = scenes(_config(tmp_path, "finetune"), model)
    assert [(s.fa_heads, s.gdn_heads, s.layer) for s in found] == [
        (0, 8, 1), (1, 7, 4), (2, 6, 0), (8, 0, 3),
    ]  # fmt: skip
    cut = _config(tmp_path, "finetune", parallel={"tensor": 2, "context": 4})
    assert {s.cp_rank for s in scenes(cut, model)} == {0, 1, 3}  # first, between, last
    # In the layer with one FA head, one rank has this head; the other one has one more GDN head.
    assert {(1, 3), (0, 4)} <= {(s.fa_heads, s.gdn_heads) for s in scenes(cut, model)}


@pytest.mark.parametrize(
    ("layout", "partition", "verb"),
    [
        ({"tensor": 2, "sequence": True}, "sequence", "align"),
        ({"context": 4}, "heads", "finetune"),
        ({"tensor": 2, "context": 2, "sequence": True, "pipeline": 2}, "heads", "distill"),
    ],
)
def test_any_rank_of_a_layout_can_be_rehearsed_alone(
    tmp_path: Path, seen: _Seen, layout: dict[str, Any], partition: str, verb: str
) -> None:
    config = _config(
        tmp_path, verb, parallel={**layout, "fa_partition": partition},
        recompute={"granularity": "selective", "modules": ["gdn", "mlp"]},
    )  # fmt: skip
    shard = rehearsal.rounded_stream_length(config) // layout.get("context", 1)
    for scene in scenes(config, STUDENT):
        seen.calls.clear()
        parts = list(rehearse(config, STUDENT, TEACHER if verb != "finetune" else None, scene))
        assert parts
        gdn = {call[1] for call in seen.calls if call[0] == "gdn"}
        assert gdn == ({(shard, scene.gdn_heads, STUDENT.head_dim)} if scene.gdn_heads else set())
        exchanges = {call[3] for call in seen.calls if call[0] == "gdn"}
        assert exchanges <= {"context" in layout}
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("fa_heads", "parts"), [((0, 1), 4), (tuple(range(8)), 2)])
def test_every_kind_of_stream_is_called_with_fast_and_slow_decays(
    tmp_path: Path, seen: _Seen, fa_heads: tuple[int, ...], parts: int
) -> None:
    """A layer without GDN heads has no decays, but it has the streams."""
    one = {"micro_batch_size": 1, "global_batch_size": 2}
    model = dataclasses.replace(STUDENT, full_attention_heads=(fa_heads,) * STUDENT.num_layers)
    config = _config(tmp_path, "finetune", batch=one)
    (scene,) = scenes(config, model)
    said = list(rehearse(config, model, None, scene))
    assert len(said) == parts
    assert len(set(said)) == 2  # packed documents and one document a sequence


def test_no_process_group_is_left_after_an_error(tmp_path: Path, seen: _Seen) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("ptxas")

    seen.kernels = dataclasses.replace(seen.kernels, delta_rule=broken)
    with pytest.raises(RuntimeError, match="ptxas"):
        list(rehearse(_config(tmp_path, "finetune"), STUDENT, None, Scene(0, 0, 0, 2, 6, ())))
    assert not torch.distributed.is_initialized()


def test_streams_are_those_that_the_data_may_have(tmp_path: Path) -> None:
    several = _config(tmp_path, "finetune", batch={"micro_batch_size": 2, "global_batch_size": 2})
    one = _config(tmp_path, "finetune", batch={"micro_batch_size": 1, "global_batch_size": 2})
    padded = _config(
        tmp_path, "finetune", batch={"micro_batch_size": 1, "global_batch_size": 2},
        data={"sequence_length": 47}, parallel={"context": 2},
    )  # fmt: skip
    kinds = {"packed documents", "one document a sequence"}
    assert set(streams(several)) == set(streams(one)) == kinds
    length = one.data.sequence_length
    assert streams(several)["one document a sequence"] == (0, length, 2 * length)
    assert streams(one)["one document a sequence"] == (0, length)
    assert set(streams(padded)) == {"packed documents"}  # the padding is a document of its own
    for config in (several, one, padded):
        for boundaries in streams(config).values():
            assert boundaries[-1] == rehearsal.rounded_stream_length(config)
            assert list(boundaries) == sorted(set(boundaries))


def test_a_play_lists_what_a_scene_and_the_check_ask_for(
    tmp_path: Path, seen: _Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A play calls the scene's kernels, and the check's for every number of GDN heads. All calls are noted."""
    played_calls: list[set[Any]] = []

    @contextlib.contextmanager
    def played(note: Any) -> Iterator[None]:
        assert note is print
        yield
        played_calls.append(set(seen.calls))

    kernels = dataclasses.replace(
        seen.kernels, names={**seen.kernels.names, "gated_delta_net": "fla"}
    )
    monkeypatch.setattr(rehearsal.tilelang_kernels, "played", played)
    monkeypatch.setattr(rehearsal, "choose_kernels", lambda *args, **options: kernels)
    config = _config(tmp_path, "finetune")
    scene = scenes(config, STUDENT)[0]
    list(rehearse(config, STUDENT, None, scene))
    of_scene, seen.calls = seen.calls, set()
    rehearsal.play(config, STUDENT, None, scene, print)
    assert of_scene < played_calls[0]
    tokens = self_check.BOUNDARIES[-1]
    checked = {call[1] for call in played_calls[0] - of_scene}
    numbers = layer_spec.kernel_case(STUDENT, config).gdn_heads
    assert checked == {(tokens, heads, STUDENT.head_dim) for heads in numbers}


def test_layers_with_and_without_rotary_fa_heads_are_two_scenes(tmp_path: Path) -> None:
    """Their kernels differ, and each is rehearsed as it is in the run."""
    heads = ((1, 6),) * 4
    model = dataclasses.replace(
        tiny.student_config(tiny.DEEP, fa_rotary_every=2), full_attention_heads=heads
    )
    config = _config(tmp_path, "finetune")
    found = [scene.layer for scene in scenes(config, model)]
    assert found == [0, 1]
    alone = [rehearsal._one_layer(model, layer) for layer in found]
    assert [of.switches.fa_rotates(0) for of in alone] == [False, True]
    assert len(scenes(config, dataclasses.replace(model, hydra=STUDENT.hydra))) == 1
