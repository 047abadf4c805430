"""Load calibration tokens: a file of the user, or a short bundled text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.config.student import StudentStart
from megatron_hydra.conversion.calibration_text import TEXT
from megatron_hydra.errors import HydraError

SEQUENCE_LENGTH = 1024
TOKEN_KEYS = ("tokens", "input_ids")
ADVICE = (
    "give token ids with --calibration-file FILE.jsonl ({'tokens': [ids]} lines), or --no-calibration for "
    "γ = 1"
)
"""What to do without a tokenizer."""


def calibration_batches(
    tokenizer: Any | None,
    vocab_size: int,
    file: str | os.PathLike[str] | None = None,
    max_tokens: int = StudentStart.calibration_tokens,
    length: int = SEQUENCE_LENGTH,
    advice: str = ADVICE,
) -> list[torch.Tensor]:
    """Token sequences for calibration.

    Args:
        tokenizer: of the model, or ``None``; without it, ``file`` must have token ids.
        vocab_size: V, to check ids against.
        file: plain text, or ``.jsonl`` of ``{"text": …}``, ``{"tokens": [ids]}`` or ``[ids]``
            lines; ``None`` for a bundled English text.
        max_tokens: largest number of tokens.
        length: of the longest sequence.
        advice: what to do without a tokenizer, for the message.

    Returns:
        int64 ``[1, S]`` tensors, S at most ``length``, each from one document.

    Raises:
        HydraError: the file has text but there is no tokenizer, a line has another form, or a token id is
            outside the vocabulary.
    """
    batches: list[torch.Tensor] = []
    left = max_tokens
    for ids in _documents(tokenizer, file, advice):
        if left == 0:
            break
        for start in range(0, len(ids), length):
            piece = ids[start : start + min(length, left)]
            if len(piece) == 0:
                break
            _check_ids(piece, vocab_size, file)
            batches.append(torch.tensor([piece], dtype=torch.int64))
            left -= len(piece)
    if not batches:
        raise HydraError(f"calibration file {file} holds no tokens")
    return batches


def _check_ids(ids: list[int], vocab_size: int, file: Any) -> None:
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise HydraError(
            f"{file or 'the tokenizer'}: token id {bad} does not exist, the vocabulary has "
            f"{vocab_size}"
        )


def _documents(
    tokenizer: Any | None, file: str | os.PathLike[str] | None, advice: str
) -> Iterator[list[int]]:
    if file is None:
        yield _encode(tokenizer, TEXT, "the bundled calibration text", advice)
        return
    path = Path(file)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"calibration file {path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        yield _encode(tokenizer, text, str(path), advice)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _line(tokenizer, line, f"{path}, line {number}", advice)


def _line(tokenizer: Any | None, line: str, where: str, advice: str) -> list[int]:
    try:
        body = json.loads(line)
    except ValueError as error:
        raise HydraError(f"{where} is not valid JSON: {error}") from None
    if isinstance(body, dict) and isinstance(body.get("text"), str):
        return _encode(tokenizer, body["text"], where, advice)
    if isinstance(body, dict):
        body = next((body[key] for key in TOKEN_KEYS if key in body), None)
    if isinstance(body, list) and all(type(i) is int for i in body):
        return body
    raise HydraError(f"{where} must be {{'text': …}}, {{'tokens': [ids]}} or [ids]")


def _encode(tokenizer: Any | None, text: str, where: str, advice: str) -> list[int]:
    if tokenizer is None:
        raise HydraError(f"the model folder has no tokenizer to encode {where}: {advice}")
    return list(tokenizer(text)["input_ids"])
