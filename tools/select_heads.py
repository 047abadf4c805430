#!/usr/bin/env python3
"""Choose the query heads of a dense model that keep full attention, and write the head map."""

from __future__ import annotations

import argparse

from megatron_hydra.arguments import command_parser, path_argument, path_text, real, seed_argument
from megatron_hydra.config.selection import GATES
from megatron_hydra.errors import HydraError, command
from megatron_hydra.head_map import DEFAULT_RATIO, DEFAULT_STRATEGY
from megatron_hydra.options import add_options, from_arguments
from megatron_hydra.out_of_memory import out_of_memory_names
from megatron_hydra.ranks import is_first_rank
from megatron_hydra.selection import (
    DEFAULT_TASKS,
    STRATEGIES,
    Placement,
    SelectionOptions,
    select_heads,
)
from megatron_hydra.selection.capabilities import task_names
from megatron_hydra.selection.plots import draw_head_map
from megatron_hydra.selection.trust import report_lines
from megatron_hydra.stopping import StopRequest
from megatron_hydra.watchdog import Watchdog

EXAMPLES = """\
examples:
  tools/select_heads.py --hf-path Qwen/Qwen3-1.7B --ratio 3:1 --output maps/qwen3-1.7b.json
  tools/select_heads.py --hf-path models/tiny --tasks induction jsonl:my_prompts.jsonl \\
      --output map.json
  tools/select_heads.py --hf-path models/tiny --strategy global_random --seed 3 --output random-3.json
  torchrun --nproc-per-node 8 tools/select_heads.py --hf-path Qwen/Qwen3-32B --output map.json
  tools/select_heads.py --hf-path Qwen/Qwen3-1.7B --strategy learned_gates --tasks retrieval \
      --num-prompts 400 --text corpus.jsonl --compare map.json --output gates.json
  tools/head_map.py cut gates.json --ratio 7:1 --output gates-7.json

Without --tasks, a default task that the model does not solve is skipped, and the map records it. A task that
is given with --tasks must be solved. The tool prints an estimate of the time at the start, and a better one
after a few prompts of every task. On a CPU, use --probe-tokens 512 --max-rounds 1.
The same command resumes a run that was stopped (SIGTERM or SIGUSR1, exit status 85) or killed. Runs with
other ratios, weights and constraints reuse its measurements.
A JSONL task has one object per line: clean, corrupted, answer, wrong_answer (strings or token ids).
"""


ABOUT_GATES = (
    "Every head runs the teacher's attention and a GDN branch; a gate mixes them. First the branch is "
    "aligned on text. Then all weights are frozen, and the gates are learned on prompts and text while "
    "the budget decreases from all heads to none. One run ranks all heads, and measures for every budget "
    "how much accuracy held-out prompts recover; head_map.py cut makes maps of other ratios from it. "
    "Give many prompts (--num-prompts 400), and text."
)


def _parser() -> argparse.ArgumentParser:
    strategies = "; ".join(f"{name}: {s.help}" for name, s in STRATEGIES.items())
    parser = command_parser(description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add(
        "--hf-path",
        type=path_text,
        required=True,
        help="Hugging Face folder or Hub name (Qwen3, Qwen2, Llama)",
    )
    add("--revision", default="", help="Hub revision")
    add("--output", required=True, type=path_argument, help="the head map to write (JSON)")
    add(
        "--ratio",
        default=DEFAULT_RATIO,
        help="GDN:FA heads as r:1, or dense, or all-gdn (default %(default)s)",
    )
    add(
        "--strategy",
        default=DEFAULT_STRATEGY,
        metavar="NAME",
        help=f"{strategies} (default %(default)s)",
    )
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"name or name:key=value,...; names: {', '.join(task_names())}; retrieval and general are "
        f"capabilities of five tasks each (default: {' '.join(DEFAULT_TASKS)}, without unsolved tasks)",
    )
    add(
        "--seed",
        type=seed_argument,
        default=0,
        help="seed of prompts and random choices (default 0)",
    )
    groups = add_options(parser, SelectionOptions, about={GATES: ABOUT_GATES})
    machine = groups["machine"].add_argument
    machine("--device", default="auto", help="auto, cpu, cuda:0, ...")
    machine("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    machine(
        "--gpus-per-process", type=int, default=1, help="GPUs of one copy of the model (default 1)"
    )
    machine(
        "--timeout",
        type=real(0),
        default=1800,
        help="time limit in seconds for one piece of work; a process that exceeds it prints its stacks "
        "and ends the job (default %(default)s; loading has five times this limit)",
    )
    add("--no-pictures", action="store_true", help="write the map only")
    add("--force", action="store_true", help="overwrite an existing output")
    return parser


@command
def main() -> int:
    """Read the command line, select, write the map and its pictures."""
    args = _parser().parse_args()
    if args.timeout <= 0:
        raise HydraError(f"--timeout {args.timeout:g}: must be above 0 seconds")
    # Only rank 0 writes. It may have written the file before another rank starts.
    if is_first_rank() and args.output.exists() and not args.force:
        raise HydraError(f"--output {args.output} exists; give --force to overwrite it")
    advice = [
        f"--tokens-per-batch {(args.tokens_per_batch or 32768) // 4} (now "
        f"{args.tokens_per_batch or 'the default'})",
        f"--gpus-per-process {2 * args.gpus_per_process} (now {args.gpus_per_process}): one copy of the "
        "model over several GPUs",
        "--dtype bf16, if the model is stored in fp32",
        f"--probe-tokens {args.probe_tokens // 4} (now {args.probe_tokens})",
    ]
    with out_of_memory_names("head selection", *advice), StopRequest(), Watchdog(args.timeout):
        head_map = select_heads(
            args.hf_path,
            ratio=args.ratio,
            strategy=args.strategy,
            tasks=args.tasks,
            seed=args.seed,
            revision=args.revision,
            options=from_arguments(SelectionOptions, args),
            placement=Placement(args.device, args.dtype, args.gpus_per_process),
            output=args.output,
            work_folder=args.output.with_name(args.output.name + ".work"),
            show_progress=True,
        )
    if is_first_rank():
        for task, facts in head_map.details["prompts"].items():
            print(f"{task}: {facts['solved']} of {facts['drawn']} prompts solved")
        for task, facts in head_map.details.get("left_out", {}).items():
            print(f"{task}: left out, {facts['reason']}")
        for _, text in report_lines(head_map.details):
            print(text)
        print(f"{args.output}: {head_map.num_full_attention} full-attention heads")
        if not args.no_pictures:
            for picture in draw_head_map(head_map, args.output.with_suffix("")):
                print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
