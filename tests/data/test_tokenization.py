"""Preparation: the bytes do not depend on workers, shards and kills; errors name the file."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig
from megatron_hydra.data import (
    PackedStream,
    indexed,
    merging,
    part_worker,
    tokenization,
    word_encoder,
)
from megatron_hydra.data import corpus as corpus_module
from megatron_hydra.data import parts as parts_module
from megatron_hydra.data.corpus import CorpusConfig, Unit
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.manifest import Manifest
from megatron_hydra.data.merging import find_shards, merge
from megatron_hydra.data.tokenization import tokenize
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.files import sha256_of_file
from megatron_hydra.hf_loading import load_tokenizer
from tests.data.corpora import write_jsonl

SUFFIXES = (".bin", ".idx", ".json")


def config(source: Path, output: Path, tokenizer: str, unit_bytes: int = 20_000, **options):
    corpus = CorpusConfig((str(source),), unit_bytes=unit_bytes)
    return TokenizeConfig(corpus, str(output), tokenizer, **{"workers": 0, **options})


def run(settings: TokenizeConfig) -> list[str]:
    lines: list[str] = []
    tokenize(settings, lines.append)
    return lines


def contents(prefix: str | Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 300)


@pytest.fixture(scope="module")
def reference(corpus, tokenizers, tmp_path_factory) -> Path:
    """A preparation without kills."""
    output = tmp_path_factory.mktemp("reference") / "out"
    run(config(corpus, output, tokenizers["qwen"]))
    return output


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama"])
def test_tokens_are_those_of_megatrons_builder(corpus, tokenizers, tmp_path, kind):
    tokenizer = load_tokenizer(tokenizers[kind])
    kwargs = {"dtype": DType.optimal_dtype(len(tokenizer))}
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), **kwargs)
    for line in corpus.read_text(encoding="utf-8").splitlines():
        ids = [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    run(config(corpus, tmp_path / "ours", tokenizers[kind]))
    assert contents(tmp_path / "ours")[:2] == [
        (tmp_path / "megatron.bin").read_bytes(),
        (tmp_path / "megatron.idx").read_bytes(),
    ]
    assert len(IndexedDataset(str(tmp_path / "ours"))) == 300


def test_workers_and_units_do_not_change_the_result(corpus, qwen, reference, tmp_path):
    run(config(corpus, tmp_path / "a", qwen, unit_bytes=7_000, workers=2))
    run(config(corpus, tmp_path / "b", qwen, unit_bytes=10**9, exact=True))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(reference)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}{suffix}" for name in "ab" for suffix in SUFFIXES
    ]


def test_the_manifest_says_what_was_made(reference, qwen):
    manifest = Manifest.load(f"{reference}.json")
    documents = IndexedDocuments(str(reference))
    _, lengths = documents.document_spans()
    assert manifest.counts["documents"] == manifest.counts["rows"] == 300
    assert manifest.counts["tokens"] == documents.num_tokens == lengths.sum()
    assert manifest.counts["longest_document"] == lengths.max()
    assert manifest.counts["max_token_id"] == documents.read(0, documents.num_tokens).max()
    assert manifest.bin.sha256 == sha256_of_file(f"{reference}.bin")
    assert manifest.idx.sha256 == sha256_of_file(f"{reference}.idx")
    assert manifest.tokenizer["vocab_size"] == len(load_tokenizer(qwen))


def test_shards_merge_into_the_whole(corpus, qwen, reference, tmp_path):
    for index in (2, 0, 1):
        run(config(corpus, tmp_path / "s", qwen, shard=(index, 3), unit_bytes=9_000))
    prefixes = find_shards(str(tmp_path / "s"))
    sizes = [Manifest.load(f"{prefix}.json").counts["tokens"] for prefix in prefixes]
    assert max(sizes) < 1.5 * min(sizes)
    merge(prefixes, str(tmp_path / "s"), shards=True)
    assert contents(tmp_path / "s") == contents(reference)
    assert not (tmp_path / "s.merge").exists()
    with pytest.raises(HydraError, match=r"s\.bin exists"):
        merge(prefixes, str(tmp_path / "s"))


def test_uneven_units_leave_no_shard_empty():
    units = [Unit("x", "jsonl", i, i + 1, size) for i, size in enumerate([1000, 1, 1, 1, 500])]
    for count in range(1, 6):
        shards = [tokenization._shard_of(units, (index, count)) for index in range(count)]
        assert all(shards)
        assert [unit for shard in shards for unit in shard] == units


def test_merged_shards_with_a_token_limit_are_not_recorded_as_the_whole(corpus, qwen, tmp_path):
    for index in (0, 1):
        settings = config(corpus, tmp_path / "s", qwen, shard=(index, 2), max_tokens=2_000)
        run(settings)
    merged = merge(find_shards(str(tmp_path / "s")), str(tmp_path / "s"))
    assert len(merged.source["merged"]) == 2
    assert 3_000 < merged.counts["tokens"] <= 4_000


def test_a_full_disk_ends_a_merge_cleanly(reference, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(merging, "write_index", full)
    with pytest.raises(HydraError, match=r"cannot write .*m: the disk is full"):
        merge([str(reference), str(reference)], str(tmp_path / "m"))
    assert not list(tmp_path.iterdir())


def write_data_set(folder: Path, corpus: Path, files: int) -> Path:
    """The rows of a JSONL file as a data set of Parquet files."""
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    edges = [len(texts) * i // files for i in range(files + 1)]
    for part in range(files):
        data = Dataset.from_dict({"text": texts[edges[part] : edges[part + 1]]})
        data.to_parquet(folder / f"train-{part}.parquet")
    return folder


IN_WORKERS = pytest.mark.slow  # spawned workers, each of which imports everything again


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=IN_WORKERS)])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_gives_the_bytes_of_its_files(
    corpus, qwen, reference, tmp_path, streaming, workers
):
    folder = write_data_set(tmp_path / "set", corpus, files=3)
    source = CorpusConfig((str(folder),), hub=True, streaming=streaming)
    run(TokenizeConfig(source, str(tmp_path / "out"), qwen, workers=workers))
    assert contents(tmp_path / "out")[:2] == contents(reference)[:2]


def test_missing_and_damaged_shards_are_named(corpus, qwen, tmp_path):
    for index in (0, 2):
        run(config(corpus, tmp_path / "s", qwen, shard=(index, 3), unit_bytes=9_000))
    with pytest.raises(HydraError, match="shard 1 of 3 not finished"):
        find_shards(str(tmp_path / "s"))
    with pytest.raises(HydraError, match="found no shards"):
        find_shards(str(tmp_path / "t"))
    prefix = str(tmp_path / "s-00002-of-00003")
    manifest = Manifest.load(prefix + ".json")
    damaged = dataclasses.replace(manifest.bin, sha256="0" * 64)
    dataclasses.replace(manifest, bin=damaged).save(prefix + ".json")
    with pytest.raises(HydraError, match=r"the SHA-256 of .*s-00002-of-00003\.bin differs"):
        merge([str(tmp_path / "s-00000-of-00003"), prefix], str(tmp_path / "m"))
    assert not list(tmp_path.glob("m*"))


def test_data_of_different_tokenizers_is_not_merged(corpus, tokenizers, tmp_path):
    for kind in ("gpt2", "llama"):
        run(config(corpus, tmp_path / kind, tokenizers[kind]))
    with pytest.raises(HydraError, match=r"llama\.json: tokenizer .* is not the one of .*gpt2"):
        merge([str(tmp_path / "gpt2"), str(tmp_path / "llama")], str(tmp_path / "m"))


def test_a_second_run_does_nothing(corpus, qwen, tmp_path):
    settings = config(corpus, tmp_path / "out", qwen)
    run(settings)
    before = os.stat(tmp_path / "out.bin").st_mtime_ns
    assert "is complete" in run(settings)[0]
    assert os.stat(tmp_path / "out.bin").st_mtime_ns == before
    other = dataclasses.replace(settings, append_eod=False)
    with pytest.raises(HydraError, match=r"out\.json exists and comes from other inputs"):
        run(other)
    run(dataclasses.replace(other, force=True))
    assert not Manifest.load(tmp_path / "out.json").source["append_eod"]


def test_a_token_limit_ends_at_a_document(corpus, qwen, reference, tmp_path):
    run(config(corpus, tmp_path / "out", qwen, max_tokens=10_000, workers=2))
    part, whole = IndexedDocuments(str(tmp_path / "out")), IndexedDocuments(str(reference))
    _, lengths = whole.document_spans()
    assert part.num_documents == np.searchsorted(np.cumsum(lengths), 10_000, side="right")
    assert np.array_equal(part.read(0, part.num_tokens), whole.read(0, part.num_tokens))
    manifest = Manifest.load(tmp_path / "out.json")
    assert manifest.counts["tokens"] == part.num_tokens <= 10_000
    assert manifest.counts["max_token_id"] == part.read(0, part.num_tokens).max()
    assert manifest.counts["longest_document"] == lengths[: part.num_documents].max()


def test_empty_rows_are_counted_or_kept(qwen, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n', encoding="utf-8")
    lines = run(config(source, tmp_path / "out", qwen))
    assert "1 empty and 0 bad of 3 rows" in lines[-1]
    assert IndexedDocuments(str(tmp_path / "out")).num_documents == 2
    run(config(source, tmp_path / "kept", qwen, keep_empty=True))
    _, lengths = IndexedDocuments(str(tmp_path / "kept")).document_spans()
    assert lengths.tolist()[1] == 0
    assert len(lengths) == 3


def test_bad_rows_fail_the_run_or_are_skipped_without_repeating_work(qwen, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", 60)
    raw = source.read_bytes().splitlines(keepends=True)
    raw[20] = b'{"text": "caf\xe9"}\n'
    raw[40] = b'{"text": "\\ud800"}\n'
    source.write_bytes(b"".join(raw))
    settings = config(source, tmp_path / "out", qwen, unit_bytes=4_000)
    with pytest.raises(HydraError, match=r"1 unreadable row.*\n.*a\.jsonl, byte [\d,]+: not UTF-8"):
        run(settings)
    assert not (tmp_path / "out.bin").exists()
    with pytest.raises(HydraError, match="1 unreadable row"):
        run(settings)
    lenient = dataclasses.replace(settings, max_bad_rows=2)
    lines = run(lenient)
    assert any(line.startswith("going on after") for line in lines)
    assert [line for line in lines if "lone surrogate" in line]
    assert "2 bad of 60 rows" in lines[-1]
    assert IndexedDocuments(str(tmp_path / "out")).num_documents == 58


def test_a_corpus_without_text_is_named(qwen, tmp_path):
    source = tmp_path / "blank.jsonl"
    source.write_text('{"text": ""}\n' * 3, encoding="utf-8")
    with pytest.raises(HydraError, match=r"blank\.jsonl: no document with text in 3 rows"):
        run(config(source, tmp_path / "out", qwen))


def test_chat_has_a_loss_on_answers_only(qwen, tmp_path):
    rows = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]
        for n in range(20)
    ]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    corpus = CorpusConfig((str(source),), column="messages", chat=True)
    tokenize(TokenizeConfig(corpus, str(tmp_path / "chat"), qwen, workers=0), lambda _: None)
    data = DataConfig(blend=(SourceConfig(path=str(tmp_path / "chat")),), sequence_length=64)
    stream = PackedStream(data, BatchConfig(1, 1), dp_rank=0, dp_size=1, vocab_size=500)
    tokenizer = load_tokenizer(qwen)
    seen = ""
    for step in range(stream.sources[0].samples_per_epoch):
        (batch,) = stream.micro_batches(step)
        seen += tokenizer.decode(batch.labels[batch.loss_mask > 0])
    answers = sorted(seen.split("<|im_end|>")[:-1])
    assert answers == sorted(f"{n} it is" for n in range(20))


_CALL = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
_TOOLS = [{"function": {"name": "clock"}}]
_WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
def test_the_tools_of_a_conversation_come_from_a_column_of_their_own(own_tokenizer, tmp_path, form):
    (own_tokenizer / "chat_template.jinja").write_text(_WITH_TOOLS)
    answer = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
    rows = [
        {"messages": [{"role": "user", "content": "time?"}, answer], "tools": json.dumps(_TOOLS)},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
         "tools": None},
    ]  # fmt: skip
    source = tmp_path / f"chat.{form}"
    if form == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "parquet":
        Dataset.from_list(rows).to_parquet(source)
    else:
        Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        source = tmp_path / "saved"
    corpus = CorpusConfig((str(source),), column="messages", chat=True, tools_column="tools")
    settings = TokenizeConfig(corpus, str(tmp_path / "out"), str(own_tokenizer), workers=0)
    run(settings)
    tokenizer = load_tokenizer(str(own_tokenizer))
    tokens = np.fromfile(tmp_path / "out.bin", np.uint16)
    first, second, _ = tokenizer.decode(tokens).split("<|endoftext|>")
    assert first.startswith('[{"function": {"name": "clock"}}]<|im_start|>user')
    assert '[{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]<|im_end|>' in first
    assert "None" not in first and "null" not in first
    assert second == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    other = dataclasses.replace(settings, corpus=dataclasses.replace(corpus, tools_column=None))
    with pytest.raises(HydraError, match=r"out\.json exists and comes from other inputs"):
        run(other)


def test_tools_that_are_no_list_make_a_bad_row(qwen, tmp_path):
    row = {"messages": [{"role": "assistant", "content": "y"}], "tools": "clock"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    corpus = CorpusConfig(
        (str(tmp_path / "chat.jsonl"),), column="messages", chat=True, tools_column="tools"
    )
    with pytest.raises(HydraError, match="field 'tools' is neither a list of tools"):
        run(TokenizeConfig(corpus, str(tmp_path / "out"), qwen, workers=0))


@pytest.mark.parametrize("special", [True, False])
def test_a_document_ends_with_one_end_token(corpus, own_tokenizer, tmp_path, special):
    """This also holds if the tokenizer adds one itself."""
    path = own_tokenizer / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.post_processor = TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 3), ("<|endoftext|>", 0)]
    )
    backend.save(str(path))
    load_tokenizer.cache_clear()
    run(config(corpus, tmp_path / "out", str(own_tokenizer), add_special_tokens=special))
    documents = IndexedDocuments(str(tmp_path / "out"))
    tokens = np.fromfile(tmp_path / "out.bin", np.uint16)
    _, lengths = documents.document_spans()
    assert (tokens[np.cumsum(lengths) - 1] == 0).all()
    assert int((tokens == 0).sum()) == len(lengths)
    assert int((tokens == 3).sum()) == special * len(lengths)


def test_a_conversation_whose_template_writes_the_end_token_has_one(own_tokenizer, tmp_path):
    template = own_tokenizer / "chat_template.jinja"
    template.write_text(
        template.read_text() + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    )
    run(chat_settings(tmp_path, str(own_tokenizer)))
    tokens = np.fromfile(tmp_path / "chat.bin", np.uint16)
    assert tokens[-1] == 0 and int((tokens == 0).sum()) == 1


def chat_settings(tmp_path: Path, tokenizer: str) -> TokenizeConfig:
    row = [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "1"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": row}) + "\n")
    corpus = CorpusConfig((str(tmp_path / "chat.jsonl"),), column="messages", chat=True)
    return TokenizeConfig(corpus, str(tmp_path / "chat"), tokenizer, workers=0)


@pytest.fixture
def own_tokenizer(qwen, tmp_path):
    """A tokenizer folder that a test may change."""
    shutil.copytree(qwen, tmp_path / "tokenizer")
    load_tokenizer.cache_clear()
    yield tmp_path / "tokenizer"
    load_tokenizer.cache_clear()


def test_another_chat_template_is_another_preparation(own_tokenizer, tmp_path):
    settings = chat_settings(tmp_path, str(own_tokenizer))
    run(settings)
    template = own_tokenizer / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    load_tokenizer.cache_clear()
    with pytest.raises(HydraError, match=r"chat\.json exists and comes from other inputs"):
        run(settings)


def test_other_special_tokens_are_another_preparation(corpus, own_tokenizer, tmp_path):
    settings = config(corpus, tmp_path / "out", str(own_tokenizer))
    bare = config(corpus, tmp_path / "bare", str(own_tokenizer), add_special_tokens=False)
    run(settings)
    run(bare)
    path = own_tokenizer / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    backend.save(str(path))
    load_tokenizer.cache_clear()
    with pytest.raises(HydraError, match=r"out\.json exists and comes from other inputs"):
        run(settings)
    assert "is complete" in run(bare)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "has no chat template"),
        ({"is_fast": False}, "is a slow tokenizer"),
    ],
)
def test_chat_needs_a_template_and_a_fast_tokenizer(qwen, tmp_path, monkeypatch, change, message):
    tokenizer = load_tokenizer(qwen)
    given = types.SimpleNamespace(chat_template=tokenizer.chat_template, is_fast=True)
    given.__dict__.update(change)
    monkeypatch.setattr(part_worker, "load_tokenizer", lambda *_: given)
    with pytest.raises(HydraError, match=f"--chat: the tokenizer .* {message}"):
        run(chat_settings(tmp_path, qwen))


def test_an_input_that_may_not_be_read_is_named(corpus, qwen, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(corpus_module, "file_probe", refuse)
    with pytest.raises(HydraError, match=r"cannot prepare .*Permission denied: .*corpus\.jsonl"):
        run(config(corpus, tmp_path / "out", qwen))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eod_token": "<|none|>"}, r"--eod-token '<\|none\|>' is not in the vocabulary"),
        ({"shard": (3, 3)}, r"--shard 3/3: the first number must be 0\.\.2"),
        ({"shard": (0, 5000)}, "has only .* units"),
        (
            {"tokenizer": "no/such/folder"},
            "tokenizer no/such/folder: no/such/folder is not a folder",
        ),
    ],
)
def test_wrong_options_are_named(corpus, qwen, tmp_path, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = dataclasses.replace(config(corpus, tmp_path / "out", qwen), **options)
    with pytest.raises(HydraError, match=message):
        run(settings)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_clean_error_and_the_run_can_resume(
    corpus, qwen, reference, tmp_path, monkeypatch
):
    settings = config(corpus, tmp_path / "out", qwen, unit_bytes=5_000)
    original, calls = parts_module.write_json_atomic, []

    def full(path, body):
        calls.append(path)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, body)

    monkeypatch.setattr(parts_module, "write_json_atomic", full)
    with pytest.raises(HydraError, match=r"the disk is full while writing .*out\.work"):
        run(settings)
    assert not (tmp_path / "out.bin").exists()
    run(settings)
    assert contents(tmp_path / "out") == contents(reference)


def test_unfinished_work_of_another_preparation_is_not_mixed_in(corpus, qwen, tmp_path):
    settings = config(corpus, tmp_path / "out", qwen)
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "plan.json").write_text('{"column": "content"}')
    with pytest.raises(HydraError, match=r"out\.work has unfinished work.*column"):
        run(settings)
    run(dataclasses.replace(settings, force=True))
    assert not (tmp_path / "out.work").exists()


def test_one_process_at_a_time_prepares_an_output(corpus, qwen, tmp_path, monkeypatch):
    import fcntl

    with open(tmp_path / "out.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(stream, fcntl.LOCK_UN)).start()
        run(config(corpus, tmp_path / "out", qwen))  # waits until ending workers have ended
    monkeypatch.setattr(tokenization, "_LOCK_PATIENCE", 0.2)
    with open(tmp_path / "more.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(HydraError, match="being prepared by another process"):
            run(config(corpus, tmp_path / "more", qwen))


def _kill_during(settings: TokenizeConfig, seconds: float) -> bool:
    """Run in a process group of its own, SIGKILL it after a while; returns whether it was still running."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(settings,))
    process.start()
    time.sleep(seconds)
    with_children = [psutil.Process(process.pid)]
    with_children += with_children[0].children(recursive=True)
    running = process.is_alive()
    process.kill()  # unlike os.kill, this does nothing if is_alive() has just reaped it
    process.join()
    _, alive = psutil.wait_procs(with_children, timeout=240)
    assert not alive, "workers outlived the killed main process"
    return running


def _kill_many(kills: int, settings: TokenizeConfig, seed: int) -> None:
    """Kill a preparation of ``out`` repeatedly; its result must equal ``whole``."""
    tmp_path = Path(settings.output).parent
    before = [path.name for path in tmp_path.iterdir()]
    whole = dataclasses.replace(settings, output=str(tmp_path / "whole"))
    begin = time.monotonic()
    run(whole)
    duration = time.monotonic() - begin
    rng = random.Random(seed)
    killed = 0
    for _ in range(20 * kills):
        killed += _kill_during(settings, rng.uniform(0.02, min(duration, 2 * duration / kills)))
        if killed >= kills:
            break
        if (tmp_path / "out.json").exists():
            for suffix in SUFFIXES:
                (tmp_path / f"out{suffix}").unlink()
    assert killed == kills
    run(settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*before, *(f"{name}{suffix}" for name in ("out", "whole") for suffix in SUFFIXES)]
    )


def test_killed_runs_resume_to_the_same_bytes(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_SYNC_SECONDS", 0.05)
    source = write_jsonl(tmp_path / "long.jsonl", 700, words=300)
    settings = config(source, tmp_path / "out", qwen, unit_bytes=60_000, workers=2)
    _kill_many(3, settings, seed=0)


@pytest.mark.slow
def test_twenty_kills_resume_to_the_same_bytes(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_SYNC_SECONDS", 0.05)
    source = write_jsonl(tmp_path / "long.jsonl", 6000, words=300)
    settings = config(source, tmp_path / "out", qwen, unit_bytes=60_000, workers=2)
    _kill_many(20, settings, seed=1)


@pytest.mark.slow
def test_killed_runs_of_a_stream_resume_to_the_same_bytes(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_SYNC_SECONDS", 0.05)
    source = write_jsonl(tmp_path / "long.jsonl", 4000, words=300)
    folder = write_data_set(tmp_path / "set", source, files=40)
    corpus = CorpusConfig((str(folder),), hub=True, streaming=True)
    _kill_many(3, TokenizeConfig(corpus, str(tmp_path / "out"), qwen, workers=2), seed=2)


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_between_the_final_renames_is_repaired(
    corpus, qwen, reference, tmp_path, monkeypatch, moved
):
    settings = config(corpus, tmp_path / "out", qwen)
    original, calls = os.replace, []

    class Killed(BaseException):
        pass

    def replace(source, target):
        if str(target).startswith(str(tmp_path / "out.")) and ".work" not in str(target):
            calls.append(target)
            if len(calls) > moved:
                raise Killed
        original(source, target)

    def rmtree(path, ignore_errors=False):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(parts_module.os, "replace", replace)
        patch.setattr(parts_module.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            run(settings)
    run(settings)
    assert contents(tmp_path / "out") == contents(reference)
    assert not (tmp_path / "out.work").exists()


def test_the_command_runs_from_any_folder(corpus, qwen, reference, tmp_path):
    script = Path(__file__).parents[2] / "data_prep" / "tokenize.py"
    command = [sys.executable, str(script), "--input", str(corpus), "--tokenizer", qwen]
    done = subprocess.run(
        [*command, "--output", "deep/er/out", "--workers", "2", "--unit-size", "0.02"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "300 documents" in done.stdout
    assert contents(tmp_path / "deep" / "er" / "out") == contents(reference)


# -- memory ------------------------------------------------------------------------------------------


def _peak(work: Callable[[], object]) -> int:
    """Peak bytes of Python and NumPy while ``work`` runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_an_assembly_does_not_grow_with_its_documents(tmp_path, monkeypatch):
    """Ten times the documents and tokens need the same memory: columns stay on disk."""
    monkeypatch.setattr(indexed, "_BLOCK", 1 << 10)
    monkeypatch.setattr(parts_module, "_COPY_BYTES", 1 << 12)
    peaks = []
    for number in (4, 40):
        work = tmp_path / str(number)
        work.mkdir()

        def assemble(work=work, number=number) -> None:
            assembler = parts_module.Assembler(work, np.uint16, has_modes=True)
            for part in range(number):
                writer = parts_module.PartWriter(parts_module.part_path(work, part), np.uint16)
                for _ in range(4000):
                    writer.add(b"abcdef", [2, 1], [0, 1])
                writer.finish()
                assembler.append(part)
            assembler.finish()

        peaks.append(_peak(assemble))
        os.replace(work / "all.idx", tmp_path / f"{number}.idx")
        os.replace(work / "all.bin", tmp_path / f"{number}.bin")
        opened = IndexedDocuments(str(tmp_path / str(number)))
        assert (opened.num_documents, opened.num_tokens) == (4000 * number, 12000 * number)
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_memory_of_a_preparation_does_not_grow_with_the_corpus(qwen, tmp_path, monkeypatch):
    """Eight times the text needs the same memory: one unit and the table's words are held."""
    monkeypatch.setattr(word_encoder, "_MAX_WORDS", 1 << 8)
    peaks = []
    for documents in (400, 400, 3200):  # the first run loads what is loaded once
        source = write_jsonl(tmp_path / "corpus.jsonl", documents)
        settings = config(source, tmp_path / "out", qwen, force=True)
        peaks.append(_peak(functools.partial(run, settings)))
    assert source.stat().st_size > 2 * peaks[1] / 8  # large enough to show if all of it were kept
    assert peaks[2] < 1.2 * peaks[1], peaks


def test_the_table_of_words_is_bounded(qwen, monkeypatch):
    monkeypatch.setattr(word_encoder, "_MAX_WORDS", 100)
    encoder = word_encoder.WordEncoder(load_tokenizer(qwen), np.int32)
    text = " ".join(
        f"w{n:04x}".translate(str.maketrans("0123456789", "ghijklmnop")) for n in range(999)
    )
    assert encoder.encode(text) == encoder._exact(text)
    assert len(encoder._words) <= 100
    before = len(encoder._words)
    encoder.encode("x" * 10_000)
    assert all(len(word) < 100 for word in encoder._words)
    assert len(encoder._words) <= before + 1
