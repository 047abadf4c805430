#!/usr/bin/env python3
"""Prefill and decoding of the exported model against the dense model of the same shape, in Hugging Face format.

Both have random weights and Qwen3-1.7B's shape, or are read from folders: ``--hf-path`` (an export) and
``--dense`` (its teacher). Peers take turns: one prefill, or one token, of each.

Prefill (``--prefill-sizes``): one call reads a prompt, as in generate().

Decode (``--sizes``): batch 1, one greedy token for each call. Caches are filled with random numbers instead of
reading a prompt, because the time of a token does not depend on them. ``--modes`` names the modes:

  eager     without CUDA graphs, transformers' dynamic cache, as generate() does it by default
  graph     transformers' static cache, the whole step captured as one CUDA graph by hand
  compiled  transformers' static cache, torch.compile(mode="reduce-overhead"), as generate() does it with
            cache_implementation="static"; minutes of compilation a size

Batch (``--batch-sizes``): tokens a second at the largest batch that fits in memory, each model alone in it;
found by bisection. Bytes held are counted from the tensors of the caches.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache, StaticCache

from benchmarks import _harness as harness
from megatron_hydra.arguments import path_argument
from megatron_hydra.errors import HydraError, command
from megatron_hydra.hf import decode_hydrahead
from megatron_hydra.hf.cache_hydrahead import HydraHeadCacheLayer
from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import CACHE_NAME, HydraHeadForCausalLM
from megatron_hydra.hf_identity import read_config_json, resolve_hf_folder
from megatron_hydra.hf_loading import load_hf_model

EXAMPLE = (
    "python -m benchmarks.decode --device cpu --layers 2 --sizes 8K --threads 2 --prefill-sizes 8K"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen3-1.7B's."""
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
}  # fmt: skip
"""What ``--tiny`` changes."""

LAYERS, FA_HEADS = 28, 2
"""Defaults of ``--layers`` and ``--fa-heads``, of Qwen3-1.7B's 16 heads a layer."""
SAME = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip
"""What an export and its peer have in common."""

ROOM = 256
"""Columns of a static cache after the prompt; when they are full, decoding restarts at the prompt's end."""

Step = Callable[[], None]


def build(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Dense and hybrid models: from their folders, or with random weights."""
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if device.type == "cuda" or args.bf16 else torch.float32
    if args.hf_path:
        return opened(args.hf_path, args.dense, dtype, device)
    shape = SHAPE | {"num_hidden_layers": args.layers or LAYERS} | (TINY if args.tiny else {})
    dense = transformers.Qwen3Config(**shape)
    heads = [list(range(0, 16, 16 // (args.fa_heads or FA_HEADS)))] * shape["num_hidden_layers"]
    hydra = HydraHeadConfig(
        **shape, family="qwen3", qk_norm=True, full_attention_heads=heads, hydra={}
    )
    made = {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made["dense"] = transformers.Qwen3ForCausalLM(dense)
            made["hydra"] = HydraHeadForCausalLM(hydra)
    finally:
        torch.set_default_dtype(default)
    return {name: model.to(dtype).eval().requires_grad_(False) for name, model in made.items()}


def opened(export: Path, teacher: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """An export, run by this package's code, and its dense peer.

    Raises:
        HydraError: a folder is not a model, ``export`` is not an export, or their shapes differ.
    """
    if read_config_json(resolve_hf_folder(export)).get("model_type") != HydraHeadConfig.model_type:
        raise HydraError(f"--hf-path {export} is not an export of tools/megatron_to_hf.py")
    found = {
        "dense": load_hf_model(teacher, dtype=dtype, device=device),
        "hydra": load_hf_model(
            export, dtype=dtype, device=device, model_class=HydraHeadForCausalLM
        ),
    }
    configs = [model.config for model in found.values()]
    for key in SAME:
        dense, hydra = (getattr(config, key) for config in configs)
        if dense != hydra:
            raise HydraError(
                f"--dense {teacher} has {key} {dense}, --hf-path {export} has {hydra}: give the model that "
                "the export was made from"
            )
    return {name: model.requires_grad_(False) for name, model in found.items()}


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The flags, if they can be given together.

    Raises:
        HydraError: they cannot.
    """
    if bool(args.hf_path) != bool(args.dense):
        given, other = ("--hf-path", "--dense") if args.hf_path else ("--dense", "--hf-path")
        raise HydraError(f"{given} needs {other}: an export is compared with a dense model")
    if args.hf_path:
        flags = {"--layers": args.layers, "--fa-heads": args.fa_heads, "--tiny": args.tiny}
        if chosen := [flag for flag, value in flags.items() if value]:
            raise HydraError(f"{', '.join(chosen)}: the shape is that of --hf-path")
    return args


def free(device: torch.device) -> None:
    """Free unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- caches ---------------------------------------------------------------------------------------


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    total = 0
    for layer in cache.layers:
        names = ("keys", "values", *getattr(layer, "MEMORIES", ()))
        tensors = [getattr(layer, name) for name in names]
        total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total


@torch.inference_mode()
def filled_cache(model: Any, batch: int, length: int, room: int | None) -> Any:
    """A cache of random numbers, as after a prompt of ``length`` tokens.

    Args:
        room: further columns of a static cache; ``None``: a dynamic cache.
    """
    if room is None:
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=length + room)
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    model(token, use_cache=True, **{CACHE_NAME: cache})  # this makes every tensor
    for layer in cache.layers:
        for name in getattr(layer, "MEMORIES", ()):
            if getattr(layer, name) is not None:
                getattr(layer, name).normal_()
        for name in ("keys", "values"):
            held = getattr(layer, name)
            if held is None:  # a layer without full attention
                continue
            if room is None:
                held = held.new_empty(*held.shape[:2], length, held.shape[3])
                setattr(layer, name, held)
            held.normal_()
    rewind(cache, length)
    return cache


def rewind(cache: Any, length: int) -> None:
    """Set a cache's number of tokens to ``length``.

    Raises:
        HydraError: the cache does not keep this number.
    """
    for layer in cache.layers:
        if isinstance(layer, HydraHeadCacheLayer):
            if isinstance(layer.length, torch.Tensor):
                layer.length.fill_(length)
            else:
                layer.length = length
            if layer.lengths is not None:
                layer.lengths.fill_(length)
        elif hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)
        elif type(layer).__name__ != "DynamicLayer":  # which counts its keys
            raise HydraError(
                f"transformers {transformers.__version__}: a {type(layer).__name__} does not keep its "
                "length in a tensor, so a step cannot be captured: use --modes eager, or a newer transformers"
            )


# -- what is timed --------------------------------------------------------------------------------


@torch.inference_mode()
def prefill(model: Any, prompt: torch.Tensor, chunk: int) -> Any:
    """The cache of a prompt, read in chunks; 0: in one call."""
    cache = None
    for start in range(0, prompt.shape[1], chunk or prompt.shape[1]):
        part = prompt[:, start : start + (chunk or prompt.shape[1])]
        output = model(part, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        cache = output[CACHE_NAME]
    return cache


def decoder(forward: Callable[..., Any], cache: Any, token: torch.Tensor) -> Step:
    """One greedy step: reads and writes ``token`` ``[B, 1]`` and the cache, always in the same places."""

    @torch.inference_mode()
    def step() -> None:
        output = forward(token, use_cache=True, **{CACHE_NAME: cache})
        token.copy_(output.logits[:, -1:].argmax(-1))

    return step


def decode_step(model: Any, batch: int, length: int, mode: str) -> tuple[Step, Any]:
    """The function that decodes one token behind ``length`` others in one of the ways, and its cache."""
    static = mode != "eager"
    cache = filled_cache(model, batch, length, ROOM if static else None)
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    forward = model.forward
    if mode == "compiled":
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    step = decoder(forward, cache, token)
    if not static:
        return step, cache
    if mode == "graph" and model.device.type == "cuda":
        step = harness.graphed(step)
    left = [ROOM - 4]  # the warm-up before a capture is a step too

    @torch.inference_mode()
    def bounded() -> None:
        if not left[0]:
            rewind(cache, length)
            left[0] = ROOM - 4
        left[0] -= 1
        if mode == "compiled":
            torch.compiler.cudagraph_mark_step_begin()
        step()

    return bounded, cache


# -- the rows -------------------------------------------------------------------------------------


def measure_prefill(
    length: int,
    models: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
    report: harness.Report,
) -> None:
    """Time from a prompt to its cache."""
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = models["dense"].config.vocab_size
    prompt = torch.randint(vocabulary, (1, length), generator=generator).to(device)
    peers = {
        f"prefill of {name}": functools.partial(prefill, model, prompt, args.chunk)
        for name, model in models.items()
    }
    samples = harness.time_in_turns(peers, device, args.prefill_repeats, 1)
    report.add(length, samples)
    dense, hydra = samples.values()
    report.ratio(length, "prefill, times as fast as dense", harness.Ratio(dense.wall, hydra.wall))
    free(device)


def measure_decode(
    length: int,
    mode: str,
    models: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
    report: harness.Report,
) -> None:
    """Time of a token at batch 1."""
    try:
        made = {name: decode_step(model, 1, length, mode) for name, model in models.items()}
    except torch.OutOfMemoryError:
        report.note(f"{mode} at {harness.size_name(length)}: the two caches do not fit in memory")
        free(device)
        return
    if mode == "eager":
        held = {name: cache_bytes(cache) for name, (_, cache) in made.items()}
        report.note(
            f"cache at {harness.size_name(length)}: dense {held['dense'] / 2**20:.1f} MiB, "
            f"hydra {held['hydra'] / 2**20:.1f} MiB"
        )
        report.ratio(length, "cache bytes of hydra / dense",
                     harness.Ratio([held["hydra"]], [held["dense"]]))  # fmt: skip
    steps = {f"{name}, {mode}": step for name, (step, _) in made.items()}
    dense, hydra = report.measure(length, steps, memory=False, mode=mode, batch=1).values()
    report.ratio(length, f"decode {mode}, times as fast as dense",
                 harness.Ratio(dense.wall, hydra.wall))  # fmt: skip
    del made, steps
    free(device)


def fits(model: Any, batch: int, length: int, mode: str, device: torch.device) -> bool:
    """Whether a batch can be decoded: a little longer than it is timed at, so that timing fits as well.

    Nothing is captured here, where memory may run out: a graph has a pool of its own for what a step allocates,
    so as much again has to be free.
    """
    try:
        cache = filled_cache(model, batch, length + ROOM, None if mode == "eager" else ROOM)
        token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        step = decoder(model.forward, cache, token)
        step()
        torch.cuda.synchronize()
        needed = harness.measured_memory(step, device)
    except torch.OutOfMemoryError:
        return False
    free(device)
    return mode == "eager" or torch.cuda.mem_get_info(device)[0] > 1.1 * needed


def largest_batch(
    model: Any, length: int, mode: str, limit: int, device: torch.device
) -> tuple[int, str]:
    """The largest batch that fits, within a thirty-second of it, and how it was found.

    Args:
        limit: the largest batch to try; 0: limited by memory only.
    """
    _, cache = decode_step(model, 1, length, mode)
    each = cache_bytes(cache)
    del cache
    free(device)
    if device.type != "cuda":
        return limit or 2, "as told: no bisection on the CPU"
    available = torch.cuda.mem_get_info(device)[0]
    over = available // each + 1  # the caches alone do not fit
    if limit and limit < over:
        if fits(model, limit, length, mode, device):
            return limit, "--largest-batch"
        over = limit
    lowest, tried, batch = 0, 0, over * 15 // 16
    while over - lowest > max(1, over // 32):
        tried += 1
        batch = max(batch, 1)
        if fits(model, batch, length, mode, device):
            lowest = batch
        else:
            over = batch
        free(device)
        batch = (lowest + over) // 2
    return lowest, f"of {tried} tries; {over} did not fit"


def measure_batch(
    length: int,
    mode: str,
    models: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
    report: harness.Report,
) -> None:
    """Tokens per second at the largest batch. The models run one after the other, because both do not fit."""
    seconds: dict[str, list[float]] = {}
    for name, model in models.items():
        for other in models.values():
            other.to(device if other is model else "cpu")
        free(device)
        batch, how = largest_batch(model, length, mode, args.largest_batch, device)
        free(device)
        if not batch:
            report.note(f"batch of {name}, {mode}: not even one of {length} tokens fits")
            continue
        step, cache = decode_step(model, batch, length, mode)
        held = cache_bytes(cache) / 2**30
        report.note(f"batch of {name}, {mode}: {batch} ({how}), cache {held:.2f} GiB")
        sample = harness.time_in_turns({name: step}, device, args.repeats, args.warmup, False)[name]
        report.add(length, {f"{name}, {mode}, batch": sample}, mode=mode, batch=batch)
        if sample.wall:
            report.note(f"  {batch / sample.median:.1f} tokens/s")
        seconds[name] = [wall / batch for wall in sample.wall]
        del step, cache
        free(device)
    for model in models.values():
        model.to(device)
    report.ratio(length, f"decode throughput {mode}, times dense",
                 harness.Ratio(seconds.get("dense", []), seconds.get("hydra", [])))  # fmt: skip


def modes_of(text: str) -> list[str]:
    """``"eager,graph"`` → ``["eager", "graph"]``."""
    modes = [part for part in text.split(",") if part]
    for mode in modes:
        if mode not in ("eager", "graph", "compiled"):
            raise argparse.ArgumentTypeError(f"{mode!r} is none of eager, graph, compiled")
    return modes


def sizes_or_none(text: str) -> list[int]:
    """As ``--sizes``; ``none``: no such rows."""
    return [] if text == "none" else harness.sizes_of(text)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE)
    for flag, default, what in (
        ("--sizes", "8K,32K,128K,512K", "tokens in the cache for decode at batch 1"),
        ("--prefill-sizes", "8K,32K,128K", "prompt tokens for prefill"),
        ("--batch-sizes", "none", "tokens in the cache for decode at the largest batch"),
    ):
        parser.add_argument(flag, type=sizes_or_none, default=sizes_or_none(default),
                            help=f"{what}, comma-separated, or none (default {default})")  # fmt: skip
    parser.add_argument("--modes", type=modes_of, default=modes_of("eager,graph"),
                        help="of eager, graph, compiled (default eager,graph)")  # fmt: skip
    parser.add_argument("--hf-path", type=path_argument, metavar="DIR",
                        help="measure this export (default: random weights of Qwen3-1.7B's shape)")  # fmt: skip
    parser.add_argument("--dense", type=path_argument, metavar="DIR",
                        help="with --hf-path: the dense model that it is compared with")  # fmt: skip
    parser.add_argument("--layers", type=int, help=f"default {LAYERS}, Qwen3-1.7B's")
    parser.add_argument("--fa-heads", type=int, help=f"of 16 a layer (default {FA_HEADS})")
    parser.add_argument(
        "--largest-batch", type=int, default=0, help="no larger batch (default: memory's)"
    )
    parser.add_argument("--chunk", type=int, default=0, help="prefill chunk (default 0: one call)")
    parser.add_argument("--prefill-repeats", type=int, default=3, help="prefills (default 3)")
    parser.add_argument("--single-operators", action="store_true",
                        help="of hydra: without its fused kernels")  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="bf16 on the CPU too")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script out")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    parser.set_defaults(repeats=16, warmup=3)
    args = checked(parser.parse_args(arguments))
    device = harness.chosen_device(args)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    if args.single_operators:
        decode_hydrahead.triton = None  # type: ignore[assignment]
    models = build(args, device)
    report = harness.Report("decode", args, device)
    config = models["dense"].config
    of_layers = models["hydra"].config.full_attention_heads
    report.note(f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
                f"{sum(map(len, of_layers))} of {len(of_layers) * config.num_attention_heads} heads FA, "
                f"{next(models['dense'].parameters()).dtype}")  # fmt: skip
    for length in args.prefill_sizes:
        measure_prefill(length, models, args, device, report)
    for length in args.sizes:
        for mode in args.modes:
            measure_decode(length, mode, models, args, device, report)
    for length in args.batch_sizes:
        for mode in args.modes:
            measure_batch(length, mode, models, args, device, report)
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
