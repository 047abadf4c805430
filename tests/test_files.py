"""Files and folders are written atomically; headers are checked."""

from __future__ import annotations

import json
import os

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.files import (
    JsonFormat,
    atomic_file,
    atomic_folder,
    sha256_of_file,
    write_json_atomic,
    write_text_atomic,
)


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


def test_a_file_and_its_folder_are_on_the_disk_before_a_write_returns(tmp_path, monkeypatch):
    synced, before = [], os.fsync

    def noted(descriptor):
        before(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    path = tmp_path / "made" / "latest"
    write_text_atomic(path, "two")
    assert synced == [path.stat().st_ino, path.parent.stat().st_ino]


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_text_atomic(path, "one")

    def half():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        half()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "file") == digest


def test_a_header_is_checked_when_it_is_read(tmp_path):
    letter, path = JsonFormat("a-letter", 2, "letter", "write it again"), tmp_path / "letter.json"
    write_json_atomic(path, letter.add_header({"to": "you"}))
    assert json.loads(path.read_text()) == {"format": "a-letter", "version": 2, "to": "you"}
    assert letter.read(path) == {"to": "you"}
    for body, message in (
        ({"format": "a-map", "version": 2}, r"letter\.json is not a letter: its key 'format'"),
        ({"format": "a-letter", "version": 1}, r"version 1 is not .* version 2\); write it again"),
        ([], r"letter\.json must hold a JSON object"),
    ):
        write_json_atomic(path, body)
        with pytest.raises(HydraError, match=message):
            letter.read(path)
