"""Fused decode steps equal the plain layers, and are not used if they could differ."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks._harness import graphed
from megatron_hydra.hf import decode_hydrahead as decode
from megatron_hydra.hf import modeling_hydrahead as modeling
from tests.hf import decode_cases
from tests.hf.models import make_model, tokens
from tests.kernel_processes import needs_triton, output_lines

X = torch.zeros(2, 1, 40)


@needs_triton
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_fused_steps_equal_the_layers_in_the_interpreter(which):
    ran = output_lines("tests.hf.decode_cases", which, interpreted=True, timeout=3600)
    cases = decode_cases.QUICK + decode_cases.QUICK_COMPILED
    if which == "all":
        cases = decode_cases.CASES + decode_cases.COMPILED
    assert len(ran) >= len(cases)
    assert (ran[-1] == "no room") == (which == "all")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_compile_for_a_gpu_that_is_not_here():
    printed = output_lines("tests.hf.decode_compiled", interpreted=False, timeout=800)
    kernels = {line.split()[0] for line in printed}
    assert kernels == {name for name in vars(decode) if name.endswith("_kernel")}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(decode, "INTERPRETED", True)


def prepared():
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            decode.prepare(layer, X)
    assert all(layer.fused is not None for layer in model.model.layers)
    return model


def test_fused_weights_are_the_parameters_under_their_own_names(as_on_a_gpu, tmp_path):
    plain, model, ids = make_model(), prepared(), tokens(2, 7)
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (
        sum(held.values()) < 1.02 * own + 3 * 16 * 40 * 4
    )  # except for padded rows, nothing is stored twice
    want = plain.state_dict()
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items())
    with torch.no_grad(), mock.patch.object(modeling, "prompt_usable", return_value=False):
        assert torch.equal(model(ids).logits, plain(ids).logits)
    model.save_pretrained(tmp_path)
    again = modeling.HydraHeadForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, want[name]) for name, x in again.state_dict().items())
    # Parameters can be trained: an update also changes the fused weights.
    layer = model.model.layers[0]
    layer.self_attn.fa_q_proj.weight.data.fill_(3.0)
    begin = layer.fused.heads.columns["fa_q_proj"]
    assert (layer.fused.heads.weight[begin : begin + 16] == 3.0).all()


def test_any_change_of_a_layer_switches_to_the_plain_path(as_on_a_gpu):
    def hook(module, *_):
        return None

    for touch in (
        lambda layer: layer.self_attn.fa_q_proj.register_forward_hook(hook),
        lambda layer: layer.mlp.down_proj.register_forward_pre_hook(hook),
        lambda layer: setattr(
            layer.self_attn, "gdn_q_proj", torch.nn.Sequential(layer.self_attn.gdn_q_proj)
        ),
        lambda layer: layer.mlp.double(),
        lambda layer: setattr(layer.self_attn.o_proj, "forward", hook),
    ):
        layer = prepared().model.layers[0]
        touch(layer)
        decode.prepare(layer, X)
        assert layer.fused is None
    model = prepared()
    layer = model.model.layers[0]
    handle = layer.self_attn.o_proj.register_forward_hook(hook)
    decode.prepare(layer, X)
    handle.remove()
    decode.prepare(layer, X)
    assert layer.fused is not None  # unchanged
    for p in layer.parameters():
        p.data = p.data.clone()  # as load_state_dict(assign=True) does
    old = layer.fused
    decode.prepare(layer, X)
    assert layer.fused not in (None, old)
    model.to("cpu")  # no tensor moves
    assert all(layer.fused is not None for layer in model.model.layers)
    model.to(torch.float64)
    assert all(layer.fused is None for layer in model.model.layers)
    decode.prepare(layer, X.double())
    assert layer.fused is None  # the kernels have no fp64


def test_parameters_in_a_shared_storage_are_not_moved(as_on_a_gpu):
    """Parameters are views of one flat tensor, as under FSDP."""
    layer = make_model().model.layers[0]
    weight = layer.self_attn.fa_q_proj.weight
    flat = torch.cat((weight.detach().flatten(), torch.zeros(3)))
    weight.data = flat[:-3].view_as(weight)
    decode.prepare(layer, X)
    assert layer.fused is None
    assert weight.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_a_copy_shares_no_fused_weights(as_on_a_gpu):
    model = prepared()
    twin = copy.deepcopy(model)
    assert all(layer.fused is None for layer in twin.model.layers)
    assert model.model.layers[0].fused is not None
    twin.model.layers[0].self_attn.fa_q_proj.weight.data.zero_()
    assert model.model.layers[0].self_attn.fa_q_proj.weight.any()


@pytest.mark.parametrize(
    "kind", ["plain", "grad", "recording", "padding", "two", "torch", "gated", "kda", "compiled"]
)
def test_when_a_step_is_fused(as_on_a_gpu, kind):
    hydra = {"gated": {"fusion": "gated"}, "kda": {"linear": "kda"}}.get(kind, {})
    model = make_model(hydra=hydra, gdn_kernel="torch" if kind == "torch" else "auto")
    ids = tokens(2, 9)
    with torch.no_grad(), mock.patch.object(modeling, "prompt_usable", return_value=False):
        cache = model(ids).past_key_values
        if kind == "recording":
            for layer in cache.layers:
                layer.activate_past_recording()
    new = tokens(2, 2 if kind == "two" else 1, seed=5)
    mask = None
    if kind == "padding":
        mask = torch.ones_like(new)
        mask[0] = 0
    with (
        torch.set_grad_enabled(kind == "grad"),
        mock.patch.object(modeling, "prompt_usable", return_value=False),
        mock.patch.object(modeling, "decode", side_effect=lambda layer, x, *_: x) as ran,
        mock.patch.object(torch.compiler, "is_compiling", return_value=kind == "compiled"),
    ):
        model(new, attention_mask=mask, past_key_values=cache)
    assert ran.call_count == (3 if kind in ("plain", "compiled") else 0)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", decode_cases.ON_GPU)
def test_fused_steps_equal_the_layers_on_a_gpu(case, dtype):
    decode_cases.check(*case, torch.device("cuda"), dtype)
    decode_cases.check_prompt(*case[:3], torch.device("cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["compiled", "reduce-overhead", "graph"])
def test_compiled_and_captured_steps_are_fused_and_equal_eager_ones(how):
    device = torch.device("cuda")
    model = decode_cases.model_of("head", device, torch.bfloat16)
    captured = decode_cases.filled(model, "static", 3, device, room=32)
    eager = decode_cases.filled(model, "static", 3, device, room=32)
    token = torch.zeros(2, 1, dtype=torch.long, device=device)
    results = []
    forward = model.forward
    if how != "graph":
        mode = None if how == "compiled" else how
        forward = torch.compile(model.forward, mode=mode, fullgraph=True)

    def step():
        with torch.no_grad():
            results[:] = [forward(token, past_key_values=captured).logits]

    run = graphed(step) if how == "graph" else step
    for number in range(6):
        new = tokens(2, 1, seed=number).to(device)
        token.copy_(new)
        torch.compiler.cudagraph_mark_step_begin()
        run()
        with torch.no_grad():
            for _ in range(
                2 if how == "graph" and not number else 1
            ):  # a step runs once before its capture
                want = model(new, past_key_values=eager).logits
        decode_cases.close(results[0], want, torch.bfloat16, f"{how}, step {number}")
    assert all(layer.fused is not None for layer in model.model.layers)


def loaded(path):
    """The module as another export in the same process."""
    spec = importlib.util.spec_from_file_location("megatron_hydra.hf.of_another_export", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_triton
def test_exports_in_one_process_share_an_operator_only_if_their_code_is_equal(tmp_path):
    assert loaded(decode.__file__)._OPERATOR is decode._OPERATOR
    other = tmp_path / "decode_hydrahead.py"
    other.write_text(Path(decode.__file__).read_text() + "# another version\n")
    assert loaded(other)._OPERATOR is loaded(other)._OPERATOR is not decode._OPERATOR


def test_a_compiled_step_refuses_a_cache_that_it_could_not_write_in_place():
    tail = torch.zeros(3, 2, 4).transpose(1, 2)
    with pytest.raises(ValueError, match="a cache that is not contiguous"):
        decode._step(X, None, 0, tail, None, None, None, None, X, X, X, [], [])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_beyond_the_capacity_gives_nan_on_a_gpu(dtype):
    decode_cases.check_full(torch.device("cuda"), dtype)


def test_a_layer_with_a_part_that_the_kernels_do_not_know_is_not_fused(as_on_a_gpu):
    layer = make_model().model.layers[0]
    layer.self_attn.gdn_u_proj = torch.nn.Linear(40, 2, bias=False)
    decode.prepare(layer, X)
    assert layer.fused is None


def test_a_switch_that_the_kernels_do_not_know_is_not_fused(as_on_a_gpu, monkeypatch):
    layer = make_model().model.layers[0]
    monkeypatch.setitem(decode.SWITCHES, "new", ("off", ("off", "on")))
    for value in ("on", "off"):
        layer.self_attn.config.hydra["new"] = value
        decode.prepare(layer, X)
        assert (layer.fused is None) == (value == "on")
