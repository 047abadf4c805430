"""The training loop: the same for every verb."""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Generator
from pathlib import Path

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.atomic import write_text_atomic
from megatron_hydra.config.loading import to_yaml
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import check_layout
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel.world import World, start_world, stop_world
from megatron_hydra.training.agreement import on_all, on_main
from megatron_hydra.training.checkpoint import (
    Progress,
    RunCheckpoints,
    load_model,
    verified_checkpoint,
)
from megatron_hydra.training.metrics import MetricsLog
from megatron_hydra.training.provenance import Provenance, trained_model_config
from megatron_hydra.training.setup import (
    build_chunks,
    build_optimizer,
    freeze,
    wrap_for_training,
)
from megatron_hydra.training.step import StepResult, Trainee, train_step
from megatron_hydra.training.stop import REQUEUE_EXIT_CODE, StopRequest
from megatron_hydra.training.watchdog import Watchdog
from megatron_hydra.transfer.verb import inner_model
from megatron_hydra.transfer.verbs import VERBS

_log = logging.getLogger(__name__)


def run_training(config: RunConfig) -> int:
    """Train from start, or from where the run was stopped, to the end.

    Returns:
        0 when the run is complete; :data:`~.stop.REQUEUE_EXIT_CODE` after a stop by signal.

    Raises:
        HydraError: bad input, or too many steps in a row without a finite loss.
    """
    with Watchdog(config.faults.timeout_seconds) as watchdog, StopRequest() as stop:
        world = start_world(config)
        try:
            return _Run(config, world, watchdog, stop).loop()
        finally:
            stop_world()


class _Run:
    """Everything of one run on this rank."""

    def __init__(
        self, config: RunConfig, world: World, watchdog: Watchdog, stop: StopRequest
    ) -> None:
        self.config, self.world, self.watchdog, self.stop = config, world, watchdog, stop
        on_main(lambda: _prepare_output(config))
        student_folder = verified_checkpoint(config.student.checkpoint)
        teacher_folder = None
        if config.teacher.checkpoint:
            teacher_folder = verified_checkpoint(config.teacher.checkpoint)
        model = store.read_model_config(student_folder)
        teacher_model = None
        if teacher_folder is not None:
            teacher_model = store.read_model_config(teacher_folder)
        check_layout(config, world.size, model, teacher_model)
        self.stream = on_all(lambda: _open_stream(config, world, model))

        self.provenance = Provenance.of(student_folder, teacher_folder)
        self.trainee, self.schedule = self._build(
            model, teacher_model, student_folder, teacher_folder
        )
        self.checkpoints = RunCheckpoints(
            config,
            world,
            trained_model_config(model),
            [inner_model(chunk) for chunk in self.trainee.chunks],
            self.trainee.optimizer,
            lambda progress: self.provenance.record(config, progress.step, progress.tokens),
        )
        self.progress = self._resume()
        self.skipped_in_a_row = 0

    def _build(
        self,
        model: ModelConfig,
        teacher_model: ModelConfig | None,
        student_folder: Path,
        teacher_folder: Path | None,
    ) -> tuple[Trainee, OptimizerParamScheduler]:
        config = self.config
        teacher = []
        if teacher_model is not None and teacher_folder is not None:
            teacher = freeze(build_chunks(teacher_model, config))
            load_model(teacher, teacher_folder)
        verb = VERBS[config.verb](config, self.world, teacher)
        student = build_chunks(model, config)
        load_model(student, student_folder)
        chunks = wrap_for_training(student, verb, config)
        optimizer, schedule = build_optimizer(chunks, config)
        return Trainee(config, self.world, verb, chunks, optimizer), schedule

    def _resume(self) -> Progress:
        folder = self.checkpoints.find()
        if folder is None:
            return Progress(0, 0)
        progress = self.checkpoints.resume(folder, self.stream.check_state)
        for group in self.trainee.optimizer.param_groups:  # the config's, not the checkpoint's
            group["max_lr"], group["min_lr"] = (
                self.config.optimizer.lr,
                self.config.optimizer.min_lr,
            )
        self.schedule.step(progress.step)
        if self.world.is_main:
            _log.info("resuming from %s", folder)
        return progress

    # -- the loop -----------------------------------------------------------------------------

    def loop(self) -> int:
        config, total = self.config, self.config.schedule.steps
        log = MetricsLog(
            config.output,
            config.logging,
            first_step=self.progress.step,
            total_steps=total,
            enabled=self.world.is_main,
            title=config.verb,
        )
        saved_step, result = self.progress.step, None
        clock = time.perf_counter()
        batches = _prefetched(self.stream, self.progress.step, total)
        try:
            for step, micro_batches in batches:
                self.watchdog.feed(5 if result is None else 1)
                self.schedule.step(1)
                result = train_step(self.trainee, micro_batches, self.stop)
                self.progress = Progress(step, self.progress.tokens + self.stream.tokens_per_step)
                clock = self._report(log, result, clock)
                self._mind_faults(result, micro_batches)
                if step % config.checkpoint.interval == 0 or step == total or result.stop:
                    self._save(log)
                    saved_step = step
                if result.stop and step < total:
                    return REQUEUE_EXIT_CODE
            if saved_step < total or result is None:
                self._save(log)
            return 0
        finally:
            batches.close()
            log.close()

    def _report(self, log: MetricsLog, result: StepResult, clock: float) -> float:
        """Log the step; returns the time that the next report counts from."""
        step, every = self.progress.step, self.config.logging.interval
        values = self.trainee.verb.metrics(result.means)
        if step % every and step != self.config.schedule.steps:
            log.advance(step, values["loss"])
            return clock
        now = time.perf_counter()
        steps = (step - 1) % every + 1
        entry = {
            "step": step,
            "tokens": self.progress.tokens,
            **values,
            "loss_tokens": result.num_loss_tokens,
            "grad_norm": result.grad_norm,
            "lr": self.trainee.optimizer.param_groups[0]["lr"],
            "tokens_per_s": round(steps * self.stream.tokens_per_step / (now - clock), 1),
        }
        if not result.applied:
            entry["skipped"] = True
        log.write(entry)
        log.advance(step, values["loss"])
        return now

    def _mind_faults(self, result: StepResult, batches: list[PackedBatch]) -> None:
        """Count steps that were skipped; all ranks come to the same conclusion."""
        if result.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        step, limit = self.progress.step, self.config.faults.max_skipped_steps
        samples = [sample for batch in batches for sample in batch.sample_ids]
        _log.warning(
            "step %d: loss or gradient is not finite; the update was skipped (%d in a row). "
            "Samples of data-parallel rank %d: %s",
            step, self.skipped_in_a_row, self.world.dp_rank, samples,
        )  # fmt: skip
        if self.skipped_in_a_row > limit:
            raise HydraError(
                f"step {step}: loss or gradient is not finite for {self.skipped_in_a_row} steps in "
                f"a row, faults.max_skipped_steps is {limit}; the last checkpoint is good"
            )

    def _save(self, log: MetricsLog) -> None:
        self.watchdog.feed(5)
        log.sync()
        if self.config.parallel.overlap_param_gather:
            # Updated weights are otherwise collected during the next forward only.
            for chunk in self.trainee.chunks:
                chunk.start_param_sync(force_sync=True)
        if self.skipped_in_a_row == 0 or self.stop.requested:
            self.checkpoints.save(self.progress, self.stream.state(self.progress.step))
        self.watchdog.feed(5)


def _open_stream(config: RunConfig, world: World, model: ModelConfig) -> PackedStream:
    stream = PackedStream(
        config.data,
        config.batch,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        vocab_size=model.vocab_size,
    )
    stream.plan(config.schedule.steps)  # refuses what data.token_budget and max_epochs forbid
    return stream


def _prepare_output(config: RunConfig) -> None:
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_text_atomic(output / "config.yaml", to_yaml(config))


def _prefetched(
    stream: PackedStream, done: int, total: int
) -> Generator[tuple[int, list[PackedBatch]], None, None]:
    """(number of the step, its micro-batches) from step ``done + 1`` on; one step is read ahead."""
    with concurrent.futures.ThreadPoolExecutor(1, "data") as pool:
        ahead = pool.submit(stream.micro_batches, done) if done < total else None
        for step in range(done, total):
            assert ahead is not None
            batches = ahead.result()
            ahead = pool.submit(stream.micro_batches, step + 1) if step + 1 < total else None
            yield step + 1, batches
