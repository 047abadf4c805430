"""Run every fault and write the table: ``python -m tests.faults.matrix --output faults.md``.

Each row comes from a test of this run (tests/faults, tests/slurm, the page of a run). The row of a failed test
says so. The row of a skipped test says that it was tried 0 times. In both cases the command ends with status 1.
The tests need root, SLURM and chromium; HYDRA_REQUIRE= lets them skip what is missing.
It takes half an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.required import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = ("tests/faults", "tests/slurm", "tests/reporting/test_run_page.py")
NEEDED = "root,slurm,chromium"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="Markdown file (default: standard output)")
    parser.add_argument(
        "--from-junit", nargs="+", type=Path, default=[], metavar="XML",
        help="results of an earlier pytest --junitxml instead of a run",
    )  # fmt: skip
    parser.add_argument("tests", nargs="*", default=EVERYTHING, help="files or test ids")
    return parser.parse_args(argv)


def _run(tests: list[str], junit: Path) -> None:
    """Run pytest on the tests, slow ones too; the table shows failed tests."""
    environment = {VARIABLE: NEEDED} | os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable, "-m", "pytest", *tests, "-m", "", "--timeout", "3600",
        f"--junitxml={junit}", "-o", "junit_family=xunit1", "--show-capture=no", "-q",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=environment, check=False)


def read_rows(junit: Path) -> list[dict[str, str]]:
    """One row for each test. A test that passed without recording a fault has no ``fault``."""
    rows = []
    for case in ET.parse(junit).getroot().iter("testcase"):
        if case.get("name") is None:
            continue  # a test that was running when pytest was interrupted
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        facts = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        row = {"test": name, "seconds": f"{float(case.get('time', 0)):.0f}", **facts}
        if case.find("failure") is not None or case.find("error") is not None:
            rows.append(row | {"fault": name, "tried": "1", "good": "0", "outcome": "FAILED"})
        elif (skipped := case.find("skipped")) is not None:
            why = f"not run: {skipped.get('message', '')}"
            rows.append(row | {"fault": name, "tried": "0", "good": "0", "outcome": why})
        else:
            rows.append(row)
    return rows


def to_markdown(rows: list[dict[str, str]]) -> str:
    """The table."""
    lines = ["| fault | tried | good | outcome | test | s |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row[key].replace("|", "\\|") for key in ("fault", "tried", "good", "outcome")]
        file, _, name = row["test"].partition("::")
        place = f"{Path(file).name}::{name.partition('[')[0]}"
        lines.append(f"| {' | '.join(cells)} | `{place}` | {row['seconds']} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the tests and write the table; returns 0 if every row was tried and is good."""
    arguments = _arguments(argv)
    files = arguments.from_junit
    with tempfile.TemporaryDirectory() as folder:
        if not files:
            files = [Path(folder) / "junit.xml"]
            _run(list(arguments.tests), files[0])
        # A test that was run again has its last result.
        last = {row["test"]: row for path in files for row in read_rows(path)}
        rows = [row for row in last.values() if "fault" in row]
    tried, good = (sum(int(row[key]) for row in rows) for key in ("tried", "good"))
    today = dt.datetime.now(dt.UTC).date()
    text = f"{to_markdown(rows)}\n{good} of {tried} good, {today}.\n"
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text)
    was_tried = bool(rows) and all(int(row["tried"]) for row in rows)
    return 0 if was_tried and good == tried else 1


if __name__ == "__main__":
    raise SystemExit(main())
