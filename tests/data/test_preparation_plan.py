"""A plan scales its sample and agrees with a real preparation."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hydra.data import part_worker, preparation_plan
from megatron_hydra.data.manifest import Manifest
from megatron_hydra.data.parts import Counts
from megatron_hydra.data.preparation_plan import Sample, plan_preparation
from megatron_hydra.errors import HydraError
from tests.data.corpora import write_jsonl
from tests.data.test_tokenization import config, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 300)


def test_a_sample_of_the_whole_input_predicts_the_files(corpus, qwen, tmp_path) -> None:
    settings = config(corpus, tmp_path / "out", qwen, workers=2)
    lines: list[str] = []
    plan = plan_preparation(settings, 0, 600, lines.append)
    assert list(tmp_path.iterdir()) == []  # nothing is written
    run(dataclasses.replace(settings, workers=0))
    counts = Manifest.load(tmp_path / "out.json").counts
    assert (plan.tokens, plan.documents) == (counts["tokens"], counts["documents"])
    assert plan.input_bytes == corpus.stat().st_size
    assert plan.bin_bytes == (tmp_path / "out.bin").stat().st_size
    assert plan.idx_bytes == (tmp_path / "out.idx").stat().st_size
    assert plan.peak_bytes >= plan.bin_bytes + plan.idx_bytes
    text = "\n".join(lines)
    for words in ("core-hours", "GB .bin", "2 workers", "CPU-second", "packing"):
        assert words in text


SAMPLE = Sample(
    units=2, of_units=100, whole_bytes=1000, all_bytes=50_000, whole_tokens=250,
    counts=Counts(rows=10, documents=10, sequences=10, tokens=250), seconds=1.0, warm_tokens=200,
    warm_seconds=0.5, assembly_seconds=0.01, itemsize=2, worker_bytes=10**8, main_bytes=10**8,
    lengths=np.full(10, 25),
)  # fmt: skip


def test_more_tokens_take_more_of_everything_but_memory(corpus, qwen, tmp_path) -> None:
    settings = config(corpus, tmp_path / "out", qwen, workers=4)
    plans = [preparation_plan._extrapolate(settings, SAMPLE, n) for n in (10**6, 10**9)]
    for key in ("documents", "input_bytes", "bin_bytes", "idx_bytes", "worker_hours"):
        few, many = (getattr(plan, key) for plan in plans)
        assert many == pytest.approx(1000 * few, rel=0.01), key
    assert plans[1].packing_bytes > 16 * plans[1].documents  # two columns, at least
    assert plans[1].packing_bytes > plans[0].packing_bytes
    assert plans[1].memory_bytes == plans[0].memory_bytes


def test_proportions(qwen, corpus, tmp_path) -> None:
    settings = config(corpus, tmp_path / "out", qwen, workers=4)
    plan = preparation_plan._extrapolate(settings, SAMPLE, 3600 * 400 * 8)
    assert plan.input_tokens == 12_500
    assert plan.worker_hours == pytest.approx(8)
    assert plan.hours == pytest.approx(2)
    assert plan.input_bytes == 4 * plan.tokens
    assert plan.memory_bytes == 5 * 10**8


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_unit_is_stopped_when_the_time_is_over(qwen, tmp_path, monkeypatch, suffix) -> None:
    """A compressed file, or the shard of a stream, may take an hour."""
    source = write_jsonl(tmp_path / "corpus.jsonl", 200)
    path = source.with_suffix(suffix)
    if suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(source.read_bytes()))
    clock = itertools.count()
    monkeypatch.setattr(part_worker.time, "monotonic", lambda: next(clock))
    settings = config(path, tmp_path / "out", qwen, unit_bytes=1 << 30)
    folder = tmp_path / "folder"
    folder.mkdir()
    units = preparation_plan.plan_units(settings.corpus)
    sample = preparation_plan.take_sample(settings, units, 50, str(folder))
    assert 0 < sample.counts.rows < 60
    assert (sample.whole_tokens, sample.whole_bytes) == (0, 0)
    assert preparation_plan._extrapolate(settings, sample, 10**6).input_tokens is None
    with pytest.raises(HydraError, match=r"no unit of the input completely.*--plan 15e9"):
        preparation_plan._extrapolate(settings, sample, 0)


def test_inputs_that_cannot_be_planned_are_named(corpus, qwen, tmp_path) -> None:
    with pytest.raises(HydraError, match="remove --shard"):
        plan_preparation(config(corpus, tmp_path / "out", qwen, shard=(0, 2)), 0, 1)
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(
        HydraError, match=r"has no token \(1 rows, 1 of them unreadable\).*--column"
    ):
        plan_preparation(config(tmp_path / "other.jsonl", tmp_path / "out", qwen), 0, 60)
    with pytest.raises(HydraError, match=r"corpus2\.jsonl"):
        plan_preparation(config(tmp_path / "corpus2.jsonl", tmp_path / "out", qwen), 0, 1)


def test_the_command(corpus, qwen, tmp_path) -> None:
    command = [
        sys.executable, str(ROOT / "data_prep/tokenize.py"), "--input", str(corpus), "--tokenizer", qwen,
        "--output", str(tmp_path / "out"), "--plan", "15e9", "--plan-seconds", "0.5", "--workers", "999999",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "for 15,000,000,000 tokens" in done.stdout
    assert "too little memory: --workers" in done.stdout
    assert list(tmp_path.iterdir()) == []
