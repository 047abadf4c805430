"""The allowed contents of an output folder, and the files that ``force`` may delete."""

from __future__ import annotations

import json

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.storage import CellStore


def test_finished_cells_are_found_again(tmp_path):
    CellStore(tmp_path / "e", {"seed": 1}, force=False).save("niah", 64, {"accuracy": 0.5})
    again = CellStore(tmp_path / "e", {"seed": 1}, force=False)
    assert again.load("niah", 64) == {"accuracy": 0.5}
    assert again.load("niah", 128) is None


def test_force_deletes_only_an_evaluation(tmp_path):
    CellStore(tmp_path, {"seed": 1}, force=False).save("niah", 64, {"accuracy": 0.5})
    for name in ("results.json", "accuracy.png", "heatmap_niah.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "holiday.png").write_text("mine")
    with pytest.raises(HydraError, match=r"another seed \(1, now 2\)"):
        CellStore(tmp_path, {"seed": 2}, force=False)
    store = CellStore(tmp_path, {"seed": 2}, force=True)
    assert store.load("niah", 64) is None
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "holiday.png", "settings.json"}


def test_force_keeps_the_cells_of_the_same_evaluation(tmp_path):
    """A stopped run with --force resumes like any other, also with more lengths."""
    CellStore(tmp_path, {"seed": 1}, force=True).save("niah", 64, {"accuracy": 0.5})
    again = CellStore(tmp_path, {"seed": 1}, force=True)
    assert again.load("niah", 64) == {"accuracy": 0.5}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("settings", [None, "{}", '{"format": "hydra-quickstart"}', "{half"])
def test_the_folders_of_others_are_left_alone(tmp_path, settings, force):
    (tmp_path / "cells").mkdir()
    files = {"holiday.png": "x", "results.json": "{}", "cells/a.json": "{}"}
    files |= {} if settings is None else {"settings.json": settings}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(HydraError, match="not empty and not an evaluation"):
        CellStore(tmp_path, {"seed": 1}, force=force)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "e").write_text(json.dumps({}))
    with pytest.raises(HydraError, match="is a file"):
        CellStore(tmp_path / "e", {}, force=True)
