"""Prompts and scores of our tasks for lm-eval: options in all orders, short answers, bits per byte of code.

The task files of ``configs/lm_eval_tasks`` and :mod:`~megatron_hydra.evaluation.question_tasks` use them.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hydra.errors import HydraError

LETTERS = string.ascii_uppercase
_ARTICLES = re.compile(r"\b(a|an|the)\b")


# -- options in all orders ------------------------------------------------------------------------


def cyclic_orders(count: int) -> list[tuple[int, ...]]:
    """All rotations of ``count`` options: order k has option ``(place + k) % count`` at each place.

    So every option is at every place exactly once.
    """
    return [tuple((place + k) % count for place in range(count)) for k in range(count)]


def prompt_with_options(question: str, options: Sequence[str], order: Sequence[int]) -> str:
    """The question, its options with letters in this order, and ``Answer:``.

    Raises:
        HydraError: there are more options than letters, or fewer than two, or one of them is empty.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise HydraError(
            f"a question has {len(options)} options instead of 2 to {len(LETTERS)}: {question!r}"
        )
    if not all(option.strip() for option in options):
        raise HydraError(f"a question has an empty option: {question!r}")
    lines = [f"{letter}. {options[n].strip()}" for letter, n in zip(LETTERS, order, strict=False)]
    return "\n".join([question, *lines, "Answer:"])


def order_scores(places: Sequence[int], gold: int) -> dict[str, Any]:
    """Scores of one question that was asked in all :func:`cyclic_orders`.

    Args:
        places: for each order, the place of the option that the model chose.
        gold: the number of the right option, in the order of the data set.

    Returns:
        ``acc``: share of the orders with a right answer. ``same_choice``: 1 if the model chose one and the
        same option in all orders, else 0. ``acc_spread``: for each place of the right option, whether the
        answer was right (for :func:`spread_over_places`).
    """
    count = len(places)
    chosen = [order[place] for order, place in zip(cyclic_orders(count), places, strict=True)]
    right = [choice == gold for choice in chosen]
    by_place = [right[(gold - place) % count] for place in range(count)]  # order gold - place
    return {
        "acc": sum(right) / count,
        "same_choice": float(len(set(chosen)) == 1),
        "acc_spread": by_place,
    }


def spread_over_places(questions: Sequence[Sequence[bool]]) -> float:
    """Best minus worst accuracy over the places of the right option; 0 for a model without a favourite place.

    Args:
        questions: for each question, whether the answer was right with the right option at each place.
            Places that fewer than half of the questions have are left out.
    """
    places: dict[int, list[bool]] = {}
    for question in questions:
        for place, right in enumerate(question):
            places.setdefault(place, []).append(right)
    means = [sum(v) / len(v) for v in places.values() if 2 * len(v) >= len(questions)]
    return max(means) - min(means)


# -- short answers --------------------------------------------------------------------------------


def normalised_answer(text: str) -> str:
    """SQuAD's normal form: small letters, without punctuation and articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def answer_scores(said: str, accepted: Sequence[str]) -> dict[str, float]:
    """SQuAD's two scores of an answer, each the best over the accepted answers.

    Returns:
        ``exact_match``: 1 if the normal forms are equal, else 0. ``f1``: harmonic mean of precision and
        recall of the words, each counted as often as it occurs (Rajpurkar et al., arXiv 1606.05250).

    Raises:
        HydraError: there is no accepted answer.
    """
    if not accepted:
        raise HydraError("a question has no accepted answer")
    words = normalised_answer(said).split()
    pairs = [(words, normalised_answer(answer).split()) for answer in accepted]
    return {
        "exact_match": float(any(a == b for a, b in pairs)),
        "f1": max(_f1(a, b) for a, b in pairs),
    }


def _f1(said: Sequence[str], accepted: Sequence[str]) -> float:
    if not said or not accepted:
        return float(said == accepted)
    common = (collections.Counter(said) & collections.Counter(accepted)).total()
    return 2 * common / (len(said) + len(accepted))


# -- bits per byte of code ------------------------------------------------------------------------


def code_prompt(doc: Mapping[str, Any]) -> str:
    """HumanEval's prompt without the white space at its end, which tokenizers join with what follows."""
    return str(doc["prompt"]).rstrip()


def code_solution(doc: Mapping[str, Any]) -> str:
    """The white space at the end of HumanEval's prompt, and the canonical solution."""
    return str(doc["prompt"])[len(code_prompt(doc)) :] + str(doc["canonical_solution"])


def code_bits(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The solution's log-likelihood (natural logarithm) and its bytes, for lm-eval's ``bits_per_byte``.

    lm-eval divides the sum over all problems by the sum of all bytes.
    """
    ((log_likelihood, _),) = results
    return {"bits_per_byte": (log_likelihood, len(code_solution(doc).encode()))}
