"""One optimizer step, and the collective by which all ranks make the same decision about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import rounded_stream_length
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.parallel.gradients import finalize_gradients
from megatron_hydra.parallel.world import World
from megatron_hydra.training import foreach  # noqa: F401  (replaces what Megatron-Core does one by one)
from megatron_hydra.training.faults import NOT_FINITE, NOTHING_LEARNED, FaultTracker
from megatron_hydra.training.flops import attention_pairs
from megatron_hydra.training.observe import PhaseTimers
from megatron_hydra.transfer.local_batch import LocalBatch, local_batch
from megatron_hydra.transfer.verb import Verb


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Result of a step; equal on all ranks.

    Attributes:
        means: mean of each loss part over the unmasked tokens of the global batch; NaN if all are masked.
        loss: the loss that the verb computes from the means.
        num_loss_tokens: number of unmasked tokens.
        grad_norm: gradient norm before clipping.
        fault: reason for skipping the update; empty if it was applied.
        attention_pairs: number of (query, key) pairs of the global batch, for its FLOPs.
        stop: whether any rank received a request to stop.
        saving: whether any rank is still writing the last checkpoint.
    """

    means: list[float]
    loss: float
    num_loss_tokens: int
    grad_norm: float
    fault: str
    attention_pairs: float
    stop: bool
    saving: bool


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The objects that a step uses and changes."""

    config: RunConfig
    world: World
    verb: Verb
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    faults: FaultTracker


def train_step(
    train_state: TrainState,
    batches: list[PackedBatch],
    notices: Callable[[], tuple[bool, bool]],
    timers: PhaseTimers,
) -> StepResult:
    """Forward, backward and update on one global batch.

    Args:
        batches: this data-parallel rank's micro-batches.
        notices: called after the backward; returns (this rank has a request to stop, it is still saving).
            A flag that is true on one rank is true for all.
        timers: measure ``forward_backward`` and ``optimizer``.
    """
    optimizer, verb, world = train_state.optimizer, train_state.verb, train_state.world
    with timers.phase("forward_backward"):
        _accumulate_gradients(train_state, batches)
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        pairs = attention_pairs(batches) * world.dp_size

        # The only collective of the loop itself: loss sums, and this rank's flags.
        local = [pairs, grad_norm, not math.isfinite(grad_norm), *notices()]
        agreed = torch.cat([verb.sums, verb.sums.new_tensor(local)])
        dist.all_reduce(agreed)
        *sums, num_tokens, pairs, norms, bad_gradients, stopping, saving = agreed.tolist()
    means = [value / num_tokens if num_tokens else math.nan for value in sums]
    loss = float(verb.metrics(means)["loss"])
    norm = norms / world.size  # bit-equal on all ranks, so that all make the same decision
    if not num_tokens:
        fault = NOTHING_LEARNED
    elif bad_gradients:
        fault = NOT_FINITE
    else:
        fault = train_state.faults.judge(loss, norm)
    train_state.faults.count(loss, norm, fault)
    if not fault:
        with timers.phase("optimizer"):
            _update(train_state, grad_norm)
    return StepResult(
        means=means,
        loss=loss,
        num_loss_tokens=int(num_tokens),
        grad_norm=grad_norm,
        fault=fault,
        attention_pairs=pairs / world.size,
        stop=bool(stopping),
        saving=bool(saving),
    )


def _accumulate_gradients(train_state: TrainState, batches: list[PackedBatch]) -> None:
    verb, chunks, config = train_state.verb, train_state.chunks, train_state.config
    for chunk in chunks:
        chunk.zero_grad_buffer()
    train_state.optimizer.zero_grad()
    verb.sums.zero_()
    length = rounded_stream_length(config)
    local = [local_batch(batch, train_state.world, length) for batch in batches]
    run_micro_batches(
        verb,
        chunks,
        [iter(local) for _ in chunks],
        len(local),
        forward_only=verb.backward_inside_forward,
    )
    if verb.backward_inside_forward:
        count = sum(batch.num_loss_tokens for batch in local)
        num_tokens = torch.full((), count, dtype=torch.int, device=verb.sums.device)
        finalize_gradients(list(chunks), num_tokens)


def run_micro_batches(
    verb: Verb,
    chunks: Sequence[torch.nn.Module],
    batches: list[Iterator[LocalBatch]],
    count: int,
    *,
    forward_only: bool,
) -> None:
    """Run Megatron's schedule over this rank's micro-batches; the verb adds to its sums.

    Args:
        verb, chunks: the verb and the model chunks to run.
        batches: for every model chunk an iterator over the same micro-batches.
        count: number of micro-batches.
        forward_only: do not run the backward.
    """
    get_forward_backward_func()(
        forward_step_func=verb.forward_step,
        data_iterator=batches,
        model=list(chunks),
        num_microbatches=count,
        seq_length=rounded_stream_length(verb.config) * verb.streams,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _update(train_state: TrainState, grad_norm: float) -> None:
    clip = train_state.config.optimizer.clip_grad
    parameters = train_state.optimizer.get_parameters()
    if clip > 0 and parameters:
        clip_grad_by_total_norm_fp32(parameters, clip, grad_norm)
    train_state.optimizer.step_with_ready_grads()
