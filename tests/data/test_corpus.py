"""Inputs of every format give each row once and in order, however they are cut into units."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.data.corpus import CorpusConfig, input_identity
from megatron_hydra.data.rows import read_unit
from megatron_hydra.data.units import plan_units
from megatron_hydra.errors import HydraError

TEXTS = [f"document number {i} " * (i % 5 + 1) for i in range(40)]


def rows(corpus: CorpusConfig) -> list[str]:
    return [row.value for unit in plan_units(corpus) for row in read_unit(unit, corpus)]


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def jsonl(path: Path, texts: list[str]) -> str:
    return write_lines(path, [json.dumps({"text": text}) for text in texts])


LINES = st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=15)


@given(texts=LINES, unit_bytes=st.integers(1, 200), newline=st.booleans())
@settings(max_examples=60, deadline=None)
def test_byte_ranges_hold_every_line_once(tmp_path_factory, texts, unit_bytes, newline):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    body = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text(body + "\n" * newline, encoding="utf-8", newline="\n")
    corpus = CorpusConfig((str(path),), unit_bytes=unit_bytes)
    units = plan_units(corpus)
    assert len(units) == -(-path.stat().st_size // unit_bytes)
    assert rows(corpus) == texts


def test_every_local_format(tmp_path):
    jsonl(tmp_path / "a.jsonl", TEXTS)
    dataset = Dataset.from_dict({"text": TEXTS, "id": list(range(40))})
    dataset.to_parquet(tmp_path / "a.parquet", batch_size=7)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    compressed = tmp_path / "a.jsonl.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "a.parquet", "saved", "a.jsonl.gz"):
        corpus = CorpusConfig((str(tmp_path / name),), unit_bytes=300)
        assert rows(corpus) == TEXTS, name
    assert len(plan_units(CorpusConfig((str(tmp_path / "a.parquet"),)))) > 1
    assert len(plan_units(CorpusConfig((str(tmp_path / "saved"),), unit_bytes=300))) > 3


def test_text_files_and_lines(tmp_path):
    first = write_lines(tmp_path / "1.txt", ["one", "two"])
    second = tmp_path / "2.txt.gz"
    second.write_bytes(gzip.compress(b"drei\n"))
    assert rows(CorpusConfig((str(tmp_path),))) == ["one\ntwo\n", "drei\n"]
    assert rows(CorpusConfig((first,), format="lines", unit_bytes=2)) == ["one", "two"]
    assert rows(CorpusConfig((str(second),), format="lines")) == ["drei"]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_of_the_datasets_library(tmp_path, streaming, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part in range(3):
        data = Dataset.from_dict({"text": TEXTS[part * 10 : part * 10 + 10]})
        data.to_parquet(tmp_path / "set" / f"train-{part}.parquet")
    corpus = CorpusConfig((str(tmp_path / "set"),), hub=True, streaming=streaming, unit_bytes=100)
    assert len(plan_units(corpus)) >= 3
    assert rows(corpus) == TEXTS[:30]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_without_rows_is_named(tmp_path, name):
    table, path = pa.table({"text": pa.array([], pa.string())}), str(tmp_path / name)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    beside = jsonl(tmp_path / "b.jsonl", TEXTS)
    with pytest.raises(HydraError, match=rf"{name} is empty \(a table without rows\)"):
        plan_units(CorpusConfig((path, beside)))


def test_a_folder_gives_its_data_and_nothing_else(tmp_path):
    folder = tmp_path / "set"
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    jsonl(folder / ".cache" / "huggingface" / "meta.json", ["not data"])
    (folder / "more.parquet").mkdir()
    for name, text in (("train.parquet", "one"), ("more.parquet/part.parquet", "two")):
        Dataset.from_dict({"text": [text]}).to_parquet(folder / name)
    assert rows(CorpusConfig((str(folder),))) == ["two", "one"]
    assert rows(CorpusConfig((str(folder / "*.parquet"),))) == ["one"]
    (folder / "README.md").write_text("# not data either")
    with pytest.raises(
        HydraError, match=r"set holds files of several formats: .*README\.md \(text\), .*parquet"
    ):
        plan_units(CorpusConfig((str(folder),)))
    assert rows(CorpusConfig((str(folder),), format="parquet")) == ["two", "one"]
    assert rows(CorpusConfig((str(folder),), format="lines")) == ["# not data either"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("grün\n", encoding="utf-8-sig")
    assert rows(CorpusConfig((str(path),))) == ["grün\n"]


def test_inputs_come_in_the_order_given_and_folders_sorted(tmp_path):
    for name in ("b", "a", "c"):
        jsonl(tmp_path / f"{name}.jsonl", [name])
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in "cba")
    assert rows(CorpusConfig(files)) == ["c", "b", "a"]
    assert rows(CorpusConfig((str(tmp_path),))) == ["a", "b", "c"]
    assert rows(CorpusConfig((str(tmp_path / "[bc].jsonl"),))) == ["b", "c"]


def test_bad_rows_say_where_and_what(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "with BOM"}\n{"text": "caf\xe9"}\n{"text": \n[1]\n{"id": 1}\n'
        b'{"text": 5}\n\n{"text": "fine"}\n'
    )
    corpus = CorpusConfig((str(path),))
    found = [row for unit in plan_units(corpus) for row in read_unit(unit, corpus)]
    assert [row.value for row in found if not row.error] == ["with BOM", "fine"]
    errors = [row.error for row in found if row.error]
    for error, words in zip(
        errors,
        ("not UTF-8", "not JSON", "not a JSON object but list", "'text' is missing", "is a int"),
        strict=True,
    ):
        assert words in error
    assert found[1].where == f"{path}, byte 24"
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    corpus = CorpusConfig((str(latin),))
    (row,) = read_unit(plan_units(corpus)[0], corpus)
    assert "not UTF-8" in row.error
    assert row.where == str(latin)


def test_inputs_that_cannot_be_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "what.xyz").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "hollow").mkdir()
    for name, message in (
        ("empty.jsonl", r"empty\.jsonl is empty"),
        ("absent.jsonl", r"absent\.jsonl: no such file"),
        ("what.xyz", r"what\.xyz: unknown suffix"),
        ("broken.parquet", r"broken\.parquet: cannot be opened as parquet"),
        ("hollow", "hollow: no such file, or a folder"),
    ):
        with pytest.raises(HydraError, match=message):
            plan_units(CorpusConfig((str(tmp_path / name),)))


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"content": ["x"]}).to_parquet(path)
    corpus = CorpusConfig((str(path),))
    with pytest.raises(HydraError, match=r"a\.parquet has no column 'text'; it has content"):
        list(read_unit(plan_units(corpus)[0], corpus))


def test_a_missing_column_of_a_stream_is_named_at_its_first_row(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Dataset.from_dict({"content": ["x"] * 9}).to_parquet(tmp_path / "set" / "train.parquet")
    corpus = CorpusConfig((str(tmp_path / "set"),), hub=True, streaming=True)
    with pytest.raises(HydraError, match=r"set has no column 'text'; it has content"):
        next(read_unit(plan_units(corpus)[0], corpus))


def test_a_broken_archive_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    corpus = CorpusConfig((str(path),))
    with pytest.raises(HydraError, match=r"a\.jsonl\.gz: cannot be decompressed"):
        list(read_unit(plan_units(corpus)[0], corpus))


def test_a_slice_of_a_split_is_refused_and_not_read_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "set" / "train.parquet")
    corpus = CorpusConfig((str(tmp_path / "set"),), hub=True, split="train[:10%]")
    with pytest.raises(HydraError, match=r"--split train\[:10%\]: only whole splits"):
        plan_units(corpus)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bytes_that_are_not_utf8_are_bad_rows_in_tables_too(tmp_path, name):
    values = pa.array([b"fine", b"caf\xe9", "grün".encode()], pa.binary()).view(pa.string())
    table, path = pa.table({"text": values}), str(tmp_path / name)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    corpus = CorpusConfig((path,))
    found = [row for unit in plan_units(corpus) for row in read_unit(unit, corpus)]
    assert [row.value for row in found] == ["fine", None, "grün"]
    assert "not UTF-8" in found[1].error
    assert found[1].where.startswith(path)
    assert found[1].where.endswith("row 1")


def test_a_damaged_page_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": [f"hello {i} " * 50 for i in range(3000)]}).to_parquet(path)
    raw = bytearray(path.read_bytes())
    raw[2000:3000] = bytes(range(250)) * 4
    path.write_bytes(raw)
    corpus = CorpusConfig((str(path),))
    with pytest.raises(HydraError, match=r"a\.parquet: cannot be read"):
        list(read_unit(plan_units(corpus)[0], corpus))


def test_json_that_is_too_deep_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + '\n{"text": "x"}\n', encoding="utf-8")
    assert rows(CorpusConfig((str(path),))) == [None, "x"]


def test_an_input_changed_in_place_is_another_input(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    before = input_identity(CorpusConfig((path,)))
    jsonl(tmp_path / "a.jsonl", [text.upper() for text in TEXTS])
    after = input_identity(CorpusConfig((path,)))
    assert before[0]["bytes"] == after[0]["bytes"]
    assert before != after


def test_both_formats_of_arrow_files_are_read(tmp_path):
    """``datasets`` writes streams; pandas, polars and feather write files."""
    table = pa.table({"text": TEXTS})
    for name, writer in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        path = tmp_path / f"{name}.arrow"
        with pa.OSFile(str(path), "wb") as sink, writer(sink, table.schema) as out:
            out.write_table(table, max_chunksize=7)
        assert rows(CorpusConfig((str(path),), unit_bytes=300)) == TEXTS
    broken = tmp_path / "broken.arrow"
    broken.write_bytes((tmp_path / "file.arrow").read_bytes()[:100])
    with pytest.raises(HydraError, match=r"broken\.arrow: cannot be opened as arrow"):
        rows(CorpusConfig((str(broken),)))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst"])
def test_a_long_window_of_zstd_is_an_error_that_says_what_to_do(tmp_path, name):
    """A frame of one raw block whose header asks for 2 GiB, as ``zstd --long=31`` writes it."""
    body = json.dumps({"text": "x"}).encode() + b"\n"
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3])
    frame += ((len(body) << 3) | 1).to_bytes(3, "little") + body
    (tmp_path / name).write_bytes(frame)
    with pytest.raises(HydraError, match=r"cannot be decompressed.*zstd -d --long=31"):
        rows(CorpusConfig((str(tmp_path / name),)))
    (tmp_path / name).write_bytes(frame.replace(bytes([21 << 3]), bytes([10 << 3]), 1))
    assert len(rows(CorpusConfig((str(tmp_path / name),)))) == 1
