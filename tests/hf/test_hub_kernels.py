"""``use_kernels=True``: the delta rule by a kernel that the ``kernels`` package sets.

The kernels are played on the CPU: a loop over tokens, in a class as the Hub's repositories have it. What
``kernels`` does with it is done here by hand, and by the package itself where it is installed.
"""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.utils import is_kernels_available

from megatron_hydra.hf import modeling_hydrahead as modeling
from megatron_hydra.hf.decode_hydrahead import _plain
from tests.hf.models import KINDS, close, export, make_model, tokens

RULES = (modeling.HydraHeadDeltaRule, modeling.HydraHeadDeltaStep)
SENTENCES = torch.tensor([0, 9, 10, 31], dtype=torch.int32)


def _loop(query, key, value, g, beta, initial_state, cu_seqlens):
    """S ← α (I − β k kᵀ) S + β k vᵀ and o = Sᵀ q / √d, token by token."""
    batch, length, heads, size = query.shape
    starts = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    state = query.new_zeros(batch, heads, size, size)
    if initial_state is not None:
        state = initial_state.to(query)
    outputs = []
    for t in range(length):
        if t in starts:
            state = torch.zeros_like(state)
        q, k, v = query[:, t], key[:, t], value[:, t]
        state = state * g[:, t].exp()[..., None, None]
        error = (v - torch.einsum("bhkv,bhk->bhv", state, k)) * beta[:, t, :, None]
        state = state + k[..., None] * error[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q) * size**-0.5)
    return torch.stack(outputs, 1), state


CALLS: list[str] = []


class PlayedChunk(nn.Module):
    """As ``layers.chunk_gated_delta_rule`` of a repository on the Hub."""

    def forward(
        self, query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, **kwargs,
    ):  # fmt: skip
        CALLS.append("chunk")
        assert not use_qk_l2norm_in_kernel and g.dtype == torch.float32
        out, state = _loop(query, key, value, g, beta, initial_state, kwargs.get("cu_seqlens"))
        return out, state if output_final_state else None


class PlayedStep(nn.Module):
    """As ``layers.recurrent_gated_delta_rule``."""

    def forward(
        self, query, key, value, g, beta, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, **kwargs,
    ):  # fmt: skip
        CALLS.append("step")
        out, state = _loop(query, key, value, g, beta, initial_state, kwargs.get("cu_seqlens"))
        return out, state if output_final_state else None


PLAYED = {
    "chunk_gated_delta_rule": PlayedChunk,
    "fused_recurrent_gated_delta_rule": PlayedStep,
}


def kernelize(model, played=PLAYED):
    """What ``kernels.kernelize`` does with the rules: sets a kernel's forward, or the class's own."""
    rules = [module for module in model.modules() if isinstance(module, RULES)]
    for rule in rules:
        kernel = played.get(type(rule).kernel_layer_name, type(rule))
        rule.forward = MethodType(kernel.forward, rule)
    return len(rules)


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def test_outputs_and_gradients():
    heads, hydra = KINDS["head-gqa"]
    plain, replaced = (make_model(heads, hydra) for _ in range(2))
    with_gdn = sum(bool(layer.self_attn.gdn_heads) for layer in plain.model.layers)
    assert kernelize(replaced) == 2 * with_gdn
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    losses = [m(ids, attention_mask=mask, labels=ids).loss for m in (plain, replaced)]
    assert CALLS.count("chunk") >= with_gdn and "step" not in CALLS
    for loss in losses:
        loss.backward()
    close(*losses, 1e-6)
    want = dict(plain.named_parameters())
    for name, parameter in replaced.named_parameters():
        close(parameter.grad, want[name].grad)


def test_packed_documents():
    """The kernel gets the documents' bounds."""
    plain, replaced = make_model(), make_model()
    kernelize(replaced)
    ids = tokens(1, int(SENTENCES[-1]))
    given = {"cu_seq_lens_q": SENTENCES, "cu_seq_lens_k": SENTENCES}
    a, b = (m(ids, use_cache=False, **given).logits for m in (plain, replaced))
    close(a, b, 1e-5)
    assert CALLS


def test_generation():
    """A prompt by the chunked kernel, tokens by the recurrent one; a copied cache goes on without the layer."""
    plain, replaced = make_model(), make_model()
    kernelize(replaced)
    ids = tokens(2, 12)
    a, b = (
        m.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        for m in (plain, replaced)
    )
    assert torch.equal(a, b)
    assert {"chunk", "step"} == set(CALLS)
    cache = replaced(ids, use_cache=True)[modeling.CACHE_NAME]
    logits = [
        m(ids[:, :1], **{modeling.CACHE_NAME: c}).logits
        for m, c in ((replaced, copy.deepcopy(cache)), (plain, cache))
    ]
    close(*logits, 1e-5)


def test_without_a_kernel():
    """Where ``kernels`` has none it sets the class's own forward; hooks of accelerate set a wrapper."""
    model, rule = make_model(), modeling.HydraHeadDeltaRule()
    want = model(tokens(1, 20)).logits
    kernelize(model, {})
    assert torch.equal(model(tokens(1, 20)).logits, want)
    assert not any(m.replaced for m in model.modules() if isinstance(m, RULES))
    rule.forward = lambda *args: args
    assert not rule.replaced
    rule.forward = MethodType(PlayedChunk.forward, rule)
    wrapped = copy.deepcopy(rule)
    wrapped.forward = lambda *args: args
    assert rule.replaced and wrapped.replaced


def test_the_twins():
    """Called directly, the modules compute what a kernel must."""
    q, k, v = torch.randn(3, 2, 20, 3, 8)
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = -torch.rand(2, 20, 3), torch.rand(2, 20, 3)
    state = torch.randn(2, 3, 8, 8)
    for rule, part in ((RULES[0](), slice(None)), (RULES[1](), slice(1))):
        inputs = [x[:, part] for x in (q, k, v, g, beta)]
        out, after = rule(*inputs, initial_state=state, output_final_state=True)
        want, want_after = _loop(*inputs, state, None)
        close(out, want, 1e-5)
        close(after, want_after, 1e-5)
        assert rule(*inputs)[1] is None
        with pytest.raises(NotImplementedError):
            rule(*inputs, cu_seqlens=SENTENCES)


@pytest.mark.parametrize(
    ("heads", "hydra", "changes"),
    [([[0]] * 2, {"linear": "kda"}, {}), ([[0]] * 2, {}, {"gdn_kernel": "torch"})],
)
def test_models_without_a_place_for_kernels(heads, hydra, changes):
    """A decay of each channel is another rule; ``gdn_kernel='torch'`` wants none."""
    assert not kernelize(make_model(heads, hydra, num_hidden_layers=2, **changes))


def test_fused_kernels_stay():
    """A kernel from the Hub does not make a layer strange to the fused kernels of prompts and tokens."""
    model = make_model()
    layer = model.model.layers[0]
    x = torch.zeros(1, 1, model.config.hidden_size)
    assert _plain(layer, x)
    kernelize(model)
    assert _plain(layer, x)
    layer.mlp.forward = layer.mlp.forward
    assert not _plain(layer, x)


def test_signatures():
    """``kernels`` refuses a kernel with other parameters than the module's, which are those of transformers."""
    source = Path(transformers.__file__).parent / "models/qwen3_next/modeling_qwen3_next.py"
    functions = {f.name: f for f in ast.parse(source.read_text()).body if hasattr(f, "args")}
    names = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    for rule, played, name in zip(RULES, PLAYED.values(), names, strict=True):
        parameters = inspect.signature(rule.forward).parameters
        kinds = [p.kind for p in parameters.values()]
        assert kinds == [p.kind for p in inspect.signature(played.forward).parameters.values()]
        given = functions[name].args
        if given.kwarg is None:
            pytest.skip(f"transformers {transformers.__version__} takes no kernels for this rule")
        assert list(parameters) == ["self", *(a.arg for a in given.args), given.kwarg.arg]


def test_nothing_is_stored(tmp_path):
    """The modules have no weights, and the export no option that asks the Hub."""
    model = make_model()
    state = dict(model.state_dict())
    kernelize(model)
    assert list(model.state_dict()) == list(state) and not any(".gdn_rule" in n for n in state)
    export(model, tmp_path)
    assert "kernels" not in (tmp_path / "config.json").read_text()


def test_the_flag(tmp_path, monkeypatch):
    """Without the package transformers refuses the flag by name. With it, a CPU has no kernels."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = make_model()
    export(model, tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    if not is_kernels_available():
        with pytest.raises((ValueError, ImportError), match="kernels"):
            load(tmp_path, trust_remote_code=True, use_kernels=True)
        return
    loaded = load(tmp_path, trust_remote_code=True, use_kernels=True)
    assert torch.equal(loaded(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


@pytest.mark.skipif(
    not is_kernels_available(), reason="`kernels` is not installed in transformers' version"
)
def test_the_package():
    """``kernels`` itself finds the modules, accepts the signatures and sets the kernels."""
    import kernels

    class Repository:
        def __init__(self, layer):
            self.layer, self.layer_name = layer, layer.__name__

        def load(self):
            made = inspect.signature(kernels.LayerRepository.load).return_annotation
            if "ModuleType" not in str(made):
                return self.layer
            return SimpleNamespace(layers=SimpleNamespace(**{self.layer_name: self.layer}))

    mode = kernels.Mode.INFERENCE
    # A device that it does not look for; not every release knows the CPU.
    mapping = {name: {"xpu": {mode: Repository(layer)}} for name, layer in PLAYED.items()}
    plain, replaced = make_model(), make_model()
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(replaced, mode=mode, device="xpu")
    assert all(m.replaced for m in replaced.modules() if isinstance(m, RULES))
    close(replaced(tokens(1, 20)).logits, plain(tokens(1, 20)).logits, 1e-5)
    assert CALLS
