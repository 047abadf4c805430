"""A Megatron checkpoint under any layout of tensor, sequence, context and pipeline parallelism.

Samples are packed as in training, so only the end of the stream is padded. There is no cache. One forward
checks all tokens of a draft of the continuation (the right answer, or earlier text). The result is exactly
greedy decoding. A right answer costs one or two forwards of the prompt, a wrong answer up to one forward per
token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import megatron_hydra.parallel.platform  # noqa: F401  # isort: skip  (before any megatron import)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.canonical import is_fp32
from megatron_hydra.config.loading import apply_overrides, from_dict, read_config
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import BatchConfig, DataConfig, RunConfig
from megatron_hydra.config.validate import check_layout, data_parallel_size, rounded_stream_length
from megatron_hydra.data.tokenizer import token_ids
from megatron_hydra.environment import world_size_from_environment
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.backend import Continuation, T, cut, is_over
from megatron_hydra.files import read_json
from megatron_hydra.model.forward import final_hidden_states
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.world import (
    World,
    start_world,
    stop_world,
)
from megatron_hydra.ranks import on_main
from megatron_hydra.training.model_state import load_model, verified_checkpoint
from megatron_hydra.training.provenance import checkpoint_fingerprint
from megatron_hydra.training.setup import build_chunks, freeze
from megatron_hydra.transfer.answers import likeliest_tokens
from megatron_hydra.transfer.verb import lm_head_weight, replicate_sequence

SECTIONS = ("parallel", "backend", "faults")
"""Sections of a run's config that an evaluation uses."""

LOOKUP_TOKENS, LOOKUP_MATCH = 16, 2
"""Draft from earlier text: its number of tokens, and the number of last tokens to search for."""


def layout_config(config: str | os.PathLike[str] | None, overrides: Sequence[str]) -> RunConfig:
    """The layout of an evaluation, for the processes of this launch.

    Args:
        config: YAML file of a layout or a run; only :data:`SECTIONS` are used.
        overrides: overrides such as ``parallel.tensor=2``.

    Raises:
        HydraError: a key is unknown or has no effect in an evaluation, or the layout does not fit the number of
            processes; names the key.
    """
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section not in SECTIONS:
            raise HydraError(
                f"override {override!r}: an evaluation accepts only {', '.join(SECTIONS)}"
            )
    body = {} if config is None else read_config(config)
    taken = {section: body[section] for section in SECTIONS if section in body}
    run = apply_overrides(from_dict(RunConfig, taken, str(config)), overrides)
    _check(run)
    return run


def _check(run: RunConfig) -> None:
    parallel = run.parallel
    for key in ("tensor", "context", "pipeline"):
        if getattr(parallel, key) < 1:
            raise HydraError(f"parallel.{key} is {getattr(parallel, key)}: it must be at least 1")
    if parallel.sequence and parallel.tensor == 1:
        raise HydraError("parallel.sequence is true, but parallel.tensor is 1: set it to false")
    if parallel.virtual_pipeline != 1:
        raise HydraError(
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline}: an evaluation has no "
            "interleaved schedule, set parallel.virtual_pipeline=1"
        )
    processes = world_size_from_environment()
    if data_parallel_size(run, processes) != 1:
        raise HydraError(
            f"parallel.tensor · context · pipeline is {parallel.tensor}·{parallel.context}·"
            f"{parallel.pipeline}, there are {processes} processes: an evaluation has no data "
            "parallelism, so the product must be the number of processes"
        )


@contextlib.contextmanager
def open_checkpoint(
    checkpoint: str | os.PathLike[str], run: RunConfig, dtype: str = "auto"
) -> Iterator[MegatronBackend]:
    """Load a checkpoint under a layout. Every process of the layout calls it.

    Args:
        checkpoint: a checkpoint folder, or a run's ``checkpoints``.
        run: from :func:`layout_config`.
        dtype: ``fp32``, ``bf16``, or ``auto``: as stored.

    Raises:
        HydraError: the checkpoint is missing or damaged, or the layout does not fit its shape.
    """
    if dtype not in ("auto", "fp32", "bf16"):
        raise HydraError(f"--dtype {dtype}: a checkpoint runs only in fp32 or bf16")
    world = start_world(run)
    try:
        folder = verified_checkpoint(str(checkpoint))
        model = store.read_model_config(folder).finished()
        precision = _stored_precision(folder) if dtype == "auto" else dtype
        run = dataclasses.replace(run, precision=precision)  # type: ignore[arg-type]
        check_layout(run, world.size, model)
        (chunk,) = freeze(build_chunks(model, run))
        load_model([chunk], folder)
        yield MegatronBackend(chunk, model, run, world, folder)
    finally:
        stop_world()


def _stored_precision(folder: Path) -> str:
    stored = on_main(lambda: store.stored_tensors(folder))
    dtypes = {dtype for key, (_, dtype) in stored.items() if not is_fp32(key)}
    return "fp32" if torch.float32 in dtypes else "bf16"


class MegatronBackend:
    """Scores with this process's part of a model; see :class:`~.backend.Backend`."""

    def __init__(
        self, chunk: GPTModel, model: ModelConfig, run: RunConfig, world: World, folder: Path
    ) -> None:
        self.chunk, self.model, self.run = chunk, model, run
        self.world, self.folder = world, folder
        self.is_main = world.is_main
        self.vocabulary = model.vocab_size
        self._has_run = False

    def inference(self) -> contextlib.AbstractContextManager[Any]:
        """Do nothing: the model is already frozen."""
        return torch.no_grad()

    def identity(self) -> dict[str, Any]:
        """Identity with the checkpoint's fingerprint, without the layout, which does not change results."""
        return {
            "model_type": self.model.family,
            "weights": on_main(lambda: checkpoint_fingerprint(self.folder)),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[self.run.precision],
            "prefill_chunk": None,
        }

    def end_tokens(self, tokenizer: Any) -> list[int]:
        """End tokens of the checkpoint's generation config, or else of the tokenizer, as in an export."""
        given = self.model.hf_config.get("eos_token_id")
        beside = store.tokenizer_folder(self.folder)
        if beside is not None and (beside / "generation_config.json").is_file():
            body = read_json(beside / "generation_config.json")
            given = body.get("eos_token_id", given)
        if given is None and tokenizer is not None:
            given = tokenizer.eos_token_id
        return token_ids(given)

    @torch.no_grad()
    def argmax_at(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """See :class:`~.backend.Backend`. It runs one forward of all rows, packed."""
        documents = [
            list(row[: max(asked) + 1]) for row, asked in zip(rows, positions, strict=True)
        ]
        starts = [0, *itertools.accumulate(map(len, documents))]
        index = [s + p for s, asked in zip(starts, positions, strict=False) for p in asked]
        said = iter(self._next_tokens(documents, index))
        return [list(itertools.islice(said, len(asked))) for asked in positions]

    @torch.no_grad()
    def generate(
        self, continuations: Sequence[Continuation], end_tokens: Sequence[int]
    ) -> list[list[int]]:
        """See :class:`~.backend.Backend`. It checks drafts, corrects them, and makes new drafts."""
        new: list[list[int]] = [[] for _ in continuations]
        active = list(range(len(continuations)))
        while active:
            drafts = [draft(continuations[i], new[i]) for i in active]
            rows, asked = [], []
            for i, guess in zip(active, drafts, strict=True):
                known = [*continuations[i].prompt, *new[i]]
                rows.append(known + guess)
                asked.append(range(len(known) - 1, len(known) + len(guess)))
            for i, guess, said in zip(active, drafts, self.argmax_at(rows, asked), strict=True):
                right = sum(1 for _ in itertools.takewhile(_equal, zip(guess, said, strict=False)))
                grown = new[i] + said[: right + 1]
                new[i] = cut(grown, continuations[i], end_tokens, known=len(new[i]))
            active = [i for i in active if not is_over(new[i], continuations[i], end_tokens)]
        return new

    @torch.no_grad()
    def seconds_of_forward(self, tokens: int) -> float:
        """See :class:`~.backend.Uncached`. The first call also runs a short prompt as warm-up."""
        if not self._has_run:
            self.argmax_at([[0] * min(tokens, 64)], [[0]])
            self._has_run = True
        started = time.perf_counter()
        self.argmax_at([[0] * tokens], [[tokens - 1]])
        return time.perf_counter() - started

    def cache_bytes(self, length: int) -> dict[str, float] | None:
        """Return None: there is no cache. Export the model to measure its cache."""
        return None

    def on_main(self, action: Callable[[], T]) -> T:
        """See :func:`~megatron_hydra.ranks.on_main`."""
        return on_main(action)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        seen = torch.tensor(int(flag), device=platform.device())
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())

    # -- one forward ------------------------------------------------------------------------------

    def _next_tokens(self, documents: list[list[int]], index: list[int]) -> list[int]:
        """Most likely next tokens at global positions of the packed documents, on every rank."""
        tokens_local, packed = self._packed(documents)
        hidden = self._run_stages(tokens_local, packed)
        positions = torch.tensor(index, device=packed.device)
        said = torch.full_like(positions, -1)
        if self.world.is_last_stage:
            hidden = replicate_sequence(hidden, self.world, wants_gradient=False)
            local = positions - packed.shard_start
            own = (local >= 0) & (local < packed.length_local)
            weight = lm_head_weight(self.chunk)
            first = self.chunk.vocabulary_shard.first
            said[own] = likeliest_tokens(hidden[local[own]], weight, first)
            group = parallel_state.get_context_parallel_group()
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=group)
        if self.world.pp_size > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(said, src=last, group=group)
        return said.tolist()

    def _packed(self, documents: list[list[int]]) -> tuple[torch.Tensor, PackedSequence]:
        """This rank's tokens ``[T_local]`` and their layout; padding is a separate document."""
        tokens = list(itertools.chain.from_iterable(documents))
        batch, data = BatchConfig(micro_batch_size=1), DataConfig(sequence_length=len(tokens))
        length = rounded_stream_length(dataclasses.replace(self.run, batch=batch, data=data))
        bounds = [0, *itertools.accumulate(map(len, documents))]
        if length > len(tokens):
            bounds.append(length)
            tokens += [0] * (length - len(tokens))
        world = self.world
        packed = PackedSequence.from_batch(
            tuple(bounds), world.cp_rank, world.cp_size, platform.device()
        )
        shard = tokens[packed.shard_start :][: packed.length_local]
        return torch.tensor(shard, device=packed.device), packed

    def _run_stages(self, tokens_local: torch.Tensor, packed: PackedSequence) -> torch.Tensor:
        """This stage's output ``[T_local(/TP), 1, D]``, sent to the next stage."""
        group = parallel_state.get_pipeline_model_parallel_group()
        if not self.world.is_first_stage:
            rows = packed.length_local
            if self.world.sequence_parallel:
                rows //= self.world.tp_size
            shape = (rows, 1, self.model.hidden_size)
            dtype = self.chunk.config.params_dtype
            received = torch.empty(shape, dtype=dtype, device=packed.device)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
            self.chunk.set_input_tensor(received)
        hidden = final_hidden_states(self.chunk, tokens_local, packed)
        if not self.world.is_last_stage:
            following = parallel_state.get_pipeline_model_parallel_next_rank()
            dist.send(hidden.contiguous(), following, group)
        return hidden


def draft(continuation: Continuation, new: list[int]) -> list[int]:
    """Guess the next tokens, at most one fewer than the remaining limit (the forward adds one itself).

    While the new tokens equal the continuation's own draft, the guess is the rest of this draft. Otherwise it
    is the text after an earlier occurrence of the last two tokens, such as a value in the prompt or a repeated
    line.
    """
    room = continuation.max_new_tokens - len(new) - 1
    guess = list(continuation.draft)
    if guess[: len(new)] == new:
        return guess[len(new) :][:room]
    text = [*continuation.prompt, *new]
    tail = text[-LOOKUP_MATCH:]
    for start in range(len(text) - LOOKUP_MATCH - 1, -1, -1):
        if text[start : start + LOOKUP_MATCH] == tail:
            return text[start + LOOKUP_MATCH :][: min(room, LOOKUP_TOKENS)]
    return []


def _equal(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]
