"""A Hugging Face decoder taken apart: embedding, attention, MLP and head, one layer at a time.

Nothing here imports Megatron. The modules and weights are the model's own; what is ours is the
order in which they are called, so that a residual stream can be stopped at any layer, changed, and
continued from there. Shapes: B streams, T positions, D hidden, H query heads, G KV heads, d
head_dim.
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
from megatron_hydra.selection.prompts import PromptBatch

KeyValue = tuple[torch.Tensor, torch.Tensor]


class DecoderRunner:
    """Runs parts of a Qwen3, Qwen2 or Llama model.

    Args:
        model: a ``*ForCausalLM``; put into eval mode, its parameters no longer require gradients.
        devices: spread the layers over these in equal consecutive blocks (for a model larger than
            one GPU); default: where the model is.

    Raises:
        HydraError: another architecture, or one with sliding-window attention.
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
        # A tied head shares its weight with the embedding; readout_direction copes with either place.
        if self.model.lm_head.weight is not body.embed_tokens.weight:
            self.model.lm_head.to(devices[-1])

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's weights are."""
        return self.layers[layer].self_attn.o_proj.weight.device

    def wait(self) -> None:
        """Return when all GPUs that hold layers have done what they were given."""
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
        """Queries.

        Args:
            normed: ``[B, T, D]``.
            positions: ``[T]``, or ``[B, T]`` where streams differ; ``None``: 0 to T − 1, and then the host
                does not wait for the GPU.
            heads: of these n heads only; default: all.

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
        """A projection's output by heads, ``[..., n, d]``."""
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
            grouped: keys and values are those of KV heads; else every query head comes with its own.

        Returns:
            Head outputs z ``[B, Tq, H, d]``: what enters o_proj.
        """
        mask = None  # as many queries as keys: plain causal attention, which kernels do faster
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
        """o_proj of all heads: ``[B, T, H, d]`` to ``[B, T, D]``, bias included."""
        return self.layers[layer].self_attn.o_proj(z.flatten(-2))

    def head_output_weights(self, layer: int, heads: Sequence[int]) -> torch.Tensor:
        """The columns of o_proj that belong to some heads, ``[n, d, D]``."""
        weight = self.layers[layer].self_attn.o_proj.weight
        return weight.view(self.hidden_size, self.num_heads, self.head_dim)[:, list(heads)].permute(
            1, 2, 0
        )

    def add_mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The stream after the MLP: x + MLP(norm(x)).

        A stream in float32 stays so, whatever the weights' dtype.
        """
        module = self.layers[layer]
        normed = module.post_attention_layernorm(x)
        return x + module.mlp(normed.to(module.mlp.down_proj.weight.dtype))

    # -- the end -----------------------------------------------------------------------------------

    def readout_direction(self, batch: PromptBatch) -> torch.Tensor:
        """What the final normed stream is projected on: the weight of a token of the answer times
        (W[answer] − W[wrong]), ``[P, A, D]`` float32.
        """
        weight = self.model.lm_head.weight
        difference = weight[batch.answer.to(weight.device)].float()
        difference -= weight[batch.wrong.to(weight.device)].float()
        difference *= batch.weights.to(weight.device)[..., None]
        return difference.to(self.last_device)

    def readout(self, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """The span readout m from residual streams at the answer positions, ``[..., P]`` float32.

        Args:
            x: ``[..., P, A, D]``; the norm runs in float32 whatever its dtype.
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
        # In place: the copies of the usual rotate-half cost as much as a projection does.
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated

    def _tables(self, length: int, like: torch.Tensor) -> KeyValue:
        size = max(64, 1 << (length - 1).bit_length())
        key = (size, like.device)
        if key not in self._rotary:
            positions = torch.arange(size, device=self.device)[None]
            probe = torch.zeros(1, device=self.device, dtype=torch.float32)
            cos, sin = self.model.model.rotary_emb(probe, positions)
            self._rotary[key] = (cos[0].to(like.device), sin[0].to(like.device))
        return self._rotary[key]


def attention_of_any_shape(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Attention without cuDNN inside the block, for batches that have a shape of their own each.

    CuDNN builds a plan for each shape, which takes longer than the attention of a few prompts.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def default_tokens_per_batch(runner: DecoderRunner) -> int:
    """Positions computed at a time, as they suit the device: a CPU's cache is small."""
    return 2048 if runner.device.type == "cpu" else 32768


@dataclasses.dataclass(frozen=True)
class LayerState:
    """One layer of both streams, positions from the shared prefix on (T' = T − prefix).

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

    Positions before the first difference are the same in both and never change under a patch: they
    are computed once, and only their keys and values are kept.

    Attributes:
        batch: the prompts.
        start: T − T', the length of the shared prefix.
        positions: absolute positions of the T' computed ones, ``[T']``.
        answer_rows: the answer positions' index among them, ``[P, A]``.
        prefix: for each layer keys and values ``[P, start, G, d]``, or ``None`` where start is 0.
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
        """Pick the answer positions: ``[nP, T', ...]`` to ``[nP, A, ...]``, prompts fastest."""
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
        """Prepend the shared prefix's keys and values to ``[nP, T', G, d]``, of some or all KV heads."""
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
            z_offset: added to the head outputs, ``[2P, T', H, d]``: zeros that require a gradient
                give the gradient with respect to z.
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
        """Run the layers that are left; both streams at the answer, ``[2P, A, D]``."""
        while self.next_layer < self.runner.num_layers:
            self.advance()
        return self.at_answer(self.x)

    def continue_from(self, layer: int, x_mid: torch.Tensor) -> torch.Tensor:
        """Run patched streams to the end, everything downstream free.

        Args:
            layer: the layer whose attention has just been added.
            x_mid: ``[nP, T', D]``, prompts fastest.

        Returns:
            The streams at the answer, ``[nP, A, D]``. Of the last layer only these positions are
            computed.
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
