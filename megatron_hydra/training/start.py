"""Prepare a node before ranks connect: check the GPU, report slow parts, compile the kernels."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from megatron_hydra.checkpoint import store
from megatron_hydra.config.run import RunConfig
from megatron_hydra.config.validate import data_parallel_size
from megatron_hydra.environment import environment_number, world_size_from_environment
from megatron_hydra.model.layer_spec import kernel_case
from megatron_hydra.ops.backends import slow_paths
from megatron_hydra.ops.compiler_output import COMPILE_LOG, compiler_output_to
from megatron_hydra.parallel import platform
from megatron_hydra.startup import StartupClock, in_words, startup_phase
from megatron_hydra.training.metrics import MetricsLog
from megatron_hydra.training.warm_up import WarmUp, compile_once_per_node, warning_of

_log = logging.getLogger(__name__)


def prepare_node(config: RunConfig, starting: contextlib.ExitStack) -> WarmUp | None:
    """Select this process's GPU, report its slow parts, and compile the run's kernels.

    Args:
        config: the run.
        starting: stack of contexts that end after the first step. One of them writes the compilers' output
            to the compile log.

    Returns:
        The result of compiling; ``None`` without a GPU.

    Raises:
        HydraError: the number of processes does not fit the GPUs or the layout, a back end cannot run, or a
            kernel computes wrong results.
    """
    data_parallel_size(config, world_size_from_environment())
    platform.bind_process_to_device(environment_number("LOCAL_RANK", 0))
    if not platform.device_count():
        return None
    with startup_phase("kernels"):
        result = kernels_of(config)
    if not result.ready:
        _log.warning("%s", warning_of(result, config.output))
    starting.enter_context(compiler_output_to(Path(config.output) / COMPILE_LOG))
    return result


def kernels_of(config: RunConfig) -> WarmUp:
    """Report the kernels that are slow on this process's GPU, and compile all kernels.

    Raises:
        HydraError: as in :func:`prepare_node`.
    """
    model = store.read_model_config(config.student.checkpoint)
    teacher = None
    if config.teacher.checkpoint:
        teacher = store.read_model_config(config.teacher.checkpoint)
    is_main = environment_number("RANK", 0) == 0
    if is_main:
        for text in slow_paths(config.backend, kernel_case(model, config)):
            _log.warning("%s", text)
    return compile_once_per_node(
        config, model, teacher, tell=lambda text: _log_progress(text, is_main),
        local_rank=environment_number("LOCAL_RANK", 0),
    )  # fmt: skip


def _log_progress(text: str, is_main: bool) -> None:
    """Log the progress of ranks that compile. Of the waiting ranks, only the first one logs."""
    if is_main or not text.startswith("another process"):
        _log.log(logging.INFO if is_main else logging.WARNING, "%s", text)


def report_start(log: MetricsLog, step: int, clock: StartupClock, kernels: WarmUp | None) -> None:
    """Log the time to the first step and its parts, as an event and a line."""
    seconds, total = clock.seconds(), clock.total()
    facts = (
        {} if kernels is None else {"scenes_compiled": kernels.compiled, "all_ready": kernels.ready}
    )
    log.event("first step", step, seconds=seconds, total=total, **facts)
    if log.enabled:
        _log.info("first step %.1f s after the start: %s", total, in_words(seconds))
