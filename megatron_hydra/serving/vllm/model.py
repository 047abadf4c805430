"""The exported model in vLLM.

FA heads: each KV group with FA heads is one vLLM attention with one KV head. So pages hold only FA heads, for
any map. GDN heads: see :mod:`megatron_hydra.serving.vllm.gated_delta_net`. The rest of a layer is vLLM's own.

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
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
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
from megatron_hydra.ops.fusion_tail import fusion_tail
from megatron_hydra.ops.qk_preparation import prepare_heads
from megatron_hydra.serving.vllm.gated_delta_net import GatedDeltaNet, state_dtypes, state_shapes
from megatron_hydra.serving.vllm.kernel_start import KernelStart, read_tuning
from megatron_hydra.serving.vllm.layout import AttentionLayout, Block
from megatron_hydra.serving.vllm.placement import Placement, place_heads

logger = init_logger("vllm.hydrahead")  # vLLM shows messages of loggers below its own name

Tables = tuple[torch.Tensor, torch.Tensor]


class HydraHeadAttention(nn.Module):
    """This rank's FA and GDN heads of a layer, fused and projected, summed over ranks.

    Args:
        config: of the export.
        placement: of the heads of all layers.
        vllm_config: of the engine.
        prefix: the layer's name, with its number.
    """

    def __init__(
        self, config: HydraHeadConfig, placement: Placement, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        layer, rank = extract_layer_index(prefix), get_tensor_model_parallel_rank()
        self.config, self.switches = config, config.hydra
        self.head_dim, self.hidden_size = config.head_dim, config.hidden_size
        self.prefix = prefix
        self.layout = layout = AttentionLayout(config, layer, placement[layer][rank])
        self.tp_size = get_tensor_model_parallel_world_size()
        self.has_heads = bool(layout.fa or layout.gdn)
        self.fa_q_norm: nn.Parameter | None
        self.fa_k_norm: nn.Parameter | None
        self.gamma: nn.Parameter | None
        if not self.has_heads:
            return
        biased = any(self._is_biased(block) for block in layout.projections)
        self.in_proj = ReplicatedLinear(
            config.hidden_size,
            layout.rows,
            bias=biased,
            prefix=f"{prefix}.in_proj",
            return_bias=False,
        )
        self.in_proj.weight.data.zero_()  # padding rows, and biases that a block does not have
        if biased:
            self.in_proj.bias.data.zero_()
        self.o_proj = ReplicatedLinear(
            layout.output.rows,
            config.hidden_size,
            bias=config.out_bias and rank == 0,  # only once in the sum over ranks
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        scales = nn.Parameter(torch.ones(layout.gamma.rows, dtype=torch.float32))
        has = self.switches["fusion"] != "concat"
        self.register_parameter("gamma", scales if has else None)
        if self.switches["fusion"] == "gated":
            self.register_buffer("order", torch.tensor(layout.gamma.taken), persistent=False)
        self.fa = nn.ModuleList(
            Attention(
                members,
                self.head_dim,
                self.head_dim**-0.5,
                num_kv_heads=1,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.fa_group{index}",  # vLLM allows one number between dots
            )
            for index, members in enumerate(layout.fa_members)
        )
        for name in ("fa_q_norm", "fa_k_norm"):
            has = config.qk_norm and layout.fa
            weight = nn.Parameter(torch.ones(self.head_dim)) if has else None
            self.register_parameter(name, weight)
        self.gdn = (
            GatedDeltaNet(config, layout, vllm_config, f"{prefix}.gdn") if layout.gdn else None
        )

    def forward(self, x: torch.Tensor, tables: Tables, log_scale: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` → ``[T, D]``.

        Args:
            x: normed input.
            tables: cos and sin, fp32 ``[T, 1, d]``.
            log_scale: s_t, fp32 ``[T]``.
        """
        if self.has_heads:
            y = self.o_proj(self._heads(x, tables, log_scale))
        else:
            y = torch.zeros_like(x)
        return tensor_model_parallel_all_reduce(y) if self.tp_size > 1 else y

    def _heads(self, x: torch.Tensor, tables: Tables, log_scale: torch.Tensor) -> torch.Tensor:
        projected = self.in_proj(x)
        blocks = self.layout.projections
        sizes = [block.rows for block in blocks]
        spare = self.layout.rows - sum(sizes)
        parts = dict(
            zip([b.name for b in blocks], projected.split((*sizes, spare), dim=-1), strict=False)
        )
        branches = []
        if self.layout.fa:
            branches.append(
                (self._full_attention(parts, tables, log_scale), self._gate(parts, "fa"))
            )
        if self.gdn is not None:
            qkv = projected[:, : self.layout.channels]  # the first three blocks
            out = self.gdn(qkv, parts["gdn_b"], parts["gdn_a"], tables)
            branches.append((out, self._gate(parts, "gdn")))
        scale: torch.Tensor | None = self.gamma
        if scale is not None and self.switches["fusion"] == "gated":
            logits = parts["fusion_gate"].float()
            shares = torch.softmax(logits, dim=-1) * logits.shape[-1]
            scale = scale * shares.index_select(-1, self.order)
        eps = self.config.rms_norm_eps if self.switches["fusion_norm"] == "rms" else None
        return fusion_tail(branches, scale, eps)

    def _gate(self, parts: dict[str, torch.Tensor], branch: str) -> torch.Tensor | None:
        gate = parts.get(f"{branch}_gate")
        return None if gate is None else gate.unflatten(-1, (-1, self.head_dim))

    def _full_attention(
        self, parts: dict[str, torch.Tensor], tables: Tables, log_scale: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (parts[f"fa_{p}"].unflatten(-1, (-1, self.head_dim)) for p in ("q", "k", "v"))
        position, eps = self.switches["fa_position"], self.config.rms_norm_eps
        rotary = tables if position in ("rope", "both") else None
        scale = log_scale if position in ("log-scale", "both") else None
        q = prepare_heads(q, self.fa_q_norm, eps, rotary, scale, False)
        k = prepare_heads(k, self.fa_k_norm, eps, rotary, None, False)
        outputs, start = [], 0
        for index, attention in enumerate(self.fa):
            end = start + self.layout.fa_members[index]
            out = attention(
                q[:, start:end].flatten(1), k[:, index].contiguous(), v[:, index].contiguous()
            )
            outputs.append(out.unflatten(-1, (-1, self.head_dim)))
            start = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    # Loading.

    def _is_biased(self, block: Block) -> bool:
        if block.name == "fa_gate":
            return bool(self.switches["fa_gate_bias"])
        return self.config.attention_bias and block.name[-2:] in ("_q", "_k", "_v")

    def sources(self) -> dict[str, list[tuple[nn.Parameter, int, Block | None, int]]]:
        """The place of each of the export's tensors below ``self_attn``.

        Returns:
            Name → (local parameter, first row, block to take, axis of the block); block ``None``: the
            whole tensor.
        """
        config, layout, switches = self.config, self.layout, self.switches
        found: dict[str, list[tuple[nn.Parameter, int, Block | None, int]]] = {}

        def add(
            name: str, parameter: nn.Parameter, start: int, block: Block | None, dim: int = 0
        ) -> None:
            found.setdefault(name, []).append((parameter, start, block, dim))

        if not self.has_heads:
            return found
        start = 0
        for block in layout.projections:
            add(f"{block.source}.weight", self.in_proj.weight, start, block)
            if self._is_biased(block):
                add(f"{block.source}.bias", self.in_proj.bias, start, block)
            start += block.rows
        start = 0
        for block in layout.convolutions:
            assert self.gdn is not None
            add(f"{block.source}.weight", self.gdn.conv_weight, start, block)
            start += block.rows
        add("o_proj.weight", self.o_proj.weight, 0, layout.output, 1)
        if config.out_bias and self.o_proj.bias is not None:
            add("o_proj.bias", self.o_proj.bias, 0, None)
        if self.gamma is not None:
            add("gamma", self.gamma, 0, layout.gamma)
        tied = switches["qkv"] == "shared"
        norms: dict[str, Any] = {"fa_": self if layout.fa else None, "gdn_": self.gdn}
        for branch, owner in norms.items():
            for part in ("q_norm", "k_norm"):
                if owner is not None and config.qk_norm:
                    parameter = getattr(owner, f"fa_{part}" if branch == "fa_" else part)
                    add(f"{'' if tied else branch}{part}.weight", parameter, 0, None)
        if self.gdn is not None:
            add("gdn_A_log", self.gdn.A_log, 0, layout.decay)
            add("gdn_dt_bias", self.gdn.dt_bias, 0, layout.decay)
        return found


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
