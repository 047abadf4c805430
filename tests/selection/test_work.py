"""Work that is distributed, set up once for each batch, and saved on disk; and its time left."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_hydra.ranks import Ranks
from megatron_hydra.selection.time_left import Stage
from megatron_hydra.selection.work import Chunk, Result, WorkBench, share_cost, shares

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


def test_processes_share_whole_batches_where_they_can() -> None:
    """Eight batches on four processes: each sets up two, and no process has more work than another."""
    chunks = [Chunk(f"b{b}-l{i}", 1.0, b, i, setup=9.0) for b in range(8) for i in range(14)]
    parts = shares(chunks, 4)
    assert [{chunk.batch for chunk in part} for part in parts] == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    assert [chunk for part in parts for chunk in part] == chunks
    assert {share_cost(part) for part in parts} == {2 * 9 + 28}


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_no_other_cut_has_a_cheaper_largest_share(processes: int) -> None:
    draw = random.Random(processes)
    for _ in range(30):
        chunks = [
            Chunk(f"b{b}-l{i}", draw.choice([0.0, 0.3, 1.0, 7.0]), b, i, setup)
            for b, setup in enumerate(draw.choices([0.0, 0.5, 4.0], k=draw.randrange(1, 4)))
            for i in range(draw.randrange(1, 4))
        ]
        parts = shares(chunks, processes)
        assert len(parts) == processes
        assert [chunk for part in parts for chunk in part] == chunks
        best = min(
            max(share_cost(chunks[a:b]) for a, b in itertools.pairwise([0, *cuts, len(chunks)]))
            for cuts in itertools.combinations_with_replacement(
                range(len(chunks) + 1), processes - 1
            )
        )
        assert max(map(share_cost, parts)) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_nothing_to_share() -> None:
    assert shares([], 3) == [[], [], []]
