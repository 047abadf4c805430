"""The time left of work that is distributed, set up once for each batch, and saved on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_hydra.selection.time_left import Stage
from megatron_hydra.selection.work import Chunk, Ranks, Result, WorkBench

STAGE = Stage("paths", "task")
CHUNKS = [
    Chunk(f"b{b}-l{layer}", cost=1.0, batch=b, layer=layer, setup=9.0)
    for b in (0, 1)
    for layer in range(3)
]


class FakeClock:
    """A clock that tests move forward."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bench_with(clock: FakeClock, folder: Path | None = None) -> WorkBench:
    return WorkBench(Ranks(), folder, clock=clock)


def test_a_batch_is_set_up_by_its_first_chunk() -> None:
    """The first chunk of a batch takes ten times as long; the time left is always right."""
    clock = FakeClock()
    bench = bench_with(clock)
    said: list[float] = []

    def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
        clock.now += 9.0
        for chunk in members:
            clock.now += 1.0
            yield chunk, {"m": torch.zeros(1)}
            said.append(bench.time_left.seconds() or 0.0)

    bench.plan(STAGE, CHUNKS)
    assert bench.time_left.cost(STAGE) == 2 * 9 + 6
    bench.run(STAGE, CHUNKS, compute)
    assert said == pytest.approx([14.0, 13.0, 12.0, 2.0, 1.0, 0.0])


def test_results_on_disk_are_not_remaining_work(tmp_path: Path) -> None:
    clock = FakeClock()

    def compute(b: int, members: list[Chunk]) -> Iterator[tuple[Chunk, Result]]:
        for chunk in members:
            clock.now += 1.0
            yield chunk, {"m": torch.full((1,), float(chunk.layer))}

    bench_with(clock, tmp_path).run(STAGE, CHUNKS[:4], compute)
    again = bench_with(clock, tmp_path)
    again.plan(STAGE, CHUNKS)
    assert again.time_left.cost(STAGE) == 9 + 2  # two chunks of one batch
    before = clock.now
    results = again.run(STAGE, CHUNKS, compute)
    assert clock.now - before == 2.0
    assert [int(results[c.key]["m"]) for c in CHUNKS] == [0, 1, 2, 0, 1, 2]
    assert again.time_left.cost(STAGE) == 0.0
