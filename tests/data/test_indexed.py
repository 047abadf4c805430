"""Megatron's files are read, ours are read by Megatron, and damaged ones are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_hydra.data.indexed import IndexedDocuments, write_index
from megatron_hydra.data.manifest import Manifest, file_record
from megatron_hydra.errors import HydraError
from tests.data.corpora import numbered_documents, write_indexed

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@pytest.fixture
def pair(tmp_path) -> str:
    return write_indexed(tmp_path / "books", numbered_documents([5, 0, 9, 3]))[0]


def manifest_for(prefix: str, **changes) -> Manifest:
    fields = {
        "source": {},
        "tokenizer": {"name": "t", "fingerprint": "", "vocab_size": 100, "eod_id": 0},
        "counts": {"max_token_id": 17},
        "loss": "all",
        "bin": file_record(prefix + ".bin"),
        "idx": file_record(prefix + ".idx"),
    }
    manifest = Manifest(**{**fields, **changes})
    manifest.save(prefix + ".json")
    return manifest


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_of_megatron_are_read(tmp_path, dtype):
    prefix, documents = write_indexed(tmp_path / "m", numbered_documents([5, 1, 9]), dtype)
    ours = IndexedDocuments(prefix)
    offsets, lengths = ours.document_spans()
    read = [ours.read(o, n).tolist() for o, n in zip(offsets, lengths, strict=True)]
    assert read == documents
    assert (ours.num_documents, ours.num_tokens, ours.max_token_id()) == (3, 15, 15)


@given(lengths=LENGTHS, per_document=st.integers(1, 3), modes=st.booleans())
@settings(max_examples=25, deadline=None)
def test_our_index_has_the_bytes_of_megatrons(tmp_path_factory, lengths, per_document, modes):
    folder = tmp_path_factory.mktemp("index")
    builder = IndexedDatasetBuilder(str(folder / "a.bin"), dtype=np.int32, multimodal=modes)
    edges = list(range(0, len(lengths), per_document)) + [len(lengths)]
    flags = [number % 2 for number in range(len(lengths))]
    for first, last in zip(edges, edges[1:], strict=False):
        tokens = np.arange(sum(lengths[first:last]))
        builder.add_document(tokens, lengths[first:last], flags[first:last] if modes else None)
    builder.finalize(str(folder / "a.idx"))
    mode_array = np.array(flags, np.int8) if modes else None
    write_index(str(folder / "b.idx"), np.int32, np.array(lengths), np.array(edges), mode_array)
    assert (folder / "a.idx").read_bytes() == (folder / "b.idx").read_bytes()


def test_megatron_reads_ours(tmp_path):
    tokens = np.arange(100, 112, dtype=np.uint16)
    tokens.tofile(tmp_path / "x.bin")
    write_index(str(tmp_path / "x.idx"), np.uint16, np.array([5, 7]), np.array([0, 1, 2]))
    theirs = IndexedDataset(str(tmp_path / "x"))
    assert [theirs[i].tolist() for i in range(2)] == [tokens[:5].tolist(), tokens[5:].tolist()]
    assert theirs.document_indices.tolist() == [0, 1, 2]


def test_modes_mark_the_tokens_with_a_loss(tmp_path):
    np.arange(12, dtype=np.uint16).tofile(tmp_path / "c.bin")
    prefix = str(tmp_path / "c")
    modes = np.array([0, 1, 0, 1], np.int8)
    write_index(prefix + ".idx", np.uint16, np.array([3, 2, 4, 3]), np.array([0, 2, 4]), modes)
    assert IndexedDocuments(prefix).read_piece(0, 12).trainable.all()
    manifest_for(prefix, loss="answers")
    answers = IndexedDocuments(prefix)
    learned = [3, 4, 9, 10, 11]
    for begin, length in ((0, 5), (5, 7), (1, 3), (4, 1), (9, 2)):
        piece = answers.read_piece(begin, length)
        assert piece.tokens.tolist() == list(range(begin, begin + length))
        assert piece.trainable.tolist() == [t in learned for t in range(begin, begin + length)]


def cut(path: str, size: int) -> None:
    os.truncate(path, os.path.getsize(path) + size)


def test_truncated_files_are_named(pair):
    cut(pair + ".bin", -2)
    with pytest.raises(HydraError, match=r"books\.bin is truncated"):
        IndexedDocuments(pair)
    cut(pair + ".idx", -8)
    with pytest.raises(HydraError, match=r"books\.idx is truncated"):
        IndexedDocuments(pair)
    cut(pair + ".idx", -os.path.getsize(pair + ".idx") + 10)
    with pytest.raises(HydraError, match=r"books\.idx is not a Megatron index"):
        IndexedDocuments(pair)


def test_empty_and_missing_files_are_named(tmp_path):
    prefix, _ = write_indexed(tmp_path / "nothing", [[]])
    with pytest.raises(HydraError, match=r"nothing\.bin is empty"):
        IndexedDocuments(prefix)
    with pytest.raises(HydraError, match=r"absent\.idx does not exist"):
        IndexedDocuments(str(tmp_path / "absent"))


def test_a_stale_manifest_is_named(pair, tmp_path):
    manifest_for(pair)
    assert IndexedDocuments(pair).max_token_id() == 17
    raw = bytearray(Path(pair + ".bin").read_bytes())
    raw[4] ^= 1
    Path(pair + ".bin").write_bytes(raw)
    with pytest.raises(HydraError, match=r"books\.json is stale.*books\.bin"):
        IndexedDocuments(pair)
    write_indexed(tmp_path / "books", numbered_documents([4]))
    with pytest.raises(HydraError, match=r"books\.bin is truncated.*books\.json says"):
        IndexedDocuments(pair)
    Path(pair + ".json").write_text("{", encoding="utf-8")
    with pytest.raises(HydraError, match=r"books\.json is not valid JSON"):
        IndexedDocuments(pair)


def test_an_inconsistent_index_is_named(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "x.bin")
    write_index(str(tmp_path / "x.idx"), np.uint16, np.array([4, 6]), np.array([0, 1, 2]))
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[34:38] = (5).to_bytes(4, "little")
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(HydraError, match=r"x\.idx: sequences are not contiguous"):
        IndexedDocuments(str(tmp_path / "x")).document_spans()


def test_a_file_cut_off_while_it_is_read_is_named(pair):
    opened = IndexedDocuments(pair)
    cut(pair + ".bin", -4)
    assert opened.read(0, 5).tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(HydraError, match=r"books\.bin ends at byte 30"):
        opened.read(14, 3)
