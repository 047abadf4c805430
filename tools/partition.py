"""Print the heads of every tensor-parallel rank, and the balance of the work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_hydra.arguments import command_parser, path_text
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.errors import HydraError, command

_EPILOG = """examples:
  python tools/partition.py --checkpoint students/hydra --tensor 8 --sequence-length 524288
  python tools/partition.py --head-map map.json --tensor 8 --fa-partition sequence
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(
        description="Place the heads of a HydraHead model on tensor-parallel ranks. Print the FA and GDN "
        "heads of every layer and rank, their forward FLOPs for one document, and the worst "
        "imbalance (slowest rank divided by the mean; 1 is even).",
        epilog=_EPILOG,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=path_text, help="a Megatron checkpoint of the model")
    source.add_argument(
        "--head-map", type=path_text, help="a head map (with default layer options)"
    )
    parser.add_argument("--tensor", type=int, required=True, help="tensor-parallel size")
    parser.add_argument(
        "--fa-partition",
        choices=("heads", "sequence", "both"),
        default="both",
        help="how FA heads are placed (default: show both)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=32768,
        help="document length in tokens (default: 32768)",
    )
    parser.add_argument("--summary", action="store_true", help="print only the worst imbalance")
    return parser.parse_args(arguments)


def read_model(options: argparse.Namespace) -> ModelConfig:
    """The model of a checkpoint, or a model with the shape in a head map."""
    if options.checkpoint:
        from megatron_hydra.checkpoint import store

        return store.read_model_config(store.resolve_checkpoint(options.checkpoint))
    from megatron_hydra.head_map import HeadMap

    head_map = HeadMap.load(options.head_map)
    shape = head_map.model
    dense = ModelConfig(
        family=shape.family,  # type: ignore[arg-type]
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=4 * shape.hidden_size,
        vocab_size=1,
        num_query_heads=shape.num_query_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )
    return dense.with_head_map(head_map, HydraConfig())


def report(model: ModelConfig, tensor: int, mode: str, length: int, summary: bool) -> Iterator[str]:
    """The lines of one partition."""
    from megatron_hydra.model.head_flops import imbalance, rank_loads
    from megatron_hydra.parallel.head_partition import plan_model

    yield f"FA partition {mode}, {tensor} tensor-parallel ranks, {length:,} tokens"
    worst_all, worst_fa = (1.0, 0), (1.0, 0)
    for partition in plan_model(model, tensor, mode):  # type: ignore[arg-type]
        loads = rank_loads(model, partition, length)
        all_work, fa_work = imbalance(loads), partition.full_attention_imbalance()
        worst_all = max(worst_all, (all_work, partition.layer))
        worst_fa = max(worst_fa, (fa_work, partition.layer))
        if summary:
            continue
        yield f"  layer {partition.layer}: imbalance {all_work:.3f} (FA {fa_work:.3f})"
        for rank, load in enumerate(loads):
            fa = ",".join(map(str, partition.fa[rank])) or "none"
            gdn = ",".join(map(str, partition.gdn[rank])) or "none"
            yield (
                f"    rank {rank}: FA {fa}; GDN {gdn}; GFLOPs: FA {load.full_attention / 1e9:,.1f}, "
                f"GDN {load.gated_delta_net / 1e9:,.1f}, projections {load.projections / 1e9:,.1f}"
            )
    yield f"  worst imbalance: {worst_all[0]:.3f} (layer {worst_all[1]})"
    yield f"  worst imbalance of FA alone: {worst_fa[0]:.3f} (layer {worst_fa[1]})"


@command
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.tensor < 1 or options.sequence_length < 1:
        raise HydraError("--tensor and --sequence-length must be at least 1")
    model = read_model(options)
    modes = ("heads", "sequence") if options.fa_partition == "both" else (options.fa_partition,)
    for mode in modes:
        print(
            *report(model, options.tensor, mode, options.sequence_length, options.summary), sep="\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
