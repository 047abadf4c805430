"""The jobs of the GPU suite: the public commands of the whole chain, faults in them, layouts over NCCL.

Every process is a command that a user could give. For a fault at a chosen moment, ``tests.faults.worker``
starts the trainer: it is ``python -m megatron_hydra.train`` with this fault.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.gpu.machine import LIMIT_SECONDS, Ended, Job, JobFailed, Machine, Place

STAGES = ("align", "distill", "finetune")
STOP_EXIT = 85
TASK = "megatron_hydra.quickstart.tasks:retrieval"
CONFIGS = Path("configs/quickstart")
WATCHDOG_SECONDS = 20
"""``faults.timeout_seconds`` of the runs with a hung or a dead rank."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the jobs.

    Attributes:
        steps: of each stage of the chain.
        stop_at: step of ``distill`` after which SIGTERM is sent.
        interval: steps between checkpoints of ``distill``.
        samples: of the evaluation, at each length.
        sequence: tokens of a sequence of the layouts' runs.
        batch: sequences of the chain's micro-batches, at most; 0: those of the quickstart.
    """

    steps: dict[str, int]
    stop_at: int
    interval: int
    samples: int
    sequence: int
    batch: int

    @classmethod
    def of(cls, machine: Machine) -> Sizes:
        """Sizes for GPUs, or sizes that two CPU cores can do in minutes."""
        if machine.is_dry_run:
            return cls({"align": 8, "distill": 8, "finetune": 3}, 3, 3, 4, 128, 1)
        return cls({"align": 40, "distill": 80, "finetune": 30}, 20, 25, 20, 512, 0)


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp-seq": (
        2,
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.fa_partition=sequence"],
    ),
    "cp2": (2, ["parallel.context=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2": (2, []),
    "tp2-cp2": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "tp2-sp-cp2-seq": (
        4,
        [
            "parallel.tensor=2", "parallel.sequence=true", "parallel.context=2",
            "parallel.fa_partition=sequence",
        ],
    ),
}  # fmt: skip
"""Name -> number of GPUs, overrides."""
LAYOUT_VERBS = ("align", "distill")
LAYOUT_STEPS = 3
CASE_SECONDS = 60
"""Seconds that each run adds to the limit of the process that it shares."""


class Chain:
    """Paths and commands of one session.

    Args:
        machine: where it runs.
        folder: for everything.
    """

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder, self.sizes = machine, folder, Sizes.of(machine)
        self.teacher_hf = folder / "teacher_hf"
        self.teacher, self.student = folder / "teacher", folder / "student"
        self.head_map, self.export = folder / "head_map.json", folder / "export"
        self.random = folder / "random"
        # Named, so that a missing kernel is an error and not another back end.
        self.kernels = [] if machine.is_dry_run else [
            "backend.gated_delta_net=fla", "backend.fused_kernels=triton",
            "backend.full_attention=sdpa",
        ]  # fmt: skip

    def jobs(self) -> list[Job]:
        """All jobs, including those that need more GPUs than this machine has."""
        return [
            Job("inputs", self._inputs, gpus=0),
            Job("convert", self._convert_teacher, after=("inputs",)),
            Job("select", self._select, after=("inputs",)),
            Job("student", self._convert_student, after=("select",)),
            Job("align", self._align, after=("convert", "student")),
            Job("distill", self._distill_stopped, after=("align",)),
            Job("finetune", self._finetune, after=("distill",)),
            Job("export", self._export, after=("finetune",)),
            Job("evaluate_hf", self._evaluate_hf, after=("export",)),
            Job("evaluate_checkpoint", self._evaluate_checkpoint, after=("finetune",)),
            Job("distill_whole", self._distill_whole, after=("align",)),
            Job("distill_killed", self._distill_killed, after=("align",)),
            Job("same_end", self._same_end, gpus=0,
                after=("distill", "distill_whole", "distill_killed")),
            Job("select_2", self._select, gpus=2, after=("inputs",)),
            Job("evaluate_2", self._evaluate_checkpoint, gpus=2, after=("finetune",)),
            Job("one", self._layouts, after=("inputs",)),
            Job("layouts_2", self._layouts, gpus=2, after=("inputs",)),
            Job("layouts_4", self._layouts, gpus=4, after=("inputs",)),
            Job("gradients_2", self._gradients, gpus=0, after=("one", "layouts_2")),
            Job("gradients_4", self._gradients, gpus=0, after=("one", "layouts_4")),
            Job("hung", lambda place: self._fault(place, "hang"), gpus=2, after=("inputs",)),
            Job("dead", lambda place: self._fault(place, "kill"), gpus=2, after=("inputs",)),
            Job("too_many", self._too_many, after=("inputs",)),
            Job("too_large", self._too_large, after=("inputs",)),
        ]  # fmt: skip

    # -- the chain ----------------------------------------------------------------------------------

    def _inputs(self, place: Place) -> None:
        place.run("inputs", ["-m", "tests.gpu.inputs", self.folder])

    def _convert_teacher(self, place: Place) -> None:
        place.run("convert", ["tools/hf_to_megatron.py", "--hf-path", self.teacher_hf, "--verify",
                              "--quiet", "--output", self.teacher])  # fmt: skip

    def _select(self, place: Place) -> dict[str, Any]:
        """The head map that the command writes, on all GPUs."""
        several = len(place.gpus) > 1
        output = (
            self.head_map.with_name(f"head_map_{len(place.gpus)}.json")
            if several
            else self.head_map
        )
        place.run("select", [
            *place.ranks("tools.select_heads"), "--hf-path", self.teacher_hf, "--ratio", "7:1",
            "--num-prompts", "16", "--no-pictures",
            "--tasks", f"jsonl:{self.folder / 'prompts.jsonl'}", "--output", output,
        ])  # fmt: skip
        body: dict[str, Any] = json.loads(output.read_text())
        return body

    def _convert_student(self, place: Place) -> None:
        place.run("student", [
            "tools/hf_to_megatron.py", "--hf-path", self.teacher_hf, "--head-map", self.head_map,
            "--calibration-file", self.folder / "calibration.jsonl", "--quiet", "--output", self.student,
        ])  # fmt: skip

    def stage(self, stage: str, student: Path, output: str, *more: str) -> list[object]:
        """Arguments of the trainer for a stage of the chain."""
        number = STAGES.index(stage)
        words = [
            "--config", CONFIGS / "common.yaml", "--config", CONFIGS / f"{stage}.yaml",
            f"student.checkpoint={student}", f"output={self.run_folder(output)}", "precision=bf16",
            f"data.tokenizer={self.teacher_hf}", f"data.seed={number}", *self.kernels,
            f"schedule.steps={self.sizes.steps[stage]}", "schedule.warmup_steps=2",
        ]  # fmt: skip
        if self.sizes.batch:
            size = self.sizes.batch
            words += [f"batch.micro_batch_size={size}", f"batch.global_batch_size={2 * size}"]
        if stage != "finetune":
            words.append(f"teacher.checkpoint={self.teacher}")
        return [*words, *more]

    def run_folder(self, name: str) -> Path:
        """The output of a run."""
        return self.folder / "runs" / name

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of its metrics file."""
        path = self.run_folder(name) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of its events file."""
        text = (self.run_folder(name) / "events.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def _train(self, place: Place, name: str, words: list[object], **more: Any) -> Ended:
        return place.run(name, [*place.ranks("megatron_hydra.train"), *words], **more)

    def _align(self, place: Place) -> list[dict[str, Any]]:
        self._train(place, "align", self.stage("align", self.student, "align"))
        return self.metrics("align")

    def _distill(self, name: str) -> list[object]:
        """A deterministic stage with checkpoints: its runs are compared bit for bit."""
        return self.stage(
            "distill", self.run_folder("align") / "checkpoints", name, "deterministic=true",
            f"checkpoint.interval={self.sizes.interval}", "checkpoint.save_optimizer=true",
            "checkpoint.keep=0",
        )  # fmt: skip

    def _distill_whole(self, place: Place) -> list[dict[str, Any]]:
        self._train(place, "whole", self._distill("distill_whole"))
        return self.metrics("distill_whole")

    def _distill_stopped(self, place: Place) -> list[dict[str, Any]]:
        """SIGTERM in the middle, then the same command again."""
        words = self._distill("distill")
        begin = [0.0]

        def stop(process: subprocess.Popen) -> None:
            self._wait_for_step("distill", self.sizes.stop_at, process)
            begin[0] = time.monotonic()
            process.send_signal(signal.SIGTERM)

        self._train(place, "stopped", words, status=STOP_EXIT, meanwhile=stop)
        self.seconds_to_stop = time.monotonic() - begin[0]
        self._train(place, "resumed", words)
        return self.metrics("distill")

    def _wait_for_step(self, run: str, step: int, process: subprocess.Popen) -> None:
        limit = time.monotonic() + 500
        while not any(line["step"] >= step for line in self.metrics(run)):
            if process.poll() is not None or time.monotonic() > limit:
                raise JobFailed(f"{run} did not reach step {step}; status {process.poll()}")
            time.sleep(0.05)

    def _distill_killed(self, place: Place) -> list[dict[str, Any]]:
        """SIGKILL in the middle of its second save, then the same command again."""
        words, mark = self._distill("distill_killed"), self.folder / "killed_here"
        fault = {"kind": "kill_in_save", "step": 2, "point": "written", "mark": str(mark)}
        environment = {"HYDRA_TEST_FAULT": json.dumps(fault)}
        place.run("killed", ["-m", "tests.faults.worker", *words], status=-signal.SIGKILL,
                  environment=environment)  # fmt: skip
        checkpoints = self.run_folder("distill_killed") / "checkpoints"
        if not mark.exists() or not list(checkpoints.glob(".step_*")):
            raise JobFailed(f"the save was not interrupted: {sorted(checkpoints.iterdir())}")
        self._train(place, "resumed", words)
        return self.metrics("distill_killed")

    def _same_end(self, place: Place) -> dict[str, list[str]]:
        """Run -> bitwise differences between its last checkpoint and that of the undisturbed run."""
        runs = [self.run_folder(name) for name in ("distill_whole", "distill", "distill_killed")]
        return _answer(place.run("compare", ["-m", "tests.gpu.compare", "bits", *runs]))

    def _finetune(self, place: Place) -> list[dict[str, Any]]:
        student = self.run_folder("distill") / "checkpoints"
        self._train(place, "finetune", self.stage("finetune", student, "finetune"))
        return self.metrics("finetune")

    def _export(self, place: Place) -> None:
        place.run("export", ["tools/megatron_to_hf.py", "--verify", "--quiet", "--output", self.export,
                             "--checkpoint", self.run_folder("finetune") / "checkpoints"])  # fmt: skip

    def _evaluate_hf(self, place: Place) -> dict[str, float]:
        return self._evaluate(
            place, ["tools/evaluate.py", "--model", self.export, "--trust-remote-code"]
        )

    def _evaluate_checkpoint(self, place: Place) -> dict[str, float]:
        """Evaluate on one GPU, or tensor-parallel on several."""
        checkpoint = self.run_folder("finetune") / "checkpoints"
        layout = [f"parallel.tensor={len(place.gpus)}"] if len(place.gpus) > 1 else []
        words = [*place.ranks("tools.evaluate"), "--checkpoint", checkpoint, *layout]
        return self._evaluate(place, [*words, "--tokenizer", self.teacher_hf])

    def _evaluate(self, place: Place, words: list[object]) -> dict[str, float]:
        """Share of right answers by length."""
        output = place.folder / "results"
        modules = {"HF_MODULES_CACHE": str(place.folder / "modules")}
        place.run("evaluate", [
            *words, "--tasks", TASK, "--lengths", "128,256", "--samples", str(self.sizes.samples),
            "--quiet", "--output", output,
        ], environment=modules)  # fmt: skip
        cells = json.loads((output / "results.json").read_text())["tasks"]["facts"]
        return {length: cell["accuracy"] for length, cell in cells.items()}

    # -- layouts ------------------------------------------------------------------------------------

    def layouts_of(self, gpus: int) -> list[str]:
        """Names of the layouts that need so many GPUs."""
        return [name for name, (count, _) in LAYOUTS.items() if count == gpus]

    def _layouts(self, place: Place) -> None:
        """A few steps of stages 1 and 2 in bf16, layout after layout in the same processes.

        On one GPU it makes their references: in bf16 (``one``), and in fp32 by the torch twins (``exact``).
        """
        bf16 = ["precision=bf16", *self.kernels]
        runs = {name: [*bf16, *LAYOUTS[name][1]] for name in self.layouts_of(len(place.gpus))}
        if len(place.gpus) == 1:
            runs = {"one": bf16, "exact": ["precision=fp32", "backend.fused_kernels=torch"]}
        cases = [
            {"verb": verb, "output": f"{verb}-{name}", "overrides": overrides, "sections": self._sections()}
            for name, overrides in runs.items()
            for verb in LAYOUT_VERBS
        ]  # fmt: skip
        listing = place.folder / "cases.json"
        listing.write_text(json.dumps(cases))
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            len(place.gpus),
        ]
        ended = place.run(
            "layouts",
            [*launcher, "-m", "tests.parallel.training_runs", self.random, listing],
            # Each compiles its own kernels; faults.timeout_seconds ends a hang.
            limit=LIMIT_SECONDS + CASE_SECONDS * len(cases),
        )
        lines = [json.loads(x) for x in ended.output.splitlines() if x.startswith('{"output"')]
        wrong = [line for line in lines if any(line["outcomes"])]
        if wrong or len(lines) != len(cases):
            raise JobFailed(f"{len(lines)} of {len(cases)} runs ended, not well: {wrong}")

    def _sections(self) -> dict[str, Any]:
        return {
            "schedule": {"steps": LAYOUT_STEPS, "warmup_steps": 1},
            "batch": {"micro_batch_size": 1, "global_batch_size": 4},
            "data": {"sequence_length": self.sizes.sequence, "packing": "split_long"},
            "loss": {"chunk_tokens": 256},
            "checkpoint": {"interval": 1, "keep": 0},  # step 1's holds its gradients
            "faults": {"timeout_seconds": 300},
        }

    def _gradients(self, place: Place) -> dict[str, dict[str, Any]]:
        """Run -> relative errors of step 1's gradients for each parameter, losses and norms."""
        gpus = int(place.folder.name.rpartition("_")[2])
        runs = [f"{verb}-{name}" for name in self.layouts_of(gpus) for verb in LAYOUT_VERBS]
        words = ["-m", "tests.gpu.compare", "gradients", self.random, *runs]
        return _answer(place.run("compare", words))

    # -- faults over NCCL ---------------------------------------------------------------------------

    def _fault(self, place: Place, kind: str) -> Any:
        """A rank hangs or dies in step 4 of a run of two ranks, under launch/agent.py."""
        from tests.faults.runs import Run
        from tests.faults.worker import Fault

        sections = self._sections() | {
            "schedule": {"steps": 40, "warmup_steps": 1}, "checkpoint": {"interval": 2},
            "faults": {"timeout_seconds": WATCHDOG_SECONDS},
        }  # fmt: skip
        run = Run(self.random, place.folder, "distill", precision="bf16", **sections)
        return run.attempt(
            Fault(kind, 4, 1), overrides=tuple(self.kernels), timeout=300,
            environment=self.machine.environment(place.gpus),
        )  # fmt: skip

    def _too_many(self, place: Place) -> tuple[Ended, int, Path]:
        """Start the trainer on one process more than this place has GPUs."""
        count, output = len(place.gpus) + 1, self.run_folder("too_many")
        launcher = ["launch/agent.py", "--standalone", "--nproc-per-node", str(count), "-m"]
        words = [*launcher, "megatron_hydra.train", *self._smallest_run(output, f"context={count}")]
        return place.run("refused", words, status=None, limit=180), count, output

    def _too_large(self, place: Place) -> tuple[Ended, Path]:
        """One process with a layout for two."""
        output = self.run_folder("too_large")
        words = ["-m", "megatron_hydra.train", *self._smallest_run(output, "tensor=2")]
        return place.run("refused", words, status=None, limit=180), output

    def _smallest_run(self, output: Path, layout: str) -> list[str]:
        return [
            "--config", "configs/tiny/finetune.yaml", f"output={output}", f"parallel.{layout}",
            f"student.checkpoint={self.random / 'student'}",
            f"data.blend=[{{path: {self.random / 'text'}}}]",
        ]  # fmt: skip


def _answer(ended: Ended) -> Any:
    """The JSON object on the last line of its output."""
    return json.loads(ended.output.splitlines()[-1])
