"""A thousand parts: how many files are open, and how much work opening and resuming take."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data import PackedStream, indexed, manifest, merging, pack_index, sources
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.merging import merge
from megatron_hydra.data.open_files import raise_open_file_limit
from megatron_hydra.errors import HydraError
from tests.data.corpora import numbered_documents, write_indexed
from tests.data.test_indexed import manifest_for

PARTS = 30
COUNTS = {
    "rows": 4, "empty_rows": 0, "bad_rows": 0, "documents": 4, "sequences": 4, "tokens": 40,
    "max_token_id": 40, "longest_document": 10,
}  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Small file pairs with manifests; no two are equal."""
    made = []
    for number in range(PARTS):
        lengths = [5 + number, 10, 15, 10 - number % 5]
        prefix, _ = write_indexed(tmp_path / f"shard-{number:02d}", numbered_documents(lengths))
        counts = COUNTS | {"tokens": sum(lengths), "longest_document": max(lengths)}
        manifest_for(prefix, counts=counts)
        made.append(prefix)
    return made


def _data(shards: list[str], **more) -> DataConfig:
    blend = tuple(SourceConfig(path=path) for path in shards)
    return DataConfig(blend, 16, packing="split_long", **more)


def _stream(data: DataConfig) -> PackedStream:
    return PackedStream(data, BatchConfig(1, 4), dp_rank=0, dp_size=1, vocab_size=1000)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_files() -> Iterator[int]:
    """Limit this process to ten more open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _open_files() + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_opening_a_pair_keeps_no_file_open(shards, few_files) -> None:
    before = _open_files()
    opened = [IndexedDocuments(prefix) for prefix in shards]
    assert _open_files() == before
    assert [pair.document_spans()[1].tolist()[1] for pair in opened] == [10] * PARTS
    assert _open_files() == before


def test_more_shards_are_merged_than_files_may_be_open(shards, few_files, tmp_path) -> None:
    merged = merge(shards, str(tmp_path / "all"))
    assert merged.counts["documents"] == 4 * PARTS
    lengths = IndexedDocuments(str(tmp_path / "all")).sequence_lengths()
    expected = [IndexedDocuments(prefix).sequence_lengths() for prefix in shards]
    assert np.array_equal(lengths, np.concatenate(expected))
    assert sorted(path.suffix for path in tmp_path.glob("all*")) == [".bin", ".idx", ".json"]


def test_a_blend_raises_the_limit_that_it_needs(shards, few_files) -> None:
    opened = _stream(_data(shards))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few_files
    for step in range(20):
        opened.micro_batches(step)


def test_a_limit_of_the_system_that_is_too_low_is_named(monkeypatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 4096))
    with pytest.raises(
        HydraError, match=r"open files, and this process may have 4,096 .*merge\.py"
    ):
        raise_open_file_limit(4000)


def test_each_part_is_probed_once(shards, monkeypatch) -> None:
    """Opening mainly reads probes; reading each twice would double the time of a start."""
    _stream(_data(shards))  # packs
    probed: list[str] = []
    original = manifest.file_probe

    def counted(path) -> str:
        probed.append(os.fspath(path))
        return original(path)

    for module in (manifest, indexed, pack_index):
        monkeypatch.setattr(module, "file_probe", counted)
    opened = _stream(_data(shards))
    opened.fingerprint()
    opened.check_state(opened.state(3))
    assert len(probed) == len(set(probed)) == PARTS * (2 + 3)  # .bin, .idx, three arrays


def test_the_work_of_a_resume_is_linear_in_the_parts(shards, monkeypatch) -> None:
    """This also holds for another blend: parts are looked up, not compared pair by pair."""
    made: list[int] = []
    original = sources.Permutation

    def counted(size: int, key: int):
        made.append(size)
        return original(size, key)

    counts = []
    for number in (10, PARTS):
        state = _stream(_data(shards[:number])).state(2)
        data = _data(shards[:number], phase=2)
        lighter = dataclasses.replace(data.blend[0], weight=0.5)
        opened = _stream(dataclasses.replace(data, blend=(*data.blend[1:], lighter)))
        with monkeypatch.context() as patch:
            patch.setattr(sources, "Permutation", counted)
            made.clear()
            opened.check_state(state)
            counts.append(len(made))
    assert counts[1] <= counts[0] * PARTS / 10 * 1.2


def test_a_column_that_is_truncated_while_read_is_an_error(shards) -> None:
    opened = IndexedDocuments(shards[0])
    with open(f"{shards[0]}.idx", "r+b") as stream:
        stream.truncate(40)
    with pytest.raises(HydraError, match=r"shard-00\.idx ends early"):
        opened.sequence_lengths()


def test_a_merge_holds_one_input_at_a_time(shards, tmp_path, monkeypatch) -> None:
    """A merge needs the memory of its largest input, not of all inputs."""
    held: list[int] = []
    original = merging.write_index

    def looked_at(path, dtype, lengths, documents, modes) -> None:
        held.extend(type(c) is np.ndarray for c in (lengths, documents))
        original(path, dtype, lengths, documents, modes)

    monkeypatch.setattr(merging, "write_index", looked_at)
    merge(shards, str(tmp_path / "all"))
    assert held == [False, False]
