#!/usr/bin/env python3
"""How fast the exact total effects of all heads are, against a sweep of one forward a head.

The sweep is what TransformerLens' ``get_act_patch_attn_head_out_all_pos`` does: for every (layer,
head) one full forward of all corrupted prompts with a hook that puts the clean head output in at
all positions. Here it runs on the same Hugging Face model, prompts and threads as the engine; with
``--transformer-lens`` (if it is installed) the original runs as well, on the same weights. All must
agree on every head, or the command fails.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from megatron_hydra.errors import HydraError, command
from megatron_hydra.selection.capabilities import Induction
from megatron_hydra.selection.effects import prompt_tokens
from megatron_hydra.selection.patching import total_effects
from megatron_hydra.selection.prompts import PromptBatch, PromptPair, make_batches
from megatron_hydra.selection.runner import DecoderRunner

EXAMPLE = "example:\n  python benchmarks/selection.py --repeats 3\n"


def build_model(args: argparse.Namespace) -> Any:
    """A random Qwen3 of the asked shape with weights large enough for heads to matter."""
    torch.manual_seed(0)
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
    """All heads by the engine: m ``[L, H, P]``."""
    runner = DecoderRunner(model)
    heads = [(i, h) for i in range(runner.num_layers) for h in range(runner.num_heads)]
    m = torch.empty(runner.num_layers, runner.num_heads, len(pairs), dtype=torch.float64)
    for batch in make_batches(pairs, prompt_tokens(tokens_per_batch, runner.num_heads)):
        for layer, _, result in total_effects(runner, batch, heads, tokens_per_batch):
            m[layer][:, list(batch.index)] = result
    return m


def _answers(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    rows = torch.arange(len(batch.index))
    last = logits[rows, batch.answer_position].double()
    return last[rows, batch.answer] - last[rows, batch.wrong]


@torch.no_grad()
def hook_sweep(model: Any, batch: PromptBatch) -> torch.Tensor:
    """All heads by one full forward each: m ``[L, H, P]``."""
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
    """TransformerLens' own sweep on the same weights, ready to run: its mean m ``[L, H]``."""
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


def _timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """The result, wall seconds, and CPU seconds of this process (of use on a busy machine)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in {
        "layers": 28,
        "heads": 16,
        "kv-heads": 8,
        "head-dim": 8,
        "hidden": 64,
        "vocabulary": 512,
        "prompts": 8,
        "segment": 32,
        "tokens-per-batch": 2048,
        "repeats": 3,
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--transformer-lens",
        action="store_true",
        help="run the original as well (transformer_lens 2.17; 4.x has no HookedTransformer)",
    )
    return parser


@command
def main() -> int:
    """Time all of them in one process and print one JSON line."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args)
    pairs = Induction(length=args.segment).prompts(None, args.vocabulary, args.prompts, 0)
    (batch,) = make_batches(pairs, 10**9)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "engine": lambda: engine(model, pairs, args.tokens_per_batch),
        "hook_sweep": lambda: hook_sweep(model, batch),
    }
    if args.transformer_lens:
        runs["transformer_lens"] = transformer_lens_sweep(model, batch)
    report: dict[str, Any] = {"arguments": vars(args), "shared_prefix": batch.shared_prefix}
    results: dict[str, torch.Tensor] = {}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):  # in turns, so that other load on the machine falls on all alike
        for name, run in runs.items():
            results[name], wall_seconds, cpu_seconds = _timed(run)
            wall[name].append(round(wall_seconds, 2))
            cpu[name].append(round(cpu_seconds, 2))
    reference = results["engine"][..., list(batch.index)]
    report |= {"wall_seconds": wall, "cpu_seconds": cpu}
    for name in list(runs)[1:]:
        other = results[name]
        mine = reference if other.dim() == 3 else reference.mean(-1)
        gap = float((other - mine).abs().max())
        if gap > 1e-3:
            raise HydraError(f"engine and {name} disagree by {gap}")
        report[name] = {
            "largest_difference": gap,
            "speedup_wall": round(min(wall[name]) / min(wall["engine"]), 2),
            "speedup_cpu": round(min(cpu[name]) / min(cpu["engine"]), 2),
        }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
