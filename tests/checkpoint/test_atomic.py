"""Folders that appear whole or not at all."""

from __future__ import annotations

import pytest

from megatron_hydra.checkpoint.atomic import atomic_folder
from megatron_hydra.errors import HydraError


def fill(path, text, force=False, fail=False):
    with atomic_folder(path, force=force) as folder:
        (folder / "file").write_text(text)
        if fail:
            raise RuntimeError("in between")


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        fill(tmp_path / "a" / "b", "x", fail=True)
    assert list((tmp_path / "a").iterdir()) == []


def test_an_existing_folder_is_kept_unless_forced(tmp_path):
    path = tmp_path / "out"
    fill(path, "old")
    with pytest.raises(HydraError, match="exists already"):
        fill(path, "new")
    with pytest.raises(RuntimeError):
        fill(path, "new", force=True, fail=True)
    assert (path / "file").read_text() == "old"
    fill(path, "new", force=True)
    assert (path / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
