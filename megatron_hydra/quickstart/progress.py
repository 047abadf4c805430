"""How far the students are, in one line: read from the metrics that their stages write."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from megatron_hydra.quickstart.workspace import STAGES, STUDENTS, Workspace

# CPU time of one unit of work relative to a step of stage 1, measured on two cores: what the
# estimate of the remaining time is weighted with.
_STEP_COST = {"align": 1.0, "distill": 2.0, "finetune": 2.0}
_FINISH_COST = 20.0
_LINE_SECONDS = 15.0


class TrainingProgress:
    """Shows stage, step and loss of every student, and about how long it will take.

    On a terminal the line is redrawn; elsewhere a new one is printed from time to time.
    """

    def __init__(
        self, workspace: Workspace, steps: dict[str, int], say: Callable[[str], None]
    ) -> None:
        self.workspace, self.steps, self.say = workspace, steps, say
        self.terminal = sys.stderr.isatty()
        self.started = time.monotonic()
        self.first_share = self._share()
        self.last_shown = self.started

    def show(self) -> None:
        """Draw the line if it is time to."""
        now = time.monotonic()
        if now - self.last_shown < (1.0 if self.terminal else _LINE_SECONDS):
            return
        self.last_shown = now
        line = "      " + " | ".join(self._describe(student) for student in STUDENTS) + self._left()
        if self.terminal:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        else:
            self.say(line)

    def close(self) -> None:
        """Remove the redrawn line."""
        if self.terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    # -- reading ------------------------------------------------------------------------------

    def _entry(self, student: str, stage: str) -> tuple[int, float]:
        """Step and loss of the last complete line of ``metrics.jsonl``."""
        path = self.workspace.run(student, stage) / "metrics.jsonl"
        if not path.is_file():
            return 0, 0.0
        lines = path.read_text().rpartition("\n")[0].splitlines()
        if not lines:
            return 0, 0.0
        body = json.loads(lines[-1])
        return int(body["step"]), float(body["loss"])

    def _describe(self, student: str) -> str:
        if self.workspace.is_done(f"{student}_evaluate"):
            return f"{student} done"
        for stage in reversed(STAGES):
            step, loss = self._entry(student, stage)
            if step == self.steps[stage] and stage == STAGES[-1]:
                return f"{student} evaluation"
            if step:
                return f"{student} {stage} {step}/{self.steps[stage]} loss {loss:.2f}"
        return f"{student} starting"

    def _share(self) -> float:
        """Share of all students' work that is done, 0 … 1."""
        total = _FINISH_COST + sum(_STEP_COST[s] * n for s, n in self.steps.items())
        done = 0.0
        for student in STUDENTS:
            if self.workspace.is_done(f"{student}_evaluate"):
                done += total
            else:
                done += sum(_STEP_COST[s] * self._entry(student, s)[0] for s in STAGES)
        return done / (total * len(STUDENTS))

    def _left(self) -> str:
        share = self._share()
        if share - self.first_share < 0.03:
            return ""
        seconds = (time.monotonic() - self.started) * (1 - share) / (share - self.first_share)
        return f" | about {seconds / 60:.1f} min left"
