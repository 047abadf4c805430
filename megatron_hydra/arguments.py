"""The parser of a command, and types of its options: ``parser.add_argument(…, type=…)``.

A bad value is a usage error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from megatron_hydra.errors import HydraError
from megatron_hydra.paths import expanded


def command_parser(
    description: str | None, epilog: str, prog: str | None = None
) -> argparse.ArgumentParser:
    """A command's parser, which shows description and examples unchanged."""
    return argparse.ArgumentParser(
        prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def path_text(text: str) -> str:
    """A path or a Hub name, with ``~`` and variables expanded."""
    try:
        return expanded(text)
    except HydraError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_argument(text: str) -> Path:
    """A path, with ``~`` and variables expanded."""
    return Path(path_text(text))


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A whole number of at least ``least``; ``5e9`` is allowed."""

    def parse(text: str) -> int:
        number = real(least)(text)
        if number != int(number) or number > most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return int(number) if not text.strip().isdecimal() else int(text)

    return parse


def real(least: float, above: bool = False) -> Callable[[str], float]:
    """A finite number of at least ``least``, or above it."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(number) or number < least or (above and number == least):
            where = f"above {least:g}" if above else f"of {least:g} at least"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {where}")
        return number

    return parse


seed_argument = whole(0, 2**32 - 1)
"""A seed."""
