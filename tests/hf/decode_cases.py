"""Fused decode steps against their twin, the plain layers: on a GPU, or in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.hf.decode_cases quick    # on a CPU
TRITON_INTERPRET=1 python -m tests.hf.decode_cases all      # minutes
"""

from __future__ import annotations

import copy
import sys
from unittest import mock

import torch
from transformers import DynamicCache, StaticCache

from megatron_hydra.hf import decode_hydrahead as decode
from megatron_hydra.hf import modeling_hydrahead as modeling
from tests.hf.models import ALL, DENSE, HEADS, MIXED, make_model, tokens

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Relative error bounds. On a GPU sums have another order, so the bound in fp32 is ten times as large. In bf16
the models' own rounding is some percent: see :func:`no_worse`.
"""
MODELS = {
    "head": (MIXED, {}, {}),
    "without-fa-or-gdn": (HEADS, {}, {"intermediate_size": 20}),  # rows of the product are padded
    "gqa": (MIXED, {"gdn_kv": "gqa", "fa_rotary_every": 2}, {}),
    "shared": (MIXED, {"qkv": "shared"}, {}),
    "shared-gqa": (MIXED, {"qkv": "shared", "gdn_kv": "gqa"}, {}),
    "all-gdn": ([[]] * 3, {}, {}),
    "dense": (ALL, DENSE, {}),
    "biases": (
        MIXED,
        {"fa_position": "both", "fa_gate_bias": True, "gdn_gate": False, "conv_width": 2},
        {"attention_bias": True, "out_bias": True, "qk_norm": False},
    ),
    "bare": (
        MIXED,
        {"fusion": "concat", "fusion_norm": "none", "short_conv": False, "gdn_position": "none",
         "fa_gate": False, "conv_width": 1},
        {},
    ),
    "one-tap": (MIXED, {"conv_width": 1}, {"head_dim": 24}),
    "wide": (
        [[0, 1, 8], [5]],
        {},
        {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128},
    ),
}  # fmt: skip


def model_of(kind, device, dtype):
    heads, hydra, changes = MODELS[kind]
    model = make_model(heads, hydra, **changes)
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("gdn_A_log", "gdn_dt_bias")):
            parameter.data = parameter.data.float()
    return model


def filled(model, name, padding, device, length=9, room=8):
    """A cache of two prompts; the first one has padding on the left."""
    ids = tokens(2, length).to(device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    if name == "static":
        cache = StaticCache(config=model.config, max_cache_len=length + room)
    else:
        cache = DynamicCache(config=model.config)
    with torch.no_grad(), mock.patch.object(modeling, "prompt_usable", return_value=False):
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def memories(cache):
    """All tensors of a cache, by layer and name."""
    for number, layer in enumerate(cache.layers):
        for name in (*layer.STORES, *layer.MEMORIES):
            tensor = getattr(layer, name)
            if tensor is not None:
                used = tensor[:, :, : int(layer.length)] if name in layer.STORES else tensor
                yield f"layer {number}: {name}", used


def own_memory(cache):
    """Assert that no tensor of a cache is a view, which would keep a whole prompt's projections in memory."""
    for number, layer in enumerate(cache.layers):
        for name in (*layer.STORES, *layer.MEMORIES):
            if (tensor := getattr(layer, name)) is not None:
                held = tensor.untyped_storage().nbytes()
                assert held == tensor.nbytes, f"layer {number}: {name} keeps {held} bytes"


def close(got, want, dtype, what):
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))
    limit = TOLERANCE[dtype] * (10 if got.is_cuda and dtype == torch.float32 else 1)
    assert error < limit, f"{what} is off by {error:.1e}"


def no_worse(got, plain, want, what):
    """Assert that a result is as near to fp32 as the layers in its dtype; the interpreter truncates to bf16."""
    errors = [
        float((x.double() - want.double()).norm() / want.double().norm()) for x in (got, plain)
    ]
    factor = 2.0 if got.is_cuda else 3.0
    assert errors[0] < factor * errors[1], f"{what}: {errors[0]:.1e}, by the layers {errors[1]:.1e}"


def both(model, kernels, token, fused, plain, forward=None):
    """Logits of a step by the fused kernels and by the layers.

    Args:
        kernels: module and name of what every layer must call in the fused step.
        forward: the fused step, if it is not the model's own.
    """
    with torch.no_grad():
        with mock.patch.object(*kernels, wraps=getattr(*kernels)) as ran:
            got = (forward or model)(token, past_key_values=fused).logits
        assert ran.call_count == len(model.model.layers)
        with mock.patch.object(modeling, "usable", return_value=False):
            want = model(token, past_key_values=plain).logits
    return got, want


def check(kind, name, padding, steps, device, dtype):
    """Run some steps by the fused kernels and by the layers, from the same cache."""
    model = model_of(kind, device, dtype)
    # Enough keys for several programs, and a store that is nearly empty.
    length, room = (900, 3000) if kind == "wide" else (9, 8)
    fused = filled(model, name, padding, device, length, room)
    plain = copy.deepcopy(fused)
    wide = copy.deepcopy(model).float()
    truth = filled(wide, name, padding, device, length, room)
    for step in range(steps):
        token = tokens(2, 1, seed=step).to(device)
        got, want = both(model, (modeling, "decode"), token, fused, plain)
        what = f"{kind}, {name}, {padding=}, step {step}"
        close(got, want, dtype, what)
        if dtype != torch.float32:
            with torch.no_grad(), mock.patch.object(modeling, "usable", return_value=False):
                true = wide(token, past_key_values=truth).logits
            no_worse(got, want, true, what)
        for (part, a), (_, b) in zip(memories(fused), memories(plain), strict=True):
            close(a, b, dtype, f"{what}, {part}")


def check_prompt(kind, name, padding, device, dtype):
    """A prompt in two calls, by the fused kernels and by the layers: compare all logits and caches."""
    model = model_of(kind, device, dtype)
    length = 700 if kind == "wide" else 21
    ids = tokens(2, length).to(device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    results = []
    for fused in (True, False):
        if name == "static":
            cache = StaticCache(config=model.config, max_cache_len=length)
        else:
            cache = DynamicCache(config=model.config)
        patch = {"wraps": modeling.prompt_usable} if fused else {"return_value": False}
        with (
            torch.no_grad(),
            mock.patch.object(modeling, "prompt_usable", **patch),
            mock.patch.object(modeling, "read", wraps=modeling.read) as ran,
        ):
            logits = []
            for part in (slice(0, 17), slice(17, length)):
                call = {"attention_mask": mask[:, part], "past_key_values": cache}
                logits.append(model(ids[:, part], **call).logits)
                own_memory(cache)
        assert bool(ran.call_count) == (fused and not model.model.layers[0].self_attn.tied)
        results.append((torch.cat(logits, 1), cache))
    (got, fused_cache), (want, plain_cache) = results
    what = f"prompt of {kind}, {name}, {padding=}"
    real = mask.bool()
    close(got[real], want[real], dtype, what)
    for (part, a), (_, b) in zip(memories(fused_cache), memories(plain_cache), strict=True):
        close(a, b, dtype, f"{what}, {part}")


QUICK = [("without-fa-or-gdn", "static", 3, 1), ("without-fa-or-gdn", "dynamic", 0, 1)]
CASES = [
    ("head", "dynamic", 0, 2),
    ("head", "dynamic", 3, 2),
    *((kind, "static", 3, 1) for kind in MODELS if kind != "wide"),  # slow in the interpreter
]
QUICK_COMPILED = ["without-fa-or-gdn"]
COMPILED = ["without-fa-or-gdn", "shared-gqa", "biases", "bare"]
ON_GPU = [
    (kind, name, padding, 3)
    for kind in ("without-fa-or-gdn", "shared-gqa", "biases", "bare", "wide")
    for name, padding in (("dynamic", 0), ("static", 3))
]


def check_full(device, dtype):
    """A token that does not fit into a static cache is an error."""
    model = model_of("head", device, dtype)
    cache = StaticCache(config=model.config, max_cache_len=10)
    with torch.no_grad():
        model(tokens(1, 9).to(device), past_key_values=cache)
        for _ in range(2):
            logits = model(tokens(1, 1).to(device), past_key_values=cache).logits
            assert bool(logits.isfinite().all()) == (int(cache.layers[0].length) <= 10)


def check_compiled(kind, name, backend, steps):
    """Steps of a padded cache by torch.compile in one graph, against the layers."""
    model, device = model_of(kind, torch.device("cpu"), torch.float32), torch.device("cpu")
    compiled = filled(model, name, 3, device)
    plain = copy.deepcopy(compiled)
    torch.compiler.reset()
    forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    for step in range(steps):
        token = tokens(2, 1, seed=step)
        got, want = both(model, (decode, "_launch"), token, compiled, plain, forward)
        what = f"{kind}, {name}, compiled by {backend}, step {step}"
        close(got, want, torch.float32, what)
        for (part, a), (_, b) in zip(memories(compiled), memories(plain), strict=True):
            close(a, b, torch.float32, f"{what}, {part}")


def copied(values):
    """Copies of an operator's arguments."""
    if isinstance(values, (list, tuple)):
        return [copied(x) for x in values]
    return values.clone() if isinstance(values, torch.Tensor) else values


def padded_rows(x):
    """The same values; behind each row there are 16 NaN, as if inductor had padded the rows."""
    room = x.new_full((*x.shape[:-1], x.shape[-1] + 16), float("nan"))
    room[..., : x.shape[-1]] = x
    return room[..., : x.shape[-1]]


def check_operator(kind, name):
    """The operator of compiled steps writes what it declares, also if inductor has padded the rows."""
    device = torch.device("cpu")
    model = model_of(kind, device, torch.float32)
    cache = filled(model, name, 3, device)
    calls = []

    def recorded(*args, **settings):
        before = copied(args)
        calls.append((before, settings, launch(*args, **settings), copied(args)))
        return calls[-1][2]

    launch = decode._launch
    with torch.no_grad(), mock.patch.object(decode, "_launch", side_effect=recorded):
        model(tokens(2, 1), past_key_values=cache)
    assert len(calls) == len(model.model.layers)
    names = [a.name for a in decode._OPERATOR._schema.arguments if not a.kwarg_only]
    for number, (before, settings, want, after) in enumerate(calls):
        args, what = copied(before), f"layer {number} of {kind}"
        args[0] = padded_rows(args[0])
        assert torch.equal(decode._OPERATOR(*args, **settings), want), what
        for argument, got, old, new in zip(names, args, before, after, strict=True):
            triples = (
                zip(got, old, new, strict=True) if isinstance(got, list) else [(got, old, new)]
            )
            for a, b, c in triples:
                if isinstance(a, torch.Tensor):
                    assert torch.equal(a, c), f"{what}: {argument}"
                    assert torch.equal(a, b) != (argument in decode.WRITTEN), f"{what}: {argument}"


if __name__ == "__main__":
    everything = sys.argv[1] == "all"
    cases = [(torch.float32, *case) for case in (CASES if everything else QUICK)]
    if everything:
        cases += [(torch.bfloat16, *case) for case in CASES if case[0] == "head"]
    for dtype, *case in cases:
        check(*case, torch.device("cpu"), dtype)
        check_prompt(*case[:3], torch.device("cpu"), dtype)
        print(dtype, *case, flush=True)
    for kind in COMPILED if everything else QUICK_COMPILED:
        check_operator(kind, "static")
        check_compiled(kind, "static", *(("inductor", 3) if everything else ("aot_eager", 1)))
        print("compiled", kind, flush=True)
    if everything:
        check_full(torch.device("cpu"), torch.float32)
        print("no room", flush=True)
