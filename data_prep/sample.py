"""Generate training text with a model: ``python data_prep/sample.py --help``."""

from __future__ import annotations

import os
import sys

# Python puts the folder of a script first on the path. This folder has a tokenize.py and an inspect.py,
# which would replace the modules of the standard library with these names.
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path = [path for path in sys.path if os.path.realpath(path) != _HERE]

import argparse  # noqa: E402

from megatron_hydra.arguments import command_parser, path_text  # noqa: E402
from megatron_hydra.data.corpus import CorpusConfig  # noqa: E402
from megatron_hydra.data.generation import Generation, GenerationSettings  # noqa: E402
from megatron_hydra.errors import HydraError, command  # noqa: E402
from megatron_hydra.hf_loading import DTYPES, find_tokenizer, load_hf_model  # noqa: E402
from megatron_hydra.options import add_options, from_arguments  # noqa: E402
from megatron_hydra.stopping import StopRequest  # noqa: E402

DESCRIPTION = """\
Generate text with a Hugging Face model: continue prompts, or answer conversations (--chat). The output is
JSON lines for data_prep/tokenize.py. A line holds the prompt and its continuation, in the column of the
prompts; with --chat, it holds the conversation and its answer. If a conversation already ends with an
answer, the model's answer replaces it.

The same command resumes a run that was stopped in any way. The result is the same as without the stop.
OUTPUT.manifest records how the file was made.
"""
EXAMPLES = """\
examples:
  # the teacher's own answers to the questions of a data set, as chat data for distillation
  python data_prep/sample.py --model Qwen/Qwen3-1.7B --input questions.jsonl --chat --column messages \\
      --max-new-tokens 2048 --batch-size 32 --output data/answers.jsonl
  python data_prep/tokenize.py --input data/answers.jsonl --chat --column messages \\
      --tokenizer Qwen/Qwen3-1.7B --output data/answers

  # four continuations of every line of a file, on two GPUs
  CUDA_VISIBLE_DEVICES=0 python data_prep/sample.py --model models/base --input openings.txt --format lines \\
      --samples 4 --temperature 0.8 --output data/more.jsonl --shard 0/2 &
  CUDA_VISIBLE_DEVICES=1 python data_prep/sample.py --model models/base --input openings.txt --format lines \\
      --samples 4 --temperature 0.8 --output data/more.jsonl --shard 1/2
"""


_OF_CORPUS = ("format", "column", "chat", "tools_column")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument_group("model").add_argument
    add("--model", type=path_text, required=True, metavar="HF", help="model folder, or a Hub name")
    add("--revision", default="", help="branch, tag or commit of a Hub model")
    add(
        "--tokenizer", type=path_text, metavar="DIR", help="tokenizer folder (default: the model's)"
    )
    add("--dtype", default="auto", choices=sorted(DTYPES), help="(%(default)s: as stored)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (%(default)s)")
    add("--trust-remote-code", action="store_true", help="run the code in the model's folder")
    add = parser.add_argument_group("prompts").add_argument
    add(
        "--input",
        type=path_text,
        nargs="+",
        required=True,
        metavar="PATH",
        help="as for tokenize.py",
    )
    groups = add_options(parser, CorpusConfig, only=_OF_CORPUS)
    add_options(parser, GenerationSettings, groups=groups)
    add = parser.add_argument_group("run").add_argument
    add("--output", type=path_text, required=True, metavar="FILE.jsonl", help="the file to write")
    add("--shard", default="0/1", metavar="I/N", help="generate batches I, I+N, … (I from 0)")
    add("--force", action="store_true", help="replace an existing output")
    return parser.parse_args(arguments)


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(number) for number in text.split("/"))
    except ValueError:
        raise HydraError(f"--shard {text} is not of the form 3/16") from None
    return index, count


def generation(given: argparse.Namespace) -> Generation:
    """Make the generation from the options, and load the model.

    Raises:
        HydraError: a model, tokenizer or option cannot be used.
    """
    settings = from_arguments(GenerationSettings, given, shard=_shard(given.shard))
    corpus = from_arguments(CorpusConfig, given, only=_OF_CORPUS, inputs=tuple(given.input))
    tokenizer = find_tokenizer(
        given.tokenizer or given.model,
        trust_remote_code=given.trust_remote_code,
        revision="" if given.tokenizer else given.revision,
    )
    if tokenizer is None:
        raise HydraError(f"{given.tokenizer or given.model} has no tokenizer; give --tokenizer")
    if given.chat and not getattr(tokenizer, "chat_template", None):
        raise HydraError("--chat: the tokenizer has no chat template; use the one of a chat model")
    model = load_hf_model(
        given.model,
        revision=given.revision,
        trust_remote_code=given.trust_remote_code,
        dtype=given.dtype,
        device=given.device,
    )
    identity = {"name": given.model, "revision": given.revision}
    return Generation(corpus, settings, given.output, model, tokenizer, identity, given.force)


@command
def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    try:
        with StopRequest(seconds_before_limit=120):
            generation(given).run()
    except KeyboardInterrupt:
        raise HydraError("interrupted; the same command resumes") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
