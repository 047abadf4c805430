"""Running a model on samples: greedy continuations, and answers inside a given sequence."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.tasks import GenerationSample, Sample, ScoredSample

CHUNKABLE = ("hydrahead", "qwen3", "qwen2", "llama", "mistral")
"""Model types known to give the same result for a prompt passed in chunks as in one pass.

Some recurrent models ignore their state when more than one token follows it; what is not known here
is passed in one pass unless the user asks otherwise.
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The score of one sample.

    Attributes:
        scores: one number 0 … 1 for each answer (a generation sample has one in all).
        depths: the depth of each, or ``None``.
        prediction: what the model said, for a person to read.
        expected: what was asked for.
    """

    scores: tuple[float, ...]
    depths: tuple[float | None, ...]
    prediction: str
    expected: str


def prefill_chunk(model: Any, asked: int | None) -> int:
    """Tokens passed at a time (0: all): as asked, else 8192 where that is known to be exact."""
    if asked is not None:
        return asked
    return 8192 if getattr(model.config, "model_type", "") in CHUNKABLE else 0


def score_samples(
    model: Any, tokenizer: Any, samples: Sequence[Sample], batch_tokens: int, chunk: int
) -> Iterator[Outcome]:
    """Score samples in order; batches hold at most ``batch_tokens`` tokens (one sample at least).

    Raises:
        HydraError: a sample of text without a tokenizer, or token ids beyond the vocabulary.
    """
    batch: list[Any] = []
    widest = 0
    for sample in samples:
        item = _encoded(sample, tokenizer, model)
        width = max(widest, item.width)
        mixed = batch and type(batch[0]) is not type(item)
        if batch and (mixed or width * (len(batch) + 1) > batch_tokens):
            yield from _score_batch(model, tokenizer, batch, chunk)
            batch, width = [], item.width
        batch.append(item)
        widest = width
    if batch:
        yield from _score_batch(model, tokenizer, batch, chunk)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    sample: GenerationSample
    ids: list[int]

    @property
    def width(self) -> int:
        return len(self.ids) + self.sample.max_new_tokens


@dataclasses.dataclass(frozen=True)
class _Sequence:
    sample: ScoredSample
    ids: list[int]

    @property
    def width(self) -> int:
        return len(self.ids)


def _encoded(sample: Sample, tokenizer: Any, model: Any) -> _Prompt | _Sequence:
    item: _Prompt | _Sequence
    if isinstance(sample, ScoredSample):
        item = _Sequence(sample, [int(t) for t in sample.tokens])
    elif isinstance(sample.prompt, str):
        if tokenizer is None:
            raise HydraError("a task made of text needs the model's tokenizer, none was given")
        item = _Prompt(sample, tokenizer(sample.prompt)["input_ids"])
    else:
        item = _Prompt(sample, list(sample.prompt))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not item.ids or min(item.ids) < 0 or max(item.ids) >= vocabulary:
        raise HydraError(
            f"a sample has no tokens, or token ids outside the model's vocabulary of {vocabulary}: "
            "is this the model's tokenizer?"
        )
    return item


def _score_batch(model: Any, tokenizer: Any, batch: list[Any], chunk: int) -> list[Outcome]:
    with torch.inference_mode():
        if isinstance(batch[0], _Sequence):
            return _score_sequences(model, batch, chunk)
        return _score_prompts(model, tokenizer, batch, chunk)


# -- sequences with answers inside ----------------------------------------------------------------


def _score_sequences(model: Any, batch: list[_Sequence], chunk: int) -> list[Outcome]:
    width = max(item.width for item in batch)
    # Padding on the right: causal models are not affected by what follows.
    ids = torch.tensor([item.ids + [0] * (width - item.width) for item in batch])
    asked = sorted({int(p) - 1 for item in batch for p in item.sample.answers})
    argmax = _argmax_at(model, ids.to(model.device), asked, chunk)
    column = {position: i for i, position in enumerate(asked)}
    outcomes = []
    for row, item in enumerate(batch):
        expected = [item.ids[p] for p in item.sample.answers]
        said = [argmax[row][column[int(p) - 1]] for p in item.sample.answers]
        outcomes.append(
            Outcome(
                scores=tuple(float(a == b) for a, b in zip(said, expected, strict=True)),
                depths=tuple(item.sample.depths) or (None,) * len(said),
                prediction=" ".join(map(str, said)),
                expected=" ".join(map(str, expected)),
            )
        )
    return outcomes


def _argmax_at(model: Any, ids: torch.Tensor, positions: list[int], chunk: int) -> list[list[int]]:
    """Likeliest next tokens ``[B, len(positions)]`` at ascending positions; logits only there."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    end = positions[-1] + 1
    step = chunk or end
    cache = None
    pieces = []
    for start in range(0, end, step):
        stop = min(start + step, end)
        wanted = [p - start for p in positions if start <= p < stop]
        index = torch.tensor(wanted or [stop - start - 1], device=ids.device)
        arguments: dict[str, Any] = {"logits_to_keep": index} if keeps else {}
        if end > step:
            arguments |= {"past_key_values": cache, "use_cache": True}
        else:
            arguments["use_cache"] = False
        out = model(input_ids=ids[:, start:stop], **arguments)
        cache = getattr(out, "past_key_values", None)
        if wanted:
            logits = out.logits if keeps else out.logits[:, index]
            pieces.append(logits.argmax(-1))
    return torch.cat(pieces, dim=1).tolist()


# -- prompts to be continued ----------------------------------------------------------------------


def _score_prompts(model: Any, tokenizer: Any, batch: list[_Prompt], chunk: int) -> list[Outcome]:
    from transformers import GenerationConfig, StoppingCriteriaList

    width = max(len(item.ids) for item in batch)
    eos = _end_tokens(model, tokenizer)
    pad = eos[0] if eos else 0
    ids = torch.tensor([[pad] * (width - len(item.ids)) + item.ids for item in batch])
    mask = torch.tensor([[0] * (width - len(item.ids)) + [1] * len(item.ids) for item in batch])
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max(item.sample.max_new_tokens for item in batch),
        pad_token_id=pad,
        eos_token_id=eos or None,
        prefill_chunk_size=chunk if 0 < chunk < width else None,
    )
    settled = _Settled(tokenizer, batch, width)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([settled]),
    )
    return [
        _outcome(item, tokenizer, row[width:].tolist())
        for item, row in zip(batch, out, strict=True)
    ]


class _Settled:
    """Stops a row when its score can no longer change, which keeps the result and saves the rest.

    A text score only counts which answers occur, so it is settled when all of them (or, for
    ``any``, one of them) have; a score of token ids is settled once enough tokens are there.
    """

    def __init__(self, tokenizer: Any, batch: list[_Prompt], width: int) -> None:
        self.tokenizer = tokenizer
        self.batch = batch
        self.width = width

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """``[B]`` bool, which rows are done."""
        done = []
        for item, row in zip(self.batch, ids[:, self.width :].tolist(), strict=True):
            enough = len(row) >= item.sample.max_new_tokens
            if not enough and isinstance(item.sample.answers[0], int):
                enough = len(row) >= len(item.sample.answers)
            elif not enough:
                enough = text_score(item.sample, self.tokenizer.decode(row)) == 1.0
            done.append(enough)
        return torch.tensor(done, device=ids.device)


def _outcome(item: _Prompt, tokenizer: Any, row: list[int]) -> Outcome:
    sample = item.sample
    row = row[: sample.max_new_tokens]
    if isinstance(sample.answers[0], int):
        expected = list(sample.answers)
        row = row[: len(expected)]
        said, wanted = " ".join(map(str, row)), " ".join(map(str, expected))
        score = float(row == expected)
    else:
        said = tokenizer.decode(row, skip_special_tokens=True)
        wanted = "; ".join(map(str, sample.answers))
        score = text_score(sample, said)
    return Outcome((score,), (sample.depth,), said, wanted)


def text_score(sample: GenerationSample, said: str) -> float:
    """RULER's string match: the share of answers that occur, in any case; or whether one does."""
    found = [str(answer).lower() in said.lower() for answer in sample.answers]
    return float(any(found)) if sample.match == "any" else sum(found) / len(found)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a continuation: the model's, else the tokenizer's."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None and tokenizer is not None:
        given = tokenizer.eos_token_id
    if given is None:
        return []
    return [int(x) for x in given] if isinstance(given, list | tuple) else [int(given)]
