"""Inputs and undisturbed runs for all tests of this folder; each fault writes a line of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.forks import Forker
from tests.faults.runs import STEPS, Run, start_run, write_inputs
from tests.faults.table import table  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture(scope="session")
def undisturbed(
    inputs: Path, forker: Forker, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Run]:
    """The undisturbed run of ``steps`` steps, with a checkpoint every second step."""
    runs: dict[int, Run] = {}

    def make(steps: int = STEPS) -> Run:
        if steps not in runs:
            folder = tmp_path_factory.mktemp(f"undisturbed-{steps}")
            run = start_run(inputs, folder, steps, checkpoint={"interval": 2, "keep": 0})
            ended = run.attempt(forker=forker)
            assert ended.status == 0, ended.output[-4000:]
            runs[steps] = run
        return runs[steps]

    return make
