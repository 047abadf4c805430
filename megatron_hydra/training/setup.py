"""Make models, wrapper, optimizer and schedule, all from Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import OptimizerConfig as OptimizerSettings
from megatron_hydra.config.run import RunConfig
from megatron_hydra.data.reading import Reading
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.gradients import finalize_gradients
from megatron_hydra.transfer.verb import Verb


def build_chunks(model: ModelConfig, config: RunConfig) -> list[GPTModel]:
    """Build this rank's model chunks (one, or one per virtual pipeline stage) with unset weights."""
    count = config.parallel.virtual_pipeline
    chunks = []
    for index in range(count):
        vp_stage = index if count > 1 else None
        chunk = build_gpt_model(
            model,
            config,
            pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
            vp_stage=vp_stage,
        )
        _mark_sharded_weights(chunk)
        chunks.append(chunk.to(platform.device()))
    return chunks


def _mark_sharded_weights(model: GPTModel) -> None:
    """Mark weights that are shards of larger weights, for Megatron.

    Megatron's layers set these marks only during random initialisation, which we do not use. Without the
    marks the gradient norm includes only the shard of tensor-parallel rank 0.
    """
    sharded_axis = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        axis = sharded_axis.get(type(module))
        if axis is None or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def freeze(chunks: list[GPTModel]) -> list[GPTModel]:
    """Freeze a model: no gradients, evaluation mode."""
    for chunk in chunks:
        chunk.eval()
        chunk.requires_grad_(False)
    return chunks


def wrap_for_training(
    chunks: list[GPTModel], verb: Verb, config: RunConfig
) -> list[DistributedDataParallel]:
    """Freeze the parameters that the verb does not train, then wrap for data parallelism.

    The order matters: the wrapper allocates gradient buffers for the parameters that are trainable then.
    """
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    wrapped = []
    for chunk in chunks:
        chunk.train()
        # Sums of token losses are divided once, at the end, by the global number of unmasked tokens.
        chunk.config.calculate_per_token_loss = True
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(verb.is_trained(name))
        # Megatron's own trainer sets disable_bucketing for chunks after the first; we do not. It would
        # put a bf16 chunk's weights and its fp32 A_log and dt_bias into one bucket group. gloo gathers a
        # group in the dtype of its first bucket and would corrupt the other buckets.
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, chunk))
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_gradients
        if parallel.overlap_grad_reduce:
            no_sync = [w.no_sync for w in wrapped]
            chunk.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def build_optimizer(chunks: list[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """AdamW. No weight decay for 1-D parameters and those marked in :mod:`megatron_hydra.model.parameters`."""
    settings = config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=config.precision == "bf16",
        params_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return get_megatron_optimizer(optimizer_config, chunks, config_overrides=_param_groups())


def apply_settings(optimizer: MegatronOptimizer, settings: OptimizerSettings) -> None:
    """Give all parameter groups these settings.

    The schedule sets weight decay and learning rate at every step, and clipping reads the config.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = settings.lr, settings.min_lr
        group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.eps


def _param_groups() -> dict[ParamKey, ParamGroupOverride]:
    """Groups of parameters without decay, and separate groups of parameters that stay fp32 in a bf16 model.

    Megatron's distributed optimizer saves and loads wrong state if a group mixes dtypes. A few fixed keys
    distinguish groups; ``is_decoupled_lr`` is one of them and has no other effect here.
    """

    def matching(name: str, test: Callable[[torch.nn.Parameter, str], bool]) -> ParamKey:
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=test))

    not_decayed = matching(
        "not_decayed",
        lambda parameter, _: parameter.dim() <= 1 or not getattr(parameter, "hydra_decays", True),
    )
    always_fp32 = matching(
        "always_fp32", lambda parameter, _: getattr(parameter, "hydra_fp32", False)
    )
    return {
        not_decayed: ParamGroupOverride(wd_mult=0.0),
        always_fp32: ParamGroupOverride(is_decoupled_lr=True),
    }


def build_schedule(
    optimizer: MegatronOptimizer, config: RunConfig, reading: Reading
) -> OptimizerParamScheduler:
    """Build the learning rate as a function of the samples read.

    ``schedule.steps`` and ``warmup_steps`` are converted to numbers of samples. So a change of the global
    batch on resume keeps the learning rate as a function of tokens, and changes it as a function of steps.
    The unit of the schedule is :attr:`.Reading.batch_unit`. If the batch never changes, it counts steps. A
    step with global batch size B calls ``step(B // unit)``.
    """
    settings, schedule = config.optimizer, config.schedule
    unit = reading.batch_unit
    steps = reading.samples_before(schedule.steps) // unit
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=reading.samples_before(schedule.warmup_steps) // unit,
        lr_decay_steps=steps,
        lr_decay_style=schedule.kind,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
