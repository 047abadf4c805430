"""The packing index on disk: it is built once, reused, and rebuilt after any change."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_hydra.data import pack_index as module
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.pack_index import pack_index
from megatron_hydra.errors import HydraError
from tests.data.corpora import numbered_documents, write_indexed

OPTIONS = {"sequence_length": 16, "packing": "split_long", "seed": 0, "upsampling": {}}


@pytest.fixture
def prefix(tmp_path) -> str:
    return write_indexed(tmp_path / "books", numbered_documents([5, 40, 9, 3, 16]))[0]


@pytest.fixture
def builds(monkeypatch) -> list[int]:
    """Count the builds."""
    counted: list[int] = []
    original = module._build

    def build(*arguments):
        counted.append(1)
        original(*arguments)

    monkeypatch.setattr(module, "_build", build)
    return counted


def test_the_index_is_built_once_and_mapped(prefix, builds):
    first, description = pack_index(IndexedDocuments(prefix), **OPTIONS)
    again, _ = pack_index(IndexedDocuments(prefix), **OPTIONS)
    assert len(builds) == 1
    assert isinstance(again.offsets, np.memmap)
    assert [first.pieces(i) for i in range(len(first))] == [
        again.pieces(i) for i in range(len(again))
    ]
    assert description["max_token_id"] == 73
    assert description["report"]["documents_above_length"] == 1


@pytest.mark.parametrize(
    "change",
    [{"sequence_length": 20}, {"packing": "concat_chunk"}, {"seed": 1}, {"upsampling": {0: 2.0}}],
)
def test_every_option_has_an_index_of_its_own(prefix, builds, change):
    keys = {
        pack_index(IndexedDocuments(prefix), **options)[1]["key"]
        for options in (OPTIONS, {**OPTIONS, **change})
    }
    assert len(keys) == len(builds) == 2


def test_changed_data_never_uses_an_old_index(prefix, builds, tmp_path):
    pack_index(IndexedDocuments(prefix), **OPTIONS)
    write_indexed(tmp_path / "books", numbered_documents([5, 40, 9, 4, 15]))
    packs, _ = pack_index(IndexedDocuments(prefix), **OPTIONS)
    assert len(builds) == 2
    assert packs.lengths.sum() == 73


def test_concurrent_processes_build_it_once(prefix, builds):
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda _: pack_index(IndexedDocuments(prefix), **OPTIONS)[1], range(8))
        )
    assert len(builds) == 1
    assert all(result == results[0] for result in results)


def test_a_failed_build_leaves_nothing(prefix, tmp_path):
    with pytest.raises(HydraError, match="document 1 has 40 tokens"):
        pack_index(IndexedDocuments(prefix), **{**OPTIONS, "packing": "best_fit"})
    assert [p for p in os.listdir(tmp_path / ".packs") if not p.endswith(".lock")] == []


def test_a_damaged_index_is_named(prefix, tmp_path):
    pack_index(IndexedDocuments(prefix), **OPTIONS)
    (folder,) = (tmp_path / ".packs").glob("books-*")
    whole = (folder / "lengths.npy").read_bytes()
    for damaged in (b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (folder / "lengths.npy").write_bytes(damaged)
        with pytest.raises(HydraError, match="damaged packing index"):
            pack_index(IndexedDocuments(prefix), **OPTIONS)


def test_an_index_that_another_node_finished_meanwhile_is_kept(prefix, tmp_path, monkeypatch):
    """Two nodes build at the same time if the file system does not lock across nodes."""
    original = module.pack_source
    finished: list[int] = []

    def pack_while_another_node_does(*arguments, **options):
        monkeypatch.setattr(module, "pack_source", original)
        monkeypatch.setattr(module.socket, "gethostname", lambda: "other")
        key = pack_index(IndexedDocuments(prefix), **OPTIONS)[1]["key"]
        (folder,) = (tmp_path / ".packs").glob(f"books-*-{key}")
        finished.append(folder.stat().st_ino)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "_locked", lambda path: contextlib.nullcontext())
    monkeypatch.setattr(module, "pack_source", pack_while_another_node_does)
    packs, _ = pack_index(IndexedDocuments(prefix), **OPTIONS)
    assert packs.lengths.sum() == 73
    (folder,) = (tmp_path / ".packs").glob("books-*")
    assert [folder.stat().st_ino] == finished
    assert [path.name for path in (tmp_path / ".packs").iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_named(prefix, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HydraError, match=r"data\.cache_dir"):
        pack_index(IndexedDocuments(prefix), cache_dir=str(tmp_path / "file"), **OPTIONS)


def test_a_finished_index_is_read_without_writing(prefix, tmp_path, monkeypatch):
    pack_index(IndexedDocuments(prefix), **OPTIONS)

    def refuse(path):
        raise OSError("read-only file system")

    monkeypatch.setattr(module, "_locked", refuse)
    packs, _ = pack_index(IndexedDocuments(prefix), **OPTIONS)
    assert packs.lengths.sum() == 73
