"""The table of a run of the GPU suite: ``python -m tests.gpu.report REPORT.json [--write docs/gpu.md]``.

With ``--write``, the table replaces the last one, between the two comments that mark it. Several reports of one
machine and commit, as after ``-k``, make one table; a test has its last outcome.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table of the last run: begin -->", "<!-- table of the last run: end -->"


def table(body: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in body["versions"].items())
    played = ", **dry run on the CPU**" if body["dry_run"] else ""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for test in body["tests"]:
        counts[test["outcome"]] += 1
    lines = [
        f"{body['date']}, {body['cards']}{played}; commit {body['commit']}; {versions}. "
        f"{', '.join(f'{n} {what}' for what, n in counts.items())} in {body['seconds']:.0f} s.",
        "",
        "| test | outcome | what came out |",
        "|---|---|---|",
    ]
    for test in body["tests"]:
        facts = "; ".join(f"{name} {value}" for name, value in test["facts"].items())
        cells = (test["name"], test["outcome"], facts or test["reason"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    jobs = ", ".join(f"{name} {seconds:.0f}" for name, seconds in body["jobs"].items())
    return "\n".join([*lines, "", f"Seconds of each job (several ran at once): {jobs}.", ""])


def together(bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge reports into one; a test that ran more than once has its last outcome.

    Raises:
        SystemExit: the reports differ in machine, commit or versions.
    """
    first, *others = bodies
    whole = {**first, "tests": list(first["tests"]), "jobs": dict(first["jobs"])}
    for body in others:
        for key in ("cards", "commit", "versions", "dry_run"):
            if body[key] != first[key]:
                raise SystemExit(f"reports of different {key}: {first[key]} and {body[key]}")
        places = {test["name"]: place for place, test in enumerate(whole["tests"])}
        for test in body["tests"]:
            if test["name"] in places:
                whole["tests"][places[test["name"]]] = test
            else:
                whole["tests"].append(test)
        whole["jobs"] |= body["jobs"]
        whole["seconds"] += body["seconds"]
    return whole


def write_into(page: Path, text: str) -> None:
    """Put a table between the page's two marks."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    text = table(together([json.loads(path.read_text()) for path in arguments.reports]))
    if arguments.write:
        write_into(arguments.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
