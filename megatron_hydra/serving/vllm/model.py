"""The exported model in vLLM.

Attention: see :mod:`megatron_hydra.serving.vllm.attention`. The rest of a layer is vLLM's own.

T: tokens of a step, all requests one after the other; d: head_dim.
"""

# Annotations must be objects here: vLLM's compilation reads those of the model's forward.

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    MambaStateCopyFuncCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsMambaPrefixCaching,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors
from vllm.triton_utils import force_first_config

from megatron_hydra.errors import HydraError
from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import HydraHeadRotaryEmbedding
from megatron_hydra.serving.vllm.attention import HydraHeadAttention, Tables
from megatron_hydra.serving.vllm.gated_delta_net import GatedDeltaNet, state_dtypes, state_shapes
from megatron_hydra.serving.vllm.kernel_start import KernelStart, read_tuning
from megatron_hydra.serving.vllm.placement import Placement, place_heads

logger = init_logger("vllm.hydrahead")  # vLLM shows messages of loggers below its own name


class HydraHeadMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: HydraHeadConfig, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, prefix=f"{prefix}.down_proj"
        )
        self.act = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` → ``[T, D]``."""
        x, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act(x))
        return x


class HydraHeadDecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(
        self, config: HydraHeadConfig, placement: Placement, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.self_attn = HydraHeadAttention(config, placement, vllm_config, f"{prefix}.self_attn")
        self.mlp = HydraHeadMLP(config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        tables: Tables,
        log_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, D]`` and the residual to add to it, for the next layer."""
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, tables, log_scale)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


@support_torch_compile
class HydraHeadModel(nn.Module):
    """The decoder without its LM head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        tp_size = get_tensor_model_parallel_world_size()
        placement = place_heads(
            config.full_attention_heads,
            config.num_attention_heads,
            config.num_key_value_heads,
            tp_size,
        )
        group = get_pp_group()
        tied = config.tie_word_embeddings and group.is_last_rank
        self.embed_tokens = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size)
            if group.is_first_rank or tied
            else PPMissingLayer()
        )
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: HydraHeadDecoderLayer(config, placement, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if group.is_last_rank
            else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        linear = [module for module in self.modules() if isinstance(module, GatedDeltaNet)]
        if linear:
            start = KernelStart(
                linear,
                read_tuning(vllm_config.additional_config, force_first_config.is_installed()),
                vllm_config.scheduler_config.max_num_batched_tokens,
                logger.info,
            )
            for module in linear:
                module.start = start

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """``[T]`` → ``[T, D]``."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """``[T]`` tokens and their positions in their own sequences → ``[T, D]``."""
        if get_pp_group().is_first_rank:
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            x = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        cos, sin = self.rotary_emb(positions[None])
        a = self.config.hydra["log_scale_a"]
        log_scale = (positions.float() + a).log() / math.log(a)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(x, residual, (cos[0], sin[0]), log_scale)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        x, _ = self.norm(x, residual)
        return x


class HydraHeadForCausalLM(
    nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching, SupportsPP
):
    """The decoder with its LM head, with the interface of vLLM's engine."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = HydraHeadModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        head: Any = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            if config.tie_word_embeddings:
                head = head.tie_weights(self.model.embed_tokens)
        self.lm_head = head
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[T]`` → ``[T, D]``."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """See :meth:`HydraHeadModel.forward`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``[T, D]`` → ``[T, vocabulary]``."""
        return self.logits_processor(self.lm_head, hidden_states)

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """See :func:`~megatron_hydra.serving.vllm.gated_delta_net.state_shapes`."""
        return state_shapes(
            vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        )

    @classmethod
    def get_mamba_state_dtype_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[torch.dtype, torch.dtype]:
        """See :func:`~megatron_hydra.serving.vllm.gated_delta_net.state_dtypes`."""
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
        """How vLLM copies a state between pages."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill every parameter from the export's tensors.

        Returns:
            Names of the parameters that were filled.

        Raises:
            HydraError: the model has no place for a tensor, or a tensor is missing.
        """
        parameters = dict(self.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        attention = {
            f"model.layers.{index}.self_attn.{source}": targets
            for index, layer in enumerate(self.model.layers)
            if isinstance(layer, HydraHeadDecoderLayer)
            for source, targets in layer.self_attn.sources().items()
        }
        filled = {
            names[id(parameter)] for targets in attention.values() for parameter, *_ in targets
        }
        common = {
            source: (parameters[name], shard)
            for name in parameters.keys() - filled
            for source, shard in _shards(name)
        }
        missing = attention.keys() | common.keys()
        for name, tensor in weights:
            if name in attention:
                for parameter, start, block, dim in attention[name]:
                    _fill(parameter, start, tensor if block is None else block.take(tensor, dim))
            elif name in common:
                parameter, shard = common[name]
                load = getattr(parameter, "weight_loader", default_weight_loader)
                load(parameter, tensor, *shard)
            elif not self._elsewhere(name):
                raise HydraError(
                    f"the export has a tensor {name!r} that its config.json has no place for: export "
                    "the model again"
                )
            missing.discard(name)
        if missing:
            raise HydraError(
                f"the export has no tensor {', '.join(sorted(missing)[:5])} "
                f"({len(missing)} missing in all): export the model again"
            )
        return set(parameters)

    def _elsewhere(self, name: str) -> bool:
        """Whether a tensor of the export belongs to another rank, or has another name here."""
        tied = name == "lm_head.weight" and self.config.tie_word_embeddings
        if tied or is_pp_missing_parameter(name, self):
            return True
        if ".self_attn." not in name:
            return False
        # A rank has no part of a branch without its heads; other ranks check that the tensor exists.
        known = _every_source(self.config, extract_layer_index(name))
        return name.split(".self_attn.", 1)[1] in known


def _every_source(config: HydraHeadConfig, layer: int) -> set[str]:
    """Tensors of an export below ``self_attn`` of a layer."""
    from megatron_hydra.hf.modeling_hydrahead import HydraHeadAttention as Exported

    with torch.device("meta"):
        return set(Exported(config, layer).state_dict())


def _fill(parameter: nn.Parameter, start: int, value: torch.Tensor) -> None:
    """Write ``value`` into rows from ``start``; kernels of convolutions have the shape ``[C, 1, W]``."""
    target = parameter.data[start : start + value.shape[0]]
    value = value[:, 0] if value.ndim == 3 else value
    if value.shape != target.shape:
        raise HydraError(
            f"the export has a tensor of shape {tuple(value.shape)} where config.json asks for "
            f"{tuple(target.shape)}: export the model again"
        )
    target.copy_(value)


def _shards(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """The export's tensors of a parameter of vLLM's own layers, and the part of each."""
    if ".gate_up_proj." in name:
        parts = ("gate_proj", "up_proj")
        return [(name.replace("gate_up_proj", part), (i,)) for i, part in enumerate(parts)]
    return [(name, ())]
