"""``python -m megatron_hydra.train``: run one stage of the transfer, or a pretraining."""

from __future__ import annotations

import argparse
import logging

from megatron_hydra.arguments import command_parser, path_text
from megatron_hydra.config.loading import load_run_config, to_yaml
from megatron_hydra.environment import environment_number
from megatron_hydra.errors import command
from megatron_hydra.startup import process_is_one_run

_EPILOG = """examples:
  python -m megatron_hydra.train --config configs/tiny/finetune.yaml output=runs/finetune
  torchrun --nproc-per-node 8 -m megatron_hydra.train --config configs/qwen3_1.7b/ours/distill.yaml \\
      --config configs/qwen3_1.7b/layouts/8_gpus_short.yaml parallel.tensor=2
  python -m megatron_hydra.train --config configs/tiny/finetune.yaml --dry-run

A run resumes by itself when started again with the same output. Exit status: 0 done, 2 bad input,
85 stopped by SIGTERM or SIGUSR1 after saving (the same command resumes).
"""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(
        prog="python -m megatron_hydra.train",
        description="Train a model: the config's verb is pretrain, align, distill or finetune.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--config",
        type=path_text,
        action="append",
        required=True,
        help="YAML file; repeatable; later files override earlier ones key by key",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and the parameters of each rank, then exit",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        help="with --dry-run: the number of processes to plan for (default: this launch's)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="config overrides; values are YAML (data.blend.0.weight=2 reaches into lists)",
    )
    return parser.parse_intermixed_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    options = _parse(arguments)
    config = load_run_config(options.config, options.overrides)
    is_main = environment_number("RANK", 0) == 0
    if options.dry_run:
        from megatron_hydra.training.dry_run import describe_layout

        if is_main:
            print(to_yaml(config), flush=True)
            print(describe_layout(config, options.world_size), flush=True)
        return 0
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    process_is_one_run()
    from megatron_hydra.training.loop import run_training

    return run_training(config)


if __name__ == "__main__":
    raise SystemExit(main())
