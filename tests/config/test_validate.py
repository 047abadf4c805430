"""An impossible config is refused when it is read, and the error names the key."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_hydra.config import ModelConfig, RunConfig, apply_overrides, from_dict
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.config.validate import (
    accumulation_steps,
    check_layout,
    check_run,
    rounded_stream_length,
)
from megatron_hydra.errors import HydraError

DENSE = ModelConfig(
    family="qwen3", num_layers=4, hidden_size=32, ffn_hidden_size=48, vocab_size=64,
    num_query_heads=8, num_kv_heads=4, head_dim=8, source={"fingerprint": "sha256:a"},
)  # fmt: skip


def _config(*overrides: str) -> RunConfig:
    body = {
        "verb": "distill", "output": "o", "student": {"checkpoint": "s"},
        "teacher": {"checkpoint": "t"}, "data": {"blend": [{"path": "p"}]},
    }  # fmt: skip
    return apply_overrides(from_dict(RunConfig, body), overrides)


def test_a_good_config_passes() -> None:
    check_run(_config())
    check_layout(_config("parallel.tensor=2", "parallel.pipeline=2"), 8, DENSE, DENSE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output="], "output is empty"),
        (["student.checkpoint="], "student.checkpoint is empty"),
        (["teacher.checkpoint="], "teacher.checkpoint is empty: distill needs"),
        (["verb=finetune"], "teacher.checkpoint is set, but finetune has no teacher"),
        (["data.blend=[]"], "data.blend is empty"),
        (["data.blend.0.path="], "data.blend.0.path is empty"),
        (["data.blend.0.kind=synthetic"], "data.blend.0.task is empty"),
        (["data.blend.0.weight=0"], "data.blend.0.weight is 0"),
        (["parallel.tensor=0"], "parallel.tensor is 0: it must be at least 1"),
        (["optimizer.min_lr=1"], "optimizer.min_lr is 1"),
        (["schedule.warmup_steps=100"], "schedule.warmup_steps is 100"),
        (["loss.kl_weight=1.1"], "loss.kl_weight is 1.1"),
        (["optimizer.beta1=1"], "optimizer.beta1 is 1"),
        (["optimizer.beta2=-0.1"], "optimizer.beta2 is -0.1"),
        (["optimizer.eps=0"], "optimizer.eps is 0"),
        (["validation.interval=-1"], "validation.interval is -1"),
        (["validation.interval=1"], "nothing is held out: set data.held_out"),
        (["validation.sequences=0"], "validation.sequences is 0"),
        (["validation.probe_sequences=0"], "validation.probe_sequences is 0"),
        (["validation.probes=[{path: q}]"], "validation.probes.0.kind is indexed"),
        (["validation.probes=[{kind: synthetic, task: ''}]"], "validation.probes.0.task is empty"),
        (
            ["verb=align", "validation.probes=[{kind: synthetic, task: needles}]"],
            "validation.probes: align does not run the whole student",
        ),
        (
            ["validation.probes=[{kind: synthetic, task: needles}]"],
            "validation.probes are named, but validation.interval is 0",
        ),
        (["data.held_out=1"], "data.held_out is 1.0: it is a share"),
        (["schedule.patience=-1"], "schedule.patience is -1"),
        (["schedule.patience=2"], "schedule.patience is 2, but validation.interval is 0"),
        (["schedule.min_improvement=-0.1"], "schedule.min_improvement is -0.1"),
        (["validation.blend=[{path: q, weight: 0}]"], "validation.blend.0.weight is 0"),
        (["validation.blend=[{path: ''}]"], "validation.blend.0.path is empty"),
        (
            ["validation.blend=[{path: ./p}]"],
            "validation.blend.0.path is ./p, which training reads",
        ),
        (["validation.blend=[{path: q}]", "data.held_out=0.1"], "validation reads only one of"),
        (["backend.streams=two", "parallel.context=2"], "backend.streams=two is not possible if"),
        (
            ["backend.streams=two", "parallel.tensor=2", "parallel.fa_partition=sequence"],
            "backend.streams=two is not possible if",
        ),
        (["parallel.sequence=true"], "parallel.sequence is true, but parallel.tensor is 1"),
        (["parallel.virtual_pipeline=2"], "but parallel.pipeline is 1"),
        (
            ["precision=bf16", "parallel.distributed_optimizer=false"],
            "precision=bf16 needs parallel.distributed_optimizer=true",
        ),
        (["parallel.overlap_param_gather=true"], "needs parallel.overlap_grad_reduce=true"),
        (
            ["verb=align", "parallel.overlap_grad_reduce=true"],
            "parallel.overlap_grad_reduce cannot be used by align",
        ),
        (
            ["recompute.granularity=selective", "recompute.modules=[norm]"],
            "recompute.modules: ['norm'] is unknown",
        ),
        (
            ["recompute.granularity=selective", "recompute.modules=[attention, fa]"],
            "recompute.modules names attention and ['fa']",
        ),
    ],
)
def test_contradictions(overrides: list[str], message: str) -> None:
    with pytest.raises(HydraError) as error:
        check_run(_config(*overrides))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor=3"], 4, "does not divide the 4 processes"),
        (
            ["parallel.tensor=2", "parallel.context=4"],
            4,
            "parallel.tensor · context · pipeline = 2·4·1 = 8 processes, one a GPU, but this run has 4",
        ),
        (["batch.global_batch_size=6"], 4, "batch.global_batch_size 6 is not a multiple"),
        (["parallel.pipeline=3"], 3, "does not divide the student's 4 layers"),
        (["parallel.tensor=16"], 16, "the student has 8 query heads"),
        (["parallel.tensor=5"], 5, "does not divide the student's ffn_hidden_size"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.global_batch_size=3"],
            2,
            "needs a multiple of parallel.pipeline",
        ),
    ],
)
def test_layouts_that_cannot_work(overrides: list[str], world: int, message: str) -> None:
    with pytest.raises(HydraError) as error:
        check_layout(_config(*overrides), world, DENSE, DENSE)
    assert message in str(error.value)


def test_both_kinds_in_every_head_refuse_the_sequence_partition() -> None:
    mixed = DENSE.with_every_head_mixed(HydraConfig(mixer="parallel"))
    overrides = ["parallel.tensor=2", "parallel.fa_partition=sequence"]
    with pytest.raises(HydraError, match=r"parallel\.fa_partition=sequence .*mixer=parallel"):
        check_layout(_config(*overrides), 2, mixed)
    check_layout(_config("parallel.tensor=2"), 2, mixed)


def test_a_vocabulary_is_padded_unless_a_rank_would_be_empty() -> None:
    model = dataclasses.replace(DENSE, vocab_size=65)
    check_layout(_config("parallel.tensor=2"), 2, model, model)
    few = dataclasses.replace(DENSE, vocab_size=5)  # 3 ranks hold 2 rows each
    with pytest.raises(
        HydraError, match=r"with 2 entries of the .*vocabulary of 5 per rank, the last"
    ):
        check_layout(_config("parallel.tensor=4"), 4, few, few)


def test_foreign_teacher_is_refused() -> None:
    other = dataclasses.replace(DENSE, source={"fingerprint": "sha256:b"})
    with pytest.raises(HydraError, match="not the model that the student was made from"):
        check_layout(_config(), 1, DENSE, other)
    wider = dataclasses.replace(DENSE, hidden_size=64)
    with pytest.raises(HydraError, match="its hidden_size is 64, the student's is 32"):
        check_layout(_config(), 1, DENSE, wider)


def test_accumulation_and_padding() -> None:
    config = _config("batch.micro_batch_size=2", "batch.global_batch_size=8")
    assert [accumulation_steps(config, n) for n in (1, 2, 4)] == [4, 2, 1]
    config = _config("data.sequence_length=50", "parallel.context=2", "parallel.tensor=2")
    assert rounded_stream_length(config) == 56
    config = apply_overrides(config, ["parallel.sequence=true", "batch.micro_batch_size=3"])
    assert rounded_stream_length(config) == 152
    # tensor-parallel ranks also cut a stream if neither of these keys is set
    assert rounded_stream_length(_config("data.sequence_length=45", "parallel.tensor=4")) == 48


def test_two_streams_cannot_share_rotary_tables() -> None:
    def model(position: str) -> ModelConfig:
        hydra = HydraConfig(fa_position=position)  # type: ignore[arg-type]
        return dataclasses.replace(DENSE, hydra=hydra, full_attention_heads=((0,),) * 4)

    config = _config("backend.streams=two")
    check_layout(config, 1, model("log-scale"))
    with pytest.raises(
        HydraError, match=r"streams=two is not possible with hydra\.fa_position=rope"
    ):
        check_layout(config, 1, model("rope"))
    rotary = dataclasses.replace(
        model("log-scale"), hydra=HydraConfig(fa_rotary_every=DENSE.num_layers)
    )
    with pytest.raises(HydraError, match=f"fa_rotary_every={DENSE.num_layers}"):
        check_layout(config, 1, rotary)


def test_a_shard_holds_what_the_convolution_of_the_next_one_reads() -> None:
    model = dataclasses.replace(
        DENSE, hydra=HydraConfig(conv_width=8), full_attention_heads=((0,),) * 4
    )
    check_layout(_config("data.sequence_length=28", "parallel.context=4"), 4, model)
    message = r"parallel\.context is 4: its shards of 6 tokens are shorter than the 7"
    with pytest.raises(HydraError, match=message):
        check_layout(_config("data.sequence_length=24", "parallel.context=4"), 4, model)


def test_every_backend_has_its_name_in_the_config_and_no_other_passes() -> None:
    from megatron_hydra.ops.backends import BACKENDS

    for key, backends in BACKENDS.items():
        for name in ("auto", *(backend.name for backend in backends)):
            assert getattr(_config(f"backend.{key}={name}").backend, key) == name
        with pytest.raises(HydraError, match=rf"backend\.{key}"):
            _config(f"backend.{key}=flsh")
