"""Retrieval at given lengths and depths, scored on any Hugging Face causal model (design §1).

The parts: :mod:`tasks` says what a task is, :mod:`finding` finds it by name; :mod:`needles`, :mod:`ruler`
and :mod:`qa` are the tasks; :mod:`scoring` runs a model on samples; :mod:`runner` goes over tasks and lengths,
resumably; :mod:`cache_bytes` measures a model's cache; :mod:`plots` draws.
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
