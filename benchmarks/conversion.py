#!/usr/bin/env python3
"""Converting a checkpoint against loading and re-saving the same safetensors.

A random Qwen3 of about ``--megabytes`` (bf16) is written once. Then these run in turns: safetensors' own
load_file and save_file of all its tensors; the same, with the file hashed and synced to the disk, as in all our
conversions; our conversion to a Megatron checkpoint; our export of this checkpoint to Hugging Face format.
Whole functions are timed in one process and one folder, without imports. ``--profile`` lists the functions that
take most of each conversion's time.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import tempfile
from pathlib import Path

import safetensors.torch
import torch
import transformers

from benchmarks import _harness as harness
from megatron_hydra.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_hydra.errors import HydraError, command
from megatron_hydra.files import sha256_of_file

EXAMPLE = "python -m benchmarks.conversion --megabytes 1000 --repeats 5"


def write_model(folder: Path, megabytes: int, seed: int) -> int:
    """Write a random Qwen3 of about this size; returns its bytes."""
    hidden, vocabulary = 1024, 16384
    per_layer = 2 * (hidden * 3072 * 3 + hidden * 128 * (16 + 8 + 8 + 16))
    layers = max(1, round((megabytes * 1e6 - 2 * hidden * vocabulary) / per_layer))
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3072,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    tensors = {
        name: torch.randn(value.shape, dtype=torch.bfloat16) * 0.02
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(x.numel() * x.element_size() for x in tensors.values())


def check_round_trip(source: Path, exported: Path) -> None:
    """Check that the exported tensors equal the original ones.

    Raises:
        HydraError: a tensor is missing or differs.
    """
    before = safetensors.torch.load_file(source / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for file in exported.glob("*.safetensors"):
        after |= safetensors.torch.load_file(file)
    for name, value in before.items():
        if name not in after or not torch.equal(after[name], value):
            raise HydraError(f"{exported}: {name} did not survive the round trip")


def profiled(peer: harness.Peer, rows: int = 20) -> str:
    """The functions of one call that take the most time themselves."""
    profiler = cProfile.Profile()
    profiler.runcall(peer)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(rows)
    return text.getvalue()


@command
def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, EXAMPLE)
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights (default 1000)")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.set_defaults(repeats=5, warmup=1)
    args = parser.parse_args(arguments)
    device = harness.cpu_only(args, "conversion")
    torch.set_num_threads(args.threads)
    ratios = {
        f"time of {ours} / {theirs}": (ours, theirs)
        for theirs in ("load and re-save", "load, re-save, hash, sync")
        for ours in ("HF -> Megatron", "Megatron -> HF")
    }
    report = harness.Report("conversion", args, device, ratios, unit="megabytes")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source, stored, exported = (folder / part for part in ("source", "stored", "exported"))
        source.mkdir()
        size = write_model(source, args.megabytes, args.seed)
        report.note(f"{size / 1e9:.2f} GB of bf16 weights, {torch.get_num_threads()} threads")

        def resave() -> None:
            tensors = safetensors.torch.load_file(source / "model.safetensors")
            safetensors.torch.save_file(tensors, folder / "copy.safetensors")

        def resave_durably() -> None:
            resave()
            with open(folder / "copy.safetensors", "rb") as stream:
                os.fsync(stream.fileno())
            sha256_of_file(folder / "copy.safetensors")

        peers = {
            "load and re-save": resave,
            "load, re-save, hash, sync": resave_durably,
            "HF -> Megatron": lambda: hf_to_megatron(source, stored, force=True),
            "Megatron -> HF": lambda: megatron_to_hf(stored, exported, force=True),
        }
        report.measure(args.megabytes, peers, memory=False)
        check_round_trip(source, exported)
        if args.profile:
            for name in ("HF -> Megatron", "Megatron -> HF"):
                report.note(f"{name}\n{profiled(peers[name])}")
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
