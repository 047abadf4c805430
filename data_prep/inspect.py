"""Look at prepared data: ``python data_prep/inspect.py --help``."""

from __future__ import annotations

import os
import sys

# Python puts the folder of a script first on the path. This folder has a tokenize.py and an inspect.py,
# which would replace the modules of the standard library with these names.
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path = [path for path in sys.path if os.path.realpath(path) != _HERE]

import argparse  # noqa: E402
import dataclasses  # noqa: E402
from typing import Any  # noqa: E402

from megatron_hydra.arguments import command_parser, path_text, whole  # noqa: E402
from megatron_hydra.config.run import DataConfig  # noqa: E402
from megatron_hydra.data.data_options import add_data_options, data_sections  # noqa: E402
from megatron_hydra.data.indexed import IndexedDocuments  # noqa: E402
from megatron_hydra.data.inspection import (  # noqa: E402
    describe_learning,
    describe_lengths,
    find_duplicates,
    learned_in_packs,
    plot_lengths,
    show_pack,
)
from megatron_hydra.data.sources import IndexedSource  # noqa: E402
from megatron_hydra.data.stream import PackedStream  # noqa: E402
from megatron_hydra.data.tokenizer import vocabulary_size  # noqa: E402
from megatron_hydra.errors import HydraError, command  # noqa: E402
from megatron_hydra.files import sha256_of_file  # noqa: E402
from megatron_hydra.hf_loading import load_tokenizer  # noqa: E402

DESCRIPTION = """\
Show the data that training will read: decoded packed sequences with document boundaries and loss
mask; lengths, padding waste and duplicates; and how often a run reads each source of its blend.
"""
EXAMPLES = """\
examples:
  python data_prep/inspect.py --input data/fineweb --tokenizer Qwen/Qwen3-1.7B --samples 2 \\
      --histogram lengths.png --duplicates
  python data_prep/inspect.py --config configs/data/stage3_finetune.yaml --steps 1000
  python data_prep/inspect.py --input data/fineweb --verify       # full SHA-256 check
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(description=DESCRIPTION, epilog=EXAMPLES)
    add_data_options(parser)
    parser.add_argument("--tokenizer", type=path_text, metavar="NAME",
                        help="default: data.tokenizer, or the tokenizer in the manifest")  # fmt: skip
    parser.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's code")
    parser.add_argument(
        "--samples", type=whole(0), default=1, metavar="N", help="number of packs to show"
    )
    parser.add_argument(
        "--first", type=whole(0), default=0, metavar="N", help="index of the first pack to show"
    )
    parser.add_argument(
        "--characters", type=whole(0), default=400, help="characters to show of each document"
    )
    parser.add_argument(
        "--steps", type=whole(0), default=0, help="report how much this many steps read"
    )
    parser.add_argument("--histogram", type=path_text, metavar="PNG", help="write a histogram of "
                        "lengths; for several sources, to PNG-0, PNG-1, ...")  # fmt: skip
    parser.add_argument("--duplicates", action="store_true", help="count exact duplicates")
    parser.add_argument(
        "--most",
        type=whole(1),
        default=10_000_000,
        help="largest number of documents and packs to compare (10^7)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="verify SHA-256 sums against the manifest"
    )
    return parser.parse_args(arguments)


def _load_tokenizer(data: DataConfig, trust_remote_code: bool) -> Any:
    """The tokenizer of the config, or else the tokenizer in a manifest, at its revision."""
    if data.tokenizer:
        return load_tokenizer(data.tokenizer, trust_remote_code=trust_remote_code)
    for part in data.blend:
        manifest = IndexedDocuments(part.path).manifest if part.kind == "indexed" else None
        if manifest is not None:
            name, revision = manifest.tokenizer["name"], manifest.tokenizer.get("revision")
            return load_tokenizer(name, revision, trust_remote_code)
    raise HydraError("no manifest names a tokenizer; give --tokenizer")


def _verify(prefix: str) -> None:
    manifest = IndexedDocuments(prefix).manifest
    if manifest is None:
        raise HydraError(
            f"{prefix}.json does not exist: without a manifest, nothing can be verified"
        )
    for suffix, record in ((".bin", manifest.bin), (".idx", manifest.idx)):
        if sha256_of_file(prefix + suffix) != record.sha256:
            raise HydraError(f"{prefix + suffix} is damaged: its SHA-256 is not {record.sha256}")
    print(f"{prefix}: SHA-256 of .bin and .idx match the manifest")


def _picture(path: str, number: int, sources: int) -> str:
    """Path of the histogram of one of several parts."""
    stem, suffix = os.path.splitext(path)
    return path if sources == 1 else f"{stem}-{number}{suffix}"


def _describe_source(
    source: IndexedSource, given: argparse.Namespace, length: int, picture: str
) -> None:
    _, lengths = source.documents.document_spans()
    report = source.description["report"]
    print(
        f"{source.name}: {report['documents']:,} documents, {source.documents.num_tokens:,} tokens"
    )
    print(f"  {describe_lengths(lengths)}")
    print(f"  {report['packs']:,} packs per epoch, padding waste {report['waste']:.2%}")
    learned = learned_in_packs(source, given.most)
    print(f"  {describe_learning(learned, report['packs'])}")
    if given.duplicates:
        count, tokens, pairs = find_duplicates(source.documents, given.most)
        shown = ", ".join(f"{later} = {earlier}" for earlier, later in pairs)
        cut = report["documents"] > given.most
        among = f" (among the first {given.most:,} only: --most)" if cut else ""
        print(
            f"  duplicates{among}: {count:,} documents, {tokens:,} tokens"
            f"{': ' + shown if shown else ''}"
        )
    if given.histogram:
        plot_lengths(lengths, length, source.name, picture)
        print(f"  histogram: {picture}")
    if given.verify:
        _verify(source.name)


@command
def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    data, batch = data_sections(given)
    if given.tokenizer:
        data = dataclasses.replace(data, tokenizer=given.tokenizer)
    tokenizer = _load_tokenizer(data, given.trust_remote_code)
    size = vocabulary_size(tokenizer)
    stream = PackedStream(data, batch, dp_rank=0, dp_size=1, vocab_size=size, tokenizer=tokenizer)
    indexed = [source for source in stream.sources if isinstance(source, IndexedSource)]
    for number, source in enumerate(indexed):
        picture = _picture(given.histogram or "", number, len(indexed))
        _describe_source(source, given, data.sequence_length, picture)
    if given.steps:
        print(f"{given.steps:,} steps of {stream.tokens_per_step:,} tokens read:")
        for name, numbers in stream.plan(given.steps).items():
            print(f"  {name}: {numbers['tokens']:,.0f} tokens, {numbers['epochs']:.2f} epochs")
    for sample in range(given.first, given.first + given.samples):
        draw = stream.draw(sample)
        print(f"\n=== sample {sample}: {stream.sources[draw.source].name}, number {draw.index} ===")
        documents = stream.documents(sample)
        print(show_pack(documents, data.sequence_length, tokenizer, given.characters))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
