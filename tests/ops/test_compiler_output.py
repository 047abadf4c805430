"""Output of compilers: it goes to a file of its own, not to the run's log; later output is normal."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.ops.compiler_output import compiler_output_to, last_lines


@pytest.fixture
def shown() -> Iterator[list[str]]:
    """Lines that a handler on the root logger shows."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield lines
    logging.getLogger().removeHandler(handler)


def test_chatter_goes_to_the_file_and_our_log_stays(
    tmp_path: Path, shown: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "run" / "compile.log"
    with compiler_output_to(log):
        os.write(1, b"a PTX listing\n")
        subprocess.run([sys.executable, "-c", "print('ptxas info')"], check=True)
        logging.getLogger("tilelang.jit").warning("compiles a kernel")
        logging.getLogger("megatron_hydra.training").warning("step 1")
        warnings.warn_explicit("slow", UserWarning, "/x/fla/ops/chunk.py", 1)
        print("our own line", file=sys.stderr)
    os.write(1, b"after\n")
    logging.getLogger("tilelang.jit").warning("again")
    text = log.read_text()
    for said in ("a PTX listing", "ptxas info", "compiles a kernel", "UserWarning: slow"):
        assert said in text
    out = capfd.readouterr()
    assert out.out == "after\n"  # descriptor 1 is unchanged
    assert "our own line" in out.err
    assert shown == ["step 1", "again"]
    assert "step 1" not in text
    assert last_lines(log, 1).endswith("UserWarning: slow")


def test_a_process_without_a_log_of_its_own_sends_its_errors_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with compiler_output_to(tmp_path / "log", errors=True):
        os.write(2, b"nvcc: error\n")
    assert "nvcc: error" in (tmp_path / "log").read_text()
    assert capfd.readouterr().err == ""


def test_everything_is_undone_by_an_error(tmp_path: Path, shown: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), compiler_output_to(tmp_path / "log"):
        raise ZeroDivisionError
    logging.getLogger("triton").warning("seen")
    assert shown == ["seen"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(HydraError, match="cannot be written"),
        compiler_output_to(tmp_path / "file" / "compile.log"),
    ):
        pass
