"""The GDN heads of a layer in vLLM, from projections to head outputs.

The states live in vLLM's cache, one page a sequence and layer: the last inputs of the short convolution, and
``[n, v, k]`` fp32 (the export's states, transposed: the layout of vLLM's kernels). All layers reserve what
the largest one needs, so that vLLM sees one kind of cache.

In 16 bits on a GPU the convolution and the delta rule are vLLM's own kernels. This package's kernels compute
what lies between them (norm, rotary embedding, l2 norm, decay, write strength), because vLLM's fused kernels
have no place for it. Elsewhere the package's torch code computes everything.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import recurrent_gated_delta_rule
from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule
from megatron_hydra.ops.kernels import Kernels
from megatron_hydra.ops.short_conv import final_conv_state, short_conv
from megatron_hydra.serving.vllm.kernel_start import KernelStart
from megatron_hydra.serving.vllm.kernels import layer_kernels
from megatron_hydra.serving.vllm.layout import AttentionLayout
from megatron_hydra.serving.vllm.placement import place_heads

KERNEL_WIDTHS = (2, 3, 4)
"""Widths of the short convolution that vLLM's kernels take."""


def state_shapes(config: HydraHeadConfig, tp_size: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a sequence's state. All layers and ranks use the shapes of the largest one.

    Returns:
        ``[W − 1, channels]`` (or transposed, as vLLM is set) and ``[n, d, d]``; all-FA models have none.
    """
    placement = place_heads(
        config.full_attention_heads, config.num_attention_heads, config.num_key_value_heads, tp_size
    )
    layouts = [
        AttentionLayout(config, layer, local)
        for layer, ranks in enumerate(placement)
        for local in ranks
    ]
    heads = max(len(layout.gdn) for layout in layouts)
    # Where nothing is convolved a few numbers stand in: vLLM wants to copy two states, whatever the model.
    # In 16 bits one number is too few, because the fp32 state behind it must begin at a multiple of 4 bytes.
    channels = max(layout.channels for layout in layouts) if config.hydra["short_conv"] else 8
    taps = max(config.hydra["conv_width"] - 1, 1) if config.hydra["short_conv"] else 1
    conv = MambaStateShapeCalculator._orient_conv_shape(channels if heads else 0, taps)
    return conv, (heads, config.head_dim, config.head_dim)


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the two: the model's; and fp32, unless ``--mamba-ssm-cache-dtype`` gives another."""
    return MambaStateDtypeCalculator.kda_state_dtype(
        vllm_config.model_config.dtype,
        vllm_config.cache_config.mamba_cache_dtype,
        vllm_config.cache_config.mamba_ssm_cache_dtype,
    )[:2]


@dataclasses.dataclass
class _Batch:
    """The requests of a step: ``decodes`` with one token first, then ``prefills`` with any number.

    Attributes:
        tokens: of all of them.
        slots: ``[decodes + prefills]`` each one's page.
        bounds: ``[prefills + 1]`` where the prefills begin among their tokens.
        begun: ``[decodes + prefills]`` bool, which have a state; ``None`` without prefills.
        metadata: vLLM's own.
    """

    tokens: int
    decodes: int
    prefills: int
    slots: torch.Tensor
    bounds: torch.Tensor | None
    begun: torch.Tensor | None
    metadata: GDNAttentionMetadata

    @property
    def kind(self) -> str:
        """Steps of one kind launch the same kernels."""
        if self.prefills:
            found = "tokens and prompts" if self.decodes else "prompts"
        # vLLM's convolution takes the number as an argument; Triton compiles 1 and multiples of 16 apart.
        elif self.decodes == 1:
            found = "one token"
        else:
            found = "tokens" if self.decodes % 16 else "a multiple of 16 tokens"
        step = self.slots.stride(0)  # compiled in: vLLM gives a column of a table, or a row
        return found if step == 1 else f"{found}, pages {step} apart"

    @classmethod
    def of(cls, metadata: GDNAttentionMetadata) -> "_Batch":
        decodes, prefills = metadata.num_decodes, metadata.num_prefills
        slots, bounds = metadata.non_spec_state_indices_tensor, None
        assert slots is not None and metadata.spec_sequence_masks is None
        if prefills:
            assert metadata.prefill_query_start_loc is not None
            bounds = metadata.prefill_query_start_loc[: prefills + 1]
        return cls(
            tokens=metadata.num_actual_tokens,
            decodes=decodes,
            prefills=prefills,
            slots=slots,
            bounds=bounds,
            begun=metadata.has_initial_state,
            metadata=metadata,
        )


class GatedDeltaNet(nn.Module, MambaBase):
    """The local GDN heads of one layer, without projections.

    Args:
        config: of the export.
        layout: of this layer and rank, with at least one GDN head.
        vllm_config: of the engine.
        prefix: the layer's name.
    """

    def __init__(
        self,
        config: HydraHeadConfig,
        layout: AttentionLayout,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.config, self.layout, self.prefix = config, layout, prefix
        self.vllm_config = vllm_config
        self.head_dim = config.head_dim
        # Not `num_heads`: by an attribute of that name vLLM parts the layers that share metadata.
        self.local_heads = len(layout.gdn)
        self.shapes = state_shapes(config, vllm_config.parallel_config.tensor_parallel_size)
        self.kv_cache: tuple[torch.Tensor, ...] = (torch.tensor([]), torch.tensor([]))
        self.A_log = nn.Parameter(torch.zeros(self.local_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(self.local_heads, dtype=torch.float32))
        if layout.convolutions:
            width = config.hydra["conv_width"]
            self.conv_weight = nn.Parameter(torch.zeros(layout.channels, width))
        for name in ("q_norm", "k_norm"):
            weight = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
            self.register_parameter(name, weight)
        self.kv_of: torch.Tensor
        index = torch.tensor(layout.gdn_kv_of)
        self.register_buffer("kv_of", index, persistent=False)
        self.spread = layout.gdn_kv_of != list(range(self.local_heads))
        self.start: KernelStart | None = None
        """Of the kernels of all layers; set by the model, before anything is computed."""
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"layer {prefix} was registered twice")
        context[prefix] = self

    # What vLLM asks of a layer with a state.

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """See :func:`state_shapes`."""
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """See :func:`state_dtypes`."""
        return state_dtypes(self.vllm_config)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The back end whose metadata this layer reads."""
        return MambaAttentionBackendEnum.GDN_ATTN

    def forward(
        self, projected: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Heads' outputs ``[T, n, d]``, before gate and norm; updates the states of the step's requests.

        Args:
            projected: ``[T, rows]``, the joint projection.
            tables: cos and sin, fp32 ``[T, 1, d]``.
        """
        every = get_forward_context().attn_metadata
        metadata = every.get(self.prefix) if isinstance(every, dict) else None
        fast = self._has_kernels(projected)
        assert self.start is not None
        batch = None if metadata is None else _Batch.of(metadata)
        if batch is None and fast:  # vLLM measures memory, so the kernels must use theirs now
            self.start.tune()
        if batch is None or not batch.decodes + batch.prefills:
            return projected.new_zeros(projected.shape[0], self.local_heads, self.head_dim)
        if fast and not torch.cuda.is_current_stream_capturing():
            assert isinstance(every, dict)
            self.start.step(batch.kind, lambda layer: every[layer.prefix])
        return self._compute(projected, tables, self._states(), batch)

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's part of its pages: ``[pages, C, W − 1]`` and ``[pages, n, v, k]``."""
        conv_state, state = self.kv_cache
        if not is_conv_state_dim_first():
            conv_state = conv_state.transpose(-1, -2)
        return conv_state[:, : self.layout.channels], state[:, : self.local_heads]

    def _compute(
        self,
        projected: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        states: tuple[torch.Tensor, torch.Tensor],
        batch: _Batch,
    ) -> torch.Tensor:
        tokens = batch.tokens
        conv_state, state = states
        fast = self._has_kernels(projected)
        kernels = layer_kernels(projected)
        rows, spans = projected[:tokens], self.layout.spans
        qkv = rows[:, : self.layout.channels]  # the first three blocks
        if self.layout.convolutions:
            convolve = self._fast_convolution if fast else self._convolution
            qkv = convolve(qkv, conv_state, batch)
        q, k, v = self._prepared(qkv, (tables[0][:tokens], tables[1][:tokens]), kernels)
        log_alpha, beta = kernels.delta_rule_gates(
            rows[:, spans["gdn_a"]], rows[:, spans["gdn_b"]], self.A_log, self.dt_bias
        )
        rule = self._fast_rule if fast else self._rule
        parts = rule((q, k, v, log_alpha, beta), state, batch)
        # Graphs have fixed sizes. Rows beyond the batch are normalized later, so they must be numbers.
        spare = projected.shape[0] - sum(len(part) for part in parts)
        if spare:
            parts.append(projected.new_zeros(spare, self.local_heads, self.head_dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _has_kernels(self, x: torch.Tensor) -> bool:
        width = self.config.hydra["conv_width"]
        return (
            x.is_cuda
            and x.dtype in (torch.bfloat16, torch.float16)
            and self.head_dim <= 256
            and (not self.layout.convolutions or width in KERNEL_WIDTHS)
        )

    def _prepared(
        self,
        qkv: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        m, d = len(self.layout.gdn_kv), self.head_dim
        heads = qkv.unflatten(-1, (-1, d))
        q, k = kernels.prepare_queries_and_keys(
            heads[:, :-m],
            m,
            (self.q_norm, self.k_norm),
            self.config.rms_norm_eps,
            tables if self.config.hydra["gdn_position"] == "rope" else None,
            None,
            True,
        )
        v = heads[:, -m:]
        if self.spread:
            k, v = k.index_select(1, self.kv_of), v.index_select(1, self.kv_of)
        return q, k, v

    # What a start of the kernels asks.

    def kernel_shape(self) -> tuple[Any, ...]:
        """See :class:`~megatron_hydra.serving.vllm.kernel_start.Layer`."""
        return (
            self.local_heads,
            self.layout.channels,
            self.layout.rows,
            self.spread,
            len(self.layout.convolutions),
        )

    def launch_prompt(self, tokens: int) -> None:
        """See :class:`~megatron_hydra.serving.vllm.kernel_start.Layer`."""
        device, dtype = self.A_log.device, self.vllm_config.model_config.dtype
        n, d = self.local_heads, self.head_dim
        generator = torch.Generator(device).manual_seed(0)  # the engine's own is left alone
        q, k, v = torch.randn(3, 1, tokens, n, d, device=device, generator=generator)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, decay = torch.rand(2, 1, tokens, n, device=device, generator=generator)
        self._prompts(
            *(x.to(dtype) for x in (q, k, v)),
            g=-decay,
            beta=beta,
            before=torch.zeros(1, n, d, d, device=device),
            bounds=torch.tensor([0, tokens], device=device, dtype=torch.int32),
        )

    def launch_step(self, metadata: GDNAttentionMetadata) -> None:
        """See :class:`~megatron_hydra.serving.vllm.kernel_start.Layer`."""
        batch = _Batch.of(metadata)
        slots = torch.empty_strided(
            batch.slots.shape,
            batch.slots.stride(),
            dtype=batch.slots.dtype,
            device=batch.slots.device,
        )
        batch = dataclasses.replace(batch, slots=slots.zero_())
        tokens, d = batch.tokens, self.head_dim
        weight = self.A_log
        dtype = self.vllm_config.model_config.dtype
        # With the strides of the real ones, which are compiled in. Two pages: one would be a constant.
        conv_state, state = (
            torch.empty_strided((2, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
            for x in self._states()
        )
        projected = weight.new_empty(tokens, self.layout.rows, dtype=dtype)
        tables = (weight.new_empty(tokens, 1, d), weight.new_empty(tokens, 1, d))
        self._compute(projected, tables, (conv_state, state), batch)

    # In torch, for any device and dtype.

    def _convolution(self, x: torch.Tensor, state: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """Causal convolution of ``x [tokens, C]``; ``state [pages, C, W − 1]`` is updated."""
        width = self.conv_weight.shape[1]
        weight = self.conv_weight.float()
        outputs = []
        if batch.decodes:
            slots = batch.slots[: batch.decodes]
            new = x[: batch.decodes]
            window = torch.cat((state[slots, :, : width - 1], new[:, :, None]), dim=2)
            outputs.append((window.float() * weight).sum(-1).to(x.dtype))
            state[slots, :, : width - 1] = window[:, :, 1:]
        for slot, begun, part in self._sequences(batch):
            new = x[part]
            before = state[slot, :, : width - 1].T
            before = before.clone() if begun else torch.zeros_like(before)
            position = torch.arange(
                width, width + len(new), device=x.device
            )  # `before` is always there
            outputs.append(short_conv(new.float(), weight, position, before).to(x.dtype))
            state[slot, :, : width - 1] = final_conv_state(new, width, before).T
        return torch.cat(outputs)

    def _sequences(self, batch: _Batch) -> list[tuple[int, bool, slice]]:
        """Page, whether it has a state, and tokens of every prefill."""
        if not batch.prefills:
            return []
        assert batch.bounds is not None and batch.begun is not None
        bounds = [batch.decodes + bound for bound in batch.bounds.tolist()]
        part = slice(batch.decodes, batch.decodes + batch.prefills)
        slots, begun = batch.slots[part].tolist(), batch.begun[part].tolist()
        spans = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        return list(zip(slots, begun, spans, strict=True))

    def _rule(
        self, inputs: tuple[torch.Tensor, ...], state: torch.Tensor, batch: _Batch
    ) -> list[torch.Tensor]:
        """Outputs of the decodes' tokens and of the prefills', each if there are any."""
        n, parts = batch.decodes, []
        dtype = inputs[0].dtype
        if n:
            slots = batch.slots[:n]
            before = state[slots].transpose(-1, -2).float()
            steps = (x[:n, None] for x in inputs)
            o, after = recurrent_gated_delta_rule(*steps, state=before)
            parts.append(o[:, 0].to(dtype))
            state[slots] = after.transpose(-1, -2).to(state.dtype)
        if batch.prefills:
            assert batch.bounds is not None and batch.begun is not None
            part = slice(n, n + batch.prefills)
            slots = batch.slots[part]
            before = state[slots].transpose(-1, -2).float()
            before = before.masked_fill(~batch.begun[part, None, None, None], 0.0)
            q, k, v, log_alpha, beta = (x[n:].float() for x in inputs)
            bounds = tuple(batch.bounds.tolist())
            o, after = chunked_gated_delta_rule(q, k, v, log_alpha, beta, bounds, before)
            parts.append(o.to(dtype))
            state[slots] = after.transpose(-1, -2).to(state.dtype)
        return parts

    # vLLM's kernels.

    def _fast_convolution(
        self, x: torch.Tensor, state: torch.Tensor, batch: _Batch
    ) -> torch.Tensor:
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
            causal_conv1d_fn,
            causal_conv1d_update,
        )

        if batch.prefills:
            return causal_conv1d_fn(
                x.transpose(0, 1),
                self.conv_weight,
                None,
                activation=None,
                conv_states=state,
                has_initial_state=batch.begun,
                cache_indices=batch.slots,
                query_start_loc=batch.metadata.non_spec_query_start_loc,
                metadata=batch.metadata,
            ).transpose(0, 1)
        n = batch.decodes
        return causal_conv1d_update(
            x[:n],
            state,
            self.conv_weight,
            None,
            None,
            conv_state_indices=batch.slots[:n],
            out=x.new_empty(n, x.shape[1]),
        )

    def _fast_rule(
        self, inputs: tuple[torch.Tensor, ...], state: torch.Tensor, batch: _Batch
    ) -> list[torch.Tensor]:
        from vllm.model_executor.layers.mamba.ops.gather_initial_states import gather_initial_states
        from vllm.model_executor.layers.mamba.ops.scatter_states import scatter_states
        from vllm.third_party.flash_linear_attention.ops import fused_recurrent_gated_delta_rule

        n, parts = batch.decodes, []
        if n:
            q, k, v, g, beta = (x[None, :n].contiguous() for x in inputs)
            bounds = batch.metadata.non_spec_query_start_loc
            assert bounds is not None
            o, _ = fused_recurrent_gated_delta_rule(
                q=q,
                k=k,
                v=v,
                g=g,
                beta=beta,
                initial_state=state,
                inplace_final_state=True,
                cu_seqlens=bounds[: n + 1],
                ssm_state_indices=batch.slots[:n],
            )
            parts.append(o[0])
        if batch.prefills:
            assert batch.begun is not None
            part = slice(n, n + batch.prefills)
            slots = batch.slots[part]
            q, k, v, g, beta = (x[None, n:].contiguous() for x in inputs)
            # Triton compiles kernels again for addresses that are not multiples of 16 bytes.
            if n:
                g, beta = g.clone(), beta.clone()
            o, after = self._prompts(
                q,
                k,
                v,
                g=g,
                beta=beta,
                before=gather_initial_states(state, slots, batch.begun[part]),
                bounds=batch.bounds,
                chunk_indices=batch.metadata.chunk_indices,
                chunk_offsets=batch.metadata.chunk_offsets,
            )
            parts.append(o[0])
            scatter_states(state, after, slots)
        return parts

    def _prompts(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        g: torch.Tensor,
        beta: torch.Tensor,
        before: torch.Tensor,
        bounds: torch.Tensor | None,
        chunk_indices: torch.Tensor | None = None,
        chunk_offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule

        o, after = chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            initial_state=before,
            output_final_state=True,
            cu_seqlens=bounds,
            chunk_indices=chunk_indices,
            chunk_offsets=chunk_offsets,
        )
        return o, after
