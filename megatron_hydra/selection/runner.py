"""Run a Hugging Face decoder in parts: embedding, attention, MLP and head, one layer at a time.

It does not import Megatron. It uses the model's own modules and weights, but calls them itself. So it can stop
a residual stream at any layer, change it, and continue from there. Shapes: B streams, T positions, D hidden,
H query heads, G KV heads, d head_dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hydra.errors import HydraError
from megatron_hydra.hf_identity import FAMILIES
from megatron_hydra.ops.integers import next_power_of_2
from megatron_hydra.selection.prompts import PromptBatch

KeyValue = tuple[torch.Tensor, torch.Tensor]


class DecoderRunner:
    """Runs parts of a Qwen3, Qwen2 or Llama model.

    Args:
        model: a ``*ForCausalLM``. It is set to eval mode, and its parameters no longer require gradients.
        devices: distribute the layers over these devices in equal consecutive blocks (for a model larger than
            one GPU); default: the model's device.

    Raises:
        HydraError: the architecture is not supported, or uses sliding-window attention.
    """

    def __init__(self, model: Any, devices: Sequence[torch.device | str] = ()) -> None:
        config = model.config
        if config.model_type not in FAMILIES:
            raise HydraError(
                f"model_type {config.model_type!r} is not supported by head selection; "
                f"supported: {', '.join(FAMILIES)}"
            )
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise HydraError(
                "the model uses sliding-window attention in some layers; head selection needs full "
                "attention in every layer (use_sliding_window: false)"
            )
        self.model = model.eval().requires_grad_(False)
        self.layers = model.model.layers
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        attention = self.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.group_size = attention.num_key_value_groups
        self.num_kv_heads = self.num_heads // self.group_size
        self.hidden_size = config.hidden_size
        self._rotary: dict[tuple[int, torch.device], KeyValue] = {}
        if devices:
            self._spread([torch.device(d) for d in devices])
        self.device = model.model.embed_tokens.weight.device
        self.last_device = self.layers[-1].self_attn.o_proj.weight.device

    def _spread(self, devices: list[torch.device]) -> None:
        body = self.model.model
        for i, layer in enumerate(self.layers):
            layer.to(devices[i * len(devices) // self.num_layers])
        body.embed_tokens.to(devices[0])
        body.rotary_emb.to(devices[0])
        body.norm.to(devices[-1])
        # A tied head shares its weight with the embedding; readout_direction works on either device.
        if self.model.lm_head.weight is not body.embed_tokens.weight:
            self.model.lm_head.to(devices[-1])

    def device_of(self, layer: int) -> torch.device:
        """The device of a layer's weights."""
        return self.layers[layer].self_attn.o_proj.weight.device

    def wait(self) -> None:
        """Wait until all GPUs with layers have finished their work."""
        for device in {self.device_of(layer) for layer in range(self.num_layers)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    # -- the parts of a layer ----------------------------------------------------------------------

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids ``[B, T]`` to the first residual stream ``[B, T, D]``."""
        return self.model.model.embed_tokens(ids.to(self.device))

    def attention_input(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The normalised residual stream that q, k and v read, ``[..., D]``."""
        return self.layers[layer].input_layernorm(x)

    def queries(
        self,
        layer: int,
        normed: torch.Tensor,
        positions: torch.Tensor | None,
        heads: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Compute queries.

        Args:
            normed: ``[B, T, D]``.
            positions: ``[T]``, or ``[B, T]`` if streams differ. ``None``: 0 to T − 1; the host then does not
                wait for the GPU.
            heads: only these n heads; default: all.

        Returns:
            ``[B, T, n, d]``, normalised and rotated.
        """
        attention = self.layers[layer].self_attn
        q = self._project(attention.q_proj, normed, heads)
        if hasattr(attention, "q_norm"):
            q = attention.q_norm(q)
        return self._rotate(q, positions)

    def keys(
        self,
        layer: int,
        normed: torch.Tensor,
        positions: torch.Tensor | None,
        kv_heads: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Keys of some or all KV heads, ``[B, T, G, d]``, normalised and rotated."""
        attention = self.layers[layer].self_attn
        k = self._project(attention.k_proj, normed, kv_heads)
        if hasattr(attention, "k_norm"):
            k = attention.k_norm(k)
        return self._rotate(k, positions)

    def values(
        self, layer: int, normed: torch.Tensor, kv_heads: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Values of some or all KV heads, ``[B, T, G, d]``."""
        return self._project(self.layers[layer].self_attn.v_proj, normed, kv_heads)

    def _project(
        self, projection: Any, normed: torch.Tensor, heads: Sequence[int] | None
    ) -> torch.Tensor:
        """Output of a projection, split into heads, ``[..., n, d]``."""
        if heads is None:
            return projection(normed).unflatten(-1, (-1, self.head_dim))
        weight, bias = projection.weight, projection.bias
        rows = weight.unflatten(0, (-1, self.head_dim))[list(heads)].flatten(0, 1)
        if bias is not None:
            bias = bias.unflatten(0, (-1, self.head_dim))[list(heads)].flatten()
        return F.linear(normed, rows, bias).unflatten(-1, (-1, self.head_dim))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions_q: torch.Tensor | None,
        grouped: bool = True,
    ) -> torch.Tensor:
        """Causal softmax attention; keys start at position 0.

        Args:
            q: ``[B, Tq, H, d]``.
            k, v: ``[B, Tk, G, d]``; ``[B, Tk, H, d]`` if not ``grouped``.
            positions_q: positions of the queries, ``[Tq]`` or ``[B, Tq]``; not read if Tq = Tk.
            grouped: whether keys and values belong to KV heads; else every query head has its own.

        Returns:
            Head outputs z ``[B, Tq, H, d]``, the input of o_proj.
        """
        mask = None  # equal numbers of queries and keys: plain causal attention, which is faster
        if q.shape[1] != k.shape[1]:
            assert positions_q is not None
            positions_k = torch.arange(k.shape[1], device=q.device)
            mask = positions_k <= positions_q.to(q.device)[..., None]
            if mask.dim() == 3:
                mask = mask[:, None]
        k, v = (t.transpose(1, 2) for t in (k, v))
        if grouped:
            k, v = (t.repeat_interleave(self.group_size, 1) for t in (k, v))
        scale = self.layers[layer].self_attn.scaling
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return z.transpose(1, 2)

    def output_projection(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """Apply o_proj to all heads: ``[B, T, H, d]`` to ``[B, T, D]``, with bias."""
        return self.layers[layer].self_attn.o_proj(z.flatten(-2))

    def head_output_weights(self, layer: int, heads: Sequence[int]) -> torch.Tensor:
        """The columns of o_proj of the given heads, ``[n, d, D]``."""
        weight = self.layers[layer].self_attn.o_proj.weight
        return weight.view(self.hidden_size, self.num_heads, self.head_dim)[:, list(heads)].permute(
            1, 2, 0
        )

    def add_mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The stream after the MLP: x + MLP(norm(x)).

        A float32 stream stays float32 for any dtype of the weights.
        """
        module = self.layers[layer]
        normed = module.post_attention_layernorm(x)
        return x + module.mlp(normed.to(module.mlp.down_proj.weight.dtype))

    # -- the end -----------------------------------------------------------------------------------

    def readout_direction(self, batch: PromptBatch) -> torch.Tensor:
        """Direction of the readout in the final normed stream, ``[P, A, D]`` float32.

        It is the weight of an answer token times (W[answer] − W[wrong]).
        """
        weight = self.model.lm_head.weight
        difference = weight[batch.answer.to(weight.device)].float()
        difference -= weight[batch.wrong.to(weight.device)].float()
        difference *= batch.weights.to(weight.device)[..., None]
        return difference.to(self.last_device)

    def readout(self, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """Compute the span readout m from residual streams at the answer positions, ``[..., P]`` float32.

        Args:
            x: ``[..., P, A, D]`` of any dtype; the norm runs in float32.
            direction: ``[P, A, D]``.
        """
        return (self.model.model.norm(x.float()).float() * direction).sum((-1, -2))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens, ``[..., V]``."""
        head = self.model.lm_head
        return head(self.model.model.norm(x).to(head.weight.device))

    # -- positions ---------------------------------------------------------------------------------

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if positions is None:
            cos, sin = (t[: x.shape[1]] for t in self._tables(x.shape[1], x))
        else:
            tables = self._tables(int(positions.max()) + 1, x)
            cos, sin = (t[positions.to(x.device)] for t in tables)
        cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in (cos, sin))
        half = x.shape[-1] // 2
        rotated = x * cos
        # In place: the copies of the usual rotate-half cost as much as a projection.
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated

    def _tables(self, length: int, like: torch.Tensor) -> KeyValue:
        size = max(64, next_power_of_2(length))
        key = (size, like.device)
        if key not in self._rotary:
            positions = torch.arange(size, device=self.device)[None]
            probe = torch.zeros(1, device=self.device, dtype=torch.float32)
            cos, sin = self.model.model.rotary_emb(probe, positions)
            self._rotary[key] = (cos[0].to(like.device), sin[0].to(like.device))
        return self._rotary[key]


def attention_of_any_shape(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Use attention without cuDNN inside the block, for batches with different shapes.

    CuDNN builds a plan for each shape, which takes longer than the attention of a few prompts.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def default_tokens_per_batch(runner: DecoderRunner) -> int:
    """Default number of positions per forward. It is smaller on a CPU, whose cache is small."""
    return 2048 if runner.device.type == "cpu" else 32768


@dataclasses.dataclass(frozen=True)
class LayerState:
    """Values of one layer for both streams, for the positions after the shared prefix (T' = T − prefix).

    Attributes:
        x_in: residual streams that enter the layer, clean rows first, ``[2P, T', D]``.
        x_mid: after attention, before the MLP, ``[2P, T', D]``.
        z: head outputs, ``[2P, T', H, d]``.
        q: queries ``[2P, T', H, d]``; k, v: keys and values from position 0, ``[2P, T, G, d]``.
    """

    x_in: torch.Tensor
    x_mid: torch.Tensor
    z: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class PairedStreams:
    """The clean and the corrupted residual stream of one batch, advanced together layer by layer.

    Positions before the first difference are equal in both streams, and no patch changes them. They are
    computed once, and only their keys and values are kept.

    Attributes:
        batch: the prompts.
        start: T − T', the length of the shared prefix.
        positions: absolute positions of the T' computed tokens, ``[T']``.
        answer_rows: indices of the answer positions among them, ``[P, A]``.
        prefix: for each layer keys and values ``[P, start, G, d]``, or ``None`` if start is 0.
    """

    def __init__(self, runner: DecoderRunner, batch: PromptBatch) -> None:
        self.runner, self.batch = runner, batch
        self.start = batch.shared_prefix
        length = batch.clean.shape[1]
        self.positions = torch.arange(self.start, length, device=runner.device)
        self.answer_rows = batch.answer_positions.to(runner.device) - self.start
        self.prefix: list[KeyValue] | None = self._run_prefix() if self.start else None
        ids = torch.cat([batch.clean, batch.corrupted])[:, self.start :]
        self.x = runner.embed(ids)
        self.next_layer = 0

    @property
    def num_prompts(self) -> int:
        """P, the number of pairs."""
        return len(self.batch.index)

    def at_answer(self, x: torch.Tensor) -> torch.Tensor:
        """Pick the answer positions: ``[nP, T', ...]`` to ``[nP, A, ...]``; prompts are the fastest axis."""
        rows = self.answer_rows.to(x.device).repeat(x.shape[0] // self.num_prompts, 1)
        return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]

    def answer_positions(self, copies: int, device: torch.device) -> torch.Tensor:
        """Absolute positions of the answers for ``copies`` streams of every pair, ``[nP, A]``."""
        return self.batch.answer_positions.to(device).repeat(copies, 1)

    def _run_prefix(self) -> list[KeyValue]:
        runner, kept = self.runner, []
        positions = torch.arange(self.start, device=runner.device)
        x = runner.embed(self.batch.clean[:, : self.start])
        for layer in range(runner.num_layers):
            x = x.to(runner.device_of(layer))
            normed = runner.attention_input(layer, x)
            k, v = runner.keys(layer, normed, positions), runner.values(layer, normed)
            kept.append((k, v))
            if layer + 1 < runner.num_layers:
                q = runner.queries(layer, normed, positions)
                z = runner.attend(layer, q, k, v, positions)
                x = runner.add_mlp(layer, x + runner.output_projection(layer, z))
        return kept

    def with_prefix(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_heads: Sequence[int] | None = None,
    ) -> KeyValue:
        """Prepend keys and values of the shared prefix to ``[nP, T', G, d]``, for some or all KV heads."""
        if self.prefix is None:
            return k, v
        copies = k.shape[0] // self.num_prompts
        before = self.prefix[layer]
        if kv_heads is not None:
            before = (before[0][:, :, list(kv_heads)], before[1][:, :, list(kv_heads)])
        before_k, before_v = (t.repeat(copies, 1, 1, 1) for t in before)
        return torch.cat([before_k, k], 1), torch.cat([before_v, v], 1)

    def advance(self, z_offset: torch.Tensor | None = None) -> LayerState:
        """Run the next layer of both streams.

        Args:
            z_offset: offset of the head outputs, ``[2P, T', H, d]``. Zeros that require a gradient give the
                gradient with respect to z.
        """
        runner, layer = self.runner, self.next_layer
        x_in = self.x.to(runner.device_of(layer))
        normed = runner.attention_input(layer, x_in)
        q = runner.queries(layer, normed, self.positions)
        k, v = self.with_prefix(
            layer, runner.keys(layer, normed, self.positions), runner.values(layer, normed)
        )
        z = runner.attend(layer, q, k, v, self.positions)
        if z_offset is not None:
            z = z + z_offset
        x_mid = x_in + runner.output_projection(layer, z)
        self.x = runner.add_mlp(layer, x_mid)
        self.next_layer += 1
        return LayerState(x_in, x_mid, z, q, k, v)

    def finish(self) -> torch.Tensor:
        """Run the remaining layers. Return both streams at the answer, ``[2P, A, D]``."""
        while self.next_layer < self.runner.num_layers:
            self.advance()
        return self.at_answer(self.x)

    def continue_from(self, layer: int, x_mid: torch.Tensor) -> torch.Tensor:
        """Run patched streams to the end; all later layers are recomputed.

        Args:
            layer: the layer whose attention output was added last.
            x_mid: ``[nP, T', D]``; prompts are the fastest axis.

        Returns:
            The streams at the answer, ``[nP, A, D]``. The last layer computes only these positions.
        """
        runner, last = self.runner, self.runner.num_layers - 1
        if layer == last:
            return runner.add_mlp(layer, self.at_answer(x_mid))
        x = runner.add_mlp(layer, x_mid)
        for j in range(layer + 1, last):
            x = x.to(runner.device_of(j))
            x = runner.add_mlp(j, x + self._attention_of(j, x))
        x = x.to(runner.device_of(last))
        x_answer = self.at_answer(x)
        return runner.add_mlp(last, x_answer + self._attention_of(last, x, only_answer=True))

    def _attention_of(self, layer: int, x: torch.Tensor, only_answer: bool = False) -> torch.Tensor:
        runner = self.runner
        normed = runner.attention_input(layer, x)
        positions = self.positions.to(x.device)
        k, v = self.with_prefix(
            layer, runner.keys(layer, normed, positions), runner.values(layer, normed)
        )
        if only_answer:
            normed = self.at_answer(normed)
            positions = self.answer_positions(x.shape[0] // self.num_prompts, x.device)
        q = runner.queries(layer, normed, positions)
        return runner.output_projection(layer, runner.attend(layer, q, k, v, positions))
