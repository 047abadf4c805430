"""Worker: every layout's loss and gradients against one rank, whole models, in four processes.

test_layouts.py runs it. Rank 0 prints one JSON line of relative errors for each case. On a machine with four
GPUs it runs over NCCL. ``--bf16`` in front selects bf16 and models eight times as large, so that the kernels of
GPUs (FLA, cuDNN) run:

    torchrun --standalone --nproc-per-node 4 -m tests.parallel.layouts [--bf16] fast
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_hydra.parallel import platform

from megatron.core import parallel_state  # isort: skip
from megatron.core.distributed import (  # isort: skip
    DistributedDataParallel,
    DistributedDataParallelConfig,
)

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import ParallelConfig, RecomputeConfig, RunConfig
from megatron_hydra.model.forward import final_hidden_states
from megatron_hydra.model.layer_spec import build_gpt_model
from megatron_hydra.ops.linear_distillation_loss import linear_distillation_loss
from megatron_hydra.parallel.gradients import finalize_gradients
from megatron_hydra.parallel.packed_sequence import PackedSequence
from megatron_hydra.parallel.world import World
from megatron_hydra.transfer.verb import lm_head_weight, replicate_sequence
from tests import canonical_access

BF16 = "--bf16" in sys.argv
SIZE = 8 if BF16 else 1  # factor of lengths, head dimension and width
LENGTH, VOCABULARY = 96 * SIZE, 64

DOCUMENTS = {
    "one": (0, LENGTH),
    # documents shorter and longer than a shard, over three shards, and of one token
    "packed": (0, *(SIZE * b + 1 for b in (4, 5, 39, 40, 89)), LENGTH),
    "aligned": tuple(SIZE * b for b in (0, 24, 48, 72, 96)),
}


def tiny(hydra: HydraConfig | None, fa: tuple | None, **changes) -> ModelConfig:
    """A model small enough to run hundreds of times."""
    base = ModelConfig(
        family="qwen3", num_layers=2, hidden_size=32 * SIZE, ffn_hidden_size=48 * SIZE, vocab_size=VOCABULARY,
        num_query_heads=8, num_kv_heads=4, head_dim=8 * SIZE, qk_norm=True, tie_embeddings=True,
        # A first token's GDN output is β(q·k)v, which may be near zero by chance. Its RMSNorm then magnifies
        # one rounding error (1 ulp of the weights: 3e-4 of a gradient at eps 1e-6).
        norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    return dataclasses.replace(base, hydra=hydra, full_attention_heads=fa, **changes)


EVERY = (tuple(range(8)),) * 2

MODELS = {
    "dense": tiny(None, None),
    "hydra": tiny(HydraConfig(), ((1, 6), (0, 1, 5))),
    "no-fa-layer": tiny(HydraConfig(), ((), (3,))),
    "all-fa-layer": tiny(HydraConfig(), (tuple(range(8)), (2,))),
    # no number is a multiple of the ranks: 6 heads, 2 KV heads, 3 or 1 FA heads
    "uneven": tiny(HydraConfig(), ((0, 1, 4), (5,)), num_query_heads=6, num_kv_heads=2),
    "one-kv": tiny(HydraConfig(gdn_kv="gqa"), ((0, 3), (1, 2, 7)), num_kv_heads=1),
    "one-kv-dense": tiny(None, None, num_kv_heads=1),
    "gqa-bias": tiny(
        HydraConfig(gdn_kv="gqa", fusion="gated"),
        ((0,), (1, 2)),
        num_kv_heads=2,
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
        tie_embeddings=False,
    ),
    "plain": tiny(
        HydraConfig(
            fusion="concat",
            fusion_norm="none",
            fa_position="both",
            short_conv=False,
            gdn_position="none",
            fa_gate=False,
            gdn_gate=False,
        ),
        ((4,), (0, 7)),
    ),
    # shared k and v: a group with both kinds, one with FA heads only, one with GDN heads only
    "shared": tiny(HydraConfig(qkv="shared", fa_rotary_every=2), ((1, 6, 7), (0, 1, 5))),
    "shared-gqa": tiny(
        HydraConfig(qkv="shared", gdn_kv="gqa"),
        ((0,), (1, 2)),
        num_kv_heads=2,
        qk_norm=False,
        qkv_bias=True,
    ),
    "shared-one-kv": tiny(HydraConfig(qkv="shared"), (tuple(range(8)), (3,)), num_kv_heads=1),
    "shared-uneven": tiny(
        HydraConfig(qkv="shared", gdn_kv="gqa"), ((0, 1, 4), ()), num_query_heads=6, num_kv_heads=2
    ),
    "shared-parallel": tiny(HydraConfig(qkv="shared", mixer="parallel"), EVERY),
    # a decay for each channel; the second model has no multiple of the ranks
    "kda": tiny(HydraConfig(linear="kda"), ((1, 6), (0, 1, 5))),
    "kda-uneven": tiny(
        HydraConfig(linear="kda", qkv="shared", gdn_kv="gqa"),
        ((0, 1, 4), ()),
        num_query_heads=6,
        num_kv_heads=2,
    ),
    "kda-token": tiny(HydraConfig(linear="kda", mixer="token", window=7), EVERY),
    # both kinds in every head; windows are shorter or longer than a context-parallel shard
    "parallel": tiny(HydraConfig(mixer="parallel"), EVERY),
    "parallel-gated": tiny(
        HydraConfig(mixer="parallel", fusion="gated", gdn_kv="gqa"),
        EVERY,
        num_kv_heads=2,
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
    ),
    "token": tiny(HydraConfig(mixer="token", window=7), EVERY),
    "token-wide": tiny(HydraConfig(mixer="token", window=60, fusion="gated"), EVERY),
    # 6 heads over 4 ranks, one KV head that all read
    "token-uneven": tiny(
        HydraConfig(mixer="token", window=3, gdn_kv="gqa", fa_position="rope"),
        (tuple(range(6)),) * 2,
        num_query_heads=6,
        num_kv_heads=1,
    ),
}

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sp": ParallelConfig(tensor=2, sequence=True),
    "tp4-sp": ParallelConfig(tensor=4, sequence=True),
    "tp2-sp-seq": ParallelConfig(tensor=2, sequence=True, fa_partition="sequence"),
    "tp4-sp-seq": ParallelConfig(tensor=4, sequence=True, fa_partition="sequence"),
    "cp2": ParallelConfig(context=2),
    "cp4": ParallelConfig(context=4),
    "tp2-cp2": ParallelConfig(tensor=2, context=2),
    "tp2-sp-cp2": ParallelConfig(tensor=2, sequence=True, context=2),
    "tp2-seq": ParallelConfig(tensor=2, fa_partition="sequence"),
    "tp2-cp2-seq": ParallelConfig(tensor=2, context=2, fa_partition="sequence"),
    "tp2-sp-cp2-seq": ParallelConfig(tensor=2, sequence=True, context=2, fa_partition="sequence"),
}

FAST = [
    ("hydra", "tp2-sp", "packed"), ("hydra", "cp4", "packed"), ("hydra", "tp2-sp-cp2-seq", "packed"),
    ("hydra", "tp4-sp-seq", "one"), ("dense", "tp2-cp2", "packed"), ("uneven", "tp4-sp", "packed"),
    ("uneven", "tp4-sp-seq", "aligned"), ("one-kv", "tp2", "packed"), ("one-kv-dense", "tp2-sp-cp2", "one"),
    ("no-fa-layer", "tp2-sp-cp2", "one"), ("all-fa-layer", "tp2-sp-seq", "packed"),
    ("gqa-bias", "tp2-sp-cp2-seq", "packed"), ("gqa-bias", "tp4-sp", "aligned"), ("plain", "cp2", "aligned"),
    ("parallel", "tp2-sp-cp2", "packed"), ("parallel-gated", "tp4-sp", "packed"), ("token", "cp4", "packed"),
    ("hydra", "tp2-cp2-seq", "packed"), ("all-fa-layer", "tp2-seq", "packed"), ("gqa-bias", "tp2-seq", "one"),
    ("token-wide", "cp4", "one"), ("token-wide", "tp2-cp2", "packed"), ("token-uneven", "tp4-sp", "aligned"),
    ("shared", "tp2", "packed"), ("shared", "tp2-sp-cp2-seq", "packed"), ("shared-gqa", "tp2-sp-cp2", "packed"),
    ("shared-uneven", "tp4-sp-seq", "aligned"), ("kda", "tp2-sp-cp2-seq", "packed"),
    ("kda-uneven", "tp4-sp", "packed"), ("kda-token", "cp4", "packed"),
]  # fmt: skip


def possible(model: str, layout: str) -> bool:
    """Whether a layout supports a model: ``sequence`` does not if every head is both FA and GDN."""
    by_sequence = LAYOUTS[layout].fa_partition == "sequence"
    return not (by_sequence and MODELS[model].switches.mixes_in_every_head)


FULL = [(m, p, d) for m in MODELS for d in DOCUMENTS for p in LAYOUTS if possible(m, p)]


def canonical_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights with slow decays, which show any leak or lost state."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for key, shape in canonical_shapes(model).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float32) * 0.2 / SIZE**0.5
        if key.endswith(("layernorm.weight", "_norm", "gamma")):
            value = 1 + value
        elif key.endswith("dt_bias"):
            value = value - 6.0  # half-lives of hundreds of tokens
        weights[key] = value
    return weights


RECOMPUTE = {
    "none": RecomputeConfig("none"),
    "attention": RecomputeConfig("selective", ("attention",)),
    "parts": RecomputeConfig("selective", ("fa", "gdn", "tail", "mlp")),
    "full": RecomputeConfig("full"),
}


def run_case(
    model: ModelConfig, parallel: ParallelConfig, cu: tuple[int, ...], recompute: str, ddp: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per token and canonical gradients of one forward and backward."""
    precision = "bf16" if BF16 else "fp32"
    run = RunConfig(precision=precision, parallel=parallel, recompute=RECOMPUTE[recompute])  # type: ignore[arg-type]
    gpt = build_gpt_model(model, run)
    canonical_access.load(gpt, canonical_weights(model))
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)
    mask = (torch.rand(LENGTH, generator=generator) > 0.2).float()
    tokens, labels, mask = (x.to(platform.device()) for x in (tokens, labels, mask))

    cp_rank, cp_size = parallel_state.get_context_parallel_rank(), parallel.context
    packed = PackedSequence(cu, cp_rank=cp_rank, cp_size=cp_size, device=platform.device())
    shard = slice(cp_rank * LENGTH // cp_size, (cp_rank + 1) * LENGTH // cp_size)
    wrapped = DistributedDataParallel(
        gpt.config, DistributedDataParallelConfig(overlap_grad_reduce=False), gpt
    ) if ddp else gpt  # fmt: skip
    if ddp:
        wrapped.zero_grad_buffer()
    hidden = final_hidden_states(gpt, tokens[shard], packed)
    world = dataclasses.replace(
        World(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, False), sequence_parallel=parallel.sequence
    )
    loss = linear_distillation_loss(
        replicate_sequence(hidden, world, wants_gradient=True), lm_head_weight(gpt),
        labels[shard], mask[shard], chunk_tokens=20,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    ).loss  # fmt: skip
    loss.backward()
    total = loss.detach().clone()
    if ddp:
        finalize_gradients([wrapped])
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
        replicas = parallel_state.get_data_parallel_world_size()
        grads = canonical_access.gather(gpt, lambda p: p.main_grad / replicas)
    else:
        grads = canonical_access.gather(gpt, lambda p: p.grad, of_the_world=False)
    return float(total / mask.sum()), grads


@contextmanager
def groups(layout: ParallelConfig) -> Iterator[None]:
    """Megatron's groups for a layout, made once for each layout, because their threads stay until the end."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        platform.bind_process_to_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(platform.communication_backend())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor, context_parallel_size=layout.context
    )
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()


def references(cases: list[str]) -> dict[tuple[str, str], tuple[float, dict]]:
    """Loss and gradients of one rank, by model and documents; the ranks share this work."""
    needed = sorted({(case.split("/")[0], case.split("/")[2]) for case in cases})
    mine = {}
    with groups(ParallelConfig()):
        for m, d in needed[dist.get_rank() :: dist.get_world_size()]:
            loss, grads = run_case(MODELS[m], ParallelConfig(), DOCUMENTS[d], "none", ddp=False)
            mine[m, d] = loss, {key: canonical_access.pack(grad) for key, grad in grads.items()}
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return {
        case: (loss, {key: canonical_access.unpack(grad) for key, grad in grads.items()})
        for part in everywhere
        for case, (loss, grads) in part.items()
    }


def compare(name: str, recompute: str, reference: tuple[float, dict]) -> dict:
    """Relative errors of one case, under the groups of its layout."""
    model, layout, documents = name.split("/")
    loss, grads = reference
    other_loss, other = run_case(
        MODELS[model], LAYOUTS[layout], DOCUMENTS[documents], recompute, ddp=True
    )
    assert set(other) == set(grads), set(other) ^ set(grads)
    # A key bias cannot change a softmax without rotary, so its exact gradient is zero. If a parameter's
    # gradient is smaller than a share of the whole gradient, the error is relative to this share.
    floor = 1e-3 * float(torch.stack([grad.norm() for grad in grads.values()]).norm())
    errors = {
        key: float((other[key] - grads[key]).norm() / grads[key].norm().clamp_min(floor))
        for key in grads
    }
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else 1e9)
    return {
        "case": f"{name}/{recompute}", "loss": loss, "loss_error": abs(other_loss - loss) / loss,
        "gradient_error": errors[worst], "worst": worst,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Run ``fast``, ``full``, or cases named ``model/layout/documents``; ``--bf16``: see above."""
    arguments = [argument for argument in arguments if argument != "--bf16"]
    if arguments == ["full"]:
        cases = ["/".join(case) for case in FULL]
    elif arguments == ["fast"]:
        cases = ["/".join(case) for case in FAST]
    else:
        cases = arguments
    expected = references(cases)
    for layout in LAYOUTS:
        chosen = [(i, case) for i, case in enumerate(cases) if case.split("/")[1] == layout]
        if not chosen:
            continue
        with groups(LAYOUTS[layout]):
            for i, case in chosen:
                model, _, documents = case.split("/")
                recompute = list(RECOMPUTE)[i % len(RECOMPUTE)]
                result = compare(case, recompute, expected[model, documents])
                if dist.get_rank() == 0:
                    print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
