#!/usr/bin/env python
"""Convert a Hugging Face model to a Megatron checkpoint. See --help."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_hydra.arguments import command_parser, path_text, seed_argument
from megatron_hydra.config.student import STUDENT, StudentStart
from megatron_hydra.errors import HydraError, command
from megatron_hydra.options import add_options, changed, from_arguments

if TYPE_CHECKING:
    from megatron_hydra.conversion.convert import StudentOptions

DESCRIPTION = """\
Convert a Hugging Face model (Qwen3, Qwen2, Llama, an exported HydraHead) to a Megatron checkpoint.

Without --head-map: convert the model bit for bit. This is the teacher of stages 1 and 2.
With --head-map:    make a HydraHead student. Its weights are copied from the dense model. Gated DeltaNet
                    heads get copies of their key-value heads. Gates start as constants. The scale of
                    every head is measured on a few thousand tokens.
With --set mixer=token or mixer=parallel: make a baseline that runs both branches in every head (no map).

The output folder is written completely or not at all. If a tensor is missing, unknown or has the wrong
shape, the error names it and nothing is written.
"""

EXAMPLES = """\
examples:
  # the teacher
  python tools/hf_to_megatron.py --hf-path Qwen/Qwen3-1.7B --output checkpoints/teacher
  # the student, at the ratio of its head map
  python tools/hf_to_megatron.py --hf-path Qwen/Qwen3-1.7B --output checkpoints/student \\
      --head-map head_maps/qwen3-1.7b-7to1.json
  # an ablation: gated fusion, no short convolution
  python tools/hf_to_megatron.py --hf-path my_model --output checkpoints/gated \\
      --head-map map.json --set fusion=gated --set short_conv=false
  # a baseline: softmax within 1024 tokens and a linear state beyond them, in every head
  python tools/hf_to_megatron.py --hf-path my_model --output checkpoints/token_wise \
      --set mixer=token --set window=1024
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser(description=DESCRIPTION, epilog=EXAMPLES)
    p.add_argument(
        "--hf-path", type=path_text, required=True, metavar="P", help="model folder or Hub name"
    )
    p.add_argument(
        "--output", type=path_text, required=True, metavar="D", help="checkpoint folder to write"
    )
    p.add_argument("--revision", default="", metavar="R", help="Hub revision (branch, tag, commit)")
    p.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="dtype of the weights (default: as stored)"
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="verify the output before it is renamed to D: read it back and compare every tensor; for a "
        "small model that is not a new student, also compare fp32 logits with transformers",
    )
    p.add_argument("--force", action="store_true", help="replace an existing output")
    p.add_argument("--quiet", action="store_true", help="show no progress bars")
    student = p.add_argument_group(STUDENT)
    student.add_argument(
        "--head-map", type=path_text, metavar="MAP", help="head map from tools/select_heads.py"
    )
    student.add_argument(
        "--hydra-config",
        metavar="YAML",
        help="YAML file with layer options (keys of HydraConfig)",
    )
    student.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one layer option, e.g. fusion=gated; repeatable; overrides --hydra-config",
    )
    student.add_argument(
        "--seed",
        type=seed_argument,
        default=0,
        help="seed of the order of decays over heads (default 0)",
    )
    add_options(p, StudentStart, groups={STUDENT: student})
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = parser().parse_args(argv)
    flags = changed(StudentStart, from_arguments(StudentStart, arguments))
    flags += [
        flag
        for flag in ("--hydra-config", "--set")
        if getattr(arguments, flag[2:].replace("-", "_"))
    ]
    student = student_options(arguments) if arguments.head_map or flags else None
    if student and not student.head_map and not student.hydra.mixes_in_every_head:
        raise HydraError(
            f"{flags[0]} says how a student is made: it needs --head-map (or, for a baseline that runs "
            "both in every head, --set mixer=token or mixer=parallel)"
        )
    from megatron_hydra.conversion import convert
    from megatron_hydra.hf_loading import COMPUTED_DTYPES

    model = convert.hf_to_megatron(
        arguments.hf_path,
        arguments.output,
        student,
        revision=arguments.revision,
        dtype=COMPUTED_DTYPES.get(arguments.dtype),
        verify=arguments.verify,
        force=arguments.force,
        progress=not arguments.quiet,
    )
    kind = "dense model"
    if model.is_hybrid:
        chosen = sum(len(heads) for heads in model.full_attention_heads or ())
        kind = f"HydraHead, {chosen} of {model.num_layers * model.num_query_heads} heads FA"
        if model.switches.mixes_in_every_head:
            kind = f"both FA and GDN in every head (mixer={model.switches.mixer})"
    print(f"{arguments.output}: {model.family}, {kind}", file=sys.stderr)
    return 0


def student_options(arguments: argparse.Namespace) -> StudentOptions:
    """The student's options from the command line."""
    from megatron_hydra.config.loading import apply_overrides, from_dict, parse_yaml
    from megatron_hydra.config.model import HydraConfig
    from megatron_hydra.conversion.convert import StudentOptions

    hydra = HydraConfig()
    if arguments.hydra_config:
        try:
            with open(arguments.hydra_config) as file:
                body = parse_yaml(file.read(), arguments.hydra_config)
        except OSError as error:
            raise HydraError(f"--hydra-config {arguments.hydra_config}: {error}") from None
        hydra = from_dict(HydraConfig, body or {}, arguments.hydra_config)
    return from_arguments(
        StudentOptions,
        arguments,
        head_map=arguments.head_map,
        hydra=apply_overrides(hydra, arguments.set),
        seed=arguments.seed,
    )


if __name__ == "__main__":
    raise SystemExit(main())
