#!/usr/bin/env python
"""Score a Hugging Face model on retrieval tasks at given lengths and depths."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hydra.errors import HydraError, command
from megatron_hydra.evaluation.loading import DTYPES, load_model, load_tokenizer
from megatron_hydra.evaluation.runner import EvaluationSettings, evaluate
from megatron_hydra.evaluation.tasks import load_task, task_names
from megatron_hydra.stopping import StopRequest

DESCRIPTION = """\
Hide facts in long texts, ask for them, and count right answers: greedy, generated offline with the
model's own tokenizer, decided by the seed. Writes results.json, one picture of length × depth a
task, and accuracy.png. A run that was stopped (SIGTERM, SIGUSR1: exit status 85) goes on where it was:
every finished (task, length) is kept in OUTPUT/cells.
"""

EPILOG = """\
tasks: {tasks};
  qa:FILE, questions over documents (SQuAD, HotpotQA, or .jsonl with question, answer, documents);
  a .jsonl file with {{"prompt": …, "answer": …}} a line, as text or token ids;
  or module:function, which returns a task (see megatron_hydra.evaluation.RetrievalTask).

example:
  python tools/evaluate.py --model exports/hydra --trust-remote-code \\
      --tasks niah_single_2,niah_multikey_1 --lengths 4K,16K,64K --depths 11 --output runs/eval
"""


def _length(text: str) -> int:
    scale = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    try:
        return int(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        raise HydraError(
            f"--lengths: {text!r} is no length; write for example 512,4K,128K"
        ) from None


def _depths(text: str) -> tuple[float, ...]:
    try:
        if "," not in text and text.isdecimal() and int(text) >= 2:
            return tuple(i / (int(text) - 1) for i in range(int(text)))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise HydraError(f"--depths: {text!r} is neither a number nor a list of 0 … 1") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG.format(tasks=", ".join(task_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="HF", help="Hugging Face model folder, or a Hub name")
    add("--revision", default="", help="of a Hub name: branch, tag or commit")
    add("--tasks", required=True, help="comma-separated, see below")
    add("--lengths", required=True, help="context lengths in tokens, for example 512,4K,128K")
    add("--output", required=True, metavar="DIR", help="folder for the results")
    add(
        "--depths",
        default="5",
        help="how many, from start to end, or a list as 0,0.5,1 (%(default)s)",
    )
    add("--samples", type=int, default=10, help="for each task, length and depth (%(default)s)")
    add("--seed", type=int, default=1234, help="decides every sample (%(default)s)")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, if not the model's")
    add("--haystack", metavar="FILE", help="your own distractor text, one paragraph a line")
    add("--batch-tokens", type=int, default=32768, help="tokens of a batch (%(default)s)")
    add(
        "--prefill-chunk",
        type=int,
        help="tokens of a prompt passed at a time, 0: all (default: 8192 where known to be exact)",
    )
    add("--cache-length", type=int, default=512, help="prompt that measures the cache; 0: do not")
    add("--dtype", default="auto", choices=sorted(DTYPES), help="(%(default)s: as stored)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (%(default)s)")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the modelling code in the model's folder (HydraHead exports carry theirs)",
    )
    add("--force", action="store_true", help="throw away another evaluation in --output")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Everything cheap first: a wrong flag must not cost the loading of a model.
    tasks = [load_task(spec.strip()) for spec in args.tasks.split(",")]
    lengths = [_length(part.strip()) for part in args.lengths.split(",")]
    settings = EvaluationSettings(
        depths=_depths(args.depths),
        samples=args.samples,
        seed=args.seed,
        batch_tokens=args.batch_tokens,
        prefill_chunk=args.prefill_chunk,
        haystack=_read(args.haystack),
        cache_length=args.cache_length,
        progress=not args.quiet,
    )
    trust = args.trust_remote_code
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=trust)
    else:
        tokenizer = load_tokenizer(args.model, trust_remote_code=trust, revision=args.revision)
    model = load_model(
        args.model,
        revision=args.revision,
        trust_remote_code=trust,
        dtype=args.dtype,
        device=args.device,
    )
    with StopRequest():
        results = evaluate(
            model,
            tokenizer,
            tasks,
            lengths,
            settings,
            output=args.output,
            force=args.force,
            name=str(args.model),
        )
    _print_table(results)
    print(f"results: {Path(args.output) / 'results.json'}")
    return 0


def _read(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"--haystack {path} cannot be read: {error}") from None


def _print_table(results: dict) -> None:
    lengths = sorted({n for cells in results["tasks"].values() for n in cells}, key=int)
    width = max(len(name) for name in results["tasks"])
    print(" ".join([f"{'task':{width}}", *(f"{n:>8}" for n in lengths)]))
    for name, cells in results["tasks"].items():
        row = [f"{100 * cells[n]['accuracy']:7.1f}%" if n in cells else " " * 8 for n in lengths]
        print(" ".join([f"{name:{width}}", *row]))
    if "cache" in results:
        cache = results["cache"]
        print(
            f"cache: {cache['kv_bytes_per_token']:.0f} bytes a token, "
            f"{cache['state_bytes']:.0f} bytes of state"
        )


if __name__ == "__main__":
    raise SystemExit(main())
