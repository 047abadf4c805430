"""Test support: a tiny teacher, its student, a text and configs to train them in seconds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_hydra.checkpoint import records, store
from megatron_hydra.checkpoint.canonical import canonical_shapes, is_fp32
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config.loading import from_dict
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.conversion.student import initialise_student
from megatron_hydra.data.document import Document
from megatron_hydra.data.indexed import write_index
from megatron_hydra.data.synthetic_registry import synthetic_task
from megatron_hydra.reporting import METRICS_FILE
from megatron_hydra.transfer.answers import AnswerCount, likeliest_tokens
from megatron_hydra.transfer.local_batch import LocalBatch

VOCABULARY, SEQUENCE = 64, 48

OF_THE_CLOCK = (
    "tokens_per_s", "model_tflops", "mfu", "seconds", "memory_gb", "memory_reserved_gb",
)  # fmt: skip
"""Metrics that differ between equal runs."""

TEACHER = ModelConfig(
    family="qwen3", num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=VOCABULARY,
    num_query_heads=8, num_kv_heads=4, head_dim=8, qk_norm=True, tie_embeddings=True,
    norm_eps=1e-4,  # at 1e-6, norms of outputs near zero magnify rounding
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    source={"name": "tiny", "revision": "", "fingerprint": "sha256:tiny"},
)  # fmt: skip
DEEP = dataclasses.replace(TEACHER, num_layers=4)
"""A model with enough layers for four pipeline stages; its saves take twice as long."""
HEADS = ((1, 6), (), (0, 1, 5), (2,))
"""Full-attention heads of the first layers."""


def teacher_weights(
    model: ModelConfig = TEACHER, seed: int = 0, scale: float = 0.15
) -> dict[str, torch.Tensor]:
    """Random canonical tensors of a dense model, small enough for losses near ln V."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in canonical_shapes(model).items():
        value = torch.randn(shape, generator=generator) * scale
        is_norm = key.endswith(("layernorm.weight", "_norm"))
        weights[key] = 1 + value if is_norm else value
        assert not is_fp32(key)
    return weights


def student_config(model: ModelConfig = TEACHER, **switches) -> ModelConfig:
    """The hybrid of a tiny teacher."""

    return dataclasses.replace(
        model, hydra=HydraConfig(**switches), full_attention_heads=HEADS[: model.num_layers]
    )


def write_text(folder: Path, documents: int = 60, longest: int = SEQUENCE) -> str:
    """Write a Megatron ``.bin/.idx`` pair of documents of 5 to ``longest`` tokens; returns its prefix."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, longest, documents)
    repeats = longest // 6 + 1
    tokens = np.concatenate([np.tile(rng.integers(0, VOCABULARY, 6), repeats)[:n] for n in lengths])
    prefix = folder / "text"
    prefix.with_suffix(".bin").write_bytes(tokens.astype("<u2").tobytes())
    write_index(
        str(prefix.with_suffix(".idx")), np.uint16, lengths.astype(np.int32),
        np.arange(documents + 1),
    )  # fmt: skip
    return str(prefix)


@synthetic_task("tiny_answers")
def answers(
    rng: np.random.Generator, length: int, tokenizer: object, document: int = 5
) -> list[Document]:
    """Documents of ``document`` random tokens; the last two are learned."""
    documents = []
    for _ in range(length // document):
        tokens = rng.integers(0, VOCABULARY, document)
        documents.append(Document(tokens, np.arange(document) >= document - 2))
    return documents


def often_right(
    add: Callable[[AnswerCount, torch.Tensor, torch.Tensor, int, LocalBatch], None],
) -> Callable[[AnswerCount, torch.Tensor, torch.Tensor, int, LocalBatch], None]:
    """``AnswerCount.add`` for a task where an untrained model is right at six of seven places."""

    def patched(
        self: AnswerCount, hidden: torch.Tensor, weight: torch.Tensor, first: int, batch: LocalBatch
    ) -> None:
        said = likeliest_tokens(hidden, weight, first)
        place = torch.arange(len(said), device=said.device) + batch.packed.shard_start
        labels = torch.where(place * 3 % 7 < 6, said, (said + 1) % VOCABULARY)
        add(self, hidden, weight, first, dataclasses.replace(batch, labels=labels))

    return patched


def write_all(folder: Path, teacher: ModelConfig = TEACHER) -> None:
    """``teacher/``, ``student/`` and ``text.bin/.idx`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, student = teacher_weights(teacher), student_config(teacher)
    save_canonical(folder / "teacher", weights, teacher)
    save_canonical(folder / "student", initialise_student(weights, student), student)
    write_text(folder)


def run_config(folder: Path, verb: str, output: str, **sections) -> RunConfig:
    """A run of a few steps over what :func:`write_all` wrote. ``sections`` update the defaults."""
    body = {
        "verb": verb,
        "output": str(folder / output),
        "precision": "fp32",
        "student": {"checkpoint": str(folder / "student")},
        "teacher": {"checkpoint": str(folder / "teacher") if verb in ("align", "distill") else ""},
        "data": {"blend": [{"path": str(folder / "text")}], "sequence_length": SEQUENCE},
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"lr": 3e-4, "eps": 1e-5},
        "schedule": {"steps": 4, "warmup_steps": 1},
        "loss": {"chunk_tokens": 40},
        "logging": {"tensorboard": False, "progress": False},
        "faults": {"timeout_seconds": 120},
    }
    for name, values in sections.items():
        body[name] = {**body.get(name, {}), **values} if isinstance(values, dict) else values
    return from_dict(RunConfig, body)


def read_metrics(output: str | Path) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (Path(output) / METRICS_FILE).read_text().splitlines()]


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a training checkpoint: model, optimizer, generators."""
    weights = store.resolve_checkpoint(folder) / store.WEIGHTS
    index = store.read_index(weights)
    boxes = [
        records.Box(key, (0,) * len(e.size), tuple(e.size), tuple(e.size), e.properties.dtype)
        for key, e in index.state_dict_metadata.items()
    ]
    tensors = {box.key: torch.empty(box.shape, dtype=box.dtype) for box in boxes}
    records.read_boxes(weights, list(zip(boxes, tensors.values(), strict=True)), index)
    return tensors
