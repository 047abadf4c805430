"""Out of memory on a GPU: advise settings to change, and show the planner's estimate."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager

from megatron_hydra.checkpoint import store
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.environment import world_size_from_environment
from megatron_hydra.errors import HydraError
from megatron_hydra.model.layer_spec import kernel_case
from megatron_hydra.ops.backends import resolved_names
from megatron_hydra.out_of_memory import GIB, convert_out_of_memory, explained


def out_of_memory_explained(config: RunConfig) -> AbstractContextManager[None]:
    """Replace torch's out-of-memory error of a training run by an error that names the keys to change.

    Raises:
        OutOfMemory: instead of ``torch.OutOfMemoryError``.
    """
    return convert_out_of_memory(lambda error: _explain(config, error))


def _explain(config: RunConfig, error: BaseException) -> str:
    if is_gdn_torch := _is_gdn_torch(config):  # the planner needs it as well
        backend = dataclasses.replace(config.backend, gated_delta_net="torch")
        config = dataclasses.replace(config, backend=backend)
    advice = training_advice(config, is_gdn_torch)
    return explained(config.verb, error, advice, _planner_estimate(config))


def training_advice(config: RunConfig, is_gdn_torch: bool = False) -> list[str]:
    """Changes of this config that reduce the memory of a step, the cheapest first."""
    batch, recompute, parallel = config.batch, config.recompute, config.parallel
    advice = []
    if is_gdn_torch:
        advice.append(
            "backend.gated_delta_net is torch, which needs several times the memory of FLA's kernels: install "
            "flash-linear-attention, or set recompute.granularity=selective recompute.modules=[gdn]"
        )
    if batch.micro_batch_size > 1:
        advice.append(
            f"batch.micro_batch_size={batch.micro_batch_size // 2} (now {batch.micro_batch_size}; the global "
            "batch stays the same, with more accumulation steps)"
        )
    if recompute.granularity == "none":
        advice.append("recompute.granularity=selective recompute.modules=[gdn,tail,mlp] (now none)")
    if recompute.granularity != "full":
        advice.append(f"recompute.granularity=full (now {recompute.granularity})")
    if config.verb != "align" and config.loss.chunk_tokens > 256:
        advice.append(
            f"loss.chunk_tokens={config.loss.chunk_tokens // 2} (now {config.loss.chunk_tokens}): number of "
            "tokens whose logits are in memory at a time"
        )
    if not parallel.distributed_optimizer:
        advice.append("parallel.distributed_optimizer=true: shards optimizer states over ranks")
    advice.append(
        f"more GPUs for a model: parallel.context (now {parallel.context}) shards tokens, "
        f"parallel.tensor (now {parallel.tensor}) shards weights and heads"
    )
    return advice


def _is_gdn_torch(config: RunConfig) -> bool:
    model = _student(config)
    if model is None:
        return False
    case = kernel_case(model, config)
    names = resolved_names(config.backend, case)
    return bool(case.gdn_heads) and names["gated_delta_net"] == "torch"


def _student(config: RunConfig) -> ModelConfig | None:
    with contextlib.suppress(HydraError):
        return store.read_model_config(config.student.checkpoint)
    return None


def _planner_estimate(config: RunConfig) -> str:
    """``; the planner expects …``, or an empty text if it cannot estimate."""
    from megatron_hydra.planning.plan import expected_memory

    model = _student(config)
    if model is None:
        return ""
    with contextlib.suppress(HydraError):
        expected = expected_memory(model, config, world_size_from_environment())
        parts = ", ".join(
            f"{name} {count / GIB:.1f}" for name, count in expected.peak.most_common(4)
        )
        return (
            f"; the planner expects a peak of {expected.total / GIB:.1f} GiB for this config ({parts}), "
            "if every sequence is one document"
        )
    return ""
