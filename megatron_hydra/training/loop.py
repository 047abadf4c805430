"""The training loop: the same for every verb."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from megatron_hydra.checkpoint import store
from megatron_hydra.config.loading import to_dict, to_yaml
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import check_layout
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.files import write_text_atomic
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.world import World, start_world, stop_world
from megatron_hydra.ranks import on_main
from megatron_hydra.startup import StartupClock, startup_phase
from megatron_hydra.stopping import REQUEUE_EXIT_CODE, StopRequest, exit_on_stop_signal
from megatron_hydra.training.agreement import on_all, true_anywhere
from megatron_hydra.training.checkpoint import Progress, RunCheckpoints
from megatron_hydra.training.faults import FaultTracker
from megatron_hydra.training.metrics import MetricsLog, where_it_runs
from megatron_hydra.training.model_state import load_model, verified_checkpoint
from megatron_hydra.training.observe import PhaseTimers
from megatron_hydra.training.out_of_memory import out_of_memory_explained
from megatron_hydra.training.patience import ALL_STEPS
from megatron_hydra.training.provenance import Provenance, trained_model_config
from megatron_hydra.training.report import StepReport
from megatron_hydra.training.resume_rules import rule_of
from megatron_hydra.training.run_folder import CHECKPOINTS, lock_output, step_folders
from megatron_hydra.training.setup import (
    apply_settings,
    build_chunks,
    build_optimizer,
    build_schedule,
    freeze,
    wrap_for_training,
)
from megatron_hydra.training.start import prepare_node, report_start
from megatron_hydra.training.step import StepResult, TrainState, train_step
from megatron_hydra.training.validation import Validation
from megatron_hydra.transfer.verb import inner_model
from megatron_hydra.transfer.verbs import VERBS
from megatron_hydra.watchdog import PATIENCE, Watchdog

_log = logging.getLogger(__name__)


def run_training(config: RunConfig) -> int:
    """Start or resume a run, and train to the end.

    Returns:
        0 when the run is complete; :data:`~megatron_hydra.stopping.REQUEUE_EXIT_CODE` after a stop.

    Raises:
        HydraError: bad input, or too many skipped steps in a row.
    """
    platform.keep_freed_memory()
    stop_before = config.faults.stop_seconds_before_limit
    with (
        StartupClock() as clock,
        Watchdog(config.faults.timeout_seconds) as watchdog,
        StopRequest(stop_before) as stop,
        out_of_memory_explained(config),
        contextlib.ExitStack() as held,
        contextlib.ExitStack() as starting,
    ):
        kernels = prepare_node(config, starting)
        with exit_on_stop_signal("the run is starting"):
            with startup_phase("process group"):
                world = start_world(config)
                held.callback(stop_world)
                on_main(lambda: _lock_output(held, config))
            run = _Run(config, world, watchdog, stop)

        def first_step_is_done(log: MetricsLog, step: int) -> None:
            starting.close()
            report_start(log, step, clock, kernels)

        return run.loop(first_step_is_done)


class _Run:
    """State of one run on this rank."""

    def __init__(
        self, config: RunConfig, world: World, watchdog: Watchdog, stop: StopRequest
    ) -> None:
        self.config, self.world, self.watchdog, self.stop = config, world, watchdog, stop
        student, teacher = config.student, config.teacher
        teacher_folder = None
        with startup_phase("verifying checkpoints"):
            student_folder = verified_checkpoint(student.checkpoint, student.fingerprint)
            if teacher.checkpoint:
                teacher_folder = verified_checkpoint(teacher.checkpoint, teacher.fingerprint)
        model = store.read_model_config(student_folder)
        teacher_model = None
        if teacher_folder is not None:
            teacher_model = store.read_model_config(teacher_folder)
        check_layout(config, world.size, model, teacher_model)
        with startup_phase("data"):
            self.stream = on_all(lambda: _open_stream(config, world, model))
            self.validation = on_all(lambda: Validation(config, world, model.vocab_size))
        self.model, self.teacher_model = model, teacher_model
        self.faults = FaultTracker(config.faults)
        self.timers = PhaseTimers()

        self.train_state = self._build(model, teacher_model, student_folder, teacher_folder)
        self.checkpoints = RunCheckpoints(
            config,
            world,
            trained_model_config(model),
            [inner_model(chunk) for chunk in self.train_state.chunks],
            self.train_state.optimizer,
            Provenance.of(student_folder, teacher_folder),
        )
        with startup_phase("resuming"):
            self.progress = self._resume()
        self.saved_step = self.progress.step
        # Only at the end: a failed start must leave the folder unchanged.
        on_main(lambda: write_text_atomic(Path(config.output) / "config.yaml", to_yaml(config)))

    def _build(
        self,
        model: ModelConfig,
        teacher_model: ModelConfig | None,
        student_folder: Path,
        teacher_folder: Path | None,
    ) -> TrainState:
        config = self.config
        teacher = []
        if teacher_model is not None and teacher_folder is not None:
            with startup_phase("model"):
                teacher = freeze(build_chunks(teacher_model, config))
            with startup_phase("weights"):
                load_model(teacher, teacher_folder)
        verb = VERBS[config.verb](config, self.world, teacher)
        with startup_phase("model"):
            student = build_chunks(model, config)
        with startup_phase("weights"):
            load_model(student, student_folder)
        with startup_phase("optimizer"):
            chunks = wrap_for_training(student, verb, config)
            optimizer = build_optimizer(chunks, config)
        return TrainState(config, self.world, verb, chunks, optimizer, self.faults)

    def _resume(self) -> Progress:
        config = self.config
        folder = self.checkpoints.find()
        if folder is None:
            progress = Progress(0, 0)
        else:
            progress = self.checkpoints.resume(folder, self._restore_data_state)
            # Use the settings of the config, not those in the checkpoint.
            apply_settings(self.train_state.optimizer, config.optimizer)
            self.faults.restore(progress.faults)
            if self.world.is_main:
                _log.info("resuming from %s", folder)
                for change in self.checkpoints.changes:
                    _log.info("%s: %s", change, rule_of(change.key)[0])
                for line in self.stream.reading.about_change(config.schedule.steps):
                    _log.info("%s", line)
        reading = self.stream.reading
        self.schedule = build_schedule(self.train_state.optimizer, config, reading)
        self.schedule.step(reading.samples_before(progress.step) // reading.batch_unit)
        return progress

    def _restore_data_state(self, body: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
        """Restore data position and held-out losses; see :meth:`.RunCheckpoints.resume`."""
        step = self.stream.check_state(body["data"])
        self.stream.plan(self.config.schedule.steps)
        self.validation.check_not_trained_on(self.stream.reading.sources)
        losses = body.get("validation", {})  # missing in older checkpoints
        self.validation.restore(losses, has_new_blend=self.stream.has_new_blend)
        return step, self.validation.state(), self.validation.reason_to_end(step)

    # -- the loop -----------------------------------------------------------------------------

    def loop(self, first_step_is_done: Callable[[MetricsLog, int], None]) -> int:
        """Run the remaining steps; returns the exit status.

        Args:
            first_step_is_done: called once, after the first step.
        """
        config, first = self.config, self.progress.step
        with MetricsLog(
            config.output,
            config.logging,
            first_step=first,
            total_steps=config.schedule.steps,
            enabled=self.world.is_main,
            title=config.verb,
            run_config=to_dict(config),
        ) as log:
            changed = {c.key: [c.before, c.after] for c in self.checkpoints.changes}
            log.event(
                "resume" if first else "start", first, **where_it_runs(self.world.size),
                **({"changed": changed} if changed else {}),
            )  # fmt: skip
            if first and (difference := self.stream.reading.change()):
                log.event("reading changed", first, **difference)
            end = first if self.progress.ended else config.schedule.steps
            with contextlib.closing(_prefetched(self.stream, first, end)) as batches:
                status = self._steps(log, batches, first_step_is_done)
            self.watchdog.feed(PATIENCE)
            on_main(log.close)  # no rank exits while rank 0 still sends its logs
        return status

    def _steps(
        self,
        log: MetricsLog,
        batches: Iterator[tuple[int, list[PackedBatch]]],
        first_step_is_done: Callable[[MetricsLog, int], None],
    ) -> int:
        first, unit = self.progress.step, self.stream.reading.batch_unit
        report = StepReport(
            self.config, self.world, self.train_state, self.model, self.teacher_model
        )
        for step, micro_batches in self.timers.over("data", batches):
            self.watchdog.feed(PATIENCE if step == first + 1 else 1)
            self.schedule.step(self.config.batch.global_batch_size // unit)
            with startup_phase("first step") if step == first + 1 else contextlib.nullcontext():
                result = train_step(
                    self.train_state, micro_batches, self._stop_and_saving, self.timers
                )
            if step == first + 1:
                first_step_is_done(log, step)
            tokens = self.progress.tokens + self.stream.tokens_per_step
            held_out = self._validated(step)
            ended = self.validation.reason_to_end(step)
            self.progress = Progress(
                step, tokens, self.faults.state(), self.validation.state(), ended
            )
            entry = report.entry(result, self.progress, self.timers, held_out)
            if entry is not None:
                log.write(entry)
            log.advance(step, result.loss)
            self._handle_faults(log, result, micro_batches)
            is_stopped = self._save_if_due(log, result)
            if ended:
                break
            if is_stopped:
                reason = self.stop.reason or "another rank was asked to"
                log.event("stop", step, reason=reason, saved_step=self.saved_step)
                return REQUEUE_EXIT_CODE
        step, reason = self.progress.step, self.progress.ended
        log.event("end", step, reason=reason)
        if self.world.is_main and reason != ALL_STEPS:
            _log.info("the run ends after step %d: %s", step, reason)
        return 0

    def _validated(self, step: int) -> dict[str, Any] | None:
        """Run the validation after ``step``; ``None`` if none is due."""
        if not self.validation.is_due(step):
            return None
        with self.timers.phase("validation"):
            found = self.validation.measure(
                self.train_state, step, lambda: self.watchdog.feed(PATIENCE)
            )
        self.watchdog.feed(PATIENCE)
        return found

    def _stop_and_saving(self) -> tuple[bool, bool]:
        return self.stop.requested, self.checkpoints.is_writing

    def _handle_faults(
        self, log: MetricsLog, result: StepResult, batches: list[PackedBatch]
    ) -> None:
        """Log the samples of a skipped step; end the run if too many steps were skipped."""
        if not result.fault:
            return
        step = self.progress.step
        samples = [sample for batch in batches for sample in batch.sample_ids]
        _log.warning(
            "step %d: %s; the update was skipped (%d in a row, %d in all). "
            "Samples of data-parallel rank %d: %s",
            step, result.fault, self.faults.in_a_row, self.faults.skipped, self.world.dp_rank,
            samples,
        )  # fmt: skip
        ids = self.stream.global_samples(step - 1)
        log.event("skip", step, fault=result.fault, samples=sorted(ids))
        if self.faults.in_a_row > self.config.faults.max_skipped_steps:
            self._finish_save(log)
        self.faults.check_skip_limit(step, result.fault)

    def _save_if_due(self, log: MetricsLog, result: StepResult) -> bool:
        """Complete a background save; save a checkpoint if one is due.

        A stop saves only once, because the process may have only seconds. If a background save is running,
        it is completed, and the next attempt repeats the few steps since then.

        Returns:
            Whether to exit: a stop was requested on some rank, and everything is saved.
        """
        config, step = self.config, self.progress.step
        is_end = bool(self.progress.ended)
        if self.checkpoints.is_pending and not result.saving:
            self._finish_save(log)
        interval = config.checkpoint.interval
        # Counted from the last save: a save due on a skipped step happens after the next good step.
        is_due = step // interval > self.saved_step // interval and not self.faults.in_a_row
        stop = result.stop
        if is_end or ((is_due or stop) and not (stop and self.checkpoints.is_pending)):
            self._save(log)
            # A request during the save is handled here: without another step, and without a second save.
            stop = stop or true_anywhere(self.stop.requested)
        if is_end or stop:
            self._finish_save(log)
        return stop

    def _save(self, log: MetricsLog) -> None:
        self._finish_save(log)
        self.watchdog.feed(PATIENCE)
        with self.timers.phase("save"):
            log.sync()
            if self.config.parallel.overlap_param_gather:
                # Otherwise updated weights are gathered only in the next forward.
                for chunk in self.train_state.chunks:
                    chunk.start_param_sync(force_sync=True)
            started = time.perf_counter()
            folder = self.checkpoints.save(self.progress, self.stream.state(self.progress.step))
            seconds = round(time.perf_counter() - started, 3)
        self.saved_step = self.progress.step
        in_background = self.checkpoints.is_pending
        log.event(
            "save begun" if in_background else "save", self.progress.step,
            checkpoint=folder.name, seconds=seconds,
        )  # fmt: skip
        self.watchdog.feed(PATIENCE)

    def _finish_save(self, log: MetricsLog) -> None:
        """Complete the background save, if any."""
        if not self.checkpoints.is_pending:
            return
        self.watchdog.feed(PATIENCE)
        started = time.perf_counter()
        with self.timers.phase("save"):
            folder = self.checkpoints.finish()
        assert folder is not None
        seconds = round(time.perf_counter() - started, 3)
        log.event("save", self.progress.step, checkpoint=folder.name, seconds=seconds)
        self.watchdog.feed(PATIENCE)


def _lock_output(held: contextlib.ExitStack, config: RunConfig) -> None:
    held.enter_context(lock_output(Path(config.output)))


def _open_stream(config: RunConfig, world: World, model: ModelConfig) -> PackedStream:
    stream = PackedStream(
        config.data,
        config.batch,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        vocab_size=model.vocab_size,
    )
    # On resume, the data read so far are not known yet.
    if not step_folders(Path(config.output) / CHECKPOINTS):
        stream.plan(config.schedule.steps)  # checks data.token_budget and max_epochs
    return stream


def _prefetched(
    stream: PackedStream, done: int, total: int
) -> Generator[tuple[int, list[PackedBatch]], None, None]:
    """Yield (step number, micro-batches) from step ``done + 1``; one step is read ahead."""
    with concurrent.futures.ThreadPoolExecutor(1, "data") as pool:
        ahead = pool.submit(stream.micro_batches, done) if done < total else None
        for step in range(done, total):
            assert ahead is not None
            batches = ahead.result()
            ahead = pool.submit(stream.micro_batches, step + 1) if step + 1 < total else None
            yield step + 1, batches
