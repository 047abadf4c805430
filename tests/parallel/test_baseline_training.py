"""The baselines with both kinds in every head train under any layout as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion.student import initialise_student
from tests.parallel.test_training import _assert_equal_training, _case, _run
from tests.training import tiny

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

CASES = [
    ("align", "tp4"),
    ("align", "cp4"),
    ("align", "tp2-sp-pp2"),
    ("distill", "tp2-cp2-full"),
    ("finetune", "cp2-dp2-selective"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mixer", ["token", "parallel"])
def test_layouts_equal_one_process(tmp_path: Path, mixer: str) -> None:
    tiny.write_all(tmp_path, tiny.DEEP)
    # The window is longer than a shard of four, so its halo comes from several ranks.
    student = tiny.DEEP.with_every_head_mixed(HydraConfig(mixer=mixer, window=20))
    weights = initialise_student(tiny.teacher_weights(tiny.DEEP), student)
    save_canonical(tmp_path / "student", weights, student, force=True)
    outcomes = _run(tmp_path, [_case(verb, layout) for verb, layout in CASES])
    for verb, layout in CASES:
        assert outcomes[f"{verb}-{layout}"] == [0] * 4
        _assert_equal_training(tmp_path, verb, layout)
    gammas = [line for line in tiny.read_metrics(tmp_path / "align-tp4") if "gamma_fa" in line]
    assert gammas and all(
        None not in line["gamma_fa"] + line["gamma_gdn"] for line in gammas
    )  # both outputs of every head are reported
