"""Build packing indices before training: ``python data_prep/pack.py --help``."""

from __future__ import annotations

import os
import sys

# Python puts the folder of a script first on the path. This folder has a tokenize.py and an inspect.py,
# which would replace the modules of the standard library with these names.
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path = [path for path in sys.path if os.path.realpath(path) != _HERE]

import argparse  # noqa: E402
from typing import Any  # noqa: E402

from megatron_hydra.arguments import command_parser  # noqa: E402
from megatron_hydra.config.run import DataConfig, SourceConfig  # noqa: E402
from megatron_hydra.data.data_options import add_data_options, data_sections  # noqa: E402
from megatron_hydra.data.held_out import Side  # noqa: E402
from megatron_hydra.data.indexed import IndexedDocuments  # noqa: E402
from megatron_hydra.data.pack_index import pack_index  # noqa: E402
from megatron_hydra.data.packing import upsample_factors  # noqa: E402
from megatron_hydra.data.validation import VALIDATION_SEED  # noqa: E402
from megatron_hydra.errors import command  # noqa: E402

DESCRIPTION = """\
Pack documents into sequences, once, and report what that costs. Training finds the index by the
fingerprint of data and options; without this command it builds the same index at its start.
"""
EXAMPLES = """\
examples:
  python data_prep/pack.py --config configs/data/stage2_distill.yaml
  python data_prep/pack.py --input data/pg19 --sequence-length 131072 \\
      --upsample 0=0 32768=1 131072=3
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(description=DESCRIPTION, epilog=EXAMPLES)
    add_data_options(parser)
    return parser.parse_args(arguments)


def _line(report: dict[str, Any]) -> str:
    documents = report.get("documents_of_side", report["documents"])
    text = (
        f"{documents:,} documents, {report['tokens_per_epoch']:,} tokens per epoch in "
        f"{report['packs']:,} packs; waste {report['waste']:.2%}; "
        f"{report['documents_above_length']:,} longer than a pack"
    )
    if "documents_repeated" in report:
        text += (
            f"; upsampling repeats {report['documents_repeated']:,} and drops "
            f"{report['documents_dropped']:,}"
        )
    return text


def _pack(part: SourceConfig, data: DataConfig, seed: int, side: Side | None) -> None:
    _, description = pack_index(
        IndexedDocuments(part.path),
        sequence_length=data.sequence_length,
        packing=data.packing,
        seed=seed,
        upsampling=upsample_factors(part.upsample, part.path),
        cache_dir=data.cache_dir,
        side=side,
    )
    name = "held out: " if side is not None and side.is_validation else ""
    print(f"{part.path}: {name}{_line(description['report'])}", flush=True)


@command
def main(arguments: list[str] | None = None) -> int:
    data, _ = data_sections(parse(arguments))
    for part in data.blend:
        if part.kind != "indexed":
            continue
        if not data.held_out:
            _pack(part, data, data.seed, None)
            continue
        _pack(part, data, data.seed, Side(data.held_out, is_validation=False))
        _pack(part, data, VALIDATION_SEED, Side(data.held_out, is_validation=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
