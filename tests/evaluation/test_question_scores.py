"""Scores of questions, against values worked out by hand."""

from __future__ import annotations

import pytest

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.question_scores import (
    answer_scores,
    code_bits,
    code_prompt,
    code_solution,
    cyclic_orders,
    order_scores,
    prompt_with_options,
    spread_over_places,
)


def test_every_option_is_at_every_place_once() -> None:
    assert cyclic_orders(3) == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    assert prompt_with_options("Which?", ["red ", "blue", "grey"], (1, 2, 0)) == (
        "Which?\nA. blue\nB. grey\nC. red\nAnswer:"
    )
    for options in (["one"], ["x"] * 27):
        with pytest.raises(HydraError, match=f"{len(options)} options .*'Which"):
            prompt_with_options("Which?", options, range(len(options)))
    with pytest.raises(HydraError, match="empty option: 'Which"):
        prompt_with_options("Which?", ["red", " "], (0, 1))


def test_a_model_that_always_says_a_is_right_by_chance_and_never_consistent() -> None:
    scores = order_scores([0, 0, 0], gold=2)  # the option at A is 0, then 1, then 2
    assert scores == {
        "acc": pytest.approx(1 / 3),
        "same_choice": 0.0,
        "acc_spread": [True, False, False],
    }
    always_a = [order_scores([0, 0, 0], gold)["acc_spread"] for gold in (0, 1, 2)]
    assert spread_over_places(always_a) == 1.0


def test_a_model_that_knows_the_option_has_no_spread() -> None:
    # Option 1 stands at places 1, 0, 2 of the orders 012, 120, 201.
    assert order_scores([1, 0, 2], gold=1) == {
        "acc": 1.0,
        "same_choice": 1.0,
        "acc_spread": [True, True, True],
    }
    assert order_scores([1, 0, 2], gold=0)["same_choice"] == 1.0  # wrong, but consistent
    mixed = order_scores([1, 0, 0], gold=1)  # the last order: option 2 at place 0
    assert mixed["acc"] == pytest.approx(2 / 3) and mixed["acc_spread"] == [True, True, False]
    assert spread_over_places([[True, True, False], [True, False, False]]) == 1.0
    assert spread_over_places([[True, True], [True, False]]) == 0.5


def test_places_that_few_questions_have_do_not_count() -> None:
    questions = [[True, True]] * 3 + [[True, True, False]]
    assert spread_over_places(questions) == 0.0
    assert spread_over_places([*questions, [True, True, False], [True, True, False]]) == 1.0


@pytest.mark.parametrize(
    "said, accepted, exact, f1",
    [
        (" The Eiffel Tower.", ["Eiffel tower"], 1, 1.0),
        ("the tower", ["Eiffel tower"], 0, 2 / 3),  # precision 1, recall 1/2
        ("a tower of Paris", ["Paris", "the tower in Paris"], 0, 2 / 3),  # 2 of 3 and 2 of 3 words
        ("no no", ["no"], 0, 2 / 3),  # a word counts as often as it occurs
        ("", ["Paris"], 0, 0.0),
        ("The", ["an"], 1, 1.0),  # both are empty without articles
        ("Lyon", ["Paris", "Rome"], 0, 0.0),
    ],
)
def test_answers_score_as_in_squad(said, accepted, exact, f1) -> None:
    assert answer_scores(said, accepted) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_a_question_without_an_answer_is_refused() -> None:
    with pytest.raises(HydraError, match="no accepted answer"):
        answer_scores("Paris", [])


def test_bits_of_code_count_the_bytes_that_are_scored() -> None:
    doc = {"prompt": "def f():\n    ", "canonical_solution": "return 'é'\n"}
    assert code_prompt(doc) + code_solution(doc) == "def f():\n    return 'é'\n"
    assert code_bits(doc, [(-3.0, False)]) == {"bits_per_byte": (-3.0, 5 + 12)}
