"""The model that lm-eval asks, with batches by their number of tokens.

Like :mod:`.question_tasks`, this module needs the extra ``eval``: only :mod:`.lm_eval_suite` imports it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from megatron_hydra.evaluation.backend import T
from megatron_hydra.out_of_memory import OutOfMemory

_log = logging.getLogger(__name__)

_LOGITS_GPU, _LOGITS_CPU = 2**33, 2**29
"""Bytes of a batch's logits. On a CPU, larger batches are not faster."""

_BYTES_OF_A_LOGIT = 14
"""In the model's dtype (bf16), in fp32, its log-probability, and the log-probability of the batch before."""

_UNBOUNDED = 2**20


class BatchedByTokens(HFLM):
    """A loaded Hugging Face causal model.

    lm-eval itself gives every batch the same number of requests, short or long. Or it fills the GPU's memory,
    which other processes may share. Here, the longest request of a task decides the number. If memory is short
    all the same, all requests are asked again, in batches of half the size.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        batch_tokens: largest number of tokens of a batch (at least one request).
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int) -> None:
        # By default, lm-eval rounds and adds log-likelihoods in the model's dtype: in bf16, options would tie.
        # lm-eval asks for windows of long texts, for perplexities, in batches of its own; each is divided here.
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=_UNBOUNDED, softmax_dtype="float32"
        )
        self._batch_tokens = batch_tokens
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        room = _LOGITS_GPU if self.device.type == "cuda" else _LOGITS_CPU
        self._scored_tokens = min(batch_tokens, room // (_BYTES_OF_A_LOGIT * vocabulary))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        *args: Any,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        longest = max((len(context) + len(rest) for _, context, rest in requests), default=1)
        ask = super()._loglikelihood_tokens
        return self._ask(
            self._scored_tokens // min(longest, self.max_length),
            lambda: ask(requests, *args, **kwargs),
        )

    def generate_until(self, requests: list[Instance], *args: Any, **kwargs: Any) -> list[str]:
        """Greedy or sampled continuations, in order."""
        ask = super().generate_until
        return self._ask(
            self._batch_tokens // self._longest(requests), lambda: ask(requests, *args, **kwargs)
        )

    def _longest(self, requests: Sequence[Instance]) -> int:
        """Tokens of the longest prompt and of the longest continuation, at most the model's length."""
        prompt = max((len(self.tok_encode(request.args[0])) for request in requests), default=1)
        new = (normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests)
        return max(1, min(prompt + max(new, default=0), self.max_length))

    def _ask(self, rows: int, ask: Callable[[], T]) -> T:
        """Return ``ask()`` with batches of ``rows`` requests, or of fewer if they do not fit.

        Raises:
            OutOfMemory: a single request does not fit.
        """
        self._set_batch(rows)
        try:
            while True:
                try:
                    return ask()
                except torch.OutOfMemoryError as error:
                    if self.batch_size == 1:
                        raise OutOfMemory(
                            f"--lm-eval: a single request does not fit into the GPU's memory ({error})"
                        ) from None
                # Outside of the handler, because the error's traceback holds the tensors.
                gc.collect()
                torch.cuda.empty_cache()
                self._set_batch(self.batch_size // 2)
                _log.warning(
                    "lm-eval: out of GPU memory; asking again with batches of %d requests",
                    self.batch_size,
                )
        finally:
            self._set_batch(_UNBOUNDED)

    def _set_batch(self, rows: int) -> None:
        self.batch_size_per_gpu = max(1, rows)
