"""Options for making a student: of ``tools/hf_to_megatron.py``, and of ``student`` in an experiment."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_hydra.arguments import path_text, real
from megatron_hydra.errors import HydraError
from megatron_hydra.options import option

Init = Literal["spread", "decay", "statistics"]
STUDENT = "student (with --head-map, or --set mixer=token|parallel)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentStart:
    """Where the parameters of a student begin that the dense model does not have.

    Attributes:
        init: where decay and β of a GDN head come from; see
            :class:`~megatron_hydra.conversion.student.StudentInit`.
        half_life: range of the initial half-lives, two numbers of tokens; empty: 32 … 16384, where
            they are measured 1 … 16384.
        calibrate: measure γ; otherwise it is 1.
        calibration_file: text to measure γ and statistics of heads on (see
            :mod:`megatron_hydra.conversion.calibration`); empty: a bundled one.
        calibration_tokens: how many of its tokens.
    """

    init: Init = option(
        "spread",
        "initial decay and write strength of GDN heads. spread: half-lives cover the range evenly "
        "(default). decay: half-lives follow the attention distances of the teacher's heads on the calibration "
        "text. statistics: as decay, and the write strength follows their attention too",
        group=STUDENT,
    )
    half_life: tuple[float, ...] = option(
        (),
        "range of initial half-lives of GDN heads, in tokens (default 32 16384; 1 16384 for measured "
        "half-lives)",
        parse=real(0),
        count=2,
        metavar=("MIN", "MAX"),
        group=STUDENT,
    )
    calibration_file: str = option(
        "",
        "text, or .jsonl of {'text': …} or {'tokens': [ids]} lines (default: a bundled text)",
        parse=path_text,
        metavar="FILE",
        group=STUDENT,
    )
    calibration_tokens: int = option(
        8192,
        "tokens of the calibration text to use (default %(default)s)",
        metavar="N",
        group=STUDENT,
    )
    calibrate: bool = option(
        True,
        "start the scale of every head at 1, without calibration",
        flag="--no-calibration",
        group=STUDENT,
    )

    def __post_init__(self) -> None:
        if self.init not in ("spread", "decay", "statistics"):
            raise HydraError(f"--init is {self.init!r}: it must be spread, decay or statistics")
        if self.half_life and not (
            len(self.half_life) == 2 and 0 < self.half_life[0] <= self.half_life[1]
        ):
            raise HydraError(
                f"--half-life {' '.join(f'{value:g}' for value in self.half_life)}: must be two numbers of "
                "tokens, positive and ascending"
            )
        if self.calibration_tokens < 1:
            raise HydraError(f"--calibration-tokens {self.calibration_tokens}: must be 1 or more")
