"""Measure the loss on held-out data during a run, without any effect on training.

The verb's own forward step and loss run on the held-out sequences, in evaluation mode and without a graph,
with training's micro-batches. Sums are taken over all ranks, so the value is the same under every layout.
Incomplete micro-batches are filled with padding, which has no loss.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import rounded_stream_length
from megatron_hydra.data.reading import SourceRecord
from megatron_hydra.data.validation import ValidationStream
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel.world import World
from megatron_hydra.training.patience import as_json, history_of, reason_to_end, standing
from megatron_hydra.training.random_state import capture_random_state, restore_random_state
from megatron_hydra.training.step import TrainState, run_micro_batches
from megatron_hydra.transfer.answers import AnswerCount
from megatron_hydra.transfer.local_batch import local_batch
from megatron_hydra.transfer.verb import Verb

_log = logging.getLogger(__name__)


class Validation:
    """Held-out data of a run, and the losses measured on it.

    Args:
        config: the run.
        world: this rank.
        vocab_size: vocabulary size of the model.

    Raises:
        HydraError: the data cannot be read or are too few.
    """

    def __init__(self, config: RunConfig, world: World, vocab_size: int) -> None:
        self._config, self._world = config, world
        self._history: list[tuple[int, float]] = []
        self._kept: dict[str, Any] = {}
        self._stream: ValidationStream | None = None
        self._probes: ValidationStream | None = None
        open_stream = functools.partial(
            ValidationStream,
            config.data,
            config.validation,
            micro_batch_size=config.batch.micro_batch_size,
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
            vocab_size=vocab_size,
        )
        if config.validation.interval:
            self._stream = open_stream()
        if config.validation.probes:
            self._probes = open_stream(probes=True)

    # -- results --------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether a validation is due after ``step`` steps."""
        interval = self._config.validation.interval
        return bool(interval) and (step % interval == 0 or step == self._config.schedule.steps)

    def reason_to_end(self, step: int) -> str:
        """See :func:`.patience.reason_to_end`."""
        return reason_to_end(self._config.schedule, step, self._history)

    def state(self) -> dict[str, Any]:
        """State for the checkpoint, JSON: the data read, all losses, and the state of early stopping."""
        if self._stream is None:
            return self._kept
        if not self._history:
            return {}
        now = standing(self._history, self._config.schedule.min_improvement)
        return {
            "fingerprint": self._stream.fingerprint(),
            "history": as_json(self._history),
            "best": now.best if math.isfinite(now.best) else None,
            "best_step": now.best_step,
            "waited": now.waited,
        }

    def check_not_trained_on(self, sources: Sequence[SourceRecord]) -> None:
        """Check that the run has not trained on its held-out data with an earlier blend.

        Args:
            sources: all sources that the run has read.

        Raises:
            HydraError: a source of ``validation.blend`` is one of them.
        """
        parts = self._stream.files if self._stream and self._config.validation.blend else []
        for i, files in enumerate(parts):
            for source in sources:
                if files and files == source.files and source.samples:
                    raise HydraError(
                        f"validation.blend.{i} ({source.name}): the run has trained on {source.samples:,} of "
                        "its sequences in an earlier phase; name other data"
                    )

    def restore(self, state: dict[str, Any], *, has_new_blend: bool = False) -> None:
        """Inverse of :meth:`state`. A run without validation keeps the state unchanged.

        Args:
            state: the state in a checkpoint.
            has_new_blend: whether the run continues with another ``data.blend``. Its held-out data differ,
                so best loss and patience start again.

        Raises:
            HydraError: the losses belong to other sequences.
        """
        if has_new_blend and not self._config.validation.blend:
            if state and self._world.is_main:
                _log.info(
                    "data.blend holds out other data now: best held-out loss and patience start again"
                )
            state = {}
        self._kept = state
        if not state or self._stream is None:
            return
        own, saved = self._stream.fingerprint(), state["fingerprint"]
        for key, value in own.items():
            if saved.get(key) != value:
                name = "validation.blend or data.blend" if key == "parts" else key
                values = "" if key == "parts" else f" ({saved.get(key)!r} before, {value!r} now)"
                raise HydraError(
                    f"cannot resume: {name}{values} has changed the data that validation reads, so its losses "
                    "cannot be compared. Restore the old value, choose another output, or set "
                    "validation.interval=0"
                )
        self._history = history_of(state)

    # -- measuring ------------------------------------------------------------------------------

    def measure(
        self, train_state: TrainState, step: int, still_alive: Callable[[], None]
    ) -> dict[str, Any]:
        """Measure the held-out loss. Collective.

        Args:
            train_state: the state of training. It and the random generators keep the same bits.
            step: steps done.
            still_alive: called before every part of the blend.

        Returns:
            The verb's metrics over all held-out tokens, their number ``tokens``, and ``sources``: the
            same for each source, without lists. With probes also ``probes``: for each probe the number
            of ``documents``, the share ``accuracy`` of correct answers, and the same metrics.
        """
        stream, verb = self._stream, train_state.verb
        assert stream is not None
        sums, answers = [], []
        with _evaluation_mode(train_state):
            for part in range(len(stream.counts)):
                still_alive()
                sums.append(self._sums(train_state, stream, part))
            if (probes := self._probes) is not None:
                for part in range(len(probes.counts)):
                    still_alive()
                    verb.answers = AnswerCount(verb.sums.device)
                    sums.append(self._sums(train_state, probes, part))
                    answers.append(verb.answers.sums)
        total = torch.stack(sums)
        dist.all_reduce(total)
        parts = len(stream.counts)
        whole, num_tokens = _metrics(verb, total[:parts].sum(0))
        sources = {
            label: _numbers(verb, row)
            for label, row in zip(stream.labels, total[:parts], strict=True)
        }
        self._history.append((step, whole["loss"]))
        self._log_loss(step)
        found = whole | {"tokens": num_tokens, "sources": sources}
        if probes is not None:
            counts = torch.stack(answers)
            dist.all_reduce(counts)
            found["probes"] = {
                label: {"accuracy": right / asked, "documents": int(asked), **_numbers(verb, row)}
                for label, row, (asked, right) in zip(
                    probes.labels, total[parts:], counts.tolist(), strict=True
                )
            }
        return found

    def _sums(self, train_state: TrainState, stream: ValidationStream, part: int) -> torch.Tensor:
        """This rank's loss sums and tokens for one source, ``[parts of the loss + 1]`` float64."""
        config, verb = train_state.config, train_state.verb
        length = rounded_stream_length(config)
        # The interleaved schedule takes micro-batches in multiples of the pipeline's size.
        parallel = config.parallel
        multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        batches = (
            local_batch(batch, train_state.world, length)
            for batch in stream.micro_batches(part, multiple)
        )
        verb.sums.zero_()
        run_micro_batches(
            verb,
            train_state.chunks,
            list(itertools.tee(batches, len(train_state.chunks))),
            stream.num_micro_batches(part, multiple),
            forward_only=True,
        )
        return verb.sums.clone()

    def _log_loss(self, step: int) -> None:
        if not self._world.is_main:
            return
        schedule = self._config.schedule
        now = standing(self._history, schedule.min_improvement)
        patience = (
            f", {now.waited} of {schedule.patience} without an improvement"
            if schedule.patience
            else ""
        )
        _log.info(
            "step %d: held-out loss %.6g (best %.6g at step %d%s)",
            step, now.last, now.best, now.best_step, patience,
        )  # fmt: skip


def _metrics(verb: Verb, sums: torch.Tensor) -> tuple[dict[str, Any], int]:
    *parts, num_tokens = sums.tolist()
    means = [value / num_tokens if num_tokens else math.nan for value in parts]
    return verb.metrics(means), int(num_tokens)


def _numbers(verb: Verb, sums: torch.Tensor) -> dict[str, Any]:
    """Numeric metrics, and ``tokens``."""
    metrics, num_tokens = _metrics(verb, sums)
    return {k: v for k, v in metrics.items() if not isinstance(v, list)} | {"tokens": num_tokens}


@contextlib.contextmanager
def _evaluation_mode(train_state: TrainState) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the previous state at the end."""
    generators = capture_random_state()
    verb = train_state.verb
    verb.is_learning = False
    for chunk in train_state.chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in train_state.chunks:
            chunk.train()
        verb.is_learning = True
        verb.answers = None
        restore_random_state(generators)
