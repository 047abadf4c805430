"""Worker: properties of every layout besides parity. test_properties.py runs it in four processes.

``isolation``: with slow decay, the last token of one document does not change the next one, bit for bit.
``host_reads``: once its caches are filled, a pass over the layers reads no value back to the host and
makes no tensor from the host's numbers.
``bytes``: what a rank sends per GDN layer under context parallelism, counted at the collectives.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core import parallel_state  # isort: skip

from benchmarks._bytes import counted_bytes
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.run import ParallelConfig, RunConfig
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.parallel.packed_sequence import PackedSequence
from tests import canonical_access
from tests.parallel.layouts import LAYOUTS, MODELS, canonical_weights, groups, possible, tiny

LENGTH, BOUNDARY = 96, 41


def _worth_running(model: str, layout: str) -> bool:
    """Whether a case tests something new: the model with one KV head needs ranks that share it."""
    if layout == "one rank":
        return model != "one-kv"
    return possible(model, layout) and (model != "one-kv" or LAYOUTS[layout].tensor > 1)


FULL = [
    (model, layout)
    for layout in ("one rank", *LAYOUTS)
    for model in ("hydra", "one-kv", "shared", "parallel", "token", "token-wide")
    if _worth_running(model, layout)
]
_CHOSEN = {
    "one-kv": ("tp4-sp", "tp2-sp-seq", "tp2-sp-cp2"),
    "shared": ("one rank", "tp2-sp-cp2-seq"),
    "parallel": ("one rank", "cp4", "tp2-sp-cp2"),
    "token": ("cp4", "tp4-sp"),
    "token-wide": ("cp4", "tp2-sp-cp2"),
}
FAST = [(model, layout) for model, layout in FULL if model == "hydra" or layout in _CHOSEN[model]]
CASES = {"fast": FAST, "full": FULL}


def local_slice(length: int, parallel: ParallelConfig) -> slice:
    """This rank's tokens of the stream: its context shard, and with SP its slice of the shard."""
    per_cp = length // parallel.context
    start = parallel_state.get_context_parallel_rank() * per_cp
    if parallel.sequence:
        per_cp //= parallel.tensor
        start += parallel_state.get_tensor_model_parallel_rank() * per_cp
    return slice(start, start + per_cp)


def run_decoder(gpt, hidden: torch.Tensor, cotangent: torch.Tensor, packed, part: slice):
    """Decoder output and input gradient for this rank's tokens."""
    leaf = hidden[part].clone().requires_grad_()
    out = gpt.decoder(hidden_states=leaf, attention_mask=None, packed_seq_params=packed)
    (out * cotangent[part]).sum().backward()
    return out.detach(), leaf.grad


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a GPU: ``.item()``, ``if tensor:``, data-dependent shapes,
    and tensors from host numbers, such as the index in ``x[:, [0, 2]]``, whose copy also waits.
    """

    WAITS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten._unique2.default,
        torch.ops.aten.lift_fresh.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.WAITS:
            # Megatron-Core compares states of the host's generator, which needs no device.
            callers = {frame.filename for frame in traceback.extract_stack()}
            self.count += not any(name.endswith("tensor_parallel/random.py") for name in callers)
        return func(*args, **(kwargs or {}))


def isolation(name: str, layout: str) -> dict:
    """Change the last token of the first document; compare the second document."""
    parallel, model = LAYOUTS.get(layout, ParallelConfig()), MODELS[name]
    gpt = build_gpt_model(model, RunConfig(precision="fp32", parallel=parallel))
    canonical_access.load(gpt, canonical_weights(model))
    packed = PackedSequence(
        (0, BOUNDARY, LENGTH),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.context,
    )
    part = local_slice(LENGTH, parallel)
    generator = torch.Generator().manual_seed(5)
    hidden, cotangent = torch.randn(2, LENGTH, 1, model.hidden_size, generator=generator)
    cotangent[:BOUNDARY] = 0  # a loss on the second document alone
    changed = hidden.clone()
    changed[BOUNDARY - 1] += 10.0
    before = run_decoder(gpt, hidden, cotangent, packed, part)
    with HostReads() as reads:
        after = run_decoder(gpt, changed, cotangent, packed, part)
    second = torch.arange(LENGTH)[part] >= BOUNDARY
    same = all(torch.equal(a[second], b[second]) for a, b in zip(before, after, strict=True))
    leaked = bool(after[1][~second].abs().max() > 0) if (~second).any() else False
    differs = bool((before[0][~second] != after[0][~second]).any()) if (~second).any() else False
    flags = torch.tensor([float(not same), float(leaked), float(differs), float(reads.count)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return {
        "model": name, "layout": layout, "second_changed": bool(flags[0]), "gradient_leaked": bool(flags[1]),
        "first_changed": bool(flags[2]), "host_reads": int(flags[3]),
    }  # fmt: skip


def sent_bytes(tokens_per_rank: int) -> dict:
    """Bytes of one all-GDN layer, forward and backward, under CP 4."""
    size = 4
    model = tiny(HydraConfig(), ((),), num_layers=1)
    gpt = build_gpt_model(model, RunConfig(precision="fp32", parallel=ParallelConfig(context=size)))
    canonical_access.load(gpt, canonical_weights(model))
    length = tokens_per_rank * size
    packed = PackedSequence((0, length), cp_rank=dist.get_rank(), cp_size=size)
    attention = gpt.decoder.layers[0].self_attention
    hidden = torch.randn(tokens_per_rank, 1, model.hidden_size, requires_grad=True)
    with counted_bytes() as sent:
        out, _ = attention(hidden, packed_seq_params=packed)
        out.sum().backward()
    channels = model.num_query_heads * model.head_dim
    # q, k, v, gate and output: each goes to the other ranks and, in the backward, returns
    all_to_all = 2 * 5 * tokens_per_rank * channels * 4 * (size - 1) // size
    return {"tokens_per_rank": tokens_per_rank, "sent": sent["bytes"], "all_to_all": all_to_all}


def main(selection: str) -> None:
    """Run everything, with isolation for ``fast`` or ``full``; rank 0 prints one JSON line for each."""
    results = []
    for layout in ("one rank", *LAYOUTS):
        with groups(LAYOUTS.get(layout, ParallelConfig())):
            results += [isolation(name, layout) for name, of in CASES[selection] if of == layout]
    with groups(ParallelConfig(context=4)):
        results += [sent_bytes(1024), sent_bytes(8192)]
    if dist.get_rank() == 0:
        print("\n".join(map(json.dumps, results)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
