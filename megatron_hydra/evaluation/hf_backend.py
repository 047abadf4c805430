"""A Hugging Face causal model in this process: left-padded batches, a cache, and chunked prompts."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from megatron_hydra.data.tokenizer import end_tokens_of
from megatron_hydra.evaluation.backend import Continuation, T, cut, is_over
from megatron_hydra.evaluation.cache_bytes import measure_cache_bytes, returned_cache
from megatron_hydra.head_map import fingerprint_tensors
from megatron_hydra.out_of_memory import OutOfMemory

U = TypeVar("U")

CHUNKABLE = ("hydrahead", "qwen3", "qwen2", "llama", "mistral")
"""Model types that are known to give the same result for a chunked prompt as for one pass.

Some recurrent models ignore their state if more than one token follows. Other model types get the prompt in one
pass, unless the user sets a chunk.
"""


class HfBackend:
    """Scores with any Hugging Face causal model.

    Args:
        model: the model, on its device.
        prefill_chunk: prompt tokens per forward pass; 0: all; ``None``: 8192 for models for which this is
            known to be exact, else all.
    """

    is_main = True

    def __init__(self, model: Any, prefill_chunk: int | None = None) -> None:
        self.model = model
        self.asked_chunk = prefill_chunk
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        known = getattr(model.config, "model_type", "") in CHUNKABLE
        self.chunk = prefill_chunk if prefill_chunk is not None else 8192 if known else 0

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Set the model to evaluation mode, and restore its mode at the end."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def identity(self) -> dict[str, Any]:
        """See :class:`~.backend.Backend`."""
        # Vectors (norms, scales, biases) differ between any two trained models, and are small.
        vectors = {n: p for n, p in self.model.named_parameters() if p.ndim == 1}
        if not vectors:
            vectors = dict(list(self.model.named_parameters())[:1])
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        # Equal weights with other scaling are another model.
        scaled = rope.get("rope_type", "default") != "default"
        return ({"rope_parameters": dict(rope)} if scaled else {}) | {
            "model_type": getattr(self.model.config, "model_type", ""),
            "weights": fingerprint_tensors(vectors),
            "dtype": str(getattr(self.model, "dtype", torch.float32)).removeprefix("torch."),
            "prefill_chunk": self.asked_chunk,
        }

    def end_tokens(self, tokenizer: Any) -> list[int]:
        """The model's end tokens, or else the tokenizer's."""
        return end_tokens_of(self.model, tokenizer)

    def argmax_at(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """See :class:`~.backend.Backend`."""
        items = list(zip(rows, positions, strict=True))
        return self._run_or_halve(items, lambda part: self._argmax_at(*zip(*part, strict=True)))

    @torch.inference_mode()
    def _argmax_at(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        asked = sorted({p for row in positions for p in row})
        width = asked[-1] + 1
        # Padding on the right: later tokens do not affect a causal model.
        padded = [[*row[:width], *[0] * (width - len(row))] for row in rows]
        ids = torch.tensor(padded, device=self.model.device)
        argmax = self._argmax(ids, asked)
        column = {position: i for i, position in enumerate(asked)}
        return [[said[column[p]] for p in row] for said, row in zip(argmax, positions, strict=True)]

    def _argmax(self, ids: torch.Tensor, positions: list[int]) -> list[list[int]]:
        keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        end = ids.shape[1]
        step = self.chunk or end
        cache: dict[str, Any] = {}
        pieces = []
        for start in range(0, end, step):
            stop = min(start + step, end)
            wanted = [p - start for p in positions if start <= p < stop]
            index = torch.tensor(wanted or [stop - start - 1], device=ids.device)
            arguments: dict[str, Any] = {"logits_to_keep": index} if keeps else {}
            if end > step:
                arguments |= {**cache, "use_cache": True}
            else:
                arguments["use_cache"] = False
            out = self.model(input_ids=ids[:, start:stop], **arguments)
            cache = returned_cache(out)
            if wanted:
                logits = out.logits if keeps else out.logits[:, index]
                pieces.append(logits.argmax(-1))
        return torch.cat(pieces, dim=1).tolist()

    def generate(
        self, continuations: Sequence[Continuation], end_tokens: Sequence[int]
    ) -> list[list[int]]:
        """See :class:`~.backend.Backend`. It uses the cache and ignores drafts."""
        return self._run_or_halve(continuations, lambda part: self._generate(part, end_tokens))

    def _run_or_halve(self, batch: Sequence[T], run: Callable[[Sequence[T]], list[U]]) -> list[U]:
        """Return ``run(batch)``. If the batch does not fit into the GPU's memory, run its halves.

        Raises:
            OutOfMemory: a single sample does not fit.
        """
        try:
            return run(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise OutOfMemory(
                    f"a single sample does not fit into the GPU's memory: give a shorter length, or "
                    f"--prefill-chunk below {self.chunk or 'its length'} ({error})"
                ) from None
        # Outside of the handler, because the error's traceback holds the tensors.
        gc.collect()
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return [*self._run_or_halve(batch[:half], run), *self._run_or_halve(batch[half:], run)]

    @torch.inference_mode()
    def _generate(
        self, continuations: Sequence[Continuation], end_tokens: Sequence[int]
    ) -> list[list[int]]:
        from transformers import GenerationConfig, StoppingCriteriaList

        width = max(len(c.prompt) for c in continuations)
        pad = end_tokens[0] if end_tokens else 0
        ids = torch.tensor(
            [[pad] * (width - len(c.prompt)) + list(c.prompt) for c in continuations]
        )
        mask = torch.tensor(
            [[0] * (width - len(c.prompt)) + [1] * len(c.prompt) for c in continuations]
        )
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max(c.max_new_tokens for c in continuations),
            pad_token_id=pad,
            eos_token_id=list(end_tokens) or None,
            prefill_chunk_size=self.chunk if 0 < self.chunk < width else None,
        )
        out = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList(
                [_StopWhenSettled(continuations, width, end_tokens)]
            ),
        )
        rows = out[:, width:].tolist()
        return [cut(row, c, end_tokens) for row, c in zip(rows, continuations, strict=True)]

    def cache_bytes(self, length: int) -> dict[str, float]:
        """See :func:`~.cache_bytes.measure_cache_bytes`."""
        return measure_cache_bytes(self.model, length)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action``: there is only one process."""
        return action()

    def anywhere(self, flag: bool) -> bool:
        """Return ``flag``: there is only one process."""
        return flag


class _StopWhenSettled:
    """Stops a row when it is settled: more tokens would not change the score."""

    def __init__(
        self, continuations: Sequence[Continuation], width: int, end_tokens: Sequence[int]
    ) -> None:
        self.continuations = continuations
        self.width = width
        self.end_tokens = end_tokens
        self.done = [False] * len(continuations)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """``[B]`` bool, true for finished rows."""
        for index, row in enumerate(ids[:, self.width :].tolist()):
            if not self.done[index]:
                self.done[index] = is_over(row, self.continuations[index], self.end_tokens)
        return torch.tensor(self.done, device=ids.device)
