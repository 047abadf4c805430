"""Load tasks by name, ``qa:FILE``, ``module:function``, or from JSONL."""

from __future__ import annotations

import importlib

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation import needles, ruler  # noqa: F401  # they register the built-in tasks
from megatron_hydra.evaluation.qa import QuestionAnswering
from megatron_hydra.evaluation.tasks import TASKS, JsonlTask, RetrievalTask


def task_names() -> list[str]:
    """Names of the built-in and registered tasks."""
    return sorted(TASKS)


def load_task(spec: str) -> RetrievalTask:
    """Find a task.

    Args:
        spec: a registered name; or ``qa:FILE`` (see :mod:`megatron_hydra.evaluation.qa`); or
            ``module:function``, a function that returns a task without arguments; or the path of a
            ``.jsonl`` file (see :class:`~megatron_hydra.evaluation.tasks.JsonlTask`).

    Raises:
        HydraError: the task does not exist.
    """
    if spec in TASKS:
        return TASKS[spec]()
    if spec.startswith("qa:"):
        return QuestionAnswering(spec.removeprefix("qa:"))
    if spec.endswith(".jsonl"):
        return JsonlTask(spec)
    module_name, colon, function = spec.partition(":")
    if not colon:
        raise HydraError(
            f"task {spec!r} is unknown: use one of {', '.join(sorted(TASKS))}, 'qa:FILE', "
            "'module:function' or a .jsonl file"
        )
    try:
        task = getattr(importlib.import_module(module_name), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise HydraError(f"task {spec!r} cannot be created: {error}") from error
    if not callable(getattr(task, "samples", None)) or not hasattr(task, "name"):
        raise HydraError(f"task {spec!r} is a {type(task).__name__} without name and samples()")
    return task
