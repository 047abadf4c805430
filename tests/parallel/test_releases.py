"""Two releases of Megatron-Core give equal losses for every verb and layout, and load each other's checkpoints.

``HYDRA_OTHER_PYTHON`` names an interpreter whose environment has the other release; ``make test-releases``
makes one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hydra.parallel import megatron_versions
from megatron_hydra.stopping import REQUEUE_EXIT_CODE
from tests.parallel.launch import ROOT, forked
from tests.parallel.test_training import LAYOUTS, VERBS
from tests.required import skip_without
from tests.training import tiny

pytestmark = pytest.mark.slow

OTHER_PYTHON = "HYDRA_OTHER_PYTHON"
STEPS, STOPPED_AFTER = 5, 2
CHUNKED = "tp2-sp-seq-pp2"  # ranks have different heads, and stages share the embedding, whose bucket is forced
RESUMED_UNDER = "dp2-pp2"


@pytest.fixture(scope="module")
def other() -> str:
    """The interpreter with the other release."""
    python = os.environ.get(OTHER_PYTHON, "")
    if not python:
        skip_without("releases", f"{OTHER_PYTHON} names no interpreter with another megatron-core")
    program = "from megatron_hydra.parallel import megatron_versions as m; print(m.installed())"
    done = subprocess.run(
        [python, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    release = done.stdout.split()[-1]
    assert release != megatron_versions.installed(), f"{python} has the same release, {release}"
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One student, teacher and text for both releases."""
    folder = tmp_path_factory.mktemp("releases")
    tiny.write_all(folder, tiny.DEEP)
    return folder


def _case(verb: str, layout: str, output: str, **more) -> dict:
    sections = {
        "schedule": {"steps": STEPS, "warmup_steps": 1},
        "batch": {"micro_batch_size": 1, "global_batch_size": 4},
        "checkpoint": {"interval": STEPS},
    }
    return {
        "verb": verb, "output": output, "overrides": LAYOUTS[layout], "sections": sections, **more,
    }  # fmt: skip


def _run(folder: Path, cases: list[dict], python: str, status: int = 0) -> None:
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    module = "tests.parallel.training_runs"
    text = forked(module, 4, str(folder), str(listing), timeout=1700, python=python)
    outcomes = [json.loads(line) for line in text.splitlines() if line.startswith('{"output"')]
    assert [outcome["outcomes"] for outcome in outcomes] == [[status] * 4] * len(cases)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", VERBS)
def test_losses_agree(folder: Path, other: str, verb: str) -> None:
    layouts = [layout for layout in LAYOUTS if verb != "align" or "overlap" not in layout]
    for which, python in (("one", sys.executable), ("other", other)):
        cases = [_case(verb, layout, f"{which}-{verb}-{layout}") for layout in layouts]
        _run(folder, cases, python)
    for layout in layouts:
        one, two = (
            tiny.read_metrics(folder / f"{which}-{verb}-{layout}") for which in ("one", "other")
        )
        assert len(one) == len(two) == STEPS
        for key in ("loss", "grad_norm"):
            expected = pytest.approx([line[key] for line in one], rel=1e-6)
            assert [line[key] for line in two] == expected, (verb, layout, key)


@pytest.mark.timeout(1200)
def test_releases_load_each_others_checkpoints_bit_for_bit(folder: Path, other: str) -> None:
    """A run stops under one release and layout; both releases resume it under another, with equal tensors."""
    interpreters = {"one": sys.executable, "other": other}
    for saver, python in interpreters.items():
        stopped = _case("distill", CHUNKED, saver, fault="signal")
        _run(folder, [stopped], python, REQUEUE_EXIT_CODE)
        assert (folder / saver / f"checkpoints/step_0000000{STOPPED_AFTER}").is_dir()
        for loader in interpreters:
            shutil.copytree(folder / saver, folder / f"{saver}-{loader}")
    for loader, python in interpreters.items():
        names = [f"{saver}-{loader}" for saver in interpreters]
        cases = [_case("distill", RESUMED_UNDER, n, digests=f"{n}.json") for n in names]
        _run(folder, cases, python)
    loaded, ends = (
        [make(folder, f"{saver}-{loader}") for saver in interpreters for loader in interpreters]
        for make in (_loaded, _end)
    )
    assert all(len(of_rank) > 50 for of_rank in loaded[0])
    assert loaded[1:] == loaded[:1] * 3
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        assert not [name for name in end if not torch.equal(end[name], ends[0][name])]


def _loaded(folder: Path, name: str) -> list[dict[str, str]]:
    return json.loads((folder / f"{name}.json").read_text())


def _end(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return tiny.everything(folder / name / "checkpoints")
