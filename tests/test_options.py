"""A command line and a file read their options from one dataclass."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Literal

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.options import add_options, changed, flags, from_arguments, keys, option, worded


@dataclasses.dataclass(frozen=True)
class Options:
    """Options with one field of each kind."""

    num_prompts: int = option(40, "(default %(default)s)", group="prompts")
    solved: Literal["top1", "off"] = option("top1", "")
    control: bool = option(True, "")
    attribution: bool = option(False, "")
    most: int | None = option(None, "")
    effects: tuple[Literal["direct", "total"], ...] = option((), "")
    lm_eval: tuple[str, ...] = option((), "", in_one=lambda text: tuple(text.split(",")))
    weights: dict = option({}, "", flag="--weight")
    span: tuple[float, ...] = option((), "", count=2, metavar=("MIN", "MAX"))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise HydraError(f"--num-prompts {self.num_prompts}: at least 1, or give --output")


def parse(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_options(parser, Options)
    return from_arguments(Options, parser.parse_args(words), seed=7)


def test_a_command_line_without_flags_gives_the_defaults() -> None:
    assert parse() == Options(seed=7)


def test_every_kind_of_field_has_a_flag() -> None:
    given = parse(
        *("--num-prompts", "3", "--solved", "off", "--no-control", "--attribution", "--most", "2"),
        *("--effects", "total", "direct", "total", "--lm-eval", "a,b", "--weight", "x=2", "y=0.5"),
        *("--span", "3", "3"),
    )
    assert given == Options(
        3,
        "off",
        False,
        True,
        2,
        ("total", "direct"),
        ("a", "b"),
        {"x": 2.0, "y": 0.5},
        (3.0, 3.0),
        7,
    )
    assert changed(Options, given) == [*flags(Options).values()]
    assert changed(Options, parse("--most", "2")) == ["--most"]


@pytest.mark.parametrize(
    "words",
    [("--solved", "x"), ("--effects", "x"), ("--most", "x"), ("--weight", "x"), ("--span", "1")],
)
def test_a_wrong_word_is_a_usage_error(words: tuple[str, str], capsys) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_a_command_may_take_some_options_only() -> None:
    parser = argparse.ArgumentParser()
    groups = add_options(parser, Options, only=("num_prompts",))
    assert set(groups) == {"", "prompts"}
    given = parser.parse_args(["--num-prompts", "3"])
    assert from_arguments(Options, given) == Options(3)


def test_errors_name_an_option_as_whoever_gave_it_does() -> None:
    assert flags(Options)["control"] == "--no-control"
    with pytest.raises(HydraError, match=r"^--num-prompts 0: at least 1, or give --output$"):
        parse("--num-prompts", "0")
    message = r"^selection\.num_prompts 0: at least 1, or give --output$"
    with pytest.raises(HydraError, match=message), worded(keys(Options, "selection")):
        Options(0)
