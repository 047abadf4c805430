"""The exported model: its delta rule, its equality with the teacher, its cache and its padding."""

from __future__ import annotations

import functools
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_hydra.config.model import (
    BEFORE_THE_SWITCH,
    HydraConfig,
    stored_switches,
)
from megatron_hydra.hf import modeling_hydrahead as modeling
from megatron_hydra.hf.configuration_hydrahead import SWITCHES, HydraHeadConfig
from tests.hf.models import (
    ALL,
    DENSE,
    HEADS,
    KINDS,
    MIXED,
    SHAPE,
    close,
    export,
    flattened,
    generator,
    make_model,
    rope,
    tokens,
)

# -- the delta rule -------------------------------------------------------------------------------


def rule_inputs(length, heads=3, d=16, dv=16, dtype=torch.float32, linear="gdn"):
    g = generator(length)
    q, k = (torch.randn(2, length, heads, d, generator=g, dtype=dtype) for _ in range(2))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v = torch.randn(2, length, heads, dv, generator=g, dtype=dtype)
    # The decay is slow: a fast one would hide mistakes after a few tokens.
    decays = heads * d if linear == "kda" else heads
    log_alpha = -0.02 * torch.rand(2, length, decays, generator=g, dtype=dtype)
    beta = torch.rand(2, length, heads, generator=g, dtype=dtype)
    state = torch.randn(2, heads, d, dv, generator=g, dtype=dtype)
    return q, k, v, log_alpha, beta, state


def float64_recurrence(q, k, v, log_alpha, beta, state):
    q, k, v, log_alpha, beta, state = (x.double() for x in (q, k, v, log_alpha, beta, state))
    outputs = []
    for t in range(q.shape[1]):
        identity = torch.eye(q.shape[-1], dtype=torch.float64)
        outer = k[:, t, :, :, None] * k[:, t, :, None, :]
        step = identity - beta[:, t, :, None, None] * outer
        decays = log_alpha[:, t].unflatten(-1, (q.shape[2], -1)).exp()[..., None]
        state = step @ (decays * state)
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((state.transpose(-1, -2) @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1) * q.shape[-1] ** -0.5, state


@pytest.mark.parametrize("length", [1, 3, 64, 65, 150])
@pytest.mark.parametrize("rule", ["chunked", "recurrent"])
@pytest.mark.parametrize("linear", ["gdn", "kda"])
def test_delta_rule_equals_the_float64_recurrence(length, rule, linear):
    inputs = rule_inputs(length, linear=linear)
    expected, expected_state = float64_recurrence(*inputs)
    output, state = getattr(modeling, f"{rule}_gated_delta_rule")(*inputs)
    close(output.double(), expected, 2e-6)
    close(state.double(), expected_state, 5e-6)


def test_delta_rule_survives_identical_keys():
    """Identical keys with full write strength give the worst-conditioned system of a chunk."""
    q, _, v, log_alpha, _, state = rule_inputs(128)
    k = torch.zeros_like(q)
    k[..., 0] = 1.0
    beta, log_alpha = torch.ones_like(log_alpha), torch.zeros_like(log_alpha)
    expected, _ = float64_recurrence(q, k, v, log_alpha, beta, state)
    output, _ = modeling.chunked_gated_delta_rule(q, k, v, log_alpha, beta, state)
    close(output.double(), expected, 1e-5)


def test_delta_rule_equals_fla_and_transformers():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    q, k, v, log_alpha, beta, state = rule_inputs(150)
    output, final = modeling.chunked_gated_delta_rule(q, k, v, log_alpha, beta, state)
    fla_output, fla_final = naive.naive_recurrent_gated_delta_rule(
        q, k, v, beta, log_alpha, initial_state=state, output_final_state=True
    )
    close(output, fla_output, 2e-6)
    close(final, fla_final, 5e-6)

    # Its module takes FLA's kernels if FLA can be imported; they need a driver.
    blocked = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "fla"
    }
    sys.modules["fla"] = None
    try:
        peer = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    finally:
        sys.modules.pop("fla")
        sys.modules.update(blocked)
    peer_output, peer_final = peer.torch_chunk_gated_delta_rule(
        q, k, v, g=log_alpha, beta=beta, initial_state=state, output_final_state=True
    )
    close(output, peer_output, 2e-6)
    close(final, peer_final, 5e-6)


@pytest.mark.parametrize("linear", ["gdn", "kda"])
def test_delta_rule_gradients_equal_those_of_the_recurrence(linear):
    inputs = [x.requires_grad_() for x in rule_inputs(70, linear=linear)]
    weights = torch.randn(2, 70, 3, 16, generator=generator(9))
    gradients = []
    for rule in (modeling.chunked_gated_delta_rule, modeling.recurrent_gated_delta_rule):
        output, state = rule(*inputs)
        loss = (output * weights).sum() + state.square().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for chunked, recurrent in zip(*gradients, strict=True):
        close(chunked, recurrent, 1e-4 * float(recurrent.abs().max()))


@pytest.mark.parametrize("rule", ["chunked", "recurrent"])
def test_autocast_leaves_the_delta_rule_and_its_gradients_in_fp32(rule):
    results = []
    for enabled in (False, True):
        inputs = [x.requires_grad_() for x in rule_inputs(70)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, state = getattr(modeling, f"{rule}_gated_delta_rule")(*inputs)
            loss = output.square().sum() + state.square().sum()
        results.append((output, state, *torch.autograd.grad(loss, inputs)))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype == torch.float32
        close(cast, plain, 1e-6 * float(plain.detach().abs().max()))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_under_autocast_the_rule_gets_what_fast_kernels_take(qk_norm, monkeypatch):
    """The gradient also equals that of fp32, up to rounding to 16 bits."""
    model, ids = make_model(qk_norm=qk_norm), tokens(2, 70)
    rule, seen, gradients = modeling.gated_delta_rule, [], []

    def noted(*arguments, **options):
        seen.append([x.dtype for x in arguments[:5]])
        return rule(*arguments, **options)

    monkeypatch.setattr(modeling, "gated_delta_rule", noted)
    for enabled in (False, True):
        model.zero_grad()
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        wide = [torch.float32] * 2
        assert seen == [[torch.bfloat16 if enabled else torch.float32] * 3 + wide] * 3
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.05


# -- against the teacher --------------------------------------------------------------------------


def as_dense(teacher, **fields):
    """The HydraHead model whose heads are all FA, with the teacher's weights, strictly loaded."""
    own = {name: getattr(teacher.config, name) for name in SHAPE}
    own["head_dim"] = teacher.model.layers[0].self_attn.head_dim
    config = HydraHeadConfig(
        **own,
        rms_norm_eps=teacher.config.rms_norm_eps,
        rope_parameters=teacher.config.rope_parameters,
        hydra=DENSE,
        **fields,
    )
    renamed = {}
    for name, tensor in teacher.state_dict().items():
        for part in ("q", "k", "v"):
            name = name.replace(f".{part}_proj.", f".fa_{part}_proj.")
            name = name.replace(f".{part}_norm.", f".fa_{part}_norm.")
        renamed[name] = tensor
    model = modeling.HydraHeadForCausalLM(config).eval()
    model.load_state_dict(renamed, strict=True)
    return model


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_all_full_attention_equals_qwen3(kind):
    torch.manual_seed(0)
    teacher = randomised(Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters=rope(kind))))
    ids = tokens(2, 50)
    with torch.no_grad():
        close(as_dense(teacher)(ids).logits, teacher(ids).logits, 1e-5)


def test_all_full_attention_equals_qwen2_and_llama():
    ids = tokens(2, 50)
    shape = {**SHAPE, "hidden_size": 96}
    qwen2_shape = {k: v for k, v in shape.items() if k != "head_dim"}
    torch.manual_seed(0)
    qwen2 = randomised(Qwen2ForCausalLM(Qwen2Config(**qwen2_shape, rope_parameters=rope())))
    hydra = as_dense_of(qwen2, shape, family="qwen2", qk_norm=False, attention_bias=True)
    with torch.no_grad():
        close(hydra(ids).logits, qwen2(ids).logits, 1e-5)
    llama = randomised(
        LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, rope_parameters=rope("llama3")))
    )
    hydra = as_dense_of(
        llama, shape, family="llama", qk_norm=False, attention_bias=True, out_bias=True
    )
    with torch.no_grad():
        close(hydra(ids).logits, llama(ids).logits, 1e-5)


def as_dense_of(teacher, shape, **fields):
    for name, value in shape.items():
        setattr(teacher.config, name, value)
    return as_dense(teacher, **fields)


# -- the hybrid layer against its equations -------------------------------------------------------


class Equations:
    """Design §2, computed head by head and token by token for one sequence ``[T, D]``."""

    def __init__(self, attention, x):
        self.a, self.x, self.config, self.s = attention, x, attention.config, attention.switches
        self.d, self.length = self.config.head_dim, x.shape[0]
        self.group = self.config.num_attention_heads // self.config.num_key_value_heads
        self.window = self.s["window"] if self.s["mixer"] == "token" else 0

    def norm(self, v, weight=1.0):
        return weight * v / (v.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()

    def turn(self, values):
        d = self.d
        frequencies = 1.0 / self.config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2) / d)
        rows = []
        for t, v in enumerate(values):
            angle = torch.cat((t * frequencies, t * frequencies))
            rows.append(v * angle.cos() + torch.cat((-v[d // 2 :], v[: d // 2])) * angle.sin())
        return torch.stack(rows)

    def rows(self, name, index):
        linear, part = getattr(self.a, name), slice(index * self.d, (index + 1) * self.d)
        return self.x @ linear.weight[part].T + (0 if linear.bias is None else linear.bias[part])

    def conv(self, name, index, values):
        weight = getattr(self.a, name).weight[index * self.d : (index + 1) * self.d, 0]
        width = weight.shape[1]
        padded = torch.cat((torch.zeros(width - 1, self.d), values))
        return torch.stack([(padded[t : t + width].T * weight).sum(1) for t in range(self.length)])

    def fa_head(self, i, kv):
        q, k, v = (self.part("fa", p, n) for p, n in (("q", i), ("k", kv), ("v", kv)))
        if self.config.qk_norm:
            q, k = self.norm(q, self.norm_of("fa", "q")), self.norm(k, self.norm_of("fa", "k"))
        every = self.s["fa_rotary_every"]
        chosen = range(every, self.config.num_hidden_layers + 1, every) if every else ()
        if self.s["fa_position"] in ("rope", "both") or self.a.layer_idx + 1 in chosen:
            q, k = self.turn(q), self.turn(k)
        if self.s["fa_position"] in ("log-scale", "both"):
            t, a = torch.arange(self.length), torch.tensor(self.s["log_scale_a"])
            if self.window:
                t = t.clamp(max=self.window - 1)
            q = q * ((t + a).log() / a.log())[:, None]
        unseen = torch.ones(self.length, self.length).triu(1).bool()
        if self.window:
            unseen |= torch.ones(self.length, self.length).tril(-self.window).bool()
        out = (q @ k.T / self.d**0.5).masked_fill(unseen, -1e30).softmax(-1) @ v
        return out * 2 * self.rows("fa_gate_proj", i).sigmoid() if self.s["fa_gate"] else out

    def part(self, branch, part, index):
        """The q of a head, or a k or v that the branch reads, by index."""
        if self.s["qkv"] == "shared" and part != "q":
            heads = getattr(self.a, f"{branch}_heads")
            own = branch == "gdn" and self.s["gdn_kv"] == "mha"
            groups = [h // self.group for h in heads]
            return self.rows(f"{part}_proj", (groups if own else sorted(set(groups)))[index])
        return self.rows(f"{branch}_{part}_proj", index)

    def norm_of(self, branch, part):
        prefix = "" if self.s["qkv"] == "shared" else f"{branch}_"
        return getattr(self.a, f"{prefix}{part}_norm").weight

    def gdn_input(self, part, index):
        values = self.part("gdn", part, index)
        if self.s["short_conv"]:
            values = self.conv(f"gdn_{part}_conv", index, values)
        if part == "v":
            return values
        if self.config.qk_norm:
            values = self.norm(values, self.norm_of("gdn", part))
        if self.s["gdn_position"] == "rope":
            values = self.turn(values)
        return values / (values.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def gdn_head(self, i, kv):
        q, k, v = self.gdn_input("q", i), self.gdn_input("k", kv), self.gdn_input("v", kv)
        beta = (self.x @ self.a.gdn_b_proj.weight[i]).sigmoid()
        step = self.x @ self.a.gdn_a_proj.weight[i] + self.a.gdn_dt_bias[i]
        alpha = (-self.a.gdn_A_log[i].exp() * torch.nn.functional.softplus(step)).exp()
        state, rows = torch.zeros(self.d, self.d), []
        for now in range(self.length):
            t = now - self.window  # the token that has just left the window, or this one
            if t >= 0:
                state = alpha[t] * (state - beta[t] * torch.outer(k[t], k[t] @ state))
                state = state + beta[t] * torch.outer(k[t], v[t])
            rows.append(state.T @ q[now] / self.d**0.5)
        out = torch.stack(rows)
        return out * 2 * self.rows("gdn_gate_proj", i).sigmoid() if self.s["gdn_gate"] else out

    def output(self):
        heads = self.config.num_attention_heads
        outputs = torch.zeros(self.length, heads, self.d)
        if self.s["mixer"] != "head":
            return self.project(self.fused("fa") + self.fused("gdn"))
        groups = sorted({h // self.group for h in self.a.fa_heads})
        for i, h in enumerate(self.a.fa_heads):
            outputs[:, h] = self.fa_head(i, groups.index(h // self.group))
        groups = sorted({h // self.group for h in self.a.gdn_heads})
        for i, h in enumerate(self.a.gdn_heads):
            kv = i if self.s["gdn_kv"] == "mha" else groups.index(h // self.group)
            outputs[:, h] = self.gdn_head(i, kv)
        if self.s["fusion_norm"] == "rms":
            outputs = self.norm(outputs)
        if self.s["fusion"] != "concat":
            outputs = outputs * self.a.gamma[:, None]
        if self.s["fusion"] == "gated":
            share = heads * (self.x @ self.a.fusion_gate.weight.T).softmax(-1)
            outputs = outputs * share[..., None]
        return self.project(outputs)

    def fused(self, branch):
        """One of each head's two outputs, in a model whose heads have both."""
        outputs = []
        for h in range(self.config.num_attention_heads):
            kv = h if branch == "gdn" and self.s["gdn_kv"] == "mha" else h // self.group
            out = getattr(self, f"{branch}_head")(h, kv)
            if self.s["fusion_norm"] == "rms":
                out = self.norm(out)
            if self.s["fusion"] != "concat":
                out = out * getattr(self.a, f"{branch}_gamma")[h]
            if self.s["fusion"] == "gated":
                logit = self.x @ self.a.fusion_gate.weight[h]
                out = out * 2 * (logit if branch == "fa" else -logit).sigmoid()[:, None]
            outputs.append(out)
        return torch.stack(outputs, 1)

    def project(self, outputs):
        bias = 0 if self.a.o_proj.bias is None else self.a.o_proj.bias
        return outputs.flatten(1) @ self.a.o_proj.weight.T + bias


VARIANTS = [
    {},
    {"fusion": "gated", "fa_position": "both"},
    {"fusion": "concat", "fusion_norm": "none", "fa_position": "rope", "gdn_kv": "gqa"},
    {"fa_gate": False, "gdn_gate": False, "short_conv": False, "fa_position": "none"},
    {"fusion": "concat", "conv_width": 1, "log_scale_a": 7.0},
    {"fusion_norm": "none", "conv_width": 7, "gdn_kv": "gqa"},
    {"fa_gate_bias": True, "gdn_position": "none"},
    {"fa_rotary_every": 1},
    {"fa_rotary_every": 2, "fa_position": "none"},
    {"qkv": "shared"},
    {"qkv": "shared", "gdn_kv": "gqa", "fa_position": "both"},
    {"mixer": "parallel"},
    {"mixer": "parallel", "fusion": "gated", "gdn_kv": "gqa", "fa_position": "both"},
    {"mixer": "token", "window": 4, "qkv": "shared"},
    {"mixer": "token", "window": 4},
    {"mixer": "token", "window": 1, "fusion": "gated", "gdn_kv": "gqa", "fa_position": "rope"},
    {"mixer": "token", "window": 30, "fusion": "concat", "short_conv": False},
    {"mixer": "token", "window": 3, "fusion_norm": "none", "log_scale_a": 7.0},
]


@pytest.mark.parametrize("hydra", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_its_equations(hydra, bias):
    heads = ALL if "mixer" in hydra else HEADS
    model = make_model(heads, hydra, attention_bias=bias, out_bias=bias, qk_norm=not bias)
    x = torch.randn(1, 11, SHAPE["hidden_size"], generator=generator(3))
    context = model.model._context(x, torch.arange(11)[None], None, None)
    for layer in model.model.layers:
        with torch.no_grad():
            close(layer.self_attn(x, context)[0], Equations(layer.self_attn, x[0]).output(), 2e-5)


def test_switches_are_those_of_the_package():
    """hf/ may not import the package, so this test compares the two lists of switches."""
    absent = {name: default for name, (default, _) in SWITCHES.items()}
    newer = {
        name: value for name, value in vars(HydraConfig()).items() if name in BEFORE_THE_SWITCH
    }
    assert absent == {**vars(HydraConfig()), **stored_switches({})}
    assert all(BEFORE_THE_SWITCH[name] != value for name, value in newer.items())


# -- cache, padding, generation -------------------------------------------------------------------

CASES = pytest.mark.parametrize("heads, hydra", KINDS.values(), ids=KINDS)


@CASES
@pytest.mark.parametrize("cuts", [(70, 71, 72, 73, 74), (1, 2, 3), (2, 40, 41, 80), (64,)])
def test_chunked_prefill_and_decode_equal_one_pass(heads, hydra, cuts):
    model, ids = make_model(heads, hydra), tokens(2, 90)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        assert whole.past_key_values is None
        cache, pieces = None, []
        for start, end in zip((0, *cuts), (*cuts, 90), strict=True):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    pieces = torch.cat(pieces, dim=1)
    close(pieces, whole.logits)
    assert torch.equal(pieces.argmax(-1), whole.logits.argmax(-1))


@CASES
@pytest.mark.parametrize(
    "side, block", [("left", 1 << 26), ("right", 1 << 26), ("both", 1 << 26), ("left", 300)]
)
def test_padded_batch_equals_single_sequences(heads, hydra, side, block, monkeypatch):
    """This also holds in chunks, and if the attention mask is built block by block."""
    monkeypatch.setattr(modeling, "MASK_ELEMENTS", block)
    model, lengths, width = make_model(heads, hydra), (2, 75, 90, 31), 90
    ids, mask = torch.full((4, width), 7), torch.zeros(4, width, dtype=torch.long)
    starts = [{"left": width - n, "right": 0, "both": (width - n) // 2}[side] for n in lengths]
    sequences = [tokens(1, n, seed=n) for n in lengths]
    for row, (start, sequence) in enumerate(zip(starts, sequences, strict=True)):
        ids[row, start : start + sequence.shape[1]] = sequence
        mask[row, start : start + sequence.shape[1]] = 1
    with torch.no_grad():
        singles = [model(s).logits[0] for s in sequences]
        whole = model(ids, attention_mask=mask)
        cache, pieces = None, []
        for start, end in ((0, 50), (50, 77), (77, width)):
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            pieces.append(out.logits)
        step = torch.tensor([[3], [4], [5], [6]])
        after = model(
            step,
            attention_mask=torch.cat((mask, torch.ones(4, 1, dtype=torch.long)), dim=1),
            past_key_values=cache,
        ).logits
        for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            close(whole.logits[row, start : start + n], singles[row])
            close(torch.cat(pieces, dim=1)[row, start : start + n], singles[row])
            longer = torch.cat((sequences[row], step[row : row + 1]), dim=1)
            close(after[row, 0], model(longer).logits[0, -1])
    assert cache.lengths.tolist() == [n + 1 for n in lengths]


@CASES
def test_generation_with_and_without_cache(heads, hydra):
    model = make_model(heads, hydra)
    sequences = [tokens(1, n, seed=n) for n in (1, 3, 40)]
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, 40 - sequence.shape[1] :] = sequence
        mask[row, 40 - sequence.shape[1] :] = 1
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **options)
    chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=11, **options)
    assert torch.equal(batch, chunked)
    for row, sequence in enumerate(sequences):
        # Without a mask, generate() would read the prompt's zeros as padding.
        options["attention_mask"] = torch.ones_like(sequence)
        single = model.generate(sequence, **options)
        uncached = model.generate(sequence, use_cache=False, **options)
        assert torch.equal(single, uncached)
        assert single[0, sequence.shape[1] :].tolist() == batch[row, 40:].tolist()


class HostWaits(TorchDispatchMode):
    """Counts reads of values and tensors made from host numbers: on a GPU the host waits for both."""

    WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", [0, 5])
@CASES
def test_decoding_never_makes_the_host_wait(heads, hydra, padding):
    model, ids = make_model(heads, hydra), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    forward, counts = model.forward, []

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        with HostWaits() as waits:
            output = forward(*args, **kwargs)
        counts.append(waits.count)
        return output

    model.forward = counted
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert len(counts) == 6
    assert counts[0] > 0  # the prompt's mask is read
    assert counts[2:] == [0] * 4  # the first step may make indices that later steps reuse


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_decode_steps_are_compiled_a_few_times_only():
    """One graph for all lengths; it is compiled again only when the store of keys grows."""
    from torch._dynamo.testing import CompileCounter  # slow to import

    model, graphs = make_model(), CompileCounter()
    compiled = torch.compile(model, backend=graphs, dynamic=True, fullgraph=True)
    prompt, steps = tokens(1, 8), 80
    with torch.no_grad():
        caches = [model(prompt, use_cache=True).past_key_values for _ in range(2)]
        counts = []
        for step in range(steps):
            token = tokens(1, 1, seed=step)
            eager, fast = (
                f(token, past_key_values=cache).logits
                for f, cache in zip((model, compiled), caches, strict=True)
            )
            close(fast, eager)
            counts.append(graphs.frame_count)
    capacity = caches[1].layers[0].keys.shape[2]
    assert capacity > 8 + 8 // 8 + 32 + 1  # the store has grown more than once
    assert counts[-1] <= 4
    assert counts[-1] == counts[steps // 2]  # no further compilation


@pytest.mark.parametrize("kind", ["head", "token"])
def test_beam_search_reorders_the_cache(kind):
    model, ids = make_model(*KINDS[kind]), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 2, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, **options)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, uncached)


def test_a_cache_goes_by_either_of_its_names():
    model, ids = make_model(*KINDS["head"]), tokens(2, 12)
    with torch.no_grad():
        whole = model(ids).logits
        ends = []
        for name in ("past_key_values", "cache"):
            begun = model(ids[:, :7], use_cache=True).past_key_values
            ends.append(model(ids[:, 7:], use_cache=True, **{name: begun}).logits)
    torch.testing.assert_close(ends[0], whole[:, 7:], rtol=1e-4, atol=1e-5)
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, past_key_values=begun, cache=begun)


@pytest.mark.parametrize("kind", ["head", "all-gdn", "token"])
def test_a_mask_that_contradicts_the_cache_is_refused(kind):
    model, ids = make_model(*KINDS[kind]), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for first, then, message in (
            (torch.ones_like(mask), mask, r"has 0 for earlier columns .*row 0, column 0"),
            (mask, torch.ones_like(mask), r"has 1 for earlier columns .*row 0, column 0"),
        ):
            for end in (8, 12):  # one new token, then several
                cache = model(ids[:, :7], attention_mask=first[:, :7]).past_key_values
                with pytest.raises(ValueError, match=message):
                    model(ids[:, 7:end], attention_mask=then[:, :end], past_key_values=cache)
                assert cache.seen == 7
                out = model(ids[:, 7:end], attention_mask=first[:, :end], past_key_values=cache)
                whole = model(ids[:, :end], attention_mask=first[:, :end]).logits
                close(out.logits, whole[:, 7:])
        with pytest.raises(ValueError, match="the cache holds 2 sequences, the input has 1"):
            model(ids[:1], past_key_values=cache)


def test_a_row_that_ended_early_cannot_be_hidden_in_the_next_turn():
    """Batched chat: generate() has also fed end tokens into the state of the finished row."""
    model, ids = make_model(), tokens(2, 8)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options["return_dict_in_generate"] = True
    turn = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    text = torch.cat((turn.sequences, tokens(2, 5, seed=3)), dim=1)
    mask = torch.ones_like(text)
    follow = model.generate(
        text, attention_mask=mask, past_key_values=turn.past_key_values, **options
    )
    fresh = model.generate(text, attention_mask=mask, **options)
    assert torch.equal(follow.sequences, fresh.sequences)
    mask[1, 10:14] = 0
    turn = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with pytest.raises(ValueError, match="cannot forget a token"):
        model.generate(text, attention_mask=mask, past_key_values=turn.past_key_values, **options)


@pytest.mark.parametrize("padding", [0, 3])
def test_positions_that_do_not_continue_the_cache_are_refused(padding):
    model, ids = make_model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    right = (mask.cumsum(1) - 1).clamp(min=0)
    for end in (8, 9):
        with torch.no_grad():
            cache = model(
                ids[:, :7], attention_mask=mask[:, :7], position_ids=right[:, :7]
            ).past_key_values
            wrong = torch.arange(end - 7).expand(2, -1)
            with pytest.raises(ValueError, match="do not continue the positions"):
                model(ids[:, 7:end], position_ids=wrong, past_key_values=cache)
            out = model(ids[:, 7:end], position_ids=right[:, 7:end], past_key_values=cache)
            close(out.logits, model(ids[:, :end], attention_mask=mask[:, :end]).logits[:, 7:])


@CASES
def test_generation_from_embeddings_equals_that_from_tokens(heads, hydra):
    model, ids = make_model(heads, hydra), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    embeddings = model.get_input_embeddings()(ids).detach()
    new = model.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(new, model.generate(ids, use_cache=False, **options)[:, 12:])


def test_cache_holds_the_kv_groups_of_full_attention_heads_only():
    model = make_model([[1, 2, 3], [], [0, 1]])
    with torch.no_grad():
        short = model(tokens(2, 20), use_cache=True).past_key_values
        long = model(tokens(2, 50), use_cache=True).past_key_values
    # Heads 1, 2, 3 read KV groups 0 and 1; heads 0, 1 read group 0: three groups together.
    per_token = 2 * 3 * SHAPE["head_dim"] * 4
    assert (long.kv_bytes() - short.kv_bytes()) == 2 * 30 * per_token
    assert short.kv_bytes() == 2 * 20 * per_token
    d, gdn, width = SHAPE["head_dim"], 3 + 6 + 4, 4
    states = gdn * d * d * 4 + 3 * gdn * d * (width - 1) * 4
    assert short.state_bytes() == long.state_bytes() == 2 * states
    assert short.layers[1].keys is None and short.layers[0].keys.shape[1] == 2
    with torch.no_grad():
        model(tokens(2, 1), past_key_values=long)
    assert long.kv_bytes() == 2 * 51 * per_token


def test_positions_and_masks_that_would_be_misread_are_refused():
    model, ids = make_model(), tokens(1, 8)
    with pytest.raises(ValueError, match="Only packed documents"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8]]))
    with pytest.raises(TypeError, match=r"HydraHeadForCausalLM.*: sequence_index"):
        model(ids, sequence_index=torch.zeros(1, 8))
    with pytest.raises(TypeError, match=r"HydraHeadModel.*: num_items_in_batch"):
        model.model(ids, num_items_in_batch=8)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(1, 1, 8, 8))
    with torch.no_grad():
        close(model(ids, position_ids=torch.arange(8)[None]).logits, model(ids).logits, 0.0)


# -- packed documents -----------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize(
    "said", [{}, {"bounds": True, "positions": False}, {"bounds": True, "numbers": True}]
)
def test_packed_documents_equal_separate_ones(heads, hydra, said):
    """Logits, loss and every gradient; some documents have a chunk's length, some a single token."""
    model, lengths = make_model(heads, hydra), (30, 1, 64, 2, 75)
    model.train()
    batch = flattened(lengths, **said)
    total = int((batch["labels"] != -100).sum())
    out = model(**batch, num_items_in_batch=total, output_hidden_states=True)
    out.loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses, start = 0.0, 0
    for n in lengths:
        ids = tokens(1, n, seed=n)
        single = model(ids, labels=ids, num_items_in_batch=total, output_hidden_states=True)
        close(out.logits[:, start : start + n], single.logits)
        for whole, part in zip(out.hidden_states, single.hidden_states, strict=True):
            close(whole[:, start : start + n], part)
        single.loss.backward()
        losses, start = losses + single.loss.detach(), start + n
    close(out.loss, losses, 1e-5)
    assert out.past_key_values is None
    for name, parameter in model.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
        close(packed[name], parameter.grad, 1e-4 * max(1.0, float(parameter.grad.abs().max())))


@pytest.mark.parametrize("kind", ["head", "token"])
def test_packed_documents_in_several_rows_with_padding(kind):
    """Only positions mark documents; padding is before, between and after them."""
    model, width = make_model(*KINDS[kind]), 40
    rows = [[(0, 12), (12, 28)], [(3, 20), (22, 30), (30, 31)]]
    ids, mask = tokens(2, width), torch.zeros(2, width, dtype=torch.long)
    positions = torch.zeros(2, width, dtype=torch.long)
    for row, documents in enumerate(rows):
        for start, end in documents:
            mask[row, start:end] = 1
            positions[row, start:end] = torch.arange(end - start)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions)
        for row, documents in enumerate(rows):
            for start, end in documents:
                single = model(ids[row : row + 1, start:end]).logits[0]
                close(out.logits[row, start:end], single)


def test_contradictions_of_packed_documents_are_refused():
    model = make_model()
    batch = flattened((5, 3), bounds=True, numbers=True)
    wrong = {
        "cu_seq_lens_q and cu_seq_lens_k give different bounds": {
            "cu_seq_lens_k": torch.tensor([0, 4, 8])
        },
        "cu_seq_lens_q and seq_idx give different bounds": {"seq_idx": torch.zeros(1, 8)},
        "cu_seq_lens_q and position_ids give different bounds": {
            "position_ids": torch.arange(8)[None]
        },
        "it must increase from 0": {"cu_seq_lens_q": torch.tensor([0, 5])},
        "seq_idx has shape": {"seq_idx": torch.zeros(1, 7)},
        "max_length_q is 4, but a document has 5": {"max_length_q": 4},
        "cannot use a cache": {"use_cache": True},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **change})
    with pytest.raises(ValueError, match="need cu_seq_lens_q"):
        model(batch["input_ids"], max_length_q=5)


# -- training and loading -------------------------------------------------------------------------


def test_loss_logits_to_keep_and_hidden_states():
    model, ids = make_model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    close(model(ids, attention_mask=mask, labels=ids).loss, expected, 1e-6)
    close(model(ids, attention_mask=mask, logits_to_keep=3).logits, out.logits[:, -3:], 1e-6)
    index = torch.tensor([4, 20])
    close(model(ids, attention_mask=mask, logits_to_keep=index).logits, out.logits[:, index], 1e-6)
    assert len(out.hidden_states) == SHAPE["num_hidden_layers"] + 1
    close(model.lm_head(out.hidden_states[-1]), out.logits, 1e-6)
    close(out.hidden_states[0], model.model.embed_tokens(ids), 0.0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("kind", ["head", "token"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model, ids = make_model(*KINDS[kind]), tokens(2, 30)
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(float(g.abs().max()) > 0 for g in expected.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], 1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["head", "token"])
def test_a_checkpointed_model_in_training_generates_with_its_cache(kind, reentrant):
    model, ids = make_model(*KINDS[kind]), tokens(2, 12)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, use_cache=False, **options)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.seen == 12 + 5
    with pytest.raises(ValueError, match="gradient checkpointing computes gradients"):
        model(expected[:, -1:], past_key_values=out.past_key_values)
    assert model(ids, use_cache=True).past_key_values is None


LOAD_WITHOUT_THE_PACKAGE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "megatron_hydra"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM
for tied in (True, False):
    folder = f"{sys.argv[1]}/tied_{tied}"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    with torch.no_grad():
        error = model(expected["ids"]).logits - expected["logits"]
    assert error.abs().max() < 1e-5
    out = model.generate(expected["ids"], max_new_tokens=4, do_sample=False)
    assert out.shape[1] == 13
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
assert not any(name.split(".")[0].startswith("megatron") for name in sys.modules)
"""


def run_elsewhere(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with its own home and no stdin; it must succeed."""
    result = subprocess.run(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            "HF_HOME": str(folder / "home"),
            "PATH": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(
                Path(transformers.__file__).parents[1]
            ),  # the transformers of these tests
        },
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_export_loads_where_megatron_and_the_package_are_absent(tmp_path):
    for tied in (True, False):
        model, ids = make_model(HEADS, tie_word_embeddings=tied), tokens(1, 9)
        export(model, tmp_path / f"tied_{tied}")
        with torch.no_grad():
            expected = {"ids": ids, "logits": model(ids).logits}
        torch.save(expected, tmp_path / f"tied_{tied}" / "expected.pt")
    run_elsewhere(tmp_path, "-c", LOAD_WITHOUT_THE_PACKAGE, str(tmp_path))


def test_the_lines_of_the_readme_load_an_export_and_ask_nothing(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = make_model(HEADS)
    export(model, tmp_path / "export")
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(tmp_path / "t")
    shutil.copyfile(tmp_path / "t" / "tokenizer.json", tmp_path / "export" / "tokenizer.json")
    (tmp_path / "export" / "tokenizer_config.json").write_text("{}")
    text = (Path(__file__).parents[2] / "README.md").read_text()
    lines = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "exports/" in b)
    (tmp_path / "lines.py").write_text(
        re.sub(r'"exports/[^"]*"', repr(str(tmp_path / "export")), lines)
        + "\nassert tokenizer('a')['input_ids'] == [0] and model.config.vocab_size == 61"
    )
    result = run_elsewhere(tmp_path, "lines.py")
    assert "Do you wish to run" not in result.stdout + result.stderr


def test_bf16_loading_keeps_decay_parameters_in_fp32(tmp_path):
    model = make_model(MIXED)
    model.save_pretrained(tmp_path)
    loaded = modeling.HydraHeadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    attention, original = loaded.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert torch.equal(attention.gdn_A_log, original.gdn_A_log)
    assert torch.equal(attention.gdn_dt_bias, original.gdn_dt_bias)
    assert attention.gamma.dtype == attention.o_proj.weight.dtype == torch.bfloat16
    ids = tokens(2, 40)
    with torch.no_grad():
        reference = model(ids).logits
        error = (loaded(ids).logits.float() - reference).abs().mean()
    assert error < 0.03 * reference.std()


def test_fresh_model_starts_with_neutral_gates():
    torch.manual_seed(0)
    config = HydraHeadConfig(**SHAPE, full_attention_heads=MIXED, hydra={"fusion": "gated"})
    attention = modeling.HydraHeadForCausalLM(config).model.layers[0].self_attn
    for gate in (attention.fa_gate_proj, attention.gdn_gate_proj, attention.fusion_gate):
        assert not gate.weight.any()
    assert attention.gdn_q_conv.weight[:, 0].eq(torch.tensor([0.0, 0.0, 0.0, 1.0])).all()
    assert (attention.gdn_A_log.exp() >= 1).all() and (attention.gdn_A_log.exp() <= 16).all()
    steps = torch.nn.functional.softplus(attention.gdn_dt_bias)
    assert (steps > 9e-4).all() and (steps < 0.11).all()
    assert attention.o_proj.weight.std() < 0.03
    for norm, start in (("rms", 1.0), ("none", 0.0)):
        switches = {"fa_gate_bias": True, "fusion_norm": norm}
        config = HydraHeadConfig(**SHAPE, full_attention_heads=MIXED, hydra=switches)
        gate = modeling.HydraHeadForCausalLM(config).model.layers[0].self_attn.fa_gate_proj
        assert gate.bias.eq(start).all() and not gate.weight.any()
    config = HydraHeadConfig(**SHAPE, hydra={"mixer": "parallel"})
    attention = modeling.HydraHeadForCausalLM(config).model.layers[0].self_attn
    assert attention.fa_gamma.eq(1).all() and attention.gdn_gamma.eq(1).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hydra": {"fusoin": "scale"}}, "hydra.fusoin is unknown"),
        ({"hydra": {"fusion": "sum"}}, "hydra.fusion is 'sum'"),
        ({"hydra": {"log_scale_a": 1.0}}, "hydra.log_scale_a"),
        ({"hydra": {"mixer": "token", "window": 0}}, "hydra.window is 0"),
        (
            {"hydra": {"mixer": "token"}, "full_attention_heads": MIXED},
            "hydra.mixer=token .*does not list every head",
        ),
        ({"full_attention_heads": [[0]]}, "has 1 layers"),
        ({"full_attention_heads": [[1, 0], [], []]}, "layer 0"),
        ({"full_attention_heads": [[], [], [6]]}, "layer 2"),
        ({"num_key_value_heads": 4}, "multiple"),
        ({"gdn_kernel": "cuda"}, "gdn_kernel"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ],
)
def test_config_refuses_invalid_values(changes, message):
    with pytest.raises(ValueError, match=message):
        HydraHeadConfig(**{**SHAPE, **changes})


def test_config_reads_rope_theta_in_its_older_place():
    config = HydraHeadConfig(**SHAPE, rope_theta=123456.0)
    assert config.rope_parameters["rope_theta"] == 123456.0


# -- on a GPU -------------------------------------------------------------------------------------


def test_heads_that_flash_qla_cannot_compute_go_to_flas_own_kernels(monkeypatch):
    """FlashQLA is tried once for each number of heads. Bad inputs, no memory, and a user's setting raise."""
    calls = []

    def own(heads, fault=None):
        calls.append("own")
        if fault:
            raise fault
        return heads

    @functools.wraps(own)
    def handed_on(heads, fault=None):
        calls.append("handed on")
        raise fault or RuntimeError("no available layout found")

    monkeypatch.setattr(modeling, "_declined", set())
    monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    with pytest.raises(ValueError, match="wrong"):
        modeling._by_fla(handed_on, 7, {"heads": 7, "fault": ValueError("wrong")})
    with pytest.raises(torch.OutOfMemoryError):
        modeling._by_fla(handed_on, 7, {"heads": 7, "fault": torch.OutOfMemoryError()})
    assert calls == ["handed on", "own", "handed on"] and not modeling._declined
    assert [modeling._by_fla(handed_on, n, {"heads": n}) for n in (7, 7, 13)] == [7, 7, 13]
    assert calls[3:] == ["handed on", "own", "own", "handed on", "own"]
    assert modeling._by_fla(own, 8, {"heads": 8}) == 8
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    with pytest.raises(RuntimeError, match="no available layout"):
        modeling._by_fla(handed_on, 7, {"heads": 7})


@pytest.mark.gpu
@pytest.mark.parametrize("linear", ["gdn", "kda"])
def test_fla_kernels_agree_with_the_torch_path(linear):
    """Prefill, decode and a padded batch in bf16, by FLA's kernels and by torch, against fp32."""
    pytest.importorskip("fla.ops.gated_delta_rule")
    model = make_model(MIXED, {"linear": linear}, head_dim=64).cuda()
    ids = tokens(2, 300).cuda()
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    logits = {}
    for name, kernel, dtype in (
        ("exact", "torch", torch.float32),
        ("torch", "torch", torch.bfloat16),
        ("fla", "auto", torch.bfloat16),
    ):
        model = model.to(dtype)
        model.config.gdn_kernel = kernel
        with torch.no_grad():
            first = model(ids[:, :290], attention_mask=mask[:, :290], use_cache=True)
            cache, pieces = first.past_key_values, [first.logits]
            for start, end in ((290, 298), (298, 299), (299, 300)):
                out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                pieces.append(out.logits)
        logits[name] = torch.cat(pieces, dim=1).float()[mask.bool()]
    scale = logits["exact"].std()
    errors = {n: float((logits[n] - logits["exact"]).abs().mean() / scale) for n in logits}
    assert errors["torch"] < 0.05 and errors["fla"] < max(0.05, 2 * errors["torch"]), errors


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_documents_by_fla_equal_separate_ones(autocast, monkeypatch):
    """In bf16, and in fp32 under autocast, the kernel is used, and its gradients are as good as torch's."""
    kernels = pytest.importorskip("fla.ops.gated_delta_rule")
    calls = []

    def counted(**arguments):
        calls.append(arguments["q"].dtype)
        return kernels.chunk_gated_delta_rule(**arguments)

    monkeypatch.setattr(modeling, "_fla_kernels", lambda by_channel: (counted, counted))
    model = make_model(MIXED, head_dim=64).cuda().train()
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in flattened((130, 1, 64)).items()}
    gradients = {}
    for name, kernel in (("exact", "torch"), ("torch", "torch"), ("fla", "auto")):
        model.config.gdn_kernel = kernel
        model.to(torch.float32 if name == "exact" or autocast else torch.bfloat16)
        model.zero_grad()
        calls.clear()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast and name != "exact"):
            loss = model(**batch).loss
        loss.backward()
        assert set(calls) == ({torch.bfloat16} if name == "fla" else set())
        parts = [p.grad.float().flatten() for _, p in model.named_parameters()]
        gradients[name] = torch.cat(parts)
    norm = gradients["exact"].norm()
    errors = {n: float((g - gradients["exact"]).norm() / norm) for n, g in gradients.items()}
    assert errors["torch"] < 0.1 and errors["fla"] < max(0.1, 2 * errors["torch"]), errors


@pytest.mark.gpu
def test_decoding_makes_no_cudnn_plan():
    """cuDNN would make a plan for every token, because each has one more key."""
    model = make_model([[0, 3], [1, 2, 5], []], head_dim=64).cuda().to(torch.bfloat16)
    kernels = []
    with torch.no_grad():
        cache = model(tokens(2, 40).cuda(), use_cache=True).past_key_values
        for _ in range(2):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                cache = model(tokens(2, 1).cuda(), past_key_values=cache).past_key_values
            kernels += [event.name for event in seen.events()]
    assert kernels
    assert not [name for name in kernels if "cudnn" in name.lower() and "flash" in name.lower()]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_chunked_prefill_equals_one_pass_on_a_gpu(dtype, tolerance):
    """On a GPU, the lower-right causal kernel computes an unpadded chunk without a mask."""
    model = make_model([[0, 1, 2, 3, 4, 5]] * 3, DENSE, head_dim=64).cuda().to(dtype)
    ids = tokens(2, 200).cuda()
    with torch.no_grad():
        whole = model(ids).logits
        cache, pieces = None, []
        for start, end in ((0, 77), (77, 140), (140, 200)):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    error = (torch.cat(pieces, dim=1) - whole).abs().max() / whole.abs().max()
    assert float(error) < tolerance
