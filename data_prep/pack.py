"""Build packing indices before training: ``python data_prep/pack.py --help``."""

from __future__ import annotations

import os
import sys

# This folder holds a tokenize.py and an inspect.py; first on the path, where Python puts a script's
# folder, they would replace the standard library's modules of these names.
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path = [path for path in sys.path if os.path.realpath(path) != _HERE]

import argparse  # noqa: E402
from typing import Any  # noqa: E402

from megatron_hydra.config.run import DataConfig, SourceConfig  # noqa: E402
from megatron_hydra.data.indexed import IndexedDocuments  # noqa: E402
from megatron_hydra.data.inspection import load_data_sections  # noqa: E402
from megatron_hydra.data.pack_index import pack_index  # noqa: E402
from megatron_hydra.data.packing import upsample_factors  # noqa: E402
from megatron_hydra.errors import HydraError, command  # noqa: E402

DESCRIPTION = """\
Pack documents into sequences, once, and report what that costs. Training finds the index by the
fingerprint of data and options; without this command it builds the same index at its start.
"""
EXAMPLES = """\
examples:
  python data_prep/pack.py --config configs/data/stage2_distill.yaml
  python data_prep/pack.py --input data/pg19 --sequence-length 131072 --packing split_long \\
      --upsample 0=0 32768=1 131072=3
"""


def parse(arguments: list[str] | None = None) -> DataConfig:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="YAML", help="pack every indexed part of its data.blend")
    what.add_argument("--input", nargs="+", metavar="PREFIX", help="pack these .bin/.idx pairs")
    parser.add_argument("--sequence-length", type=int, default=4096, metavar="S")
    parser.add_argument(
        "--packing",
        choices=["best_fit", "split_long", "concat_chunk"],
        default="best_fit",
        help="best_fit: documents stay whole; split_long: longer ones are cut into pieces of S; "
        "concat_chunk: laid end to end and cut every S tokens",
    )
    parser.add_argument("--seed", type=int, default=DataConfig().seed, help="data.seed of the run")
    parser.add_argument(
        "--upsample",
        nargs="+",
        default=[],
        metavar="LENGTH=FACTOR",
        help="documents of at least LENGTH tokens appear FACTOR times per epoch (0: not at all)",
    )
    parser.add_argument("--cache-dir", default="", help="default: .packs beside the data")
    given = parser.parse_args(arguments)
    if given.config:
        return load_data_sections(given.config).data
    upsample = dict(_bucket(text) for text in given.upsample)
    return DataConfig(
        blend=tuple(SourceConfig(path=path, upsample=upsample) for path in given.input),
        sequence_length=given.sequence_length,
        packing=given.packing,
        seed=given.seed,
        cache_dir=given.cache_dir,
    )


def _bucket(text: str) -> tuple[int, float]:
    try:
        length, factor = text.split("=")
        return int(length), float(factor)
    except ValueError as error:
        raise HydraError(f"--upsample {text} is not of the form 32768=2") from error


def _line(report: dict[str, Any]) -> str:
    text = (
        f"{report['documents']:,} documents, {report['tokens_per_epoch']:,} tokens per epoch in "
        f"{report['packs']:,} packs; waste {report['waste']:.2%}; "
        f"{report['documents_above_length']:,} longer than a pack"
    )
    if "documents_repeated" in report:
        text += (
            f"; upsampling repeats {report['documents_repeated']:,} and drops "
            f"{report['documents_dropped']:,}"
        )
    return text


@command
def main(arguments: list[str] | None = None) -> int:
    data = parse(arguments)
    for part in data.blend:
        if part.kind != "indexed":
            continue
        _, description = pack_index(
            IndexedDocuments(part.path),
            sequence_length=data.sequence_length,
            packing=data.packing,
            seed=data.seed,
            upsampling=upsample_factors(part.upsample, part.path),
            cache_dir=data.cache_dir,
        )
        print(f"{part.path}: {_line(description['report'])}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
