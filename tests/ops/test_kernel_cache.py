"""Records of compiled and checked kernels, and which process works next."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime import cache_dir_utils, triton_heuristics

from megatron_hydra.config.run import BackendConfig
from megatron_hydra.ops import kernel_cache
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.ops.kernel_cache import alone_on_this_node, fingerprint, is_recorded, record
from megatron_hydra.ops.kernels import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TILELANG_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return kernel_cache.cache_folders()


def test_a_record_goes_with_any_of_the_caches(caches: list[Path]) -> None:
    assert len(caches) >= 2
    for cache in caches:
        assert not is_recorded("work")
        record("work", {"seconds": 3})
        assert is_recorded("work")
        (cache / kernel_cache.RECORDS / "work").unlink()


def test_the_fingerprint_follows_versions_settings_and_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = fingerprint(CPU)
    assert before["versions"]["torch"] == kernel_cache._version("torch")
    assert fingerprint(CPU) == before
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "_version", lambda name: "9.9")
        assert fingerprint(CPU) != before
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "card", lambda device: "another card")
        assert fingerprint(CPU) != before


@pytest.mark.parametrize(
    "variable, counts", [("FLA_TRIL_PRECISION", True), ("TRITON_CACHE_DIR", False)]
)
def test_the_fingerprint_has_what_the_user_set_and_not_what_a_library_sets(
    variable: str, counts: bool
) -> None:
    """TileLang, Megatron-Core and inductor set environment variables; the fingerprint does not change."""
    program = (
        "import json, os, torch\n"
        "from megatron_hydra.ops import kernel_cache\n"
        "make = lambda: kernel_cache.fingerprint(torch.device('cpu'))\n"
        "first = make()\n"
        "os.environ |= {'TL_CUTLASS_PATH': '/a', 'NVTE_FLASH_ATTN': '1', 'TRITON_PTXAS_PATH': '/b'}\n"
        "assert make() == first and 'TL_CUTLASS_PATH' not in kernel_cache.environment_as_given()\n"
        "os.environ['TRITON_CACHE_DIR'] = '/c'\n"
        "assert kernel_cache.environment_as_given()['TRITON_CACHE_DIR'] == '/c'\n"
        "kernel_cache.decide('FLA_FLASH_QLA', '0')\n"
        "assert make() != first and kernel_cache.environment_as_given()['FLA_FLASH_QLA'] == '0'\n"
        "print(json.dumps(first['environment']))\n"
    )
    plain = {k: v for k, v in os.environ.items() if not kernel_cache._is_steering(k)}
    plain.pop(variable, None)
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True
            ).stdout
        )
        for env in (plain, plain | {variable: "x"})
    ]
    assert found == [{}, {variable: "x"} if counts else {}]


def test_an_edited_kernel_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded pass of the start-up check must not hide a kernel whose source has changed."""
    package = tmp_path / "fla"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    kernel_cache._sources_hash.cache_clear()
    before = fingerprint(CPU)["sources"]
    (package / "__init__.py").write_text("x = 2\n")
    kernel_cache._sources_hash.cache_clear()
    assert fingerprint(CPU)["sources"] != before
    monkeypatch.undo()
    kernel_cache._sources_hash.cache_clear()


_HOLDER = """
import sys, time
from megatron_hydra.ops.kernel_cache import alone_on_this_node
with alone_on_this_node("work", lambda seconds: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_dead_one_holds_nothing() -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited: list[float] = []

    def waiting(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            holder.kill()
            holder.wait()

    with alone_on_this_node("work", waiting, poll_seconds=0.05):
        assert holder.returncode is not None  # it waited until the holder had ended
    assert len(waited) >= 3


def test_without_a_folder_to_lock_everyone_works_for_himself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with alone_on_this_node("work", lambda seconds: None):
        record("work", {})
    assert not is_recorded("work")
    assert "compiles for itself" in caplog.text
    assert "cannot record" in caplog.text


def test_torch_does_not_move_tritons_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inductor does this for the whole process, unless the variable is set before its first kernel."""
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    before = kernel_cache.triton_folder()
    inductor = inspect.getsource(triton_heuristics)
    if "TRITON_CACHE_DIR" in inductor:  # a later torch may lack this code
        assert 'os.getenv("TRITON_CACHE_DIR") is None' in inductor
    kernel_cache.keep_triton_folder()
    assert os.environ["TRITON_CACHE_DIR"] == str(before) == str(tmp_path / ".triton" / "cache")
    # As inductor calls it, for its own device.
    assert cache_dir_utils.triton_cache_dir(1) == str(before)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/the/users")
    kernel_cache.keep_triton_folder()
    assert os.environ["TRITON_CACHE_DIR"] == "/the/users"


def test_kernels_are_chosen_after_the_cache_is_fixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    case = Case(torch.device("cuda"), torch.bfloat16, 64)
    torch_everywhere = BackendConfig(
        gated_delta_net="torch", full_attention="torch", fused_kernels="torch"
    )
    choose_kernels(torch_everywhere, case, check=False)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".triton" / "cache")
