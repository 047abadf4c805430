"""The commands that show and pack data."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_hydra.config import to_dict
from megatron_hydra.config.run import BatchConfig, DataConfig, SourceConfig, ValidationConfig
from megatron_hydra.data.corpus import CorpusConfig
from megatron_hydra.data.data_options import load_data_sections
from megatron_hydra.data.document import Document
from megatron_hydra.data.indexed import IndexedDocuments
from megatron_hydra.data.inspection import (
    describe_learning,
    describe_lengths,
    find_duplicates,
    learned_in_packs,
    plot_lengths,
    show_pack,
)
from megatron_hydra.data.manifest import Manifest
from megatron_hydra.data.sources import IndexedSource
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.data.tokenization import tokenize
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.data.validation import ValidationStream
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import load_tokenizer
from tests.data.corpora import numbered_documents, write_indexed, write_jsonl


def command(name: str):
    """Load the ``main`` of a script in ``data_prep``."""
    path = Path(__file__).parents[2] / "data_prep" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"data_prep_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizers) -> str:
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "a.jsonl", 40)
    corpus = CorpusConfig((str(source), str(source)))
    settings = TokenizeConfig(corpus, str(folder / "a"), tokenizers["qwen"], workers=0)
    tokenize(settings, lambda _: None)
    return str(folder / "a")


def test_a_pack_is_shown_with_its_bounds(qwen):
    tokenizer = load_tokenizer(qwen)
    first = Document.all_trainable(np.array(tokenizer("the of and").input_ids))
    answer = np.array(tokenizer("what? that it").input_ids)
    trainable = np.arange(len(answer)) >= len(answer) - 2
    shown = show_pack([first, Document(answer, trainable)], 32, tokenizer, 100)
    used = len(first) + len(answer)
    assert f"{used} of 32 tokens, 2 documents, {32 - used} padding" in shown
    assert f"document 0: tokens 0..{len(first) - 1}, {len(first) - 1} learned" in shown
    assert "the of and" in shown
    assert f"learned: {tokenizer.decode(answer[-2:])!r}" in shown
    assert f"padding: tokens {used}..31" in shown
    assert "characters ...]" in show_pack([first], 32, tokenizer, 4)


def test_packs_without_a_learned_token_are_counted(qwen, tmp_path, capsys):
    """A long prompt fills packs of its own; the command counts the packs that training reads."""
    rows = [
        [{"role": "user", "content": "the of and " * words}, {"role": "assistant", "content": "to"}]
        for words in (1, 30, 2, 60, 1)
    ]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    corpus = CorpusConfig((str(source),), column="messages", chat=True)
    tokenize(TokenizeConfig(corpus, str(tmp_path / "chat"), qwen, workers=0), lambda _: None)
    data = DataConfig(packing="split_long", sequence_length=32)
    opened = IndexedSource(SourceConfig(path=str(tmp_path / "chat")), data, seed=1, vocab_size=500)
    learned = learned_in_packs(opened, 1000)
    expected = []
    for number in range(len(opened.packs)):
        documents = [opened.documents.read_piece(*piece) for piece in opened.packs.pieces(number)]
        expected.append(sum(int(document.trainable[1:].sum()) for document in documents))
    assert learned.tolist() == expected
    none = expected.count(0)
    assert 0 < none < len(expected)
    first = expected.index(0)
    arguments = ["--input", str(tmp_path / "chat"), "--sequence-length", "32", "--samples", "0"]
    assert command("inspect")(arguments) == 0
    printed = capsys.readouterr().out
    share = f"{none} of {len(expected)} ({none / len(expected):.2%}): numbers {first}"
    assert f"packs without a learned token: {share}" in printed
    assert describe_learning(learned[:1], len(learned)).startswith(
        "packs without a learned token (among the first 1 only: --most)"
    )


def test_all_of_a_text_is_learned_but_what_begins_a_piece(tmp_path):
    prefix, _ = write_indexed(tmp_path / "text", numbered_documents([5, 1, 3]))
    opened = IndexedSource(
        SourceConfig(path=prefix), DataConfig(sequence_length=5), seed=1, vocab_size=500
    )
    assert sorted(learned_in_packs(opened, 10).tolist()) == [2, 4]


def test_duplicates_are_found(tmp_path):
    prefix, _ = write_indexed(tmp_path / "d", [[1, 2], [3], [], [1, 2], [3], [1], [1, 2]])
    documents = IndexedDocuments(prefix)
    assert find_duplicates(documents, 100) == (3, 5, [(0, 3), (1, 4), (0, 6)])
    assert find_duplicates(documents, 3) == (1, 2, [(0, 3)])


def test_inspect_says_where_it_stopped_looking_for_duplicates(prepared, capsys):
    arguments = ["--input", prepared, "--samples", "0", "--duplicates"]
    assert command("inspect")([*arguments, "--most", "60"]) == 0
    assert "duplicates (among the first 60 only: --most): 20 documents" in capsys.readouterr().out
    assert command("inspect")([*arguments, "--most", "80"]) == 0
    assert "duplicates: 40 documents" in capsys.readouterr().out


def test_lengths_are_described_and_drawn(tmp_path):
    lengths = np.array([0, *range(1, 102)])
    assert "min 1, 10 % 11, median 51, 90 % 91, 99 % 100, max 101, mean 51" in describe_lengths(
        lengths
    )
    plot_lengths(lengths, 64, "title", str(tmp_path / "h.png"))
    assert (tmp_path / "h.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        plot_lengths(lengths, 64, "title", str(tmp_path / "folder"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "h.png"]


def test_inspect_shows_everything(prepared, tmp_path, capsys):
    arguments = ["--input", prepared, "--samples", "2", "--duplicates", "--verify", "--steps", "9"]
    arguments += ["--histogram", str(tmp_path / "h.png"), "--sequence-length", "256"]
    assert command("inspect")(arguments) == 0
    shown = capsys.readouterr().out
    for words in (
        "80 documents",
        "padding waste",
        "duplicates: 40 documents",
        "SHA-256 of .bin and .idx match the manifest",
        "9 steps of 256 tokens read",
        "=== sample 1",
        "--- document 0: tokens 0..",
    ):
        assert words in shown
    assert (tmp_path / "h.png").exists()


def test_inspect_shows_the_blend_of_a_config(prepared, qwen, tmp_path, capsys):
    path = tmp_path / "data.yaml"
    path.write_text(
        f"data:\n  sequence_length: 512\n  packing: split_long\n  tokenizer: {qwen}\n  blend:\n"
        f"    - {{path: {prepared}, weight: 1.0}}\n"
        "    - {kind: synthetic, task: needles, weight: 1.0}\n"
        "batch: {global_batch_size: 4}\n"
    )
    assert load_data_sections(str(path)).data.blend[0] == SourceConfig(path=prepared)
    assert command("inspect")(["--config", str(path), "--samples", "2", "--steps", "5"]) == 0
    shown = capsys.readouterr().out
    assert "5 steps of 2,048 tokens read" in shown
    assert "needles: 5,120 tokens, 0.00 epochs" in shown
    assert "learned: ' " in shown
    path.write_text("data: {sequence_lenght: 3}")
    assert command("inspect")(["--config", str(path)]) == 2
    assert "sequence_length" in capsys.readouterr().err
    with pytest.raises(HydraError, match=r"absent\.yaml cannot be read"):
        load_data_sections(str(tmp_path / "absent.yaml"))


def test_inspect_asks_for_a_tokenizer_and_finds_damage(tmp_path, prepared, capsys):
    prefix, _ = write_indexed(tmp_path / "bare", numbered_documents([5]))
    assert command("inspect")(["--input", prefix]) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    manifest = Path(prepared + ".json")
    text = manifest.read_text()
    sha256 = text.split('"sha256": "')[1][:64]
    manifest.write_text(text.replace(sha256, "0" * 64))
    assert command("inspect")(["--input", prepared, "--verify", "--samples", "0"]) == 2
    assert "a.bin is damaged" in capsys.readouterr().err
    manifest.write_text(text)


def test_pack_builds_the_index_that_training_finds(prepared, tmp_path, capsys):
    cache = tmp_path / "cache"
    arguments = ["--input", prepared, "--sequence-length", "128", "--packing", "split_long"]
    arguments += ["--cache-dir", str(cache)]
    assert command("pack")(arguments) == 0
    assert "80 documents" in capsys.readouterr().out
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    before = (folder / "pack.json").stat().st_mtime_ns
    inspect = ["--input", prepared, "--sequence-length", "128", "--cache-dir", str(cache)]
    assert command("inspect")(inspect) == 0
    assert (folder / "pack.json").stat().st_mtime_ns == before
    assert command("pack")([*arguments, "--upsample", "0=0", "50=2"]) == 0
    assert "upsampling repeats" in capsys.readouterr().out
    assert command("pack")([*arguments, "--upsample", "50:2"]) == 2
    assert "--upsample 50:2" in capsys.readouterr().err


def test_pack_builds_both_indices_of_data_of_which_some_is_held_out(prepared, tmp_path, capsys):
    data = DataConfig(
        blend=(SourceConfig(path=str(prepared)),), sequence_length=128, packing="split_long",
        cache_dir=str(tmp_path / "cache"), held_out=0.2,
    )  # fmt: skip
    config = tmp_path / "data.yaml"
    config.write_text(json.dumps({"data": to_dict(data)}))
    assert command("pack")(["--config", str(config)]) == 0
    trained, held_out = capsys.readouterr().out.splitlines()
    counts = [int(re.search(r"(\d+) documents", line).group(1)) for line in (trained, held_out)]
    assert sum(counts) == 80
    assert 0 < counts[1] < counts[0]
    assert "held out: " in held_out
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len([name for name in before if not name.startswith(".")]) == 2
    rank = {"dp_rank": 0, "dp_size": 1, "vocab_size": 100_000}
    PackedStream(data, BatchConfig(1, 1), **rank)
    validation = ValidationConfig(interval=1, sequences=1)
    ValidationStream(data, validation, micro_batch_size=1, **rank)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before
    config.write_text(json.dumps({"data": to_dict(dataclasses.replace(data, held_out=1.5))}))
    assert command("pack")(["--config", str(config)]) == 2
    assert "data.held_out is 1.5" in capsys.readouterr().err


def test_options_replace_what_the_config_says(prepared, qwen, tmp_path, capsys):
    path = tmp_path / "data.yaml"
    path.write_text(
        f"data: {{sequence_length: 512, packing: concat_chunk, tokenizer: {qwen}, "
        f"blend: [{{path: {prepared}}}, {{kind: synthetic, task: needles}}]}}\n"
    )
    options = ["--config", str(path), "--sequence-length", "256", "--packing", "split_long"]
    options += ["--seed", "7", "--upsample", "0=2", "--cache-dir", str(tmp_path / "cache")]
    assert command("pack")(options) == 0
    assert "upsampling repeats 80" in capsys.readouterr().out
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert folder.name.startswith("a-256-split_long-")
    assert json.loads((folder / "pack.json").read_text())["recipe"]["seed"] == 7
    before = (folder / "pack.json").stat().st_mtime_ns
    assert command("inspect")([*options, "--steps", "1"]) == 0
    assert "1 steps of 2,048 tokens" in capsys.readouterr().out
    assert (folder / "pack.json").stat().st_mtime_ns == before
    assert command("pack")(["--config", str(path)]) == 0
    (from_config,) = Path(prepared).parent.glob(".packs/a-512-concat_chunk-*")
    assert from_config.is_dir()


def test_pack_and_inspect_have_the_same_defaults(prepared, tmp_path, capsys):
    options = ["--input", prepared, "--cache-dir", str(tmp_path / "cache")]
    assert command("pack")(options) == 0
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert folder.name.startswith("a-4096-split_long-")
    assert command("inspect")(options) == 0
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder]


def test_inspect_takes_the_tokenizer_of_the_manifest_at_its_revision(prepared, monkeypatch, qwen):
    calls = []
    main = command("inspect")
    tokenizer = load_tokenizer(qwen)
    monkeypatch.setitem(
        main.__wrapped__.__globals__,
        "load_tokenizer",
        lambda *arguments, **options: calls.append((arguments, options)) or tokenizer,
    )
    manifest = Manifest.load(prepared + ".json")
    pinned = {**manifest.tokenizer, "revision": "abc"}
    dataclasses.replace(manifest, tokenizer=pinned).save(prepared + ".json")
    try:
        assert main(["--input", prepared, "--samples", "0", "--trust-remote-code"]) == 0
    finally:
        manifest.save(prepared + ".json")
    assert calls == [((qwen, "abc", True), {})]


def test_merge_joins_listed_pairs(prepared, tmp_path, capsys):
    output = str(tmp_path / "m")
    assert command("merge")(["--input", prepared, prepared, "--output", output]) == 0
    assert "2 pairs, 160 documents" in capsys.readouterr().out
    merged, single = IndexedDocuments(output), IndexedDocuments(prepared)
    assert merged.num_tokens == 2 * single.num_tokens
    tokens = single.read(0, single.num_tokens)
    assert np.array_equal(merged.read(0, merged.num_tokens), np.concatenate([tokens, tokens]))
    assert command("merge")(["--shards", str(tmp_path / "none")]) == 2
    assert "found no shards" in capsys.readouterr().err


def test_every_part_of_a_blend_has_its_own_histogram(prepared, qwen, tmp_path, capsys):
    other, _ = write_indexed(tmp_path / "other", numbered_documents([5, 9, 40]))
    config = tmp_path / "run.yaml"
    (tmp_path / "data.yaml").write_text(
        f"data: {{tokenizer: {qwen}, sequence_length: 512, packing: split_long, "
        f"blend: [{{path: {prepared}}}, {{path: {other}}}]}}\n"
    )
    config.write_text("include: data.yaml\nbatch: {global_batch_size: 2}\n")
    arguments = ["--config", str(config), "--histogram", str(tmp_path / "h.png"), "--steps", "3"]
    assert command("inspect")(arguments) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["h-0.png", "h-1.png"]
    assert "3 steps of 1,024 tokens read" in capsys.readouterr().out
