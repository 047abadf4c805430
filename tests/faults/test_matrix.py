"""The command that tries every fault: it does not report an untried fault as good."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import matrix
from tests.required import VARIABLE, skip_without

PASSED = """<testcase classname="tests.faults.test_a" name="test_kill" time="3">
  <properties><property name="fault" value="a kill"/><property name="tried" value="2"/>
  <property name="good" value="2"/><property name="outcome" value="resumed"/></properties></testcase>"""
SKIPPED = """<testcase classname="tests.slurm.test_b" name="test_job" time="0">
  <skipped message="no slurm"/></testcase>"""
FAILED = """<testcase classname="tests.faults.test_a" name="test_hang" time="9">
  <failure message="still there"/></testcase>"""


@pytest.mark.parametrize(
    ("cases", "status", "text"),
    [
        (PASSED, 0, "| a kill | 2 | 2 | resumed |"),
        (PASSED + SKIPPED, 1, "| 0 | 0 | not run: no slurm |"),
        (PASSED + FAILED, 1, "| 1 | 0 | FAILED |"),
        ("", 1, "0 of 0 good"),
    ],
    ids=["passed", "skipped", "failed", "empty"],
)
def test_the_status_says_whether_everything_was_tried_and_good(
    cases: str, status: int, text: str, tmp_path: Path
) -> None:
    junit, output = tmp_path / "junit.xml", tmp_path / "faults.md"
    junit.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert matrix.main(["--from-junit", str(junit), "--output", str(output)]) == status
    assert text in output.read_text()


def test_tests_of_declared_equipment_are_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "chromium,slurm")
    with pytest.raises(pytest.fail.Exception, match="names slurm, but srun is missing"):
        skip_without("slurm", "srun is missing")
    with pytest.raises(pytest.skip.Exception, match="no root"):
        skip_without("root", "no root")
