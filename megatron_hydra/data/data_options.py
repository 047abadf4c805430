"""Options that ``data_prep/pack.py`` and ``inspect.py`` share: blend and packing."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megatron_hydra.arguments import path_text, seed_argument, whole
from megatron_hydra.config.loading import from_dict, read_config
from megatron_hydra.config.run import BatchConfig, DataConfig, RunConfig, SourceConfig
from megatron_hydra.config.validate import check_seeds
from megatron_hydra.data.packing import Packing
from megatron_hydra.errors import HydraError

# Default packing of --input. Unlike DataConfig's default it accepts long documents.
_INPUT_PACKING: Packing = "split_long"


def load_data_sections(path: str) -> RunConfig:
    """The ``data`` and ``batch`` sections of a YAML file; all other sections have their defaults.

    Raises:
        HydraError: the file cannot be read, or a key is unknown.
    """
    config = from_dict(RunConfig, read_config(path), source=path)
    check_seeds(config)
    return config


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`data_sections` reads."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        type=path_text,
        metavar="YAML",
        help="config with a blend: a run's config, or one of configs/data",
    )
    what.add_argument(
        "--input", type=path_text, nargs="+", metavar="PREFIX", help=".bin/.idx pairs to read"
    )
    given = parser.add_argument_group("packing", "options here override --config")
    given.add_argument(
        "--sequence-length",
        type=whole(1),
        metavar="S",
        help=f"tokens per sequence; default with --input: {DataConfig().sequence_length}",
    )
    given.add_argument(
        "--packing",
        choices=["best_fit", "split_long", "concat_chunk"],
        help="best_fit: documents stay whole; split_long: longer ones are cut into pieces of S; "
        f"concat_chunk: documents are joined and cut every S tokens. Default with --input: "
        f"{_INPUT_PACKING}",
    )
    given.add_argument("--seed", type=seed_argument, help="data.seed of the run")
    given.add_argument(
        "--upsample",
        nargs="+",
        metavar="LENGTH=FACTOR",
        help="use documents of at least LENGTH tokens FACTOR times per epoch (0: skip them)",
    )
    given.add_argument(
        "--cache-dir",
        type=path_text,
        metavar="FOLDER",
        help="folder of the packing index (default: .packs beside the data)",
    )


def data_sections(given: argparse.Namespace) -> tuple[DataConfig, BatchConfig]:
    """Make the sections from the options: the config's sections, or the inputs with equal weights.

    Raises:
        HydraError: the config cannot be read, or an option is malformed.
    """
    if given.config is not None:
        run = load_data_sections(given.config)
        data, batch = run.data, run.batch
    else:
        blend = tuple(SourceConfig(path=path) for path in given.input)
        data, batch = DataConfig(blend=blend, packing=_INPUT_PACKING), BatchConfig(1, 1)
    names = ("sequence_length", "packing", "seed", "cache_dir")
    changes: dict[str, Any] = {name: getattr(given, name) for name in names}
    if given.upsample is not None:
        buckets = dict(_bucket(text) for text in given.upsample)
        changes["blend"] = tuple(
            dataclasses.replace(part, upsample=buckets) if part.kind == "indexed" else part
            for part in data.blend
        )
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(data, **changes), batch


def _bucket(text: str) -> tuple[int, float]:
    try:
        length, factor = text.split("=")
        return int(length), float(factor)
    except ValueError as error:
        raise HydraError(f"--upsample {text} is not of the form 32768=2") from error
