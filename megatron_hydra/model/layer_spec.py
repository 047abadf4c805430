"""HydraHead as a Megatron-Core layer spec, and the stock ``GPTModel`` built from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.model.head_projections import HydraAttentionSubmodules
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.norm import RMSNorm
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.ops.kernels import Case, Kernels
from megatron_hydra.ops.linear_rules import rule_of_model
from megatron_hydra.parallel import platform
from megatron_hydra.parallel.head_partition import plan_model
from megatron_hydra.parallel.megatron_versions import config_options, mlp_spec
from megatron_hydra.parallel.vocabulary import VocabularyShard


def uses_transformer_engine(run: RunConfig) -> bool:
    """Whether linears and norms come from Transformer Engine (``backend.transformer_impl``).

    Raises:
        HydraError: the config names it, but it is not installed.
    """
    choice = run.backend.transformer_impl
    if choice == "transformer_engine" and not HAVE_TE:
        raise HydraError(
            "backend.transformer_impl=transformer_engine, but transformer-engine is not installed"
        )
    return choice == "transformer_engine" or (choice == "auto" and HAVE_TE and platform.has_gpu())


def uses_two_streams(run: RunConfig) -> bool:
    """Whether the two branches may run in parallel (``backend.streams``).

    Raises:
        HydraError: the config requires two streams, but there is no GPU.
    """
    if run.backend.streams == "two" and not platform.has_gpu():
        raise HydraError("backend.streams=two cannot run here: it needs a GPU; set it to auto")
    return run.backend.streams != "one"


def transformer_config(model: ModelConfig, run: RunConfig) -> TransformerConfig:
    """Megatron-Core's config for a model under a run's layout, precision and recomputation."""
    parallel, recompute = run.parallel, run.recompute
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    pipelined = parallel.pipeline > 1
    selective = recompute.granularity == "selective"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        # HydraAttention lays out the heads, evenly or not. Megatron's own head counts only have to pass its
        # divisibility check.
        num_attention_heads=parallel.tensor,
        num_query_groups=parallel.tensor,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=platform.has_gpu(),
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype if pipelined else None,
        # Megatron's overlapped interleaved schedule does not allow batched sends.
        overlap_p2p_comm=pipelined and parallel.virtual_pipeline > 1,
        batch_p2p_comm=not (pipelined and parallel.virtual_pipeline > 1),
        # The lookup's backward then adds rows in a fixed order.
        deterministic_mode=run.deterministic,
        params_dtype=dtype,
        bf16=run.precision == "bf16",
        calculate_per_token_loss=True,
        # Weights always come from a checkpoint; memory that no file has filled must not look trained.
        perform_initialization=False,
        use_cpu_initialization=not platform.has_gpu(),
        gradient_accumulation_fusion=False,
        hetereogenous_dist_checkpoint=True,
        recompute_granularity="full"
        if recompute.granularity == "full"
        else "selective"
        if selective and "mlp" in recompute.modules
        else None,
        recompute_method="uniform" if recompute.granularity == "full" else None,
        recompute_num_layers=recompute.num_layers if recompute.granularity == "full" else None,
        recompute_modules=["mlp"] if selective and "mlp" in recompute.modules else None,
        **config_options(),
    )


def hydra_layer_spec(model: ModelConfig, run: RunConfig, kernels: Kernels) -> ModuleSpec:
    """The spec of every decoder layer, dense or hybrid.

    A layer finds its FA heads and its rank's share of them by its layer number, so one spec is enough for
    different layers.
    """
    if uses_transformer_engine(run):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
        norm = backend.layer_norm(rms_norm=True)
    else:
        backend = LocalSpecProvider()
        norm = RMSNorm
    partitions = plan_model(model, run.parallel.tensor, run.parallel.fa_partition)
    recompute = run.recompute.modules if run.recompute.granularity == "selective" else ()
    attention = ModuleSpec(
        module=HydraAttention,
        params={
            "model": model,
            "partitions": partitions,
            "kernels": kernels,
            "recompute": recompute,
            "two_streams": uses_two_streams(run),
        },
        submodules=HydraAttentionSubmodules(
            in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear()
        ),
    )
    mlp = mlp_spec(
        MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
        )
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def kernel_case(model: ModelConfig, run: RunConfig, tp_rank: int | None = None) -> Case:
    """The case for which a run's kernels are chosen and checked.

    Args:
        model: shapes.
        run: precision and layout.
        tp_rank: the rank whose numbers of GDN heads count; ``None``: all tensor-parallel ranks.
    """
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    partitions = plan_model(model, run.parallel.tensor, run.parallel.fa_partition)
    ranks = range(run.parallel.tensor) if tp_rank is None else (tp_rank,)
    numbers = {len(partition.gdn[rank]) for partition in partitions for rank in ranks} - {0}
    windowed = model.switches.fa_window is not None
    return Case(
        platform.device(),
        dtype,
        model.head_dim,
        windowed,
        tuple(sorted(numbers)),
        run.parallel.context > 1,
        model.switches.gdn_position == "rope",
        rule_of_model(model.switches),
    )


def build_gpt_model(
    model: ModelConfig,
    run: RunConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """The stock ``GPTModel`` of this rank, with HydraHead layers.

    Parameters are allocated, not initialised: load a checkpoint before use. ``vocabulary_shard`` tells which
    rows of embedding and LM head are not padding. Rotary embedding is ours
    (``position_embedding_type='none'``). Calls need a
    :class:`~megatron_hydra.parallel.packed_sequence.PackedSequence` as ``packed_seq_params``.

    Args:
        model: the architecture.
        run: layout, precision, recomputation, back ends.
        pre_process, post_process: whether this pipeline stage has the embedding, the LM head.
        vp_stage: model chunk of an interleaved pipeline.
    """
    config = transformer_config(model, run)
    case = kernel_case(model, run, parallel_state.get_tensor_model_parallel_rank())
    layer = hydra_layer_spec(model, run, choose_kernels(run.backend, case))
    count = get_num_layers_to_build(
        config, vp_stage, parallel_state.get_pipeline_model_parallel_rank()
    )
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * count, layer_norm=layer.submodules.input_layernorm
    )
    tensor, rank = run.parallel.tensor, parallel_state.get_tensor_model_parallel_rank()
    shard = VocabularyShard.of(model.vocab_size, tensor, rank)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=shard.rows * tensor,
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",
        vp_stage=vp_stage,
    )
    gpt.vocabulary_shard = shard
    return gpt
