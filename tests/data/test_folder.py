"""Folders as inputs: every file is read, skipped with a reason, or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from megatron_hydra.data.corpus import CorpusConfig
from megatron_hydra.data.folder import list_folder
from megatron_hydra.data.units import plan_units
from megatron_hydra.errors import HydraError
from tests.data.test_corpus import jsonl, rows


def notes_on_files(corpus: CorpusConfig) -> list[str]:
    """The planner's messages about the inputs."""
    notes: list[str] = []
    plan_units(corpus, notes.append)
    return notes


def _names(folder: Path, wanted: str | None = None) -> list[str]:
    return [os.path.relpath(path, folder) for path in list_folder(folder, wanted).files]


def test_caches_of_a_saved_data_set_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(100)]}).save_to_disk(folder)
    mapped = datasets.load_from_disk(folder).map(lambda row: {"text": row["text"].upper()})
    assert len(mapped) == 100
    assert len(list(folder.glob("*.arrow"))) == 2
    corpus = CorpusConfig((str(folder),))
    assert rows(corpus) == [f"row {i}" for i in range(100)]
    (note,) = notes_on_files(corpus)
    assert "1 files are read" in note
    assert "1 caches of the datasets library" in note and "/cache-" in note
    assert "2 descriptions of a data set" in note


def test_a_data_set_of_several_splits_is_not_read_as_one(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(
        HydraError, match=r"with the splits test, train: give .*--input .*both/test"
    ):
        plan_units(CorpusConfig((str(tmp_path / "both"),)))
    assert rows(CorpusConfig((str(tmp_path / "both" / "train"),))) == ["a"]


def test_a_foreign_state_file_hides_nothing(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "x")
    (tmp_path / "x" / "state.json").write_text(json.dumps({"step": 3}))
    assert rows(CorpusConfig((str(tmp_path / "x"),))) == ["a"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    real, folder = tmp_path / "real", tmp_path / "set"
    real.mkdir()
    folder.mkdir()
    jsonl(real / "b.jsonl", ["behind the link"])
    jsonl(folder / "a.jsonl", ["here"])
    (folder / "link").symlink_to(real)
    (real / "back").symlink_to(folder)  # the links form a circle
    assert rows(CorpusConfig((str(folder),))) == ["here", "behind the link"]
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(
        HydraError, match=r"gone\.jsonl is a link to .*nowhere\.jsonl, which does not exist"
    ):
        plan_units(CorpusConfig((str(folder),)))


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    jsonl(tmp_path / "A.JSONL", ["one"])
    (tmp_path / "B.Txt.GZ").write_bytes(gzip.compress(b"two"))
    (tmp_path / "C.JSON.BZ2").write_bytes(bz2.compress(b'{"text": "three"}'))
    assert _names(tmp_path, "jsonl") == ["A.JSONL", "C.JSON.BZ2"]
    assert rows(CorpusConfig((str(tmp_path),), format="jsonl")) == ["one", "three"]
    assert rows(CorpusConfig((str(tmp_path),), format="text")) == ["two"]


def test_skipped_files_are_counted_and_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "data.jsonl", ["x"])
    for number in range(5):
        (tmp_path / f"{number}.csv").write_text("a,b")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (note,) = notes_on_files(CorpusConfig((str(tmp_path),)))
    assert note.startswith(f"--input {tmp_path}: 1 files are read, not read are ")
    assert f"5 of no known format ({tmp_path}/0.csv, {tmp_path}/1.csv, {tmp_path}/2.csv, …)" in note
    assert f"1 hidden ({tmp_path}/.hidden.jsonl)" in note
    assert f"1 no regular file ({tmp_path}/pipe.jsonl)" in note
    assert not notes_on_files(CorpusConfig((str(tmp_path / "data.jsonl"),)))
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(
        HydraError, match=r"without data files .*; not read are .*5 of no known format"
    ):
        plan_units(CorpusConfig((str(tmp_path),)))


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.parquet.zip", "a.tgz", "A.TXT.7Z"])
def test_an_unknown_compression_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(
            HydraError, match=r"cannot be read; unpack it, or compress .*\.gz, \.bz2, \.zst"
        ):
            plan_units(CorpusConfig((str(given),)))


def test_a_file_given_twice_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").symlink_to(path)
    corpus = CorpusConfig((path, str(tmp_path)))
    assert rows(corpus) == ["x"] * 3
    again = [note for note in notes_on_files(corpus) if "same file" in note]
    assert len(again) == 2
    assert f"{tmp_path}/b.jsonl is the same file as {path}: it is read twice" in again


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process is not root: root may read every file, and some machines test as root."""
    jsonl(tmp_path / "a.jsonl", ["x"])
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.jsonl"))
    with pytest.raises(HydraError, match=r"a\.jsonl cannot be read: no permission"):
        plan_units(CorpusConfig((str(tmp_path),)))
    monkeypatch.setattr(os, "scandir", _forbidden)
    with pytest.raises(HydraError, match=r"--input .* cannot be read: Permission denied"):
        plan_units(CorpusConfig((str(tmp_path),)))


def _forbidden(path: str) -> None:
    raise PermissionError(13, "Permission denied", str(path))
