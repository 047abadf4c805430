"""``python -m megatron_hydra.warm``: compile the kernels of a run before it is started."""

from __future__ import annotations

import argparse
import logging

from megatron_hydra.arguments import command_parser, path_text
from megatron_hydra.config.loading import load_run_config
from megatron_hydra.errors import HydraError, command

DESCRIPTION = """\
Compile the GPU kernels that a run will call, tune them, and compare them with their plain twins. Training
does this itself when it starts, once a node; this command does it ahead, on one GPU of the same kind, so
that a large job does not begin with minutes of compiling. It takes the run's own command line. Results are
kept in the compilers' caches (~/.triton, ~/.tilelang, torch's inductor) and can be packed and copied with
them. Only the checkpoints that the config names are read, and no weights of them.
"""

EPILOG = """\
examples:
  python -m megatron_hydra.warm --config configs/qwen3_1.7b/ours/distill.yaml \\
      --config configs/qwen3_1.7b/layouts/8_gpus_short.yaml
  launch/local.sh --warm configs/qwen3_1.7b/ours/align.yaml configs/qwen3_1.7b/layouts/8_gpus_short.yaml

What the compilers say goes to compile.log in the run's output. Exit status: 0 all kernels are ready (or there
is no GPU, so that there is nothing to compile), 2 bad input, a wrong kernel, or one that cannot be compiled,
85 stopped by SIGTERM or SIGUSR1 (start it again: what is compiled stays).
"""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(
        prog="python -m megatron_hydra.warm", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "--config",
        type=path_text,
        action="append",
        required=True,
        help="YAML file of the run; repeatable, as for megatron_hydra.train",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config")
    return parser.parse_intermixed_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    options = _parse(arguments)
    config = load_run_config(options.config, options.overrides)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    from megatron_hydra.parallel import platform

    if not platform.device_count():
        print("this machine has no GPU, so no kernel is compiled")
        return 0
    from megatron_hydra.stopping import StopRequest
    from megatron_hydra.training.start import kernels_of
    from megatron_hydra.training.warm_up import warning_of

    with StopRequest():
        result = kernels_of(config)
    if not result.ready:
        raise HydraError(warning_of(result, config.output))
    if result.compiled:
        print(f"all kernels of this run are ready: compiled in {result.seconds:.0f} s")
    else:
        print("all kernels of this run were ready, for this card and these versions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
