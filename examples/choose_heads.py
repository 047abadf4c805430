#!/usr/bin/env python3
"""Choose the heads of your own model that keep full attention.

    python examples/choose_heads.py                        # the package's tiny teacher
    python examples/choose_heads.py --model Qwen/Qwen3-0.6B --tasks retrieval

The command with all options is tools/select_heads.py.
"""

from __future__ import annotations

import argparse

import megatron_hydra as mh


def main(argv: list[str] | None = None) -> mh.HeadMap:
    """Select heads on prompts that the model solves, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(mh.shipped_teacher()), help="a folder or a Hub name")
    parser.add_argument("--tasks", nargs="+", default=["induction:length=12"])
    parser.add_argument("--ratio", default="3:1", help="GDN heads to full-attention heads")
    parser.add_argument("--output", default="head_map.json")
    args = parser.parse_args(argv)

    options = mh.SelectionOptions(num_prompts=16, min_prompts=4, max_rounds=1, stability=False)
    head_map = mh.select_heads(args.model, ratio=args.ratio, tasks=args.tasks, options=options)
    head_map.save(args.output)
    for layer, heads in enumerate(head_map.full_attention_heads):
        print(f"layer {layer}: full attention in heads {list(heads)}")
    print(f"{args.output}: give it to tools/hf_to_megatron.py --head-map")
    return head_map


if __name__ == "__main__":
    main()
