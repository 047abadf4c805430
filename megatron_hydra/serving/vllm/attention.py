"""A layer's attention in vLLM: one operator from the normed input to the output projection's result.

FA heads: each KV group with FA heads is one vLLM attention with one KV head. So pages hold only FA heads, for
any map. GDN heads: see :mod:`megatron_hydra.serving.vllm.gated_delta_net`.

torch.compile does not look into the operator. What it compiles between two operators (norms, MLP) is the same
for every layer, however many heads of each kind a layer has. So vLLM compiles it once.

T: tokens of a step, all requests one after the other; d: head_dim.
"""

from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.ops.fusion_tail import Branch
from megatron_hydra.ops.kernels import Kernels
from megatron_hydra.serving.vllm import ATTENTION_OP
from megatron_hydra.serving.vllm.gated_delta_net import GatedDeltaNet
from megatron_hydra.serving.vllm.kernels import layer_kernels
from megatron_hydra.serving.vllm.layout import AttentionLayout, Block, placed
from megatron_hydra.serving.vllm.placement import Placement

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
        self.fa_rotates = config.fa_rotates(layer)
        self.head_dim, self.hidden_size = config.head_dim, config.hidden_size
        self.prefix = prefix
        self.layout = layout = AttentionLayout(config, layer, placement[layer][rank])
        self.tp_size = get_tensor_model_parallel_world_size()
        self.has_heads = bool(layout.fa or layout.gdn)
        # vLLM's layers have no argument for their output. Where theirs is torch's product, it saves a copy.
        self.writes_output = (
            current_platform.is_cuda()
            and vllm_config.kernel_config.linear_backend == "auto"
            and not envs.VLLM_BATCH_INVARIANT
        )
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"layer {prefix} was registered twice")
        context[prefix] = self  # where the operator finds it
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
        y = torch.empty_like(x)
        operator = getattr(torch.ops.vllm, ATTENTION_OP)
        operator(x, *tables, log_scale, y, _encode_layer_name(self.prefix))
        return tensor_model_parallel_all_reduce(y) if self.tp_size > 1 else y

    def run(
        self, x: torch.Tensor, tables: Tables, log_scale: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Fill ``y`` with this rank's part of the sum over ranks. Arguments are those of :meth:`forward`."""
        if not self.has_heads:
            y.zero_()
            return
        heads = self._heads(x, tables, log_scale)
        if self.writes_output:
            weight, bias = self.o_proj.weight.t(), self.o_proj.bias
            if bias is None:
                torch.mm(heads, weight, out=y)
            else:
                torch.addmm(bias, heads, weight, out=y)
        else:
            y.copy_(self.o_proj(heads))

    def _heads(self, x: torch.Tensor, tables: Tables, log_scale: torch.Tensor) -> torch.Tensor:
        projected = self.in_proj(x)
        kernels = layer_kernels(projected)
        branches = []
        if self.layout.fa:
            branches += self._full_attention(projected, tables, log_scale, kernels)
        if self.gdn is not None:
            branches.append((self.gdn(projected, tables), self._gate(projected, "gdn")))
        scale: torch.Tensor | None = self.gamma
        if scale is not None and self.switches["fusion"] == "gated":
            logits = projected[:, self.layout.spans["fusion_gate"]].float()
            shares = torch.softmax(logits, dim=-1) * logits.shape[-1]
            scale = scale * shares.index_select(-1, self.order)
        eps = self.config.rms_norm_eps if self.switches["fusion_norm"] == "rms" else None
        return kernels.fusion_tail(branches, scale, eps)

    def _gate(self, projected: torch.Tensor, branch: str) -> torch.Tensor | None:
        span = self.layout.spans.get(f"{branch}_gate")
        return None if span is None else projected[:, span].unflatten(-1, (-1, self.head_dim))

    def _full_attention(
        self,
        projected: torch.Tensor,
        tables: Tables,
        log_scale: torch.Tensor,
        kernels: Kernels,
    ) -> list[Branch]:
        """Each KV group's heads and their gates."""
        spans, d = self.layout.spans, self.head_dim
        position = self.switches["fa_position"]
        q, k = kernels.prepare_queries_and_keys(
            # Keys follow queries.
            projected[:, spans["fa_q"].start : spans["fa_k"].stop].unflatten(-1, (-1, d)),
            len(self.fa),
            (self.fa_q_norm, self.fa_k_norm),
            self.config.rms_norm_eps,
            tables if self.fa_rotates else None,
            log_scale if position in ("log-scale", "both") else None,
            False,
        )
        v = projected[:, spans["fa_v"]].unflatten(-1, (-1, d))
        gate = self._gate(projected, "fa")
        branches: list[Branch] = []
        start = 0
        for group, attention in enumerate(self.fa):
            end = start + self.layout.fa_members[group]
            out = attention(q[:, start:end].flatten(1), k[:, group], v[:, group])
            part = None if gate is None else gate[:, start:end]
            branches.append((out.unflatten(-1, (-1, d)), part))
            start = end
        return branches

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
        for start, block in placed(layout.projections):
            add(f"{block.source}.weight", self.in_proj.weight, start, block)
            if self._is_biased(block):
                add(f"{block.source}.bias", self.in_proj.bias, start, block)
        for start, block in placed(layout.convolutions):
            assert self.gdn is not None
            add(f"{block.source}.weight", self.gdn.conv_weight, start, block)
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


@eager_break_during_capture
def _operator(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    log_scale: torch.Tensor,
    y: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    layer.run(x, (cos, sin), log_scale, y)


def _operator_shapes(*arguments: Any) -> None:
    """It returns nothing, so it has no shapes."""


# It fills an argument, and returns nothing: between pieces of CUDA graphs addresses must not change.
direct_register_custom_op(
    op_name=ATTENTION_OP, op_func=_operator, mutates_args=["y"], fake_impl=_operator_shapes
)
