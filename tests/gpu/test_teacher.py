"""The GPU suite's teacher is the quickstart's, with larger heads."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from megatron_hydra.hf_loading import find_tokenizer
from megatron_hydra.quickstart.shipped import shipped_teacher
from megatron_hydra.quickstart.tasks import TaskGenerator
from tests.gpu.teacher import HEAD_DIM, widen


def _load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )


def test_larger_heads_compute_the_same(tmp_path):
    widen(shipped_teacher(), tmp_path / "teacher", dtype=torch.float32)
    tokens = torch.arange(104).flip(0).repeat(2)[None]
    before, after = _load(shipped_teacher()), _load(tmp_path / "teacher")
    assert after.config.head_dim == HEAD_DIM
    with torch.no_grad():
        want, got = before(tokens).logits, after(tokens).logits
    # ε is added to a mean of squares that is a quarter of the old one.
    assert float((got - want).abs().max() / want.abs().max()) < 1e-3


def test_in_bf16_it_still_solves_the_task(tmp_path):
    import numpy as np

    widen(shipped_teacher(), tmp_path / "teacher")
    tasks, rng = TaskGenerator.of(find_tokenizer(tmp_path / "teacher")), np.random.default_rng(0)
    samples = [tasks.needles(rng, 128) for _ in range(8)]
    with torch.no_grad():
        logits = _load(tmp_path / "teacher")(
            torch.tensor(np.stack([s.tokens for s in samples]))
        ).logits
    right = [
        bool(logits[i, at - 1].argmax() == int(s.tokens[at]))
        for i, s in enumerate(samples)
        for at in s.answers
    ]
    assert sum(right) > 0.9 * len(right)
