"""Every config in the repository can be read, and its layouts work for its model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_hydra.config import ModelConfig, load_run_config
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.validate import check_layout
from megatron_hydra.experiments.spec import load_experiment
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
RECIPES = {  # tokens of each stage, in billions, and their lengths
    "paper": ((0.3, 512), (1.0, 512), (1.0, 16_384)),
    "optimised": ((0.8, 512), (4.0, 512), (1.0, 16_384)),
}


@pytest.mark.parametrize(
    ("gpus", "length"),
    [(2, "long"), (4, "long"), (8, "short"), (8, "long"), (64, "short"), (64, "long")],
)
def test_qwen_stages_fit_their_layouts(gpus: int, length: str) -> None:
    layout = QWEN / "layouts" / f"{gpus}_gpus_{length}.yaml"
    for files in STAGES[length]:
        config = load_run_config([*(QWEN / "ours" / name for name in files), layout])
        teacher = TEACHER if config.teacher.checkpoint else None
        check_layout(config, gpus, STUDENT, teacher)
        partitions = plan_model(STUDENT, config.parallel.tensor, config.parallel.fa_partition)
        if length == "long":
            assert max(p.full_attention_imbalance() for p in partitions) <= 1.02


def test_the_stages_of_qwen_read_15_billion_tokens() -> None:
    total = budgets = 0
    for files in [stage for stages in STAGES.values() for stage in stages]:
        config = load_run_config([QWEN / "ours" / name for name in files])
        tokens = (
            config.schedule.steps * config.batch.global_batch_size * config.data.sequence_length
        )
        assert tokens <= config.data.token_budget
        total += tokens
        budgets += config.data.token_budget
    assert budgets == 15_000_000_000
    assert total == pytest.approx(15e9, rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_the_paper_has_the_papers_tokens_and_lengths(recipe: str) -> None:
    """It reads FineWeb-Edu alone; each stage starts from the last one's checkpoint, on the named layout."""
    before = "models/qwen3_1.7b/student"
    rates = []
    for verb, (billions, length) in zip(
        ("align", "distill", "finetune"), RECIPES[recipe], strict=True
    ):
        config = load_run_config(QWEN / recipe / f"{verb}.yaml")
        assert config.verb == verb
        assert [source.path for source in config.data.blend] == ["data/fineweb_edu"]
        assert config.data.sequence_length == length
        assert config.data.token_budget == round(billions * 1e9)
        per_step = config.batch.global_batch_size * length
        steps = config.schedule.steps
        assert steps * per_step <= config.data.token_budget < (steps + 1) * per_step
        assert config.student.checkpoint == before
        before = f"{config.output}/checkpoints"
        rates.append((config.optimizer.lr, config.optimizer.min_lr, config.schedule.kind))
        assert (config.optimizer.weight_decay, config.schedule.warmup_steps) == (0.0, 50)
        layout = load_run_config(
            [QWEN / recipe / f"{verb}.yaml", QWEN / "layouts/8_gpus_short.yaml"]
        )
        check_layout(layout, 8, STUDENT, TEACHER if config.teacher.checkpoint else None)
    assert rates == [(1e-3, 1e-5, "cosine"), (1e-4, 1e-5, "cosine"), (1e-5, 1e-5, "constant")]


def test_the_questions_of_experiments_name_task_files_and_what_they_use() -> None:
    """Each of our tasks that a base names has its file; functions and classes in the files exist."""
    files = sorted((CONFIGS / "lm_eval_tasks").glob("*.yaml"))
    used = {}
    for path in files:
        text = path.read_text()
        assert re.findall(r"^task: (.*)$", text, re.M) == [path.stem]
        used[path.stem] = re.findall(r"!function (\S+)\.(\w+)$", text, re.M)
    assert files and all(used.values())
    for module, name in {pair for pairs in used.values() for pair in pairs}:
        source = (CONFIGS.parent / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(rf"^(class|def) {name}\(", source, re.M), (module, name)
    for base in ("real/base.yaml", "shared/qwen3_1.7b.yaml"):
        experiment = load_experiment(
            CONFIGS / "experiments/real/reasoning.yaml", CONFIGS / "experiments" / base
        )
        for cell in experiment.cells:
            questions = cell.spec.evaluation
            assert Path(questions.lm_eval_include).resolve() == CONFIGS / "lm_eval_tasks"
            assert not questions.tasks and not questions.lm_eval_limit
            assert set(used) <= set(questions.lm_eval)


def test_tiny_example_is_valid() -> None:
    assert load_run_config(CONFIGS / "tiny/finetune.yaml").verb == "finetune"
