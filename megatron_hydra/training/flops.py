"""Model FLOPs of a training step: the FLOPs of the equations, independent of layout and recomputation.

A multiplication and an addition count as two FLOPs. A backward counts as two forwards. Norms, gates, rotary
embedding and short convolution are omitted: they are linear in the tokens and small next to projections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import Verb
from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.model.parameters import parameters_by_key
from megatron_hydra.ops.linear_rules import rule_of_model

_EMBEDDING = "embedding.word_embeddings.weight"
_ATTENTION = ".self_attention."

PEAK_TFLOPS = {
    "H100": 989.0,
    "H200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
}
"""Part of a device's name -> its dense bf16 matrix peak in TFLOP/s, from the vendor's data sheets."""


def attention_pairs(batches: Iterable[PackedBatch]) -> float:
    """Number of (query, key) pairs of causal attention inside documents; padding counts as a document."""
    edges = (zip(b.cu_seqlens, b.cu_seqlens[1:], strict=False) for b in batches)
    return float(sum((e - s) * (e - s + 1) // 2 for pairs in edges for s, e in pairs))


def _matmul_weights(model: ModelConfig, attention_only: bool) -> float:
    """Number of weights that multiply every token once; a tied embedding counts as the LM head."""
    shapes = canonical_shapes(model)
    projections = {key for key, row in parameters_by_key(model).items() if "D" in row.tail}
    total = 0
    for key, shape in shapes.items():
        is_table = key == _EMBEDDING and not model.tie_embeddings
        _, in_attention, own = key.partition(_ATTENTION)
        if len(shape) < 2 or is_table or (in_attention and own not in projections):
            continue
        if not attention_only or _ATTENTION in key:
            total += math.prod(shape)
    return float(total)


def forward_flops(
    model: ModelConfig, tokens: float, pairs: float, *, attention_only: bool = False
) -> float:
    """FLOPs of a forward over ``tokens`` tokens whose documents have ``pairs`` (query, key) pairs.

    With a window, every query counts as a full window. This overestimates a document's first tokens.
    """
    fa_heads, gdn_heads = (
        sum(len(heads(layer)) for layer in range(model.num_layers))
        for heads in (model.fa_heads, model.gdn_heads)
    )
    if model.switches.fa_window is not None:
        pairs = min(pairs, tokens * model.switches.fa_window)
    recurrence = rule_of_model(model.switches).flops(1, model.head_dim) * gdn_heads * tokens
    cores = 4.0 * model.head_dim * pairs * fa_heads + recurrence
    return 2.0 * tokens * _matmul_weights(model, attention_only) + cores


def step_flops(
    verb: Verb, student: ModelConfig, teacher: ModelConfig | None, tokens: float, pairs: float
) -> float:
    """Model FLOPs of one optimizer step over all devices.

    ``align`` runs the teacher (without its LM head) and trains the student's attention. ``distill`` runs
    the teacher and trains the student. The other verbs train the student.
    """
    if teacher is None:
        return 3 * forward_flops(student, tokens, pairs)
    whole = forward_flops(teacher, tokens, pairs)
    if verb == "align":
        whole -= 2.0 * tokens * teacher.vocab_size * teacher.hidden_size
        return whole + 3 * forward_flops(student, tokens, pairs, attention_only=True)
    return whole + 3 * forward_flops(student, tokens, pairs)


def peak_tflops(device_name: str) -> float:
    """Entry of :data:`PEAK_TFLOPS` for a device, or 0 if it is unknown."""
    matching = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(matching, key=len)] if matching else 0.0
