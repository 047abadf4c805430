"""Every config in the repository can be read, and its layouts work for the model it is for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_hydra.config import ModelConfig, load_run_config
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.validate import check_layout
from megatron_hydra.parallel.head_partition import plan_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QWEN = CONFIGS / "qwen3_1.7b"
TEACHER = ModelConfig(
    family="qwen3", num_layers=28, hidden_size=2048, ffn_hidden_size=6144, vocab_size=151936,
    num_query_heads=16, num_kv_heads=8, head_dim=128, qk_norm=True, tie_embeddings=True,
)  # fmt: skip
STUDENT = dataclasses.replace(
    TEACHER,
    hydra=HydraConfig(),
    full_attention_heads=tuple((i % 16, 15) if i % 16 < 15 else () for i in range(28)),
)
STAGES = {
    "short": [["align.yaml"], ["distill.yaml"]],
    "long": [["finetune.yaml"], ["finetune.yaml", "finetune_512k.yaml"]],
}


@pytest.mark.parametrize(
    ("gpus", "length"),
    [(2, "long"), (4, "long"), (8, "short"), (8, "long"), (64, "short"), (64, "long")],
)
def test_qwen_stages_fit_their_layouts(gpus: int, length: str) -> None:
    layout = QWEN / "layouts" / f"{gpus}_gpus_{length}.yaml"
    for files in STAGES[length]:
        config = load_run_config([*(QWEN / name for name in files), layout])
        teacher = TEACHER if config.teacher.checkpoint else None
        check_layout(config, gpus, STUDENT, teacher)
        partitions = plan_model(STUDENT, config.parallel.tensor, config.parallel.fa_partition)
        if length == "long":
            assert max(p.full_attention_imbalance() for p in partitions) <= 1.02


def test_the_stages_of_qwen_read_15_billion_tokens() -> None:
    total = budgets = 0
    for files in [stage for stages in STAGES.values() for stage in stages]:
        config = load_run_config([QWEN / name for name in files])
        tokens = (
            config.schedule.steps * config.batch.global_batch_size * config.data.sequence_length
        )
        assert tokens <= config.data.token_budget
        total += tokens
        budgets += config.data.token_budget
    assert budgets == 15_000_000_000
    assert total == pytest.approx(15e9, rel=0.01)


def test_tiny_example_is_valid() -> None:
    assert load_run_config(CONFIGS / "tiny/finetune.yaml").verb == "finetune"
