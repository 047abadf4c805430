#!/usr/bin/env python3
"""Speed of the exact total effects of all heads, against a sweep with one forward for each head.

:mod:`benchmarks.selection_time` measures a whole selection at a model's shape.

The sweep is TransformerLens' ``get_act_patch_attn_head_out_all_pos``: for every (layer, head) one full forward
of all corrupted prompts, in which a hook puts the clean head output at all positions. It runs on the same
Hugging Face model, prompts and threads as the engine. ``--transformer-lens`` (if installed) also runs the
original, on the same weights. A size is the length of an induction prompt's repeated segment. The command fails
if results differ for any head.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import _harness as harness
from megatron_hydra.errors import HydraError, command
from megatron_hydra.selection.capabilities import Induction
from megatron_hydra.selection.effects import prompt_tokens
from megatron_hydra.selection.patching import total_effects
from megatron_hydra.selection.prompts import PromptBatch, PromptPair, make_batches
from megatron_hydra.selection.runner import DecoderRunner

EXAMPLE = "python -m benchmarks.selection --sizes 32,128 --prompts 4 --repeats 3"
AGREEMENT = 1e-3
SHAPE = {
    "layers": 28, "heads": 16, "kv-heads": 8, "head-dim": 8, "hidden": 64, "vocabulary": 512,
    "prompts": 8, "tokens-per-batch": 2048,
}  # fmt: skip
"""Flags and their defaults: Qwen3-1.7B's heads at a tiny width."""


def build_model(args: argparse.Namespace) -> Any:
    """A random Qwen3 of the given shape, with weights large enough that heads have effects."""
    torch.manual_seed(args.seed)
    config = transformers.Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def engine(model: Any, pairs: list[PromptPair], tokens_per_batch: int) -> torch.Tensor:
    """Effects m of all heads by the engine, ``[L, H, P]``."""
    runner = DecoderRunner(model)
    heads = [(i, h) for i in range(runner.num_layers) for h in range(runner.num_heads)]
    m = torch.empty(runner.num_layers, runner.num_heads, len(pairs), dtype=torch.float64)
    for batch in make_batches(pairs, prompt_tokens(tokens_per_batch, runner.num_heads)):
        for layer, _, result in total_effects(runner, batch, heads, tokens_per_batch):
            m[layer][:, list(batch.index)] = result
    return m


def _answers(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    rows = torch.arange(len(batch.index))
    last = logits[rows, batch.answer_positions[:, 0]].double()
    return last[rows, batch.answer[:, 0]] - last[rows, batch.wrong[:, 0]]


@torch.no_grad()
def hook_sweep(model: Any, batch: PromptBatch) -> torch.Tensor:
    """Effects m of all heads by one full forward each, ``[L, H, P]``."""
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    clean: dict[int, torch.Tensor] = {}
    handles = [
        p.register_forward_pre_hook(lambda m, a, i=i: clean.__setitem__(i, a[0]))
        for i, p in enumerate(projections)
    ]
    model(batch.clean, use_cache=False)
    for handle in handles:
        handle.remove()
    d = model.config.head_dim
    rows = []
    for i, projection in enumerate(projections):
        for h in range(model.config.num_attention_heads):

            def patch(module: Any, inputs: tuple, i: int = i, h: int = h) -> tuple:
                z = inputs[0].clone()
                z[..., h * d : (h + 1) * d] = clean[i][..., h * d : (h + 1) * d]
                return (z,)

            handle = projection.register_forward_pre_hook(patch)
            rows.append(_answers(model(batch.corrupted, use_cache=False).logits, batch))
            handle.remove()
    return torch.stack(rows).unflatten(0, (len(projections), -1))


def transformer_lens_sweep(model: Any, batch: PromptBatch) -> Callable[[], torch.Tensor]:
    """A function that runs TransformerLens' own sweep on the same weights: mean m ``[L, H]``."""
    try:
        import transformer_lens
        from transformer_lens import patching
        from transformer_lens.pretrained.weight_conversions import convert_qwen3_weights
    except ImportError as error:
        raise HydraError(f"--transformer-lens: it cannot be imported: {error}") from None
    c = model.config
    config = transformer_lens.HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        n_ctx=batch.clean.shape[1],
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        use_qk_norm=True,
        original_architecture="Qwen3ForCausalLM",
        final_rms=True,
        device="cpu",
    )
    hooked = transformer_lens.HookedTransformer(config)
    hooked.load_state_dict(convert_qwen3_weights(model, config), strict=False)
    hooked.eval().requires_grad_(False)

    def run() -> torch.Tensor:
        _, cache = hooked.run_with_cache(batch.clean)
        return patching.get_act_patch_attn_head_out_all_pos(
            hooked, batch.corrupted, cache, lambda logits: _answers(logits, batch).mean()
        )

    return run


def check_agreement(results: dict[str, torch.Tensor], batch: PromptBatch) -> dict[str, float]:
    """By name, the largest difference between a peer and the engine.

    Raises:
        HydraError: naming the peer that computes something else.
    """
    engine_m = results["engine"][..., list(batch.index)]
    gaps = {}
    for name, other in results.items():
        mine = engine_m if other.dim() == 3 else engine_m.mean(-1)
        if name != "engine":
            gaps[name] = float((other - mine).abs().max())
            if not gaps[name] <= AGREEMENT:
                raise HydraError(f"engine and {name} disagree by {gaps[name]}")
    return gaps


def measure_size(
    segment: int, model: Any, args: argparse.Namespace, report: harness.Report
) -> None:
    """Time all peers on prompts of one length."""
    pairs = Induction(length=segment).prompts(None, args.vocabulary, args.prompts, args.seed)
    (batch,) = make_batches(pairs, 10**9)
    sweeps: dict[str, Callable[[], torch.Tensor]] = {
        "engine": lambda: engine(model, pairs, args.tokens_per_batch),
        "one forward a head": lambda: hook_sweep(model, batch),
    }
    if args.transformer_lens:
        sweeps["TransformerLens"] = transformer_lens_sweep(model, batch)
    results: dict[str, torch.Tensor] = {}

    def keeping(name: str) -> harness.Peer:
        return lambda: results.__setitem__(name, sweeps[name]())

    report.measure(segment, {name: keeping(name) for name in sweeps}, memory=False)
    for name, gap in check_agreement(results, batch).items():
        report.note(f"{name}: effects differ from the engine's by at most {gap:.1e}")


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__, EXAMPLE, sizes="32", what="tokens of a prompt's segment")
    parser.add_argument("--segment", dest="sizes", type=harness.sizes_of, help="same as --sizes")
    for flag, default in SHAPE.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--transformer-lens",
        action="store_true",
        help="run the original as well (transformer_lens 2.17; 4.x has no HookedTransformer)",
    )
    parser.set_defaults(repeats=3, warmup=1)
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    device = harness.cpu_only(args, "selection")
    torch.set_num_threads(args.threads)
    model = build_model(args)
    ratios = {
        f"speed-up of the engine over {peer}": (peer, "engine")
        for peer in ("one forward a head", "TransformerLens")
    }
    report = harness.Report("selection", args, device, ratios, unit="tokens of a segment")
    report.note(
        f"{args.layers} layers of {args.heads} heads, {args.prompts} prompts, total effects"
    )
    for segment in args.sizes:
        measure_size(segment, model, args, report)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
