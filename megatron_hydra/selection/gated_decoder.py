"""A decoder in which every head computes full attention and Gated DeltaNet; a gate per head mixes them.

    z_h = g_h · FA_h(x) + (1 − g_h) · γ_h · RMSNorm(GDN_h(x))        y = W_o [z_h]_h

FA_h is the teacher's head output, with its rotary embedding and without norm: with all gates at 1 the model
*is* the teacher. GDN_h is the branch of the student that :func:`~megatron_hydra.conversion.student` makes,
with the student's norm and scale γ_h. Both use the teacher's W_o. Before the gates, only the GDN branch is
learned, layer by layer (stage 1 of the transfer).

B: sequences, T: positions, L: layers, H: query heads, d: head_dim, D: hidden size, V: vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import BackendConfig
from megatron_hydra.conversion.families import name_map
from megatron_hydra.conversion.hf_config import hf_config_from_model, model_from_hf_config
from megatron_hydra.conversion.student import calibrate_gamma, initialise_student
from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import (
    Documents,
    HydraHeadAttention,
    HydraHeadRotaryEmbedding,
    TokenContext,
    Visibility,
)
from megatron_hydra.model.parameters import PARAMETERS
from megatron_hydra.ops import backends, packages
from megatron_hydra.ops.device_cache import int_tensor
from megatron_hydra.ops.kernels import Case, Kernels, on_device_of
from megatron_hydra.selection.runner import DecoderRunner, attention_of_any_shape

_log = logging.getLogger(__name__)

LOGIT_ROWS = 1024
"""Number of positions whose logits, ``[rows, V]`` of both models, are in memory at a time."""

_NOT_A_CONFIG = ("architectures", "model_type", "auto_map", "dtype")

_ATTENTION = "self_attn."

_FP32 = (*(row.hf for row in PARAMETERS if row.fp32), "gamma")


class GatedDecoder:
    """The teacher with a GDN branch for every head.

    Args:
        runner: the teacher. Its weights do not change.
        calibration: int64 ``[1, S]`` token sequences. γ_h starts as the RMS of the teacher's head on them.
        seed: seed of the order of the initial decays over the heads of a layer.

    Attributes:
        branches: for each layer the GDN branch: ``[B, T, D]`` normalised stream → ``[B, T, H·d]``.
        kernels: fused kernels of the branches on a GPU. They get the sequences joined to one row, as packed
            documents. ``None``: the branches compute like the export.
    """

    def __init__(
        self, runner: DecoderRunner, calibration: Sequence[torch.Tensor], seed: int = 0
    ) -> None:
        self.runner = runner
        gamma = calibrate_gamma(runner.model, calibration)
        config, self.branches = recurrent_branches(runner, gamma, seed)
        self.rotary = HydraHeadRotaryEmbedding(config)
        self._log_scale_a = config.hydra["log_scale_a"]
        self.kernels = _fused_kernels(runner)
        self._kept: tuple[Any, TokenContext] | None = None

    # -- forward -----------------------------------------------------------------------------------

    def forward(
        self, ids: torch.Tensor, gates: torch.Tensor | None, recompute: bool = False
    ) -> torch.Tensor:
        """Compute the last residual stream.

        Args:
            ids: ``[B, T]``, padded on the right (a causal model never sees the padding).
            gates: ``[B or 1, L, H]`` in 0 … 1; ``None``: run only the teacher, without GDN branches.
            recompute: save only the streams between layers for the backward.

        Returns:
            ``[B, T, D]``, before the final norm.
        """
        x = self.runner.embed(ids)
        for layer in range(self.runner.num_layers):
            x = x.to(self.runner.device_of(layer))
            own = None if gates is None else gates[:, layer].to(x.device)
            if recompute and own is not None:
                x = checkpoint(
                    self._layer, layer, x, own, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._layer(layer, x, own)
        return x

    def _layer(self, layer: int, x: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
        runner = self.runner
        normed = runner.attention_input(layer, x)
        z = self.full_attention(layer, normed)
        if gates is not None:
            z = mix(z, self.recurrent(layer, normed), gates)
        return runner.add_mlp(layer, x + runner.output_projection(layer, z))

    def full_attention(self, layer: int, normed: torch.Tensor) -> torch.Tensor:
        """The teacher's head outputs, ``[B, T, H, d]``."""
        runner = self.runner
        q = runner.queries(layer, normed, None)
        k, v = runner.keys(layer, normed, None), runner.values(layer, normed)
        with attention_of_any_shape(normed.device):
            return runner.attend(layer, q, k, v, None)

    def recurrent(self, layer: int, normed: torch.Tensor) -> torch.Tensor:
        """The GDN branch's head outputs after norm and γ, ``[B, T, H, d]``."""
        branch, context = self.branches[layer], self._context(normed)
        if self.kernels is None:
            out = branch(normed, context)
        else:
            x = normed.flatten(0, 1)
            with on_device_of(x):
                out = _by_kernels(self.kernels, branch, x, context)
        return out.view(*normed.shape[:2], self.runner.num_heads, -1)

    def _context(self, x: torch.Tensor) -> TokenContext:
        """Positions and rotary tables of a batch, made once for all layers on a device."""
        key = (*x.shape[:2], x.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._new_context(x)
        return self._kept[1]

    @torch.no_grad()
    def _new_context(self, x: torch.Tensor) -> TokenContext:
        documents = None if self.kernels is None else _rows_as_documents(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if documents is not None:
            positions = documents.positions
        cos, sin = self.rotary(positions)
        a = self._log_scale_a
        return TokenContext(
            cos=cos,
            sin=sin,
            log_scale=((positions.float() + a).log() / math.log(a))[..., None, None],
            first=positions[:, 0],
            valid=None,
            visibility=Visibility(0, positions.shape[1]),
            documents=documents,
        )

    # -- stage 1 -----------------------------------------------------------------------------------

    def alignment_losses(
        self, ids: torch.Tensor, real: torch.Tensor, keep: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Mean squared error of the attention output on the teacher's stream, layer by layer (equation 15).

        Layers are independent: the caller may compute the gradient of one before the next one runs.

        Args:
            ids: ``[B, T]``.
            real: ``[B, T]`` bool, true for real tokens.
            keep: gates of 0 and 1, ``[B, L, H]``: heads with 1 keep the teacher's output.

        Yields:
            A scalar per layer: the mean over tokens and channels.
        """
        runner = self.runner
        with torch.no_grad():
            x = runner.embed(ids)
        for layer in range(runner.num_layers):
            x = x.to(runner.device_of(layer))
            with torch.no_grad():
                normed = runner.attention_input(layer, x)
                z = self.full_attention(layer, normed)
                target = runner.output_projection(layer, z)
            mixed = mix(z, self.recurrent(layer, normed), keep[:, layer].to(x.device))
            error = (runner.output_projection(layer, mixed) - target).float()
            yield error[real.to(x.device)].square().mean()
            with torch.no_grad():
                x = runner.add_mlp(layer, x + target)

    # -- the difference from the teacher -----------------------------------------------------------

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """KL(teacher ‖ student) of the next token, ``[N]`` fp32, from last residual streams ``[N, D]``."""
        rows = [
            checkpoint(self._divergence, s, t, use_reentrant=False, preserve_rng_state=False)
            for s, t in zip(student.split(LOGIT_ROWS), teacher.split(LOGIT_ROWS), strict=True)
        ]
        return torch.cat(rows)

    def _divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        ours = F.log_softmax(self.runner.logits(student).float(), dim=-1)
        with torch.no_grad():
            theirs = F.log_softmax(self.runner.logits(teacher).float(), dim=-1)
        return (theirs.exp() * (theirs - ours)).sum(-1)


def _rows_as_documents(x: torch.Tensor) -> Documents:
    """``[B, T, D]`` as B documents of T tokens."""
    batch, length = x.shape[:2]
    places = torch.arange(batch * length, device=x.device)
    bounds = torch.arange(batch + 1, device=x.device) * length
    return Documents(bounds, [length] * batch, (places % length)[None], None, length)


def _by_kernels(
    kernels: Kernels, branch: HydraHeadAttention, x: torch.Tensor, context: TokenContext
) -> torch.Tensor:
    """Run the branch by fused kernels: ``[N, D]`` normalised streams of joined documents → ``[N, H·d]``."""
    documents, switches, d = context.documents, branch.switches, branch.head_dim
    assert documents is not None
    projections = [getattr(branch, f"gdn_{part}_proj") for part in ("q", "k", "v")]
    heads = [p.out_features // d for p in projections]
    biases = [p.bias for p in projections if p.bias is not None]
    qkv = F.linear(
        x, torch.cat([p.weight for p in projections]), torch.cat(biases) if biases else None
    )
    conv = gate = None
    norms: Sequence[Any] = (None, None)
    if switches["short_conv"]:
        conv = torch.cat([getattr(branch, f"gdn_{part}_conv")() for part in ("q", "k", "v")])
    if branch.config.qk_norm:
        norms = [getattr(branch, f"gdn_{part}_norm").weight for part in ("q", "k")]
    rotated = switches["gdn_position"] == "rope"
    q, k, v = kernels.delta_rule_inputs(
        qkv,
        (heads[0], heads[1]),
        conv,
        documents.positions[0],
        None,
        norms,
        branch.config.rms_norm_eps,
        (context.cos[0], context.sin[0]) if rotated else None,
    )
    if heads[1] < heads[0]:
        index = int_tensor(tuple(branch.gdn_groups), torch.int64, x.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
    log_alpha, beta = branch.gates(branch.gdn_a_proj(x), branch.gdn_b_proj(x))
    bounds = tuple(itertools.accumulate(documents.lengths, initial=0))
    out, _ = kernels.delta_rule(q, k, v, log_alpha, beta, bounds)
    if switches["gdn_gate"]:
        gate = branch.gdn_gate_proj(x).unflatten(-1, (-1, d))
    scale = None if switches["fusion"] == "concat" else branch.gamma
    eps = branch.config.rms_norm_eps if switches["fusion_norm"] == "rms" else None
    return kernels.fusion_tail([(out, gate)], scale, eps)


def mix(full_attention: torch.Tensor, recurrent: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Compute g · FA + (1 − g) · GDN, head by head.

    Args:
        full_attention, recurrent: ``[B, T, H, d]``.
        gates: ``[B or 1, H]``.
    """
    g = gates[:, None, :, None].to(full_attention.dtype)
    return g * full_attention + (1 - g) * recurrent


# -- the branches ----------------------------------------------------------------------------------


def recurrent_branches(
    runner: DecoderRunner, gamma: torch.Tensor, seed: int
) -> tuple[HydraHeadConfig, list[HydraHeadAttention]]:
    """The attention of a model's all-GDN student, layer by layer, without output projection.

    Weights have the teacher's dtype; decays and γ are fp32. Each layer is on the device of the teacher's layer.

    Args:
        gamma: ``[L, H]``.
        seed: seed of the order of the initial decays.
    """
    dense = model_from_hf_config(runner.model.config.to_dict(), "the model's config")
    none: tuple[tuple[int, ...], ...] = ((),) * dense.num_layers
    student = dataclasses.replace(dense, hydra=HydraConfig(), full_attention_heads=none)
    body = hf_config_from_model(student, "float32")
    config = HydraHeadConfig(
        **{k: v for k, v in body.items() if k not in _NOT_A_CONFIG},
        gdn_kernel="torch",
    )
    canonical = initialise_student(_canonical(runner.model, dense), student, gamma, seed)
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(dense.num_layers)]
    for row in name_map(student):
        for name in row.hf:
            prefix, found, own = name.partition(_ATTENTION)
            if found and not own.startswith("o_proj"):
                (tensor,) = row.form.to_hf(canonical[row.canonical])
                states[int(prefix.split(".")[-2])][own] = tensor
    branches = []
    for layer, state in enumerate(states):
        branch = HydraHeadAttention(config, layer)
        branch.o_proj = nn.Identity()  # type: ignore[assignment]  # the teacher's serves both branches
        branch.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        weight = runner.layers[layer].self_attn.o_proj.weight
        branch.to(weight.device)
        for name, parameter in branch.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name in _FP32 else weight.dtype)
        branches.append(branch.requires_grad_(False))
    return config, branches


def _fused_kernels(runner: DecoderRunner) -> Kernels | None:
    """The training's kernels if flash-linear-attention runs here, forward and backward, else ``None``.

    Raises:
        HydraError: the kernels run but give wrong results.
    """
    weight = runner.layers[0].self_attn.o_proj.weight
    case = Case(weight.device, weight.dtype, runner.head_dim, gdn_heads=(runner.num_heads,))
    if weight.device.type != "cuda":
        return None
    if packages.needs_tilelang(case):
        _log.warning(
            "the delta rule runs in plain torch, which is slow: on this GPU flash-linear-attention's backward "
            "needs TileLang (pip install %s)",
            packages.TILELANG,
        )
        return None
    kernels = backends.choose_kernels(BackendConfig(full_attention="torch"), case)
    if kernels.names["gated_delta_net"] != "fla":
        return None
    # Batches have different numbers of rows.
    rule = functools.partial(kernels.delta_rule, dense_rows=False)
    return dataclasses.replace(kernels, delta_rule=rule)


def _canonical(model: Any, dense: ModelConfig) -> dict[str, torch.Tensor]:
    """The canonical state dict of a loaded dense model, without copies if possible."""
    stored = model.state_dict()
    return {
        row.canonical: row.form.to_canonical([stored[n] for n in row.hf], row.canonical_shape)
        for row in name_map(dense)
    }
