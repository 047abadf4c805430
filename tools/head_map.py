#!/usr/bin/env python3
"""Show, compare, validate, make or re-cut head maps, or measure the effect of knocking their heads out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hydra.arguments import command_parser, path_argument, path_text, seed_argument
from megatron_hydra.errors import HydraError, command
from megatron_hydra.files import write_json_atomic
from megatron_hydra.head_map import HeadMap, strategy_name
from megatron_hydra.hf_identity import model_identity_from_hf, resolve_hf_folder
from megatron_hydra.options import add_options, from_arguments
from megatron_hydra.ranks import is_first_rank
from megatron_hydra.selection import (
    Constraints,
    Placement,
    SelectionOptions,
    knockout_curve,
    recut,
)
from megatron_hydra.selection.plots import draw_knockout
from megatron_hydra.selection.trust import report_lines

EXAMPLES = """\
examples:
  tools/head_map.py show map.json
  tools/head_map.py diff interp.json random.json
  tools/head_map.py validate map.json --hf-path Qwen/Qwen3-1.7B
  tools/head_map.py make --hf-path Qwen/Qwen3-1.7B --heads 3.1 3.14 17.0 --output mine.json
  tools/head_map.py cut map.json --ratio 7:1 --output map-7.json
  tools/head_map.py cut map.json --ratio 15:1 --strategy global_interp --output map-15.json
  tools/head_map.py knockout map.json --hf-path Qwen/Qwen3-1.7B
  tools/head_map.py knockout map.json --hf-path models/tiny --probe-tokens 512 --heads 0 3 14 27

knockout removes heads from the model, highest score first, and measures the retrieval accuracy. It does the
same with random heads, and writes both to MAP_knockout.json and .png. cut chooses heads by the scores that
are stored in a map; make takes heads that you name. Both measure nothing. Without constraints, the heads of
a higher ratio are a subset of the heads of a lower ratio. validate without --hf-path checks only the file.
diff exits with 1 if the maps differ.
"""


_OF_KNOCKOUT = ("num_prompts", "probe_tokens", "tokens_per_batch")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print a map, layer by layer")
    show.add_argument("map")
    show.add_argument(
        "--top", type=int, default=10, help="number of top-ranked heads to list (default 10)"
    )
    diff = commands.add_parser("diff", help="list the heads that only one of two maps keeps")
    diff.add_argument("first")
    diff.add_argument("second")
    validate = commands.add_parser("validate", help="validate the file, and that it fits a model")
    validate.add_argument("map")
    validate.add_argument(
        "--hf-path",
        type=path_text,
        help="Hugging Face folder or Hub name of the model that the map must fit",
    )
    validate.add_argument("--revision", default="", help="Hub revision")
    make = commands.add_parser("make", help="write a map of heads that you name")
    make.add_argument(
        "--hf-path", type=path_text, required=True, help="the model (folder or Hub name)"
    )
    make.add_argument("--revision", default="", help="Hub revision")
    make.add_argument(
        "--heads", nargs="+", required=True, metavar="LAYER.HEAD",
        help="the FA heads, both numbers from 0, as diff lists them",
    )  # fmt: skip
    make.add_argument(
        "--strategy", default="given",
        help="name to record, where these heads come from a strategy (default: given)",
    )  # fmt: skip
    make.add_argument(
        "--output", type=path_argument, required=True, help="the head map to write (JSON)"
    )
    make.add_argument("--force", action="store_true", help="overwrite an existing output")
    cut = commands.add_parser("cut", help="choose heads at another ratio by the scores in a map")
    cut.add_argument("map")
    cut.add_argument("--ratio", required=True, help="GDN:FA heads as r:1, or dense, or all-gdn")
    cut.add_argument(
        "--output", type=path_argument, required=True, help="the head map to write (JSON)"
    )
    cut.add_argument(
        "--strategy", default="", metavar="NAME",
        help="another strategy that uses the same scores: for a map of global_interp_c, global_interp or "
        "layer_interp (default: the map's strategy)",
    )  # fmt: skip
    cut.add_argument("--granularity", choices=["query_head", "kv_group"],
                     help="default: the map's granularity")  # fmt: skip
    add_options(cut, Constraints, only=("min_per_layer", "max_per_layer"))
    cut.add_argument("--force", action="store_true", help="overwrite an existing output")
    knockout = commands.add_parser(
        "knockout", help="measure retrieval accuracy with heads removed by score, and at random"
    )
    knockout.add_argument("map")
    knockout.add_argument(
        "--hf-path", type=path_text, required=True, help="the model that the map was made for"
    )
    knockout.add_argument("--revision", default="", help="Hub revision")
    knockout.add_argument(
        "--heads", type=int, nargs="+", default=[], metavar="N",
        help="numbers of heads to remove (default: 0 to 40 %% of all)",
    )  # fmt: skip
    knockout.add_argument("--draws", type=int, default=3, help="random orders (default 3)")
    knockout.add_argument(
        "--tasks", nargs="+", default=["retrieval"], metavar="TASK",
        help="tasks, as for select_heads.py (default: retrieval)",
    )  # fmt: skip
    add_options(knockout, SelectionOptions, only=_OF_KNOCKOUT)
    knockout.add_argument(
        "--seed", type=seed_argument, default=1,
        help="seed of prompts and random orders (default 1; a selection with seed 0 has other prompts)",
    )  # fmt: skip
    knockout.add_argument("--device", default="auto", help="auto, cpu, cuda:0, ...")
    knockout.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    knockout.add_argument(
        "--output", type=path_argument, help="JSON to write (default MAP_knockout.json)"
    )
    knockout.add_argument("--no-pictures", action="store_true", help="write the JSON only")
    knockout.add_argument("--force", action="store_true", help="overwrite an existing output")
    return parser


def _refuse_existing(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise HydraError(f"--output {output} exists; give --force to overwrite it")


def _make(args: argparse.Namespace) -> None:
    _refuse_existing(args.output, args.force)
    heads = []
    for text in args.heads:
        layer, dot, head = text.partition(".")
        if not (dot and layer.isdecimal() and head.isdecimal()):
            raise HydraError(f"--heads {text}: write LAYER.HEAD, for example 18.6")
        heads.append((int(layer), int(head)))
    folder = resolve_hf_folder(args.hf_path, args.revision)
    model = model_identity_from_hf(folder, name=args.hf_path, revision=args.revision)
    made = HeadMap.of_heads(model, heads, strategy_name(args.strategy))
    made.save(args.output)
    total = model.num_layers * model.num_query_heads
    print(f"{args.output}: {made.num_full_attention} of {total} heads, ratio {made.ratio}")


def _cut(args: argparse.Namespace) -> None:
    _refuse_existing(args.output, args.force)
    head_map = HeadMap.load(args.map)
    granularity = args.granularity or head_map.granularity
    constraints = from_arguments(Constraints, args, granularity=granularity)
    made = recut(head_map, args.ratio, constraints, args.map, strategy_name(args.strategy))
    made.save(args.output)
    print(f"{args.output}: {made.num_full_attention} full-attention heads")


def _knockout(args: argparse.Namespace) -> None:
    output = args.output or Path(args.map).with_name(f"{Path(args.map).stem}_knockout.json")
    # Only the first process writes. It may have written the file before another process starts.
    if is_first_rank():
        _refuse_existing(output, args.force)
    if args.draws < 1:
        raise HydraError(f"--draws {args.draws}: must be at least 1")
    curve = knockout_curve(
        HeadMap.load(args.map),
        args.hf_path,
        source=args.map,
        revision=args.revision,
        tasks=args.tasks,
        options=from_arguments(SelectionOptions, args, min_prompts=1),
        counts=args.heads,
        draws=args.draws,
        seed=args.seed,
        placement=Placement(args.device, args.dtype),
        show_progress=True,
    )
    if not is_first_rank():
        return
    write_json_atomic(output, curve)
    print("heads out  by score         random (smallest to largest)")
    for point in curve["points"]:
        drawn = point["random"]["accuracy"]
        print(
            f"{point['heads']:9d}  {point['score']['accuracy']:8.3f}         "
            f"{sum(drawn) / len(drawn):.3f} ({min(drawn):.3f} to {max(drawn):.3f})"
        )
    print(output)
    if not args.no_pictures:
        draw_knockout(curve, output.with_suffix(".png"))
        print(output.with_suffix(".png"))


def _show(path: str, top: int) -> None:
    head_map = HeadMap.load(path)
    m = head_map.model
    total = m.num_layers * m.num_query_heads
    print(f"model        {m.name or '(unnamed)'} {m.revision}".rstrip())
    print(
        f"shape        {m.family}: {m.num_layers} layers, {m.num_query_heads} query heads on "
        f"{m.num_kv_heads} KV heads, head_dim {m.head_dim}, hidden size {m.hidden_size}"
    )
    print(f"fingerprint  {m.fingerprint or '(none)'}")
    print(f"strategy     {head_map.strategy}, seed {head_map.seed}, {head_map.granularity}")
    print(
        f"ratio        {head_map.ratio}: {head_map.num_full_attention} of {total} heads keep full "
        "attention"
    )
    try:
        lines = list(_details(head_map.details))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise HydraError(
            f"{path}: the content of 'details' was not written by select_heads.py "
            f"({type(error).__name__}: {error}); make the map again"
        ) from None
    for line in lines:
        print(line)
    if head_map.ranking and top > 0:
        print("ranking      " + " ".join(f"{a}.{b}" for a, b in head_map.ranking[:top]))
    print("layer  full-attention heads")
    for layer, heads in enumerate(head_map.full_attention_heads):
        print(f"{layer:5d}  {' '.join(map(str, heads)) or '-'}")


def _details(details: dict[str, Any]) -> Iterator[str]:
    """Lines on a map's prompts and on the reliability of its scores."""
    for task, facts in details.get("prompts", {}).items():
        yield f"task         {task}: {facts['solved']} of {facts['drawn']} prompts solved"
    for task, facts in details.get("left_out", {}).items():
        yield f"left out     {task}: {facts['reason']}"
    for task, facts in details.get("tasks", {}).items():
        for effect, value in facts.get("attribution_spearman", {}).items():
            shown = "undefined" if value is None else f"{value:.2f}"
            yield f"attribution  {task}: rank correlation with the {effect} effect {shown}"
    for what, text in report_lines(details):
        yield f"{what:<13}{text}"


def _diff(first: str, second: str) -> int:
    a, b = HeadMap.load(first), HeadMap.load(second)
    b.check_model(a.model, source=second)
    chosen_a, chosen_b = (
        {(layer, h) for layer, heads in enumerate(m.full_attention_heads) for h in heads}
        for m in (a, b)
    )
    print(f"{len(chosen_a & chosen_b)} heads in both")
    for name, only in ((first, chosen_a - chosen_b), (second, chosen_b - chosen_a)):
        listed = " ".join(f"{layer}.{h}" for layer, h in sorted(only))
        print(f"{len(only)} only in {name}: {listed or '-'}")
    return int(chosen_a != chosen_b)


def _validate(path: str, hf_path: str | None, revision: str) -> None:
    head_map = HeadMap.load(path)
    if hf_path is None:
        print(f"{path} is a valid head map for {head_map.model.name or 'a model without a name'}")
        return
    folder = resolve_hf_folder(hf_path, revision)
    head_map.check_model(model_identity_from_hf(folder, name=hf_path), source=path)
    if not head_map.model.fingerprint:
        raise HydraError(
            f"{path} has no fingerprint: its shape fits {hf_path}, its weights cannot be checked"
        )
    print(f"{path} is a valid head map for {hf_path}")


@command
def main() -> int:
    """Run one of the commands."""
    args = _parser().parse_args()
    if args.command == "diff":
        return _diff(args.first, args.second)
    if args.command == "show":
        _show(args.map, args.top)
    elif args.command == "make":
        _make(args)
    elif args.command == "cut":
        _cut(args)
    elif args.command == "knockout":
        _knockout(args)
    else:
        _validate(args.map, args.hf_path, args.revision)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
