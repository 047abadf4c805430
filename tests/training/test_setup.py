"""Wrapping model chunks for training, in one process."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.config.run import RunConfig
from megatron_hydra.parallel.world import World
from megatron_hydra.training.setup import build_chunks, wrap_for_training
from megatron_hydra.transfer.finetune import NextToken
from tests.training import tiny


@pytest.mark.usefixtures("one_rank")
def test_gathering_parameters_keeps_every_chunk_of_a_bf16_model() -> None:
    """The chunk has bf16 weights and fp32 A_log and dt_bias; interleaving makes several chunks."""
    config = RunConfig(verb="finetune", precision="bf16")
    model = tiny.student_config()
    chunks = [build_chunks(model, config)[0] for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.normal_(generator=generator)
    assert {p.dtype for p in chunks[1].parameters()} == {torch.bfloat16, torch.float32}
    world = World(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, False)
    wrapped = wrap_for_training(chunks, NextToken(config, world, []), config)
    before = [{name: p.detach().clone() for name, p in w.named_parameters()} for w in wrapped]
    for chunk in wrapped:
        chunk.start_param_sync()
    changed = [
        (index, name)
        for index, chunk in enumerate(wrapped)
        for name, parameter in chunk.named_parameters()
        if not torch.equal(parameter, before[index][name])
    ]
    assert changed == []
