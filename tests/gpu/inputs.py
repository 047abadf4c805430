"""Make the inputs of the GPU suite: ``python -m tests.gpu.inputs FOLDER``.

``teacher_hf/``: the tiny teacher that solves its tasks, with larger heads (:mod:`tests.gpu.teacher`), with
the prompts and the calibration text of the quickstart. ``random/``: a random teacher, its student and a text
whose documents are shorter than a shard, longer than one, and longer than a sequence.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.hf_loading import find_tokenizer
from megatron_hydra.quickstart.shipped import shipped_teacher
from megatron_hydra.quickstart.tasks import write_calibration, write_selection_prompts
from tests.gpu.teacher import HEAD_DIM, widen
from tests.training import tiny

PROMPTS = 16
RANDOM = dataclasses.replace(tiny.DEEP, hidden_size=256, ffn_hidden_size=384, head_dim=HEAD_DIM)
"""Four layers for a pipeline, one of them without FA heads; FLA's kernels support the heads."""


def main(folder: Path) -> None:
    """Write everything."""
    teacher = folder / "teacher_hf"
    widen(shipped_teacher(), teacher)
    tokenizer = find_tokenizer(teacher)
    write_selection_prompts(folder / "prompts.jsonl", tokenizer, PROMPTS, seed=0)
    write_calibration(folder / "calibration.jsonl", tokenizer, seed=0)
    weights = tiny.teacher_weights(RANDOM, scale=0.05)
    student = tiny.student_config(RANDOM)
    random = folder / "random"
    random.mkdir()
    save_canonical(random / "teacher", weights, RANDOM)
    save_canonical(random / "student", initialise_student(weights, student), student)
    tiny.write_text(random, documents=100, longest=700)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
