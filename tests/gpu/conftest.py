"""The GPU suite's session: jobs start after the tests are collected; the report is written at the end.

``HYDRA_GPU_REPORT`` names the folder for ``report.json``, ``table.md`` and all logs (default: ``gpu-report``).
"""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.chain import Chain
from tests.gpu.machine import ROOT, JobFailed, Machine, Scheduler
from tests.gpu.report import table

_PACKAGES = (
    "torch", "triton", "megatron-core", "fla-core", "tilelang", "flash-qla", "transformers",
    "transformer-engine", "apex", "flash-attn",
)  # fmt: skip


class Session:
    """Machine, chain and scheduler of one run of the suite, and the facts that its tests report."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.machine = Machine.here()
        self.folder = Path(os.environ.get("HYDRA_GPU_REPORT", "gpu-report")).resolve()
        work, logs = self.folder / "work", self.folder / "logs"
        for old in (work, logs):
            shutil.rmtree(old, ignore_errors=True)  # otherwise its runs would resume
        work.mkdir(parents=True)
        self.chain = Chain(self.machine, work)
        self.scheduler = Scheduler(self.machine, self.chain.jobs(), logs)
        self.tests: dict[str, dict[str, Any]] = {}
        self._head = {
            "date": dt.date.today().isoformat(),
            "dry_run": self.machine.is_dry_run,
            "cards": _cards(self.machine),
            "commit": _commit(),
            "versions": _versions(),
        }

    def can_run(self, name: str) -> bool:
        """Whether the machine has enough GPUs for a job and the jobs that it needs."""
        return self.scheduler.gpus_needed(name) <= len(self.machine.gpus)

    def write_report(self) -> None:
        """Write ``report.json`` and ``table.md`` of the finished tests."""
        body = self._head | {
            "seconds": time.monotonic() - self.begin,
            "jobs": dict(self.scheduler.seconds),
            "tests": list(self.tests.values()),
        }
        (self.folder / "report.json").write_text(json.dumps(body, indent=1) + "\n")
        (self.folder / "table.md").write_text(table(body))


def _cards(machine: Machine) -> str:
    if machine.is_dry_run:
        return f"{len(machine.gpus)} processes"
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "–"
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


_session: list[Session] = []


def jobs_of(item: pytest.Item) -> tuple[str, ...]:
    """The jobs that a test needs (:func:`tests.gpu.needing.needs`)."""
    return getattr(getattr(item, "function", None), "gpu_jobs", ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the jobs that the chosen tests need; tests of other folders run meanwhile."""
    chosen = [item for item in session.items if jobs_of(item) and not _is_skipped(item)]
    if not chosen or session.config.option.collectonly:
        return
    # As Ctrl-C: end the jobs' processes and write the report.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Import here, not in a job's thread: an import makes loggers while pytest iterates over them.
    importlib.import_module("tests.faults.runs")
    suite = Session()
    _session.append(suite)
    names = [name for item in chosen for name in jobs_of(item)]
    suite.scheduler.want(name for name in names if suite.can_run(name))


def _is_skipped(item: pytest.Item) -> bool:
    return item.get_closest_marker("skip") is not None


def pytest_sessionfinish() -> None:
    """End the remaining jobs and write the report."""
    if _session:
        _session[0].scheduler.close()
        _session[0].write_report()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Iterator[None]:  # a wrapper must return the result
    report = yield
    if _session and not jobs_of(item) and item.get_closest_marker("gpu"):
        _count(_session[0], item, report)
    if _session and jobs_of(item):
        _note(_session[0], item, report)
        if report.when == "teardown":
            _session[0].write_report()  # write it now: the machine may disappear before the end
    return report


def _count(suite: Session, item: pytest.Item, report: pytest.TestReport) -> None:
    """Tests of other folders: one line for each file."""
    if report.when != "call" and report.passed:
        return
    file = item.path.relative_to(ROOT).as_posix()
    entry = suite.tests.setdefault(
        file, {"name": file, "outcome": "passed", "reason": "", "facts": {}}
    )
    entry["facts"][report.outcome] = entry["facts"].get(report.outcome, 0) + 1
    if report.failed:
        entry["outcome"] = "failed"


def _note(suite: Session, item: pytest.Item, report: pytest.TestReport) -> None:
    entry = suite.tests.setdefault(
        item.nodeid, {"name": _title(item), "outcome": "passed", "reason": "", "facts": {}}
    )
    if report.skipped:
        entry["outcome"] = "skipped"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        entry["reason"] = reason.removeprefix("Skipped: ")
    elif report.failed:
        entry["outcome"] = "failed"
        text = str(getattr(report.longrepr, "reprcrash", report.longrepr))
        entry["reason"] = " ".join(text.split())[:200]


def _title(item: pytest.Item) -> str:
    return item.name.removeprefix("test_").replace("_", " ")


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Session:
    """The session; a test that needs more GPUs than this machine has is skipped by name."""
    session = _session[0]
    count = max(session.scheduler.gpus_needed(name) for name in jobs_of(request.node))
    if count > len(session.machine.gpus):
        pytest.skip(f"needs {count} GPUs, this machine has {len(session.machine.gpus)}")
    return session


@pytest.fixture
def result(suite: Session) -> Callable[[str], Any]:
    """Wait for a job and return its result; the test fails if the job has failed."""

    def of(name: str) -> Any:
        try:
            return suite.scheduler.result(name)
        except JobFailed as error:
            pytest.fail(str(error), pytrace=False)

    return of


@pytest.fixture
def note(suite: Session, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Put facts into the report: ``note(loss=…)``."""

    def keep(**facts: object) -> None:
        entry = suite.tests.setdefault(
            request.node.nodeid,
            {"name": _title(request.node), "outcome": "passed", "reason": "", "facts": {}},
        )
        entry["facts"] |= {name.replace("_", " "): str(value) for name, value in facts.items()}

    return keep
