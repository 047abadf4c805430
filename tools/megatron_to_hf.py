#!/usr/bin/env python
"""Convert a Megatron checkpoint to a Hugging Face folder. See --help."""

from __future__ import annotations

import argparse
import sys

from megatron_hydra.arguments import command_parser, path_text, real
from megatron_hydra.errors import HydraError, command

DESCRIPTION = """\
Convert a Megatron checkpoint to a Hugging Face folder (safetensors, config, tokenizer files).

A dense checkpoint becomes a plain Qwen3, Qwen2 or Llama folder, with the original weights bit for bit.
A hybrid becomes a HydraHeadForCausalLM folder with its modelling code. It loads without Megatron:

    AutoModelForCausalLM.from_pretrained(P, trust_remote_code=True)

The output folder is written completely or not at all. The checkpoint's manifest is verified first.
"""

EXAMPLES = """\
examples:
  # the latest checkpoint of a run
  python tools/megatron_to_hf.py --checkpoint runs/finetune/checkpoints --output exports/hydra
  # one checkpoint, in bf16; verify the output
  python tools/megatron_to_hf.py --checkpoint runs/finetune/checkpoints/step_00000500 \\
      --output exports/hydra-500 --dtype bf16 --verify
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser(description=DESCRIPTION, epilog=EXAMPLES)
    p.add_argument(
        "--checkpoint",
        type=path_text,
        required=True,
        metavar="D",
        help="checkpoint folder, or the checkpoints folder of a run",
    )
    p.add_argument(
        "--output", type=path_text, required=True, metavar="P", help="Hugging Face folder to write"
    )
    p.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="dtype of the weights (default: the checkpoint's)"
    )
    p.add_argument(
        "--max-shard-size",
        type=real(0),
        default=5.0,
        metavar="GB",
        help="largest size of one weight file (default 5)",
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="verify the output before it is renamed to P: read it back and compare every tensor; for a "
        "small model, also compare fp32 logits of the Megatron model and of the export",
    )
    p.add_argument("--force", action="store_true", help="replace an existing output")
    p.add_argument("--quiet", action="store_true", help="show no progress bars")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.max_shard_size <= 0:
        raise HydraError(f"--max-shard-size is {arguments.max_shard_size}: it must be above 0")
    from megatron_hydra.conversion import convert
    from megatron_hydra.hf_loading import COMPUTED_DTYPES

    model = convert.megatron_to_hf(
        arguments.checkpoint,
        arguments.output,
        dtype=COMPUTED_DTYPES.get(arguments.dtype),
        max_shard_bytes=int(arguments.max_shard_size * 10**9),
        verify=arguments.verify,
        force=arguments.force,
        progress=not arguments.quiet,
    )
    architecture = "HydraHeadForCausalLM" if model.is_hybrid else model.family
    print(f"{arguments.output}: {architecture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
