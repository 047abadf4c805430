"""Drafts change the number of forwards of a continuation, but not its tokens."""

from __future__ import annotations

import pytest

from megatron_hydra.checkpoint.canonical import canonical_shapes
from megatron_hydra.checkpoint.store import save_canonical
from megatron_hydra.config.model import HydraConfig
from megatron_hydra.evaluation import runner
from megatron_hydra.evaluation.backend import Continuation, cut
from megatron_hydra.evaluation.megatron_backend import (
    MegatronBackend,
    draft,
    layout_config,
    open_checkpoint,
)
from megatron_hydra.evaluation.scoring import forecast
from megatron_hydra.evaluation.tasks import GenerationSample, ScoredSample
from tests.checkpoint.models import hybrid_config, random_state

END = 99


class Counting(MegatronBackend):
    """A back end whose model predicts the last token plus one; 0 follows 9."""

    def __init__(self) -> None:
        self.forwards = 0

    def argmax_at(self, rows, positions):
        self.forwards += 1
        return [[(row[p] + 1) % 10 for p in asked] for row, asked in zip(rows, positions)]


@pytest.mark.parametrize(
    ("answer", "forwards"),
    [
        ((4, 5, 6, 7, 8, 9), 1),  # a right draft, and one token after it
        ((4, 5, 6, 8, 8, 8), 4),  # three right tokens, then no earlier text to copy
        ((), 6),
    ],
)
def test_a_right_answer_costs_one_forward(answer, forwards):
    backend = Counting()
    continuation = Continuation(prompt=[3], max_new_tokens=6, draft=answer)
    assert backend.generate([continuation], []) == [[4, 5, 6, 7, 8, 9]]
    assert backend.forwards <= forwards


def test_continuations_of_a_batch_end_each_at_its_own_place():
    backend = Counting()
    made = [
        Continuation([1, 2], max_new_tokens=2),
        Continuation([0], max_new_tokens=8, draft=[1, 2, 3, 4, 5, 6, 7, 8]),
        Continuation([5], max_new_tokens=8, settled=lambda tokens: tokens[-1] == 8),
        Continuation([6], max_new_tokens=8, draft=[7, 8, 9, 0, 1]),
    ]
    assert backend.generate(made, end_tokens=[9]) == [
        [3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [6, 7, 8], [7, 8, 9],
    ]  # fmt: skip


class Timed(Counting):
    """A back end whose forward takes one second for each token."""

    is_main, vocabulary = True, 100

    def seconds_of_forward(self, tokens):
        return float(tokens)


def test_the_expected_time_is_logged_before_the_start(capsys):
    samples = [GenerationSample(prompt=[3] * 95, answers=(4,), max_new_tokens=5)] * 60
    assert forecast(Timed(), None, samples) == (6000.0, 30000.0)
    runner._log_expected_duration(Timed(), None, "niah at 95 tokens", samples)
    said = capsys.readouterr().err
    assert "niah at 95 tokens: 60 samples take 1.7 h if all answers are right, up to 8.3 h" in said
    assert "tools/megatron_to_hf.py" in said
    scored = [ScoredSample(tokens=[1, 2, 3], answers=[2])]
    assert forecast(Timed(), None, scored) == (3.0, 3.0)  # one forward, whatever the draft is


def test_no_time_is_estimated_with_a_cache(capsys):
    samples = [GenerationSample(prompt=[3] * 95, answers=(4,), max_new_tokens=5)]
    assert forecast(WithCache(), None, samples) == (0.0, 0.0)
    runner._log_expected_duration(WithCache(), None, "niah", samples)
    assert capsys.readouterr().err == ""


class WithCache:
    """A back end that cannot tell how long a forward takes."""

    is_main, vocabulary = True, 100


def test_a_forward_is_timed_after_a_warm_up():
    backend = Counting()
    backend._has_run = False
    backend.seconds_of_forward(200)
    assert backend.forwards == 2
    assert backend.seconds_of_forward(300) >= 0
    assert backend.forwards == 3


def test_a_draft_is_the_answer_and_then_earlier_text():
    continuation = Continuation([5, 6, 7, 8, 9], max_new_tokens=4, draft=[1, 2, 3, 4, 5])
    assert draft(continuation, []) == [1, 2, 3]  # the forward adds a fourth
    assert draft(continuation, [1]) == [2, 3]
    assert draft(continuation, [5, 6]) == [7]  # not [2]: the model predicts another token
    assert draft(continuation, [9, 1]) == []


def test_tokens_after_the_end_are_removed():
    continuation = Continuation([0], max_new_tokens=3, settled=lambda tokens: tokens == [1, 2])
    assert cut([1, 2, 3], continuation, [END]) == [1, 2]
    assert cut([1, END, 3], continuation, [END]) == [1, END]
    assert cut([4, 4, 4, 4], continuation, [END]) == [4, 4, 4]
    assert cut([1, 2, 3], continuation, [END], known=2) == [1, 2, 3]


def test_a_checkpoint_is_evaluated_as_the_finished_model(tmp_path):
    """With log_scale=final, the back end answers as the export would."""
    model = hybrid_config(hydra=HydraConfig(log_scale="final"))
    save_canonical(tmp_path / "saved", random_state(canonical_shapes(model)), model)
    with open_checkpoint(tmp_path / "saved", layout_config(None, [])) as backend:
        for part in (backend, backend.chunk.decoder.layers[0].self_attention.fa):
            switches = part.model.switches if part is backend else part.switches
            assert switches.scales_queries
