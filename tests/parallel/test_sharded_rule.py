"""The delta rule of shards on two and four ranks: it is exact and sends only states."""

from __future__ import annotations

import json

import pytest

from megatron_hydra.ops.sharded_delta_rule import shards_of
from tests.ops.test_sharded_delta_rule import DV, HEADS, STREAMS, D
from tests.parallel.launch import forked


@pytest.mark.parallel
def test_ranks_compute_what_one_computes_and_send_states():
    output = forked("tests.parallel.sharded_rule", 4, timeout=250)
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) == 4 * len(STREAMS)
    for result in results:
        assert result["difference"] < 1e-10, result
        size, (cu, _) = result["ranks"], STREAMS[result["stream"]]
        shards = shards_of(cu, size)
        states = HEADS * D * DV * 2 * any(shard.goes_on for shard in shards)
        transitions = HEADS * D * D * any(shard.through for shard in shards)
        assert result["sent"] == (size - 1) * 8 * (states + transitions), result
