"""Turn text into Megatron ``.bin/.idx`` files: ``python data_prep/tokenize.py --help``."""

from __future__ import annotations

import os
import sys

# Python puts the folder of a script first on the path. This folder has a tokenize.py and an inspect.py,
# which would replace the modules of the standard library with these names.
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path = [path for path in sys.path if os.path.realpath(path) != _HERE]

import argparse  # noqa: E402

from megatron_hydra.arguments import command_parser, path_text, real, whole  # noqa: E402
from megatron_hydra.data.corpus import CorpusConfig  # noqa: E402
from megatron_hydra.data.preparation_plan import plan_preparation  # noqa: E402
from megatron_hydra.data.tokenization import tokenize  # noqa: E402
from megatron_hydra.data.tokenize_config import TokenizeConfig  # noqa: E402
from megatron_hydra.errors import HydraError, command  # noqa: E402
from megatron_hydra.options import add_options, from_arguments  # noqa: E402

DESCRIPTION = """\
Tokenise a corpus into OUTPUT.bin and .idx (Megatron's IndexedDataset) and .json (manifest).

The same command resumes a run that was stopped in any way. The result is the same as without the
stop. The run fails if more rows are unreadable than --max-bad-rows allows.

--plan estimates CPU time, disk space and memory from a sample of the corpus, and writes nothing.
"""
EXAMPLES = """\
examples:
  # what 15 billion tokens like these take with 16 workers; nothing is written
  python data_prep/tokenize.py --input 'books/*.jsonl' --tokenizer Qwen/Qwen3-1.7B \\
      --output data/books --workers 16 --plan 15e9

  # local files
  python data_prep/tokenize.py --input 'books/*.jsonl' --tokenizer Qwen/Qwen3-1.7B \\
      --output data/books --workers 16

  # a Hub data set, read file by file without keeping it; one of 8 parts, for a job array
  python data_prep/tokenize.py --dataset HuggingFaceFW/fineweb-edu --config sample-10BT \\
      --revision <commit> --streaming --tokenizer Qwen/Qwen3-1.7B --output data/fineweb \\
      --shard $SLURM_ARRAY_TASK_ID/8
  python data_prep/merge.py --shards data/fineweb

  # conversations: loss on the assistant's turns only
  python data_prep/tokenize.py --input chat.jsonl --chat --column messages \\
      --tokenizer Qwen/Qwen3-1.7B --output data/chat
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(description=DESCRIPTION, epilog=EXAMPLES)
    where = parser.add_argument_group("input").add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--input", type=path_text, nargs="+", metavar="PATH", help="files, folders or patterns"
    )
    where.add_argument(
        "--dataset",
        type=path_text,
        nargs="+",
        metavar="NAME",
        help="Hub data set (read with datasets.load_dataset)",
    )
    groups = add_options(parser, CorpusConfig)
    groups = add_options(parser, TokenizeConfig, groups=groups)
    groups["tokens"].add_argument(
        "--tokenizer", type=path_text, required=True, metavar="NAME", help="folder or Hub name"
    )
    run = groups["run"]
    run.add_argument(
        "--output",
        type=path_text,
        required=True,
        metavar="PREFIX",
        help="path of the output files, without suffix",
    )
    run.add_argument(
        "--shard", default="0/1", metavar="I/N", help="prepare only shard I (from 0) of N"
    )
    run.add_argument(
        "--unit-size",
        type=real(0, above=True),
        default=8,
        metavar="MIB",
        help="size of one unit of work (default: 8)",
    )
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--plan",
        type=whole(0),
        nargs="?",
        const=0,
        metavar="TOKENS",
        help="estimate CPU hours, disk space and memory for this many tokens with --workers, and stop "
        "(without a number: for the whole input)",
    )
    plan.add_argument(
        "--plan-seconds",
        type=real(0, above=True),
        default=20,
        metavar="S",
        help="time to spend on the sample for --plan (default: 20)",
    )
    return parser.parse_args(arguments)


def _config(given: argparse.Namespace) -> TokenizeConfig:
    try:
        index, count = (int(number) for number in given.shard.split("/"))
    except ValueError as error:
        raise HydraError(f"--shard {given.shard} is not of the form 3/16") from error
    corpus = from_arguments(
        CorpusConfig,
        given,
        inputs=tuple(given.dataset or given.input),
        hub=given.dataset is not None,
        unit_bytes=max(1, int(given.unit_size * (1 << 20))),
    )
    return from_arguments(
        TokenizeConfig,
        given,
        corpus=corpus,
        output=given.output,
        tokenizer=given.tokenizer,
        shard=(index, count),
    )


@command
def main(arguments: list[str] | None = None) -> int:
    try:
        given = parse(arguments)
        config = _config(given)
        if given.plan is None:
            tokenize(config)
        else:
            plan_preparation(config, given.plan, given.plan_seconds)
    except KeyboardInterrupt:
        raise HydraError("interrupted; the same command resumes") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
