#!/usr/bin/env python
"""Score a Hugging Face model or a Megatron checkpoint on retrieval tasks and lm-eval's."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hydra.arguments import command_parser, path_text, seed_argument
from megatron_hydra.config.evaluation import EvaluationOptions, listed
from megatron_hydra.environment import environment_number, world_size_from_environment
from megatron_hydra.errors import HydraError, command
from megatron_hydra.evaluation.finding import load_task, task_names
from megatron_hydra.evaluation.lm_eval_suite import require_lm_eval
from megatron_hydra.evaluation.runner import EvaluationSettings, evaluate
from megatron_hydra.evaluation.sharing import PATIENCE
from megatron_hydra.hf_loading import DTYPES, find_tokenizer, load_hf_model
from megatron_hydra.options import add_options, from_arguments
from megatron_hydra.out_of_memory import out_of_memory_names
from megatron_hydra.ranks import Ranks
from megatron_hydra.stopping import StopRequest, exit_if_stopped

DESCRIPTION = """\
Hide facts in long texts, ask for them, and count correct answers. Samples are generated offline with
the model's own tokenizer; the seed determines them. Decoding is greedy. The model is a Hugging Face
model, or a Megatron checkpoint under any layout of tensor, sequence, context and pipeline parallelism
(start with torchrun). Processes of torchrun that evaluate a Hugging Face model share the pairs of task and
length, each on its own GPU. The tool writes results.json, one picture of length × depth for each task, and
accuracy.png. Each finished (task, length) is saved in OUTPUT/cells: the same command resumes a stopped
run (SIGTERM or SIGUSR1, exit status 85).
"""

EPILOG = """\
tasks: {tasks};
  qa:FILE, questions over documents (SQuAD, HotpotQA, or .jsonl with question, answer, documents);
  a .jsonl file with {{"prompt": …, "answer": …}} a line, as text or token ids;
  or module:function, which returns a task (see megatron_hydra.evaluation.RetrievalTask).

examples:
  python tools/evaluate.py --model exports/hydra --trust-remote-code \\
      --tasks niah_single_2,niah_multikey_1 --lengths 4K,16K,64K --depths 11 --output runs/eval
  torchrun --nproc-per-node 4 -m tools.evaluate --model exports/hydra --trust-remote-code \\
      --tasks niah_single_2,niah_multikey_1 --lengths 4K,16K,64K,128K,256K,512K --output runs/eval_4_gpus
  python tools/evaluate.py --model exports/hydra --trust-remote-code \\
      --lm-eval arc_easy,hellaswag --output runs/lm_eval
  python tools/evaluate.py --model models/dense --tasks niah_single_2 --lengths 32K --output runs/yarn \\
      --model-config '{{"rope_parameters": {{"rope_type": "yarn", "rope_theta": 1e5, "factor": 4,
      "original_max_position_embeddings": 8192}}}}'
  torchrun --nproc-per-node 8 -m tools.evaluate --checkpoint runs/finetune/checkpoints \\
      --tasks niah_single_2 --lengths 512K --output runs/eval_512k parallel.tensor=2 parallel.context=4
"""


def _length(text: str) -> int:
    scale = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    try:
        return int(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        raise HydraError(
            f"--lengths: {text!r} is not a length; write for example 512,4K,128K"
        ) from None


def _changes(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise HydraError(f"--model-config is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise HydraError(f"--model-config {text} must be a JSON object, {{key: value}}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        description=DESCRIPTION, epilog=EPILOG.format(tasks=", ".join(task_names()))
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=path_text, metavar="HF", help="Hugging Face model folder, or a Hub name"
    )
    what.add_argument(
        "--checkpoint",
        type=path_text,
        metavar="DIR",
        help="Megatron checkpoint (start with torchrun)",
    )
    add(
        "--config",
        type=path_text,
        metavar="YAML",
        help="with --checkpoint: file with its layout (sections parallel, backend)",
    )
    add(
        "overrides",
        nargs="*",
        metavar="parallel.key=value",
        help="with --checkpoint: layout overrides",
    )
    add("--revision", default="", help="branch, tag or commit of a Hub model")
    add("--tasks", default="", help="comma-separated list of tasks, see below")
    add("--lengths", default="", help="context lengths in tokens, for example 512,4K,128K")
    add("--output", type=path_text, required=True, metavar="DIR", help="folder for the results")
    add("--seed", type=seed_argument, default=1234, help="seed of all samples (%(default)s)")
    add(
        "--tokenizer",
        type=path_text,
        metavar="DIR",
        help="tokenizer folder (default: the model's)",
    )
    add_options(parser, EvaluationOptions)
    add(
        "--model-config",
        type=_changes,
        default={},
        metavar="JSON",
        help="with --model: keys of its config.json to override, for example YaRN (see below)",
    )
    add("--dtype", default="auto", choices=sorted(DTYPES), help="(%(default)s: as stored)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (%(default)s)")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the modelling code in the model's folder (HydraHead exports carry theirs)",
    )
    add("--force", action="store_true", help="delete a different evaluation in --output first")
    add("--quiet", action="store_true", help="show no progress bar")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    # Cheap checks first: a wrong flag must fail before a model is loaded.
    tasks = [load_task(spec) for spec in listed(args.tasks)]
    lengths = [_length(part) for part in listed(args.lengths)]
    settings = from_arguments(
        EvaluationSettings,
        args,
        haystack=_read(args.haystack),
        seed=args.seed,
        progress=not args.quiet,
    )
    if settings.lm_eval:
        require_lm_eval()
    advice = [f"--batch-tokens {args.batch_tokens // 2} (now {args.batch_tokens})"]
    if args.model:
        advice.append("--prefill-chunk 2048: this number of prompt tokens per forward")
        advice.append("--dtype bf16, if the model is stored in fp32")
    else:
        advice.append("parallel.context or parallel.tensor on more GPUs")
    advice.append("shorter --lengths")
    with (
        out_of_memory_names("the evaluation", *advice),
        StopRequest(),
        _processes(args) as ranks,
        _opened(args) as (model, tokenizer),
    ):
        results = evaluate(
            model,
            tokenizer,
            tasks,
            lengths,
            settings,
            output=args.output,
            force=args.force,
            name=str(args.model or args.checkpoint),
            ranks=ranks,
        )
        is_main = ranks.rank == 0 if ranks else getattr(model, "is_main", True)
    if is_main:
        _print_results(results)
        print(f"results: {Path(args.output) / 'results.json'}")
    return 0


@contextlib.contextmanager
def _processes(args: argparse.Namespace) -> Iterator[Ranks | None]:
    """The processes that share the cells of a Hugging Face model, each on its own GPU; ``None``: one process.

    Raises:
        HydraError: this machine has fewer GPUs than processes, or ``--device`` names one for all.
    """
    if not args.model or world_size_from_environment() == 1:
        yield None
        return
    if args.device not in ("auto", "cpu"):
        raise HydraError(
            f"--device {args.device}: torchrun gives each process its own GPU; leave it out"
        )
    from megatron_hydra.parallel import platform  # as loading a model does, it imports Megatron

    if args.device == "auto":
        platform.bind_process_to_device(environment_number("LOCAL_RANK", 0))
    ranks = Ranks(PATIENCE)
    try:
        yield ranks
    finally:
        ranks.close()


def _opened(args: argparse.Namespace) -> contextlib.AbstractContextManager[tuple[Any, Any]]:
    """The model or back end, and its tokenizer."""
    return _hugging_face(args) if args.model else _megatron(args)


@contextlib.contextmanager
def _hugging_face(args: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    for flag, given in (("--config", args.config), ("an override", args.overrides)):
        if given:
            raise HydraError(
                f"{flag} ({given}) is the layout of a --checkpoint; --model has no layout"
            )
    trust = args.trust_remote_code
    revision = "" if args.tokenizer else args.revision
    tokenizer = find_tokenizer(
        args.tokenizer or args.model, trust_remote_code=trust, revision=revision
    )
    model = load_hf_model(
        args.model,
        revision=args.revision,
        trust_remote_code=trust,
        dtype=args.dtype,
        device=args.device,
        changes=args.model_config,
    )
    exit_if_stopped()  # loading takes minutes for large models
    yield model, tokenizer


@contextlib.contextmanager
def _megatron(args: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    for flag, given in (
        ("--revision", args.revision),
        ("--prefill-chunk", args.prefill_chunk is not None),
        ("--device", args.device != "auto"),
        ("--lm-eval", args.lm_eval),
        ("--model-config", args.model_config),
    ):
        if given:
            raise HydraError(
                f"{flag} is for a Hugging Face --model; tools/megatron_to_hf.py makes one of a "
                "--checkpoint"
            )
    # The import of Megatron takes seconds, and a Hugging Face model does not need it.
    from megatron_hydra.checkpoint.store import tokenizer_folder
    from megatron_hydra.evaluation.megatron_backend import layout_config, open_checkpoint

    run = layout_config(args.config, args.overrides)
    folder = args.tokenizer or tokenizer_folder(args.checkpoint)
    tokenizer = None
    if folder is not None:
        tokenizer = find_tokenizer(folder, trust_remote_code=args.trust_remote_code)
    with open_checkpoint(args.checkpoint, run, args.dtype) as backend:
        yield backend, tokenizer


def _read(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"--haystack {path} cannot be read: {error}") from None


def _print_results(results: dict) -> None:
    if results["tasks"]:
        _print_table(results["tasks"])
    for task, metrics in results.get("lm_eval", {}).get("tasks", {}).items():
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        print(f"{task}: {shown}")
    if "cache" in results:
        cache = results["cache"]
        print(
            f"cache: {cache['kv_bytes_per_token']:.0f} bytes a token, "
            f"{cache['state_bytes']:.0f} bytes of state"
        )


def _print_table(tasks: dict) -> None:
    lengths = sorted({n for cells in tasks.values() for n in cells}, key=int)
    width = max(len(name) for name in tasks)
    print(" ".join([f"{'task':{width}}", *(f"{n:>8}" for n in lengths)]))
    for name, cells in tasks.items():
        row = [f"{100 * cells[n]['accuracy']:7.1f}%" if n in cells else " " * 8 for n in lengths]
        print(" ".join([f"{name:{width}}", *row]))


if __name__ == "__main__":
    raise SystemExit(main())
