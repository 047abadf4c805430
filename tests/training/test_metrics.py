"""The log after kills has no step twice, no partial line and no NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hydra.config.run import LoggingConfig
from megatron_hydra.reporting import METRICS_FILE
from megatron_hydra.training.metrics import MetricsLog, truncate_metrics

QUIET = LoggingConfig(tensorboard=False, progress=False)


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_truncated_to_the_resume_point(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 7)) + '{"step": 7, "lo')
    log = MetricsLog(tmp_path, QUIET, first_step=4, total_steps=9, enabled=True)
    log.write({"step": 5, "loss": 1.0})
    log.close()
    log.close()
    assert _steps(path) == [1, 2, 3, 4, 5]


def test_missing_file_is_no_error(tmp_path: Path) -> None:
    truncate_metrics(tmp_path / METRICS_FILE, 3)
    assert not (tmp_path / METRICS_FILE).exists()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, QUIET, first_step=0, total_steps=1, enabled=True)
    log.write({"step": 1, "loss": float("nan"), "layers": [1.0, float("inf")]})
    log.close()
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "layers": [1.0, None]}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, LoggingConfig(), first_step=0, total_steps=1, enabled=False)
    log.write({"step": 1, "loss": 1.0})
    log.advance(1, 1.0)
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_scalars_and_layers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(
        tmp_path, LoggingConfig(progress=False), first_step=0, total_steps=1, enabled=True
    )
    log.write({"step": 1, "loss": 2.5, "layers": [1.0, 1.5], "skipped": True})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "layers/00", "layers/01"}
    assert events.Scalars("loss")[0].value == 2.5
