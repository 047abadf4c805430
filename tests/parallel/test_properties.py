"""Document isolation in every layout, and the bytes that context parallelism sends."""

from __future__ import annotations

import json

import pytest
import torch

from tests.parallel.launch import forked
from tests.parallel.properties import CASES, FAST, FULL


def _run(selection: str, timeout: float) -> list[dict]:
    output = forked("tests.parallel.properties", 4, selection, timeout=timeout)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return _run("fast", 280)


def _assert_isolated(results: list[dict], selection: str) -> None:
    isolated = [r for r in results if "layout" in r]
    assert [(r["model"], r["layout"]) for r in isolated] == CASES[selection]
    for result in isolated:
        assert result["first_changed"], result  # the change does reach its own document
        assert not result["second_changed"], result
        assert not result["gradient_leaked"], result
        assert result["host_reads"] == 0, result  # layers never wait for the device


@pytest.mark.parallel
def test_documents_are_isolated_bit_for_bit_and_the_device_is_not_waited_for(results):
    _assert_isolated(results, "fast")
    assert {layout for _, layout in FAST} == {layout for _, layout in FULL}


@pytest.mark.parallel
@pytest.mark.slow
def test_every_kind_of_model_in_every_layout():
    _assert_isolated(_run("full", 1700), "full")


def test_a_host_read_is_counted():
    from tests.parallel.properties import HostReads

    with HostReads() as reads:
        x = torch.ones(3)
        assert x.sum().item() == 3
        assert (x > 0).nonzero().shape == (3, 1)
        assert x[[0, 2]].shape == (2,)
        assert torch.tensor([1, 2]).shape == (2,)
    assert reads.count == 4


@pytest.mark.parallel
def test_gdn_sends_states_not_tokens(results):
    short, long = (r for r in results if "sent" in r)
    assert long["tokens_per_rank"] == 8192
    assert 0 < long["sent"] <= long["all_to_all"] / 10
    assert long["sent"] == short["sent"]  # does not depend on the sequence length
