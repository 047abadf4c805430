"""Worker: the delta rule of shards on four real ranks against one rank, and the bytes sent.

Prints one JSON line for each stream: the largest difference of outputs and gradients, and the bytes sent.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from benchmarks._bytes import counted_bytes
from megatron_hydra.ops.gated_delta_rule import chunked_gated_delta_rule
from megatron_hydra.ops.sharded_delta_rule import RuleKernels, sharded_gated_delta_rule
from megatron_hydra.parallel.context_parallel import ShardStates
from tests.ops.test_sharded_delta_rule import STREAMS, inputs, with_gradients


def largest_difference(
    cu: tuple[int, ...], group: dist.ProcessGroup, own_rule: bool
) -> tuple[float, int]:
    """Largest difference of this rank's outputs and gradients from the whole stream's; bytes sent."""
    tensors = inputs(cu[-1], 0.01)
    want = with_gradients(lambda *x: chunked_gated_delta_rule(*x, cu)[0], tensors)
    exchange = ShardStates(group, cu)
    (shard,) = exchange.held
    part = slice(shard.start, shard.end)
    weights = torch.linspace(-1, 2, want[0].numel(), dtype=want[0].dtype).view_as(want[0])
    local = [x.detach()[part].requires_grad_() for x in tensors]
    with counted_bytes() as sent:
        if own_rule:  # the torch back end passes states within its own graph
            output, _ = chunked_gated_delta_rule(*local, shard.cu_seqlens, exchange=exchange)
        else:
            kernels = RuleKernels(chunked_gated_delta_rule)
            output = sharded_gated_delta_rule(kernels, tuple(local), exchange)
        got = [output, *torch.autograd.grad(output, local, weights[part])]
    differences = [(a - b[part]).abs().max() for a, b in zip(got, want, strict=True)]
    worst = torch.stack(differences).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst), sent["bytes"]


def main() -> None:
    """Run every stream on four ranks, and on two pairs of ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    world = dist.group.WORLD
    assert world is not None
    for name, (cu, _) in STREAMS.items():
        for group in (world, pairs[dist.get_rank() // 2]):
            for own_rule in (False, True):
                worst, sent = largest_difference(cu, group, own_rule)
                if dist.get_rank() == 0:
                    print(
                        json.dumps(
                            {
                                "stream": name, "ranks": group.size(), "torch": own_rule,
                                "difference": worst, "sent": sent,
                            }
                        ),
                        flush=True,
                    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
