"""Make the entry of a step in the metrics."""

from __future__ import annotations

import time
from typing import Any

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.world import World
from megatron_hydra.reporting import PHASES
from megatron_hydra.training.checkpoint import Progress
from megatron_hydra.training.flops import peak_tflops, step_flops
from megatron_hydra.training.observe import PhaseTimers, gamma_by_layer, slowest
from megatron_hydra.training.step import StepResult, TrainState
from megatron_hydra.transfer.verb import inner_model


class StepReport:
    """Collects data over the steps between two entries.

    Args:
        model, teacher: configs of the student and its teacher.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        train_state: TrainState,
        model: ModelConfig,
        teacher: ModelConfig | None,
    ) -> None:
        self._config, self._world, self._train_state = config, world, train_state
        self._model, self._teacher = model, teacher
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._clock = time.perf_counter()
        self._peak = config.logging.peak_tflops or peak_tflops(platform.device_name())

    def entry(
        self,
        result: StepResult,
        progress: Progress,
        timers: PhaseTimers,
        validation: dict[str, Any] | None,
    ) -> dict[str, Any] | None:
        """Return the entry of a step, or ``None`` if the step is not logged. Collective.

        Args:
            result: the result of the step.
            progress: progress of the run after the step.
            timers: timers of the steps since the last entry.
            validation: metrics measured after the step, or ``None``. A step with a validation is always
                logged.
        """
        config, step = self._config, progress.step
        tokens = config.batch.global_batch_size * config.data.sequence_length
        self._steps += 1
        self._tokens += tokens
        self._flops += step_flops(
            config.verb, self._model, self._teacher, tokens, result.attention_pairs
        )
        is_last = bool(progress.ended)
        if step % config.logging.interval and not is_last and validation is None:
            return None
        entry = {
            "step": step,
            "tokens": progress.tokens,
            **self._train_state.verb.metrics(result.means),
            "loss_tokens": result.num_loss_tokens,
            "grad_norm": result.grad_norm,
            "lr": self._train_state.optimizer.param_groups[0]["lr"],
            **self._speed(timers),
        }
        every = config.logging.gamma_interval
        if every and (step % every == 0 or is_last):
            chunks = [inner_model(chunk) for chunk in self._train_state.chunks]
            entry |= gamma_by_layer(chunks, self._world, self._model.num_layers)
        if validation is not None:
            entry["validation"] = validation
        skipped = self._train_state.faults.skipped
        if skipped:
            entry["skipped_steps"] = skipped
        if result.fault:
            entry |= {"skipped": True, "fault": result.fault}
        return entry

    def _speed(self, timers: PhaseTimers) -> dict[str, Any]:
        """Throughput since the last entry, seconds per step by phase, and memory."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tflops = self._flops / seconds / self._world.size / 1e12
        most = slowest(timers)
        entry: dict[str, Any] = {
            "tokens_per_s": round(self._tokens / seconds, 1),
            "model_tflops": round(tflops, 6),
            "seconds": {name: round(most[name] / self._steps, 6) for name in PHASES},
            "memory_gb": round(most["memory"] / 1e9, 4),
        }
        if most["reserved"]:
            entry["memory_reserved_gb"] = round(most["reserved"] / 1e9, 4)
        if self._peak:
            entry["mfu"] = round(tflops / self._peak, 6)
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        return entry
