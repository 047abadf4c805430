"""Aligned prompt pairs: a clean and a corrupted prompt of equal length that differ in the requested fact.

The result of a run is the *span readout* (HydraHead, equation 9): the right answer's tokens are the input
(teacher forcing), and m = Σ_j λ^j (z_j[a⁺_j] − z_j[a⁻_j]) / Σ_j λ^j over the tokens of the answer, z logits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import HydraError

Encode = Callable[[str], list[int]]

DECAY = 0.9
"""λ of the span readout: later tokens of the answer have less weight."""


@dataclasses.dataclass(frozen=True)
class PromptPair:
    """A question in a clean and a corrupted form.

    Attributes:
        clean, corrupted: token ids of equal length, before the answer. They differ in at least one position.
        answer: tokens of the right answer to ``clean``.
        wrong: tokens of the wrong answer, usually the right answer to ``corrupted``. It has the same number of
            tokens and another first token (a common beginning of both answers belongs to the prompts).
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: tuple[int, ...]
    wrong: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupted):
            raise HydraError(
                f"clean and corrupted are not aligned: {len(self.clean)} and {len(self.corrupted)} tokens"
            )
        if self.clean == self.corrupted:
            raise HydraError("clean and corrupted are the same")
        if not self.answer or len(self.answer) != len(self.wrong):
            raise HydraError(
                "answer and wrong_answer must have the same number of tokens, at least one: "
                f"{len(self.answer)} and {len(self.wrong)}"
            )
        if self.answer[0] == self.wrong[0]:
            raise HydraError("answer and wrong_answer begin with the same token")

    @property
    def largest_token(self) -> int:
        """The largest token id of both prompts and answers."""
        return max(*self.clean, *self.corrupted, *self.answer, *self.wrong)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that a run reads: the prompt, and the answer without its last token."""
        return len(self.clean) + len(self.answer) - 1

    @property
    def first_difference(self) -> int:
        """Position of the first token in which the two prompts differ."""
        return next(
            i for i, (a, b) in enumerate(zip(self.clean, self.corrupted, strict=True)) if a != b
        )


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompt pairs of similar length, padded on the right (a causal model never sees the padding).

    Both prompts are followed by the right answer without its last token. The longest answer has A tokens.
    Shorter answers repeat their last position with weight 0.

    Attributes:
        index: positions of the pairs in their task's list, ``[P]``.
        clean, corrupted: token ids ``[P, T]``, int64.
        answer_positions: positions of the logits of each answer token, ``[P, A]``, ascending.
        answer, wrong: token ids ``[P, A]``.
        weights: λ^j / Σ_j λ^j, ``[P, A]`` float32.
        shared_prefix: number of tokens at the start that clean and corrupted share in every pair.
    """

    index: tuple[int, ...]
    clean: torch.Tensor
    corrupted: torch.Tensor
    answer_positions: torch.Tensor
    answer: torch.Tensor
    wrong: torch.Tensor
    weights: torch.Tensor
    shared_prefix: int

    def at_answers(self, x: torch.Tensor) -> torch.Tensor:
        """Pick the answer positions of whole prompts: ``[P, T, D]`` to ``[P, A, D]``."""
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[rows, self.answer_positions.to(x.device)]

    def answered(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether ``tokens`` ``[P, A]`` equal the answer in every position, ``[P]``."""
        return ((tokens == self.answer) | (self.weights == 0)).all(-1)


def span_weights(count: int) -> list[float]:
    """λ^j / Σ_j λ^j for the ``count`` tokens of an answer."""
    powers = [DECAY**j for j in range(count)]
    return [power / sum(powers) for power in powers]


def make_batches(
    pairs: Sequence[PromptPair], tokens_per_batch: int, keep: Sequence[int] | None = None
) -> list[PromptBatch]:
    """Cut pairs into batches. The result depends only on the arguments, so all ranks get the same batches.

    Args:
        pairs: all pairs of a capability.
        tokens_per_batch: maximum number of tokens of clean and corrupted prompts in a batch.
        keep: indices of the pairs to use; default: all.
    """
    kept = range(len(pairs)) if keep is None else keep
    order = sorted(kept, key=lambda i: (pairs[i].num_tokens, pairs[i].first_difference, i))
    groups: list[list[int]] = []
    for i in order:
        # Sorted by length, so the new pair is the longest of its batch.
        length = pairs[i].num_tokens
        if groups and 2 * length * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_batch(pairs, group) for group in groups]


def _batch(pairs: Sequence[PromptPair], group: list[int]) -> PromptBatch:
    chosen = [pairs[i] for i in group]
    length = max(p.num_tokens for p in chosen)
    span = max(len(p.answer) for p in chosen)

    def runs(prompts: list[tuple[int, ...]]) -> torch.Tensor:
        rows = [prompt + p.answer[:-1] for prompt, p in zip(prompts, chosen, strict=True)]
        return torch.tensor([row + (0,) * (length - len(row)) for row in rows])

    def spans(answers: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor([answer + answer[-1:] * (span - len(answer)) for answer in answers])

    places = [tuple(range(len(p.clean) - 1, p.num_tokens)) for p in chosen]
    weights = [span_weights(len(p.answer)) + [0.0] * (span - len(p.answer)) for p in chosen]
    return PromptBatch(
        index=tuple(group),
        clean=runs([p.clean for p in chosen]),
        corrupted=runs([p.corrupted for p in chosen]),
        answer_positions=spans(places),
        answer=spans([p.answer for p in chosen]),
        wrong=spans([p.wrong for p in chosen]),
        weights=torch.tensor(weights),
        shared_prefix=min(p.first_difference for p in chosen),
    )


def prompts_fingerprint(prompts: dict[str, list[PromptPair]]) -> str:
    """Hash of all capabilities' token ids."""
    body = {name: [dataclasses.astuple(p) for p in pairs] for name, pairs in prompts.items()}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


# -- from text ------------------------------------------------------------------------------------


def text_encoder(tokenizer: Any) -> Encode:
    """Function ``text -> ids`` for the start of a document, with the begin token if the tokenizer adds one."""
    begin = tokenizer.bos_token_id
    default = tokenizer("a").input_ids
    prefix = [begin] if begin is not None and default[:1] == [begin] else []

    def encode(text: str) -> list[int]:
        return prefix + tokenizer.encode(text, add_special_tokens=False)

    return encode


def pair_from_text(
    encode: Encode, clean: str, corrupted: str, answer: str, wrong: str, equal: bool = False
) -> PromptPair | None:
    """Tokenize a pair.

    Tokens at the beginning of both answers are appended to both prompts, because they do not distinguish the
    answers. Without them every readout changes by the same factor, so no effect changes.

    Args:
        equal: require answers with the same number of tokens; else the longer answer is cut.

    Returns:
        ``None`` if this tokenizer does not align the texts: the prompts have different lengths, or one answer
        is the beginning of the other.
    """
    clean_ids, corrupted_ids = encode(clean), encode(corrupted)
    right = _continuation(encode, clean, clean_ids, answer)
    other = _continuation(encode, clean, clean_ids, wrong)
    if equal and len(right) != len(other):
        return None
    return pair_from_ids(clean_ids, corrupted_ids, right, other)


def pair_from_ids(
    clean: Sequence[int], corrupted: Sequence[int], answer: Sequence[int], wrong: Sequence[int]
) -> PromptPair | None:
    """As :func:`pair_from_text`, for token ids."""
    length = min(len(answer), len(wrong))
    shared = 0
    while shared < length and answer[shared] == wrong[shared]:
        shared += 1
    if shared == length or len(clean) != len(corrupted) or list(clean) == list(corrupted):
        return None
    common = tuple(answer[:shared])
    return PromptPair(
        tuple(clean) + common,
        tuple(corrupted) + common,
        tuple(answer[shared:length]),
        tuple(wrong[shared:length]),
    )


def _continuation(encode: Encode, text: str, ids: list[int], answer: str) -> list[int]:
    whole = encode(text + answer)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    # The tokenizer merges tokens of prompt and answer. Then encode the answer separately.
    begin = encode("")
    return encode(answer)[len(begin) :]


# -- the user's own JSONL --------------------------------------------------------------------------


def read_jsonl(path: str | os.PathLike[str], encode: Encode | None) -> list[PromptPair]:
    """Pairs from a file with one object a line: ``clean, corrupted, answer, wrong_answer``.

    Every field is a string, or a list of token ids (answers also a single id). Strings need
    ``encode``.

    Raises:
        HydraError: a field cannot be used; names file, line and field.
    """
    try:
        # Not splitlines: it splits at U+2028 and similar characters, which JSON strings may contain.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"prompts {path} cannot be read: {error}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            pairs.append(_pair_from_line(line, f"{path}, line {number}", encode))
    if not pairs:
        raise HydraError(f"prompts {path}: no prompts in the file")
    return pairs


def _pair_from_line(line: str, where: str, encode: Encode | None) -> PromptPair:
    try:
        body = json.loads(line)
    except ValueError as error:
        raise HydraError(f"{where}: not valid JSON: {error}") from None
    fields = ("clean", "corrupted", "answer", "wrong_answer")
    if not isinstance(body, dict) or any(field not in body for field in fields):
        raise HydraError(f"{where}: needs an object with the fields {', '.join(fields)}")
    values = [body[field] for field in fields]
    if all(isinstance(value, str) for value in values):
        if encode is None:
            raise HydraError(
                f"{where}: the prompts are text, but the model folder has no tokenizer"
            )
        pair = pair_from_text(encode, *values)
    else:
        pair = pair_from_ids(*(_ids(body[f], f"{where}: {f}") for f in fields))
    if pair is None:
        raise HydraError(
            f"{where}: clean and corrupted must have the same number of tokens and differ, and "
            "neither answer may be the beginning of the other"
        )
    return pair


def _ids(value: Any, where: str) -> list[int]:
    ids = [value] if isinstance(value, int) else value
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise HydraError(f"{where}: needs token ids (or make all four fields strings)")
    return ids
