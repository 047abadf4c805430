"""Records of what was compiled and checked, and who may do it next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hydra.ops import kernel_cache
from megatron_hydra.ops.kernel_cache import alone_on_this_node, fingerprint, is_recorded, record

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
        patch.setenv("FLA_TRIL_PRECISION", "ieee")
        assert fingerprint(CPU) != before
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", "elsewhere")
        assert fingerprint(CPU) == before
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "_version", lambda name: "9.9")
        assert fingerprint(CPU) != before
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "card", lambda device: "another card")
        assert fingerprint(CPU) != before


def test_an_edited_kernel_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of the start-up check that is on record must not hide a kernel changed in place."""
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
        assert holder.returncode is not None  # not before it was gone
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
    assert "takes no record" in caplog.text
