"""Environment variables of launchers, and the types of the commands' options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_hydra.arguments import path_argument, path_text, real, seed_argument, whole
from megatron_hydra.environment import environment_number, world_size_from_environment
from megatron_hydra.errors import HydraError


def test_numbers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (environment_number("RANK", 0), world_size_from_environment()) == (0, 4)
    monkeypatch.setenv("RANK", "3")
    assert (environment_number("RANK", 0), world_size_from_environment()) == (3, 4)


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "²", " 1"])
def test_values_that_are_not_numbers_are_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(HydraError, match=f"the environment has WORLD_SIZE={text}"):
        world_size_from_environment()


@pytest.mark.parametrize(("size", "rank"), [("0", "0"), ("2", "2")])
def test_a_rank_outside_the_world_is_named(
    monkeypatch: pytest.MonkeyPatch, size: str, rank: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(HydraError, match=f"RANK={rank} and WORLD_SIZE={size}"):
        world_size_from_environment()


def test_paths_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/someone")
    monkeypatch.setenv("RUNS", "/big")
    assert path_argument("~/x") == Path("/people/someone/x")
    assert path_text("$RUNS/a/${RUNS}") == "/big/a//big"
    assert path_text("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"
    assert path_text("costs_5$") == "costs_5$"
    with pytest.raises(argparse.ArgumentTypeError, match="no variable HYDRA_UNSET"):
        path_text("$HYDRA_UNSET/x")


@pytest.mark.parametrize("text", ["-1", "1.5", "nan", "inf", "x", "", "1e30"])
def test_whole_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        whole(0)(text)


def test_numbers_of_options() -> None:
    assert (whole(0)("5e9"), whole(1)("7"), real(0)("0.5"), seed_argument("4294967295")) == (
        5 * 10**9,
        7,
        0.5,
        2**32 - 1,
    )
    with pytest.raises(argparse.ArgumentTypeError):
        real(0, above=True)("0")
    with pytest.raises(argparse.ArgumentTypeError):
        seed_argument("4294967296")
