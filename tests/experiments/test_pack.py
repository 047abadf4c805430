"""Results without weights: what is copied, what is left out, and that the copy works as a store."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.experiments.command import Request, pack, show
from megatron_hydra.experiments.executor import missing_steps
from megatron_hydra.experiments.plan import make_plan
from megatron_hydra.experiments.spec import load_experiment
from megatron_hydra.experiments.store import StepStore

ROWS = "variants: {dense: {hf_model: teacher}, hydra: {}}"
FILES = {
    "select": ("head_map.json", "work/effects.npz"),
    "convert": ("weights",),
    "teacher": ("weights",),
    "stage": ("metrics.jsonl", "checkpoints/weights"),
    "export": ("model.safetensors",),
    "evaluate": ("results.json",),
    "prepare": ("made",),
}


CONTENT = {
    "results.json": {"tasks": {"facts": {"128": {"accuracy": 0.5}}}},
    "metrics.jsonl": {"step": 2, "tokens": 4096, "loss": 0.125, "tokens_per_s": 9},
}


@pytest.fixture
def computed(write, tmp_path):
    """A store: the cells of seed 0 are finished, an evaluation of seed 1 has begun."""
    path = write(ROWS)
    plan, store = make_plan(load_experiment(path).cells), StepStore(tmp_path / "s")
    for name, key in plan.cells.items():
        for other in plan.ancestors(key):
            step = plan.steps[other]
            if store.is_done(step):
                continue
            for file in FILES[step.action]:
                target = store.out(step) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(CONTENT.get(file, {})))
            if name.endswith("seed 0"):
                store.finish(step, 1.0)
    return path, plan, store


def names(store, step):
    return sorted(str(p.relative_to(store.out(step))) for p in store.out(step).rglob("*.*"))


def test_everything_but_weights_is_copied(computed, tmp_path):
    path, plan, store = computed
    request = Request([path], store.root, to=tmp_path / "copy")
    assert pack(request, lambda _: None) == 0
    copy = StepStore(tmp_path / "copy")
    first = [plan.steps[k] for k in plan.ancestors(plan.cells["trial / hydra / seed 0"])]
    assert all(copy.is_done(step) for step in first)
    whole = [step.kind for step in first if copy.is_whole(step)]
    assert sorted(whole) == ["evaluate", "prepare", "select"]
    kept = {step.kind: names(copy, step) for step in first}
    assert kept["select"] == ["head_map.json"] and kept["align"] == ["metrics.jsonl"]
    assert kept["export"] == kept["convert"] == [] and kept["evaluate"] == ["results.json"]
    unfinished = plan.steps[plan.cells["trial / dense / seed 1"]]
    assert not copy.is_done(unfinished) and names(copy, unfinished) == ["results.json"]


def test_the_copy_is_read_and_goes_on_like_the_other(computed, tmp_path, monkeypatch):
    path, plan, store = computed
    heads = SimpleNamespace(full_attention_heads=((3,), ()))
    monkeypatch.setattr("megatron_hydra.experiments.results.HeadMap.load", lambda _: heads)
    request = Request([path], store.root, to=tmp_path / "copy")
    pack(request, lambda _: None)
    copy, lines = StepStore(tmp_path / "copy"), []
    here = Request([path], copy.root)
    show(dataclasses.replace(request, to=None), lines.append)
    again: list[str] = []
    show(here, again.append)
    assert lines[-1] == again[-1] and "0.500" in lines[-1] and "4,096" in lines[-1]
    needed = {step.title for step in missing_steps(plan, copy).values()}
    assert needed and not any(title.endswith("dense / seed 0") for title in needed)
    assert not any(
        step.action in ("evaluate", "export") and step.title.endswith("seed 0")
        for step in missing_steps(plan, copy).values()
    )


def test_packing_again_adds_and_takes_nothing_away(computed, tmp_path):
    path, plan, store = computed
    pack(Request([path], store.root, to=tmp_path / "copy"), lambda _: None)
    copy = StepStore(tmp_path / "copy")
    one, two = (plan.steps[plan.cells[f"trial / dense / seed {n}"]] for n in (0, 1))
    record = copy.record(one)
    store.finish(two, 2.0)
    (store.folder(one) / "record.json").unlink()  # as if computed again
    pack(Request([path], store.root, to=tmp_path / "copy"), lambda _: None)
    assert copy.is_done(two) and copy.record(one) == record


def test_a_target_is_needed_and_is_another_folder(computed):
    path, _, store = computed
    with pytest.raises(HydraError, match="pack needs --to"):
        pack(Request([path], store.root), print)
    with pytest.raises(HydraError, match="is the --output itself"):
        pack(Request([path], store.root, to=store.root), print)
