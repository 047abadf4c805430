"""Retrieval at given lengths and depths, scored on any Hugging Face causal model (design §1).

The parts: :mod:`tasks` defines the interface of a task, and :mod:`finding` finds a task by name. The tasks are
in :mod:`needles`, :mod:`ruler` and :mod:`qa`. :mod:`scoring` runs a model on samples. :mod:`runner` runs all
tasks and lengths and can resume. :mod:`cache_bytes` measures a model's cache. :mod:`plots` draws pictures.
"""

from megatron_hydra.evaluation.cache_bytes import measure_cache_bytes
from megatron_hydra.evaluation.finding import load_task
from megatron_hydra.evaluation.runner import EvaluationSettings, evaluate
from megatron_hydra.evaluation.tasks import (
    GenerationSample,
    RetrievalTask,
    SampleRequest,
    ScoredSample,
    register_task,
)

__all__ = [
    "EvaluationSettings",
    "GenerationSample",
    "RetrievalTask",
    "SampleRequest",
    "ScoredSample",
    "evaluate",
    "load_task",
    "measure_cache_bytes",
    "register_task",
]
