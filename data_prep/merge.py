"""Join shards into one pair of files: ``python data_prep/merge.py --help``."""

from __future__ import annotations

import os
import sys

# Python puts the folder of a script first on the path. This folder has a tokenize.py and an inspect.py,
# which would replace the modules of the standard library with these names.
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path = [path for path in sys.path if os.path.realpath(path) != _HERE]


from megatron_hydra.arguments import command_parser, path_text  # noqa: E402
from megatron_hydra.data.merging import find_shards, merge  # noqa: E402
from megatron_hydra.errors import command  # noqa: E402

DESCRIPTION = """\
Concatenate .bin/.idx pairs in order, and verify the SHA-256 sum of every input.

Merged shards of one corpus (data_prep/tokenize.py --shard) are byte for byte the same files as from
one unsharded run. Shards made with different inputs or options are rejected. All inputs must have
the same tokenizer.
"""
EXAMPLES = """\
examples:
  python data_prep/merge.py --shards data/fineweb     # all data/fineweb-*-of-* -> data/fineweb
  python data_prep/merge.py --input data/books data/papers --output data/long
"""


@command
def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(description=DESCRIPTION, epilog=EXAMPLES)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--shards", type=path_text, metavar="PREFIX", help="the --output of the sharded runs"
    )
    inputs.add_argument(
        "--input", type=path_text, nargs="+", metavar="PREFIX", help="pairs to join, in order"
    )
    parser.add_argument(
        "--output", type=path_text, metavar="PREFIX", help="default with --shards: the same PREFIX"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    given = parser.parse_args(arguments)
    if given.input and not given.output:
        parser.error("--input needs --output")
    prefixes = given.input or find_shards(given.shards)
    output = given.output or given.shards
    manifest = merge(prefixes, output, shards=given.shards is not None, force=given.force)
    print(
        f"{output}: {len(prefixes)} pairs, {manifest.counts['documents']:,} documents, "
        f"{manifest.counts['tokens']:,} tokens"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
