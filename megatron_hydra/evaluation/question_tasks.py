"""Classes for task files of lm-eval (``class: !function megatron_hydra.evaluation.question_tasks.NAME``).

Like every task of lm-eval, they need the extra ``eval``: only lm-eval imports this module.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.question_scores import (
    LETTERS,
    answer_scores,
    cyclic_orders,
    order_scores,
    prompt_with_options,
    spread_over_places,
)


class _Configured(ConfigurableTask):
    """A task whose file also names its class."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: v for key, v in config.items() if key != "class"})


class _OptionsInAllOrders(_Configured):
    """Multiple choice with the options listed in the prompt, asked once in every cyclic order.

    The file has ``doc_to_text`` (the question alone), ``doc_to_choice`` and ``doc_to_target`` (the number of
    the right option), ``output_type: multiple_choice`` and no examples in the prompt. ``--limit`` counts
    questions. The metrics are those of :func:`~.question_scores.order_scores`.
    """

    @abc.abstractmethod
    def continuations(self, options: Sequence[str], order: Sequence[int]) -> list[str]:
        """What is scored after ``Answer:``, for each place."""

    def construct_requests(self, doc: Any, ctx: str, **kwargs: Any) -> list[Instance]:
        """The requests of one question, order by order, place by place."""
        if self.config.num_fewshot:
            raise HydraError(
                f"{self.config.task}: num_fewshot must be 0: examples would have their options in one order"
            )
        options = self.doc_to_choice(doc)
        pairs = [
            (prompt_with_options(ctx, options, order), continuation)
            for order in cyclic_orders(len(options))
            for continuation in self.continuations(options, order)
        ]
        kept = {key: kwargs[key] for key in ("metadata",) if key in kwargs}
        return [
            Instance("loglikelihood", doc=doc, arguments=pair, idx=n, **kept)
            for n, pair in enumerate(pairs)
        ]

    def process_results(self, doc: Any, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """The scores of one question."""
        return order_scores(self._chosen_places(doc, results), self.doc_to_target(doc))

    def _chosen_places(
        self, doc: Any, results: Sequence[tuple[float, bool]], per_character: bool = False
    ) -> list[int]:
        """For each order, the place with the largest log-likelihood (or the largest per character)."""
        options = [option.strip() for option in self.doc_to_choice(doc)]
        count, places = len(options), []
        for k, order in enumerate(cyclic_orders(count)):
            logs = [log for log, _ in results[k * count : (k + 1) * count]]
            if per_character:
                logs = [log / len(options[n]) for log, n in zip(logs, order, strict=True)]
            places.append(max(range(count), key=logs.__getitem__))
        return places

    def aggregation(self) -> dict[str, Callable[..., float]]:
        """How the metrics of all questions become one."""
        return {"acc": _mean, "same_choice": _mean, "acc_spread": spread_over_places}

    def higher_is_better(self) -> dict[str, bool]:
        """For each metric."""
        return {"acc": True, "same_choice": True, "acc_spread": False}


class LettersInAllOrders(_OptionsInAllOrders):
    """The letter is scored."""

    def continuations(self, options: Sequence[str], order: Sequence[int]) -> list[str]:
        """The letters."""
        return [f" {letter}" for letter in LETTERS[: len(order)]]


class TextsInAllOrders(_OptionsInAllOrders):
    """The option's text is scored, also per character: the same metrics again, with ``_norm``."""

    def continuations(self, options: Sequence[str], order: Sequence[int]) -> list[str]:
        """The options, in this order."""
        return [f" {options[n].strip()}" for n in order]

    def process_results(self, doc: Any, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """The scores of one question."""
        places = self._chosen_places(doc, results, per_character=True)
        norm = order_scores(places, self.doc_to_target(doc))
        return super().process_results(doc, results) | {f"{key}_norm": v for key, v in norm.items()}

    def aggregation(self) -> dict[str, Callable[..., float]]:
        """How the metrics of all questions become one."""
        found = super().aggregation()
        return found | {f"{key}_norm": function for key, function in found.items()}

    def higher_is_better(self) -> dict[str, bool]:
        """For each metric."""
        found = super().higher_is_better()
        return found | {f"{key}_norm": value for key, value in found.items()}


class ShortAnswers(_Configured):
    """Generated answers, scored as SQuAD does.

    The file has ``output_type: generate_until`` and ``doc_to_target``, a list of accepted answers.
    """

    def process_results(self, doc: Any, results: Sequence[str]) -> dict[str, float]:
        """The scores of one answer."""
        accepted = self.doc_to_target(doc)
        return answer_scores(results[0], [accepted] if isinstance(accepted, str) else accepted)

    def aggregation(self) -> dict[str, Callable[..., float]]:
        """How the metrics of all questions become one."""
        return {"exact_match": _mean, "f1": _mean}

    def higher_is_better(self) -> dict[str, bool]:
        """For each metric."""
        return {"exact_match": True, "f1": True}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
