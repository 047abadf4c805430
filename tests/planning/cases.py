"""Models and runs to measure and to predict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_hydra.config.loading import from_dict, to_dict
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.planning.memory import rank_memory
from megatron_hydra.planning.tape.rank import Rank
from megatron_hydra.planning.tape.stage import StageBuilder
from megatron_hydra.planning.timing import BATCH_LAUNCHES, count_launches
from tests.parallel.launch import ROOT, torchrun

DENSE = ModelConfig(
    family="qwen3", num_layers=4, hidden_size=256, ffn_hidden_size=768, vocab_size=2048,
    num_query_heads=8, num_kv_heads=4, head_dim=32, qk_norm=True, tie_embeddings=True,
)  # fmt: skip


def _hybrid(heads: tuple[tuple[int, ...], ...], **switches: Any) -> ModelConfig:
    shape = {**to_dict(DENSE), "hydra": to_dict(HydraConfig(**switches))}
    return from_dict(ModelConfig, {**shape, "full_attention_heads": heads})


MODELS = {
    "dense": DENSE,
    "layer-wise": _hybrid((tuple(range(8)), (), (), ())),
    "hydrahead": _hybrid(((1, 6), (), (0, 1, 5), (2,))),
    "kda": _hybrid(((1, 6), (), (0, 1, 5), (2,)), linear="kda"),
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp2 sp": {"tensor": 2, "sequence": True, "fa_partition": "sequence"},
    "cp2": {"context": 2},
}


def run_config(verb: str = "finetune", length: int = 1024, **sections: Any) -> dict[str, Any]:
    """A run of one micro-batch of one document; ``sections`` replace sections of the config."""
    teacher = "teacher" if verb in ("align", "distill") else ""
    body: dict[str, Any] = {
        "verb": verb, "output": "x", "precision": "fp32",
        "student": {"checkpoint": "student"}, "teacher": {"checkpoint": teacher},
        "data": {"sequence_length": length},
        "batch": {"micro_batch_size": 1, "global_batch_size": 1},
        "loss": {"chunk_tokens": 256}, "faults": {"timeout_seconds": 600},
    }  # fmt: skip
    return {**body, **sections}


def measure(cases: dict[str, tuple[ModelConfig, dict]], processes: int, folder: Path) -> list[dict]:
    """Run and measure the cases (:mod:`.measure`); one result for each case and rank, with the case's name.

    On one rank every case has its own process: memory that an earlier case leaves would count.
    """
    listed = [{"name": n, "model": to_dict(m), "run": r} for n, (m, r) in cases.items()]
    path = folder / "cases.json"
    outputs = []
    if processes > 1:
        path.write_text(json.dumps(listed))
        outputs.append(torchrun("tests.planning.measure", processes, str(path), timeout=1500))
    else:
        for case in listed:
            path.write_text(json.dumps([case]))
            command = [sys.executable, "-m", "tests.planning.measure", str(path)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            outputs.append(done.stdout)
    lines = "\n".join(outputs).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def predict(model: ModelConfig, body: dict[str, Any], rank: int) -> tuple[int, float, float]:
    """Predicted peak bytes, counted FLOPs, and launches, with the torch twins."""
    run = from_dict(RunConfig, body)
    parallel = run.parallel
    place = Rank(
        run, tp_rank=rank % parallel.tensor, cp_rank=rank // parallel.tensor % parallel.context,
        pp_rank=rank // (parallel.tensor * parallel.context), gpu=False,
    )  # fmt: skip
    builder = StageBuilder(model, place)
    stage = builder.run()
    micro_batches = run.batch.global_batch_size // run.batch.micro_batch_size
    memory = rank_memory(builder, stage, micro_batches)
    counted = sum(w.counted * w.repeats for w in stage.work) * micro_batches
    launches = BATCH_LAUNCHES + count_launches(stage.work, stage.sent).total
    return memory.total, counted, launches * micro_batches
