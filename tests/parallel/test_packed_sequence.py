"""Positions, fragments and key ranges of packed streams, compared with a token-by-token computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hydra.errors import HydraError
from megatron_hydra.parallel.packed_sequence import PackedSequence


@st.composite
def streams(draw):
    size = draw(st.sampled_from([1, 2, 3, 4]))
    length = size * draw(st.integers(1, 12))
    inner = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    return (0, *sorted(inner), length), size


@given(streams())
@settings(deadline=None)
def test_shards_together_are_the_stream(case):
    cu, size = case
    document = [next(i for i, c in enumerate(cu) if c > t) - 1 for t in range(cu[-1])]
    expected = [t - cu[d] for t, d in enumerate(document)]
    shards = [PackedSequence(cu, cp_rank=r, cp_size=size) for r in range(size)]
    assert torch.cat([s.positions_local for s in shards]).tolist() == expected
    for shard in shards:
        start, end = shard.shard_start, shard.shard_start + shard.length_local
        local = document[start:end]
        changes = [i for i in range(1, len(local)) if local[i] != local[i - 1]]
        assert shard.local_cu_seqlens == (0, *changes, len(local))


@given(streams(), st.data())
@settings(deadline=None)
def test_a_query_block_sees_its_own_documents_from_their_start(case, data):
    cu, _ = case
    start = data.draw(st.integers(0, cu[-1] - 1))
    end = data.draw(st.integers(start + 1, cu[-1]))
    block = PackedSequence(cu).attention_block(start, end)
    assert block.k_start == max(c for c in cu if c <= start)
    assert block.k_end == end
    for i in range(len(block.cu_q) - 1):
        last_query = start + block.cu_q[i + 1]
        last_key = block.k_start + block.cu_k[i + 1]
        assert last_query == last_key
        first_key = block.k_start + block.cu_k[i]
        assert first_key in cu  # a segment's keys begin where its document begins


def test_a_stream_that_cannot_be_cut_is_refused():
    with pytest.raises(HydraError, match=r"data\.sequence_length.*parallel\.context"):
        PackedSequence((0, 10), cp_rank=0, cp_size=4)


def test_log_scale_is_one_at_the_start_and_follows_the_definition():
    packed = PackedSequence((0, 3, 1000))
    scale = packed.log_scale(500.0, packed.positions_local)
    assert scale[0] == 1.0
    assert scale[3] == 1.0  # positions restart at each document
    expected = torch.log(torch.tensor(996 + 500.0)) / torch.log(torch.tensor(500.0))
    torch.testing.assert_close(scale[-1], expected)
