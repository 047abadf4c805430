"""Disturbed runs of two gloo processes, compared with an undisturbed run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import torch

from megatron_hydra.checkpoint import store
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config.loading import to_yaml
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.training.run_folder import step_folders
from tests.faults.forks import Forker
from tests.faults.worker import Fault
from tests.training import tiny

ROOT = Path(__file__).resolve().parents[2]

STEPS = 110
"""Steps of the undisturbed run, with which disturbed runs are compared."""

TEACHER = dataclasses.replace(tiny.TEACHER, num_layers=2, num_query_heads=4, num_kv_heads=2)
STUDENT = dataclasses.replace(TEACHER, hydra=HydraConfig(), full_attention_heads=((1,), (0, 3)))


def write_inputs(folder: Path) -> None:
    """Write teacher, student and text. Two layers of four heads: a save takes a fraction of a second."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tiny.teacher_weights(TEACHER)
    save_canonical(folder / "teacher", weights, TEACHER)
    save_canonical(folder / "student", initialise_student(weights, STUDENT), STUDENT)
    tiny.write_text(folder)


LEAVING_SECONDS = 5
"""Seconds that a process may take to end after its run."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A finished attempt.

    Attributes:
        status: the launcher's exit status.
        output: stdout and stderr of launcher and ranks.
        seconds: duration.
        fault_happened: whether the fault's mark exists.
        seconds_after_fault: from the mark to the end of the last process.
        left_over: processes of the attempt that are alive seconds after it, as id and command.
    """

    status: int
    output: str
    seconds: float
    fault_happened: bool
    seconds_after_fault: float
    left_over: list[str]


class Run:
    """One output folder and its attempts.

    Args:
        inputs: from :func:`write_inputs`.
        folder: for config, records and output.
        sections: of the config, in addition to :func:`tests.training.tiny.run_config`.
    """

    def __init__(self, inputs: Path, folder: Path, verb: str = "distill", **sections) -> None:
        self.folder, self.output = folder, folder / "out"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        config = tiny.run_config(inputs, verb, str(self.output), **sections)
        self.config = config
        (folder / "config.yaml").write_text(to_yaml(config))

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def attempt(
        self,
        fault: Fault | None = None,
        *,
        overrides: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        forker: Forker | None = None,
        timeout: float = 600,
    ) -> Ended:
        """Start the run with two processes and wait until all processes have ended.

        Args:
            forker: starts the ranks; ``None``: launch/agent.py starts them.
        """
        mark, log = self.folder / "mark", self.folder / "log"
        mark.unlink(missing_ok=True)
        variables = {"HYDRA_TEST_RECORD": str(self.folder / "samples"), **(environment or {})}
        variables["HYDRA_TEST_FAULT"] = ""
        if fault is not None:
            described = dataclasses.asdict(dataclasses.replace(fault, mark=str(mark)))
            variables["HYDRA_TEST_FAULT"] = json.dumps(described)
        arguments = ["--config", str(self.folder / "config.yaml"), *overrides]
        start = time.time()
        if forker is None:
            status, left_over = _by_agent(arguments, variables, log, timeout)
        else:
            session, status = forker.run(arguments, variables, log)
            left_over = _alive([p for p in psutil.process_iter() if _session(p.pid) == session])
        end, happened = time.time(), mark.exists()
        return Ended(
            status, log.read_text(), end - start, happened,
            end - mark.stat().st_mtime if happened else 0.0, left_over,
        )  # fmt: skip

    def samples(self) -> list[dict[int, list[int]]]:
        """For each rank: step -> samples that it got the last time it did this step."""
        ranks = []
        for path in sorted((self.folder / "samples").glob("rank*.jsonl")):
            lines = (json.loads(line) for line in path.read_text().splitlines())
            ranks.append({line["step"]: line["samples"] for line in lines})
        return ranks

    def metrics(self) -> dict[int, dict]:
        """Step -> logged numbers that do not depend on the clock."""
        if not (self.output / tiny.METRICS_FILE).exists():
            return {}
        return {
            line["step"]: {k: v for k, v in line.items() if k not in tiny.OF_THE_CLOCK}
            for line in tiny.read_metrics(self.output)
        }

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints."""
        return [int(path.name.rpartition("_")[2]) for path in step_folders(self.checkpoints)]


def _alive(processes: list[psutil.Process]) -> list[str]:
    """Processes that do not end by themselves. A compiler's worker ends a moment after its parent."""
    found = []
    for process in psutil.wait_procs(processes, timeout=LEAVING_SECONDS)[1]:
        with contextlib.suppress(psutil.Error):
            found.append(f"{process.pid} {' '.join(process.cmdline())}")
    return found


def _by_agent(
    arguments: list[str], variables: dict[str, str], log: Path, timeout: float
) -> tuple[int, list[str]]:
    """Status of launch/agent.py, and its processes that outlived it; this function ends them."""
    token = uuid.uuid4().hex
    common = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HYDRA_TEST_RUN": token}
    command = [
        sys.executable, str(ROOT / "launch" / "agent.py"), "--standalone", "--nproc-per-node", "2",
        "-m", "tests.faults.worker", *arguments,
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | common | variables, stdout=file, stderr=file
        )
        try:
            status = process.wait(timeout)
            return status, _alive(_processes(token))
        finally:
            for left in _processes(token):
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.wait()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _processes(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HYDRA_TEST_RUN") == token:
                found.append(process)
    return found


def start_run(inputs: Path, folder: Path, steps: int = STEPS, **sections) -> Run:
    """A run with the shared settings; only runs with the same number of steps can be compared."""
    return Run(
        inputs, folder, schedule={"steps": steps, "warmup_steps": min(1, steps - 1)}, **sections
    )


# -- comparison -----------------------------------------------------------------------------------


def differences_so_far(run: Run, whole: Run) -> list[str]:
    """Bitwise differences between a run, finished or not, and the undisturbed one.

    Compared are: logged numbers and samples of all finished steps, and the checkpoint that a resume would load
    (parameters, optimizer, generators, data position).
    """
    found = []
    expected = whole.metrics()
    found += [f"metrics of step {s}" for s, line in run.metrics().items() if line != expected[s]]
    for rank, (mine, theirs) in enumerate(zip(run.samples(), whole.samples(), strict=True)):
        found += [f"samples of rank {rank}, step {s}" for s in mine if mine[s] != theirs[s]]
    if run.steps():
        folder = newest(run.checkpoints)
        store.verify_checkpoint(folder)
        found += compare_checkpoints(folder, whole.checkpoints / folder.name)
    return found


def newest(checkpoints: Path) -> Path:
    """The checkpoint that ``checkpoint.resume=auto`` loads."""
    if (checkpoints / store.LATEST_FILE).exists():
        return store.resolve_checkpoint(checkpoints)
    return step_folders(checkpoints)[-1]


def compare_checkpoints(one: Path, other: Path) -> list[str]:
    """Tensors and lines of training.json that differ."""
    tensors, expected = tiny.everything(one), tiny.everything(other)
    found = sorted(tensors.keys() ^ expected.keys())
    found += [k for k in tensors.keys() & expected.keys() if not same_bits(tensors[k], expected[k])]
    bodies = [json.loads((folder / "training.json").read_text()) for folder in (one, other)]
    for key in ("step", "tokens", "data", "faults", "verb"):
        found += [f"{one.name}: {key}"] if bodies[0][key] != bodies[1][key] else []
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise equality: -0 is not 0, and a NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NumPy has no bf16.
    first, second = (x.detach().cpu().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(first, second)


def differences(run: Run, whole: Run) -> list[str]:
    """Bitwise differences between a finished run and the undisturbed one."""
    found = differences_so_far(run, whole)
    for name, mine, theirs in (
        ("metrics", run.metrics(), whole.metrics()),
        ("samples", [*map(set, run.samples())], [*map(set, whole.samples())]),
    ):
        steps = [set(x) for x in (mine, theirs)] if name == "metrics" else [mine, theirs]
        found += [f"{name}: other steps"] if steps[0] != steps[1] else []
    if newest(run.checkpoints).name != newest(whole.checkpoints).name:
        found.append("the last checkpoint is of another step")
    return found
