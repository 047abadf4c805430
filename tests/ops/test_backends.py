"""The choice of kernels: what ``auto`` takes, and the error for a back end that cannot run."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

from megatron_hydra.config.run import BackendConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.ops import backends, fla_tuning, gpu_attention, packages, varlen_attention
from megatron_hydra.ops.backends import BACKENDS, choose_kernels
from megatron_hydra.ops.kernels import Case, Kernels
from megatron_hydra.ops.linear_rules import GATED_DELTA_RULE

CPU = Case(torch.device("cpu"), torch.float32, 64)
GPU = Case(torch.device("cuda"), torch.bfloat16, 128)
EVERYTHING = {
    "flash_attn_interface", "flash_attn", "torch.nn.attention.varlen", "transformer_engine", "fla",
    "triton",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_loaders():
    def clear():
        for candidates in BACKENDS.values():
            for backend in candidates:
                getattr(backend.load, "cache_clear", lambda: None)()

    clear()
    yield
    clear()


@pytest.fixture
def installed(monkeypatch):
    """Set which modules are installed."""

    def pretend(*modules):
        monkeypatch.setattr(packages, "is_installed", lambda name: name in modules)

    return pretend


def chosen(key, case, name="auto"):
    return backends._select(key, name, BACKENDS[key], case).name


@pytest.mark.parametrize("key", BACKENDS)
def test_the_config_has_these_names(key):
    names = typing.get_args(typing.get_type_hints(BackendConfig)[key])
    assert set(names) == {"auto", *(backend.name for backend in BACKENDS[key])}


def test_auto_is_torch_without_a_gpu():
    kernels = choose_kernels(BackendConfig(), CPU)
    assert kernels == Kernels()
    assert set(kernels.names.values()) == {"torch"}


@pytest.mark.parametrize(
    ("key", "name"),
    [(key, backend.name) for key, some in BACKENDS.items() for backend in some[:-1]],
)
def test_a_named_back_end_that_cannot_run_says_why(key, name):
    with pytest.raises(HydraError, match=rf"backend\.{key}={name} cannot run here: it needs a GPU"):
        choose_kernels(BackendConfig(**{key: name}), CPU)


@pytest.mark.parametrize("key", BACKENDS)
def test_an_unknown_name_is_refused_with_those_there_are(key):
    with pytest.raises(
        HydraError, match=rf"backend\.{key}='best' does not exist.* torch, and auto"
    ):
        choose_kernels(BackendConfig(**{key: "best"}), CPU)


@pytest.mark.parametrize(
    ("missing", "attention"),
    [
        (set(), "sdpa"),
        ({"flash_attn_interface", "torch.nn.attention.varlen"}, "sdpa"),
        ({"flash_attn_interface", "flash_attn"}, "sdpa"),
        ({"flash_attn_interface", "flash_attn", "torch.nn.attention.varlen"}, "transformer_engine"),
        (EVERYTHING, "torch"),
    ],
)
def test_order_of_auto_for_full_attention(installed, missing, attention):
    installed(*EVERYTHING - missing)
    assert chosen("full_attention", GPU) == attention


def test_order_of_auto_for_the_rest(installed):
    installed(*EVERYTHING)
    assert chosen("gated_delta_net", GPU) == "fla"
    assert chosen("fused_kernels", GPU) == "triton"
    installed("triton")
    assert chosen("gated_delta_net", GPU) == "torch"
    installed()
    assert chosen("fused_kernels", GPU) == "torch"


@pytest.mark.parametrize(
    ("modules", "packed"),
    [
        (("flash_attn", "torch.nn.attention.varlen", "flash_attn_interface"), "flash"),
        (("flash_attn", "torch.nn.attention.varlen"), "varlen"),
        (("flash_attn",), "flash"),
    ],
)
def test_sdpa_takes_the_fastest_kernel_for_packed_documents(
    installed, monkeypatch, modules, packed
):
    installed(*modules)
    monkeypatch.setattr(gpu_attention, "flash_attn_varlen", lambda: lambda *args: "flash")
    monkeypatch.setattr(gpu_attention, "torch_varlen", lambda: lambda *args: "varlen")
    attention = choose_kernels(BackendConfig(full_attention="sdpa"), GPU, check=False).attention
    assert attention(None, None, None, (0, 3, 8), (0, 3, 8)) == packed


def test_sdpa_alone_is_refused_where_packed_documents_have_no_kernel(installed):
    installed("triton")
    with pytest.raises(HydraError, match=r"full_attention=sdpa cannot run here: packed documents"):
        choose_kernels(BackendConfig(full_attention="sdpa"), GPU, check=False)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(GPU.device, torch.float32, 128), "it computes in bf16 or fp16, the run in float32"),
        (Case(GPU.device, torch.bfloat16, 512), "head dimension 512"),
        (Case(GPU.device, torch.bfloat16, 60), "head dimension 60"),
    ],
)
def test_cases_that_a_kernel_does_not_support(installed, case, reason):
    installed(*EVERYTHING)
    for name in ("sdpa", "flash_attn", "varlen", "transformer_engine"):
        with pytest.raises(HydraError, match=f"full_attention={name} cannot run here: {reason}"):
            chosen("full_attention", case, name)
    assert chosen("full_attention", case) == "torch"


def test_a_package_that_is_absent_is_named(installed):
    installed()
    for name, package in (("flash_attn", "flash_attn"), ("transformer_engine",) * 2):
        with pytest.raises(
            HydraError, match=rf"{package} is not installed; pip install .*; or name another one"
        ):
            chosen("full_attention", GPU, name)


def test_a_package_that_cannot_be_imported_is_named(installed, monkeypatch):
    def broken():
        raise ImportError("undefined symbol: _ZN3c10")

    installed("flash_attn")
    monkeypatch.setattr(gpu_attention, "flash_attn_varlen", broken)
    with pytest.raises(HydraError, match=r"full_attention=flash_attn .*undefined symbol"):
        choose_kernels(BackendConfig(full_attention="flash_attn"), GPU, check=False)


def test_what_is_loaded_twice_is_the_same(installed, monkeypatch):
    installed("flash_attn", "fla")
    monkeypatch.setattr(gpu_attention, "flash_attn_varlen", lambda: lambda *args: None)
    first, second = (choose_kernels(BackendConfig(), GPU, check=False) for _ in range(2))
    assert first == second
    assert first.attention is not varlen_attention.varlen_attention


def test_rules_with_decays_of_one_shape_have_kernels_of_their_own(installed, monkeypatch):
    installed("fla", "triton")
    monkeypatch.setattr(fla_tuning, "import_fla", lambda: None)
    monkeypatch.setattr(fla_tuning, "use_choices", lambda case, flas_own_cp: None)
    rule = dataclasses.replace(
        GATED_DELTA_RULE,
        twin=lambda *tensors, **options: tensors,
        fla=dataclasses.replace(GATED_DELTA_RULE.fla, function="another"),
    )
    case = dataclasses.replace(GPU, rule=rule)
    backend = BackendConfig(full_attention="torch", fused_kernels="torch")
    by_fla, by_torch = (
        choose_kernels(
            dataclasses.replace(backend, gated_delta_net=name), case, check=False
        ).delta_rule
        for name in ("fla", "torch")
    )
    assert by_fla.keywords == {"fla": rule.fla}
    assert by_torch is rule.twin


def test_a_rule_that_fla_does_not_have_runs_as_its_twin(installed):
    installed("fla", "triton")
    rule = dataclasses.replace(GATED_DELTA_RULE, title="new rule", fla=None)
    case = dataclasses.replace(GPU, rule=rule)
    assert chosen("gated_delta_net", case) == "torch"
    with pytest.raises(HydraError, match="flash-linear-attention has no kernels of the new rule"):
        chosen("gated_delta_net", case, "fla")


def test_modules_are_found_without_importing_them():
    assert packages.is_installed("torch.nn.attention.bias")
    assert not packages.is_installed("torch.nn.no_such_module")
    assert not packages.is_installed("no_such_package.module")


def test_a_folder_of_other_packages_is_no_module(tmp_path, monkeypatch):
    (tmp_path / "hydra_folder" / "inside").mkdir(parents=True)
    (tmp_path / "hydra_folder" / "inside" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.is_installed("hydra_folder.inside")
    assert not packages.is_installed("hydra_folder")


# -- slow back ends and their remedies --------------------------------------------------------------


def test_a_slow_path_that_auto_falls_into_is_named_with_its_wheel(installed):
    installed()
    found = backends.slow_paths(BackendConfig(), GPU)
    assert len(found) == len(BACKENDS)
    assert all("auto falls back to torch on this GPU" in text for text in found)
    (gdn,) = [text for text in found if text.startswith("backend.gated_delta_net")]
    assert "fla or triton is not installed; pip install" in gdn
    assert "flash-linear-attention==0.6.0" in gdn
    installed(*EVERYTHING)
    assert backends.slow_paths(BackendConfig(), GPU) == []


def test_what_was_asked_for_by_name_or_runs_without_a_gpu_is_no_slow_path(installed):
    installed()
    named = BackendConfig(gated_delta_net="torch", full_attention="torch", fused_kernels="torch")
    assert backends.slow_paths(named, GPU) == []
    assert backends.slow_paths(BackendConfig(), CPU) == []
    dense = Case(GPU.device, GPU.dtype, GPU.head_dim, gdn_heads=())
    keys = [text.split(":")[0] for text in backends.slow_paths(BackendConfig(), dense)]
    assert "backend.gated_delta_net" not in keys  # a dense model has no GDN heads


def test_a_reason_that_no_wheel_mends_names_none(installed):
    installed(*EVERYTHING)
    case = Case(GPU.device, torch.float32, 128)
    (gdn,) = [t for t in backends.slow_paths(BackendConfig(), case) if "gated_delta_net" in t]
    assert "the run in float32" in gdn
    assert "pip install" not in gdn


@pytest.mark.parametrize(
    ("triton", "tilelang", "needed"),
    [("3.6.0", False, True), ("3.7.0", False, True), ("3.7.1", False, False), ("3.3.1", False, False),
     ("3.6.0", True, False)],
)  # fmt: skip
def test_tilelang_is_named_where_fla_needs_it(installed, monkeypatch, triton, tilelang, needed):
    installed(*({"tilelang"} if tilelang else ()))
    monkeypatch.setattr(packages, "triton_version", lambda: triton)
    monkeypatch.setattr(packages, "is_hopper", lambda device: True)
    (gdn,) = [t for t in backends.slow_paths(BackendConfig(), GPU) if "gated_delta_net" in t]
    assert ("tilelang==0.1.15" in gdn) == needed


def test_the_wheels_named_are_those_of_the_project():
    """Packages of the extra ``gpu``; the exact versions are those of the tests."""
    import tomllib
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["gpu"]
    installed = {*extra, *(line.split(";")[0] for line in project["dependencies"])}
    named = " ".join(
        (backends.FLASH_ATTN, backends.TRITON, BACKENDS["full_attention"][3].install)
    ).split()
    assert {word for word in named if not word.startswith("--")} <= installed
    pinned = (root / "constraints.txt").read_text().splitlines()
    fla = backends.FLA.split()[0]
    assert fla in pinned
    assert f"flash-linear-attention>={fla.split('==')[1]}" in extra
