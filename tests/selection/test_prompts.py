"""Aligned pairs, batches, JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.selection.prompts import (
    PromptPair,
    make_batches,
    pair_from_ids,
    pair_from_text,
    prompts_fingerprint,
    read_jsonl,
    span_weights,
    text_encoder,
)
from tests.selection.helpers import byte_tokenizer, random_pairs


def test_a_pair_must_be_aligned_and_different() -> None:
    with pytest.raises(HydraError, match="not aligned: 2 and 1"):
        PromptPair((1, 2), (1,), (3,), (4,))
    with pytest.raises(HydraError, match="the same"):
        PromptPair((1, 2), (1, 2), (3,), (4,))
    with pytest.raises(HydraError, match="begin with the same token"):
        PromptPair((1, 2), (1, 3), (4, 5), (4, 6))
    with pytest.raises(HydraError, match="same number of tokens, at least one: 2 and 1"):
        PromptPair((1, 2), (1, 3), (4, 5), (6,))
    pair = PromptPair((1, 2, 3), (1, 5, 3), (3, 7), (4, 7))
    assert (pair.first_difference, pair.num_tokens) == (1, 4)


def test_answers_are_asked_from_where_they_differ() -> None:
    pair = pair_from_ids([1, 2], [1, 3], [7, 8, 9, 6], [7, 8, 4, 5, 3])
    assert pair == PromptPair((1, 2, 7, 8), (1, 3, 7, 8), (9, 6), (4, 5))
    assert pair_from_ids([1, 2], [1, 3], [7, 8], [7]) is None
    assert pair_from_ids([1, 2], [1, 2], [7], [8]) is None
    assert pair_from_ids([1, 2], [1], [7], [8]) is None


def test_text_pairs_decode_to_their_text() -> None:
    tokenizer = byte_tokenizer()
    encode = text_encoder(tokenizer)
    pair = pair_from_text(encode, "code 471 is", "code 983 is", " 471", " 493")
    assert pair is not None
    assert tokenizer.decode(pair.clean) == "code 471 is 4"
    assert tokenizer.decode(pair.corrupted) == "code 983 is 4"
    assert tokenizer.decode([*pair.answer, *pair.wrong]) == "7193"
    assert pair_from_text(encode, "a", "b", "12", "345", equal=True) is None
    cut = pair_from_text(encode, "a", "b", "12", "345")
    assert cut is not None and tokenizer.decode(cut.wrong) == "34"
    assert pair_from_text(encode, "ab", "abc", "d", "e") is None


def test_batches_hold_every_kept_pair_once_and_respect_the_size() -> None:
    pairs = random_pairs([9, 30, 12, 9, 30, 14, 10], first=2)
    keep = [0, 1, 2, 4, 5, 6]
    batches = make_batches(pairs, 70, keep)
    assert sorted(i for batch in batches for i in batch.index) == keep
    for batch in batches:
        assert len(batch.index) == 1 or 2 * batch.clean.numel() <= 70
        assert batch.shared_prefix == min(pairs[i].first_difference for i in batch.index)
        for row, i in enumerate(batch.index):
            pair, length = pairs[i], pairs[i].num_tokens
            count = len(pair.answer)
            assert tuple(batch.clean[row, :length].tolist()) == pair.clean + pair.answer[:-1]
            corrupted = tuple(batch.corrupted[row, :length].tolist())
            assert corrupted == pair.corrupted + pair.answer[:-1]
            assert tuple(batch.answer[row, :count].tolist()) == pair.answer
            assert tuple(batch.wrong[row, :count].tolist()) == pair.wrong
            places = batch.answer_positions[row].tolist()
            assert places[:count] == list(range(len(pair.clean) - 1, length))
            assert set(places[count:]) <= {length - 1}
            assert batch.weights[row].sum().item() == pytest.approx(1)
            assert batch.weights[row, count:].abs().sum() == 0
    assert any(len(batch.index) > 1 for batch in batches)


def test_the_span_readout_weighs_later_tokens_less() -> None:
    assert span_weights(1) == [1.0]
    assert span_weights(3) == pytest.approx([1 / 2.71, 0.9 / 2.71, 0.81 / 2.71])


def test_the_fingerprint_sees_every_token() -> None:
    pairs = random_pairs([5, 6])
    changed = [pairs[0], PromptPair(pairs[1].clean, pairs[1].corrupted, (1,), (2,))]
    assert prompts_fingerprint({"a": pairs}) == prompts_fingerprint({"a": list(pairs)})
    assert prompts_fingerprint({"a": pairs}) != prompts_fingerprint({"a": changed})
    assert prompts_fingerprint({"a": pairs}) != prompts_fingerprint({"b": pairs})


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def test_jsonl_takes_text_and_ids(tmp_path: Path) -> None:
    ids = {"clean": [1, 2, 3], "corrupted": [1, 4, 3], "answer": 5, "wrong_answer": [6]}
    text = {"clean": "a=1 a=", "corrupted": "a=2 a=", "answer": "1", "wrong_answer": "2"}
    path = write(tmp_path / "p.jsonl", ids, text)
    first, second = read_jsonl(path, text_encoder(byte_tokenizer()))
    assert first == PromptPair((1, 2, 3), (1, 4, 3), (5,), (6,))
    assert len(second.clean) == 6


def test_a_jsonl_line_ends_at_its_newline_only(tmp_path: Path) -> None:
    row = {"clean": "a=1\u2028a=", "corrupted": "a=2\u2028a=", "answer": "1", "wrong_answer": "2"}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert len(read_jsonl(path, text_encoder(byte_tokenizer()))) == 1


GOOD = {"clean": [1, 2], "corrupted": [1, 3], "answer": 2, "wrong_answer": 3}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"clean": [1]}, "line 1: needs an object with the fields clean, corrupted"),
        (GOOD | {"corrupted": [1]}, "line 1: clean and corrupted must have the same number"),
        (GOOD | {"answer": 3}, "neither answer may be"),
        (GOOD | {"answer": [-1]}, "line 1: answer: needs token ids"),
        (GOOD | {"clean": "text"}, "line 1: clean: needs token ids"),
        (dict.fromkeys(GOOD, "text"), "the model folder has no tokenizer"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(HydraError, match=message):
        read_jsonl(write(tmp_path / "p.jsonl", row), None)


def test_jsonl_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(HydraError, match=r"none\.jsonl cannot be read"):
        read_jsonl(tmp_path / "none.jsonl", None)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(HydraError, match="no prompts in the file"):
        read_jsonl(tmp_path / "empty.jsonl", None)
    (tmp_path / "bad.jsonl").write_text("\n{")
    with pytest.raises(HydraError, match="line 2: not valid JSON"):
        read_jsonl(tmp_path / "bad.jsonl", None)
