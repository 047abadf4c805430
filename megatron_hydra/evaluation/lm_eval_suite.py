"""Run EleutherAI's lm-evaluation-harness on a loaded model; optional (extra ``eval``)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from megatron_hydra.errors import HydraError


def require_lm_eval() -> None:
    """Check that lm-eval is installed.

    Raises:
        HydraError: it is not; names the extra to install.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise HydraError(
            "--lm-eval needs lm-evaluation-harness, which is not installed: pip install -c "
            f"constraints.txt -e '.[eval]' ({error})"
        ) from None


def lm_eval_version() -> str:
    """The installed version: scores of different versions are not always comparable."""
    from importlib.metadata import version

    return version("lm_eval")


def run_lm_eval(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    include: str = "",
    limit: int = 0,
    batch_tokens: int = 32768,
    seed: int = 1234,
) -> dict[str, dict[str, Any]]:
    """Score a Hugging Face causal model on one of lm-eval's tasks or groups.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        task: lm-eval's name.
        include: a folder with the user's own task files (YAML), or ``""``. Relative ``data_files`` in them are
            relative to this folder.
        limit: number of questions of each task, from the first; 0: all.
        batch_tokens: largest number of tokens of a batch (at least one request).
        seed: seed of few-shot examples and of other random numbers of lm-eval.

    Returns:
        Name → metrics with lm-eval's names (``"acc,none"``, ``"acc_stderr,none"``, …) for the task, and for a
        group also for its members.

    Raises:
        OutOfMemory: a single request does not fit into the GPU's memory.
        HydraError: lm-eval is not installed, the tokenizer is missing, or the folder or task does not exist.
    """
    require_lm_eval()
    if tokenizer is None:
        raise HydraError("--lm-eval needs the model's tokenizer: give --tokenizer")
    if include and not Path(include).is_dir():
        raise HydraError(f"--lm-eval-include {include} is not a folder")
    from lm_eval import simple_evaluate

    from megatron_hydra.evaluation.lm_eval_model import BatchedByTokens

    include = include and str(Path(include).absolute())
    tasks = _tasks_with(task, include)
    with contextlib.chdir(include or "."):  # data_files are opened here
        loaded = tasks.load([task])
    groups = loaded.get("groups") or {}
    chosen = [groups[task]] if task in groups else list(loaded["tasks"].values())
    found = simple_evaluate(
        model=BatchedByTokens(model, tokenizer, batch_tokens),
        tasks=chosen,
        task_manager=tasks,
        limit=limit or None,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {name: _metrics(values) for name, values in found["results"].items()}


def _tasks_with(task: str, include: str) -> Any:
    """lm-eval's index with this task. A user's own task does not need lm-eval's thousands of files."""
    from lm_eval.tasks import TaskManager

    if include:
        tasks = TaskManager(include_path=include, include_defaults=False)
        if task in tasks.all_subtasks:
            return tasks
    tasks = TaskManager(include_path=include or None)
    if task not in tasks.all_tasks:
        where = f", and {include} has none" if include else ""
        raise HydraError(f"--lm-eval: lm-eval {lm_eval_version()} has no task {task!r}{where}")
    return tasks


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """Keep only numbers: a missing error bar is the text ``N/A``."""
    return {key: v for key, v in values.items() if isinstance(v, int | float)}
