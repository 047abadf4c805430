"""Worker processes: they are killed, end early, and make parts in advance."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_hydra.data import part_worker, progress
from megatron_hydra.data.corpus import CorpusConfig, Unit
from megatron_hydra.data.part_worker import _parts_of_pool
from megatron_hydra.data.tokenization import tokenize
from megatron_hydra.data.tokenize_config import TokenizeConfig
from megatron_hydra.errors import HydraError
from tests.data.corpora import write_jsonl
from tests.data.test_tokenization import config, contents, run

STUCK_SECONDS = 3600
"""Seconds of a stuck unit: longer than pytest's limit, so a test that waits for it fails."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 100)


def _die(number: int, unit: Unit) -> None:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    part_worker._worker.make_part(number, unit)


def _stick(number: int, unit: Unit) -> None:
    if number > 0:
        time.sleep(STUCK_SECONDS)
    part_worker._worker.make_part(number, unit)


_shown = multiprocessing.get_context("fork").Event()


def _wait_for_progress(number: int, unit: Unit) -> None:
    _shown.wait()
    part_worker._worker.make_part(number, unit)


def test_a_killed_worker_is_reported_and_the_run_resumes(corpus, qwen, tmp_path, monkeypatch):
    settings = config(corpus, tmp_path / "out", qwen, unit_bytes=5_000, workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(part_worker, "_make_part", _die)
        with pytest.raises(HydraError, match=r"a worker died.*run the same command again"):
            run(settings)
    run(settings)
    run(config(corpus, tmp_path / "whole", qwen, unit_bytes=5_000))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("end", ["token limit", "bad row", "interrupt"])
def test_an_early_end_does_not_wait_for_units_in_work(qwen, tmp_path, monkeypatch, end):
    source = write_jsonl(tmp_path / "a.jsonl", 100)
    raw = source.read_bytes()
    source.write_bytes((b"{\n" if end == "bad row" else b"") + raw)
    limit = 100 if end == "token limit" else 0
    settings = config(source, tmp_path / "out", qwen, unit_bytes=5_000, workers=2, max_tokens=limit)
    monkeypatch.setattr(part_worker, "_make_part", _stick)
    monkeypatch.setattr(progress, "_SECONDS", 0)

    def report(line: str) -> None:
        if end == "interrupt":
            raise KeyboardInterrupt

    if end == "token limit":
        assert 0 < tokenize(settings, report).counts["tokens"] <= limit
    else:
        with pytest.raises(HydraError if end == "bad row" else KeyboardInterrupt):
            tokenize(settings, report)
    assert not multiprocessing.active_children()


def test_progress_is_shown_while_the_first_unit_is_in_work(corpus, qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(part_worker, "_make_part", _wait_for_progress)
    monkeypatch.setattr(part_worker, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_SECONDS", 0)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            _shown.set()

    tokenize(config(corpus, tmp_path / "out", qwen, unit_bytes=10**9, workers=1), report)
    assert _shown.is_set()  # otherwise the unit would still wait
    assert lines[0].startswith("     ?  ")


@pytest.mark.parametrize(("streaming", "ahead"), [(True, 1), (False, 6)])
def test_few_units_of_a_stream_are_made_ahead(tmp_path, streaming, ahead):
    submitted = []

    class Pool:
        def submit(self, make, number, unit):
            submitted.append(number)
            done: Future = Future()
            done.set_result(None)
            return done

    corpus = CorpusConfig(("set",), hub=True, streaming=streaming)
    settings = TokenizeConfig(corpus, str(tmp_path / "out"), "tokenizer", workers=2)
    units = [Unit("set", "stream", i, 20, 1) for i in range(20)]
    parts = _parts_of_pool(Pool(), settings, units, range(20))
    assert next(parts) == 0
    assert submitted == list(range(settings.workers + ahead))
    assert list(parts) == list(range(1, 20))
