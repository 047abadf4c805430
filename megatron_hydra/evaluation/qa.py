"""Question answering over many documents (RULER's ``qa``), on a file of the user.

The documents with the answer are hidden among other documents of the file. Wording, choice of distractors and
score follow RULER (Hsieh et al., arXiv 2404.06654; NVIDIA/RULER, Apache-2.0). RULER's ``qa_1`` is the
development set of SQuAD, and ``qa_2`` the development set of HotpotQA.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hydra.data.text import Fitter
from megatron_hydra.errors import HydraError
from megatron_hydra.evaluation.tasks import GenerationSample, SampleRequest

NEW_TOKENS = 32
_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: the question.
        answers: accepted answers.
        documents: indices of the documents with the answer.
        related: indices of the documents that are used first as distractors (those of the same article).
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


class QuestionAnswering:
    """``qa:FILE``: questions of a SQuAD file, a HotpotQA file, or JSON lines.

    A line of JSON lines has ``question``, ``answer`` (a text or a list of accepted texts) and ``documents`` (a
    list of texts with the answer). Documents of other questions are the distractors.

    Raises:
        HydraError: the file cannot be read or has another form; names the place.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = f"qa_{self.path.stem}"
        self.questions, self.documents = read_questions(self.path)

    def __repr__(self) -> str:
        return f"QuestionAnswering({self.questions!r}, {self.documents!r})"

    def samples(self, request: SampleRequest) -> list[GenerationSample]:
        """The first ``count`` questions of the file; no depths, documents are in random order."""
        fitter = Fitter(request.tokenizer, request.length - NEW_TOKENS, self.name)
        samples = []
        for index, question in enumerate(self.questions[: request.count]):
            build = self._prompt(question, request.rng(self.name, index))
            prompt = fitter.fit(build, minimum=len(question.documents))
            samples.append(
                GenerationSample(prompt, question.answers, "any", max_new_tokens=NEW_TOKENS)
            )
        return samples

    def _prompt(self, question: Question, rng: random.Random) -> Callable[[int], str]:
        """Function from a number of documents to the prompt; a greater number keeps all earlier documents."""
        related = [i for i in question.related if i not in question.documents]
        first = {*question.documents, *related}
        others = [i for i in range(len(self.documents)) if i not in first]
        rng.shuffle(related)
        rng.shuffle(others)
        order = [*question.documents, *related, *others]
        seed = rng.random()

        def build(count: int) -> str:
            repeats = -(-count // len(order))  # a file with too few documents is repeated
            chosen = (order * repeats)[:count]
            random.Random(seed).shuffle(chosen)
            context = "\n\n".join(
                f"Document {n}:\n{self.documents[i]}" for n, i in enumerate(chosen, 1)
            )
            return (
                f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{context}\n\n"
                f"{_INSTRUCTION}\n\nQuestion: {question.text} Answer:"
            )

        return build


# -- files ----------------------------------------------------------------------------------------


def read_questions(path: Path) -> tuple[list[Question], list[str]]:
    """Questions and documents of a file in any of the three forms.

    Raises:
        HydraError: see :class:`QuestionAnswering`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HydraError(f"questions {path} cannot be read: {error}") from None
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            questions, documents = _lines(rows)
        else:
            body = json.loads(text)
            questions, documents = _hotpot(body) if isinstance(body, list) else _squad(body)
    except json.JSONDecodeError as error:
        raise HydraError(f"questions {path}: not JSON: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise HydraError(
            f"questions {path}: neither SQuAD, HotpotQA nor JSON lines with question, answer and "
            f"documents ({type(error).__name__}: {error})"
        ) from None
    if not questions:
        raise HydraError(f"questions {path} has no question with an answer")
    return questions, documents


class _Documents:
    """Distinct texts in the order of their first appearance."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def add(self, text: Any) -> int:
        if not isinstance(text, str):
            raise TypeError(f"a document is {text!r}")
        return self.index.setdefault(text, len(self.index))


def _lines(rows: list[dict[str, Any]]) -> tuple[list[Question], list[str]]:
    documents, questions = _Documents(), []
    for row in rows:
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        places = tuple(documents.add(text) for text in row["documents"])
        if not answers or not places:
            raise ValueError("a question without an answer or without documents")
        questions.append(Question(str(row["question"]), tuple(map(str, answers)), places))
    return questions, list(documents.index)


def _squad(body: dict[str, Any]) -> tuple[list[Question], list[str]]:
    documents, questions = _Documents(), []
    for article in body["data"]:
        paragraphs = article["paragraphs"]
        places = [documents.add(paragraph["context"]) for paragraph in paragraphs]
        for place, paragraph in zip(places, paragraphs, strict=True):
            related = tuple(dict.fromkeys(other for other in places if other != place))
            for item in paragraph["qas"]:
                if not item.get("is_impossible", False) and item["answers"]:
                    answers = tuple(answer["text"] for answer in item["answers"])
                    questions.append(Question(item["question"], answers, (place,), related))
    return questions, list(documents.index)


def _hotpot(body: list[dict[str, Any]]) -> tuple[list[Question], list[str]]:
    documents, questions = _Documents(), []
    for item in body:
        places = tuple(
            dict.fromkeys(
                documents.add(f"{title}\n{''.join(sentences)}")
                for title, sentences in item["context"]
            )
        )
        questions.append(Question(item["question"], (item["answer"],), places))
    return questions, list(documents.index)
