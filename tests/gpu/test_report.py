"""The table of the suite's last run, and its place in the documentation."""

from __future__ import annotations

import pytest

from tests.gpu.machine import ROOT
from tests.gpu.report import BEGIN, END, table, together, write_into

BODY = {
    "date": "2026-11-28", "dry_run": False, "cards": "2 × H100", "commit": "abc", "seconds": 61.4,
    "versions": {"torch": "2.11", "triton": "–"}, "jobs": {"align": 12.3},
    "tests": [
        {"name": "align", "outcome": "passed", "reason": "", "facts": {"loss": "2 → 1", "off": "a|b"}},
        {"name": "four", "outcome": "skipped", "reason": "needs 4 GPUs, this machine has 2", "facts": {}},
    ],
}  # fmt: skip


def test_table():
    text = table(BODY)
    assert (
        "2 × H100; commit abc; torch 2.11, triton –. 1 passed, 0 failed, 1 skipped in 61 s." in text
    )
    assert "| align | passed | loss 2 → 1; off a\\|b |" in text
    assert "| four | skipped | needs 4 GPUs, this machine has 2 |" in text
    assert "align 12" in text
    assert "dry run" not in text and "dry run" in table(BODY | {"dry_run": True})


def test_reports_of_one_machine_make_one_table():
    again = {"name": "align", "outcome": "failed", "reason": "late", "facts": {}}
    new = {"name": "two", "outcome": "passed", "reason": "", "facts": {}}
    whole = together([BODY, BODY | {"tests": [again, new], "jobs": {"two": 3.0}, "seconds": 8.6}])
    assert [test["outcome"] for test in whole["tests"]] == ["failed", "skipped", "passed"]
    assert whole["seconds"] == 70.0 and whole["jobs"] == {"align": 12.3, "two": 3.0}
    assert len(BODY["tests"]) == 2
    with pytest.raises(SystemExit, match="different commit: abc and def"):
        together([BODY, BODY | {"commit": "def"}])


def test_the_table_takes_the_place_of_the_last_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(page, "new")
    write_into(page, "newer")
    assert page.read_text() == f"before\n{BEGIN}\n\nnewer\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        write_into(page, "new")
    assert page.read_text() == "no marks"


def test_the_page_has_the_marks():
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert page.count(BEGIN) == page.count(END) == 1
