#!/usr/bin/env python3
"""Look at head maps: show one, compare two, or check one against a model."""

from __future__ import annotations

import argparse

from megatron_hydra.errors import HydraError, command
from megatron_hydra.head_map import HeadMap
from megatron_hydra.hf_identity import model_identity_from_hf, resolve_hf_folder

EXAMPLES = """\
examples:
  tools/head_map.py show map.json
  tools/head_map.py diff interp.json random.json
  tools/head_map.py validate map.json --hf-path Qwen/Qwen3-1.7B

validate without --hf-path checks the file alone. diff exits with 1 if the maps differ.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="what a map holds, layer by layer")
    show.add_argument("map")
    show.add_argument(
        "--top", type=int, default=10, help="heads of the ranking to list (default 10)"
    )
    diff = commands.add_parser("diff", help="heads that only one of two maps keeps")
    diff.add_argument("first")
    diff.add_argument("second")
    validate = commands.add_parser("validate", help="check the file, and that it is for a model")
    validate.add_argument("map")
    validate.add_argument("--hf-path", help="Hugging Face folder or Hub name the map must be for")
    validate.add_argument("--revision", default="", help="Hub revision")
    return parser


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
    for task, facts in head_map.details.get("prompts", {}).items():
        print(f"task         {task}: {facts['solved']} of {facts['drawn']} prompts solved")
    for task, facts in head_map.details.get("left_out", {}).items():
        print(f"left out     {task}: {facts['reason']}")
    for task, facts in head_map.details.get("tasks", {}).items():
        for effect, value in facts.get("attribution_spearman", {}).items():
            shown = "undefined" if value is None else f"{value:.2f}"
            print(f"attribution  {task}: rank correlation with the {effect} effect {shown}")
    if head_map.ranking and top > 0:
        print("ranking      " + " ".join(f"{a}.{b}" for a, b in head_map.ranking[:top]))
    print("layer  full-attention heads")
    for layer, heads in enumerate(head_map.full_attention_heads):
        print(f"{layer:5d}  {' '.join(map(str, heads)) or '-'}")


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
    else:
        _validate(args.map, args.hf_path, args.revision)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
