"""TeleQuAD: questions on telecommunication standards, answered from a paragraph; or any set in SQuAD's format."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from flexlora_fast.errors import DataError
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks import reading
from flexlora_fast.simulate.tasks.answering import AnsweringOptions, AnsweringTask, alpaca, best
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.reading import Entry

if TYPE_CHECKING:
    from datasets import Dataset

REMEDY = (
    "take extractive/v4/TeleQuAD-v4-full.json of github.com/EricssonResearch/TeleQuAD, or a file of SQuAD 1.1 or 2.0"
)
Metric = Literal["f1", "exact match"]


class TeleQuadOptions(AnsweringOptions):
    """``path``: TeleQuAD's JSON file, or one of SQuAD 1.1 or 2.0. ``test_path``: another one to test on; without it a
    share ``held_out`` of each document's questions is. ``unanswerable``: whether questions without an answer in the
    paragraph are kept; the right answer to them is none. ``measure``: which of SQuAD's two.
    """

    path: Path
    test_path: Path | None = None
    held_out: float = Field(0.2, gt=0, lt=1)
    unanswerable: bool = False
    measure: Metric = "f1"
    max_new_tokens: int = Field(64, ge=1)


class TeleQuad(AnsweringTask):
    """One client a document. The question is Alpaca's instruction, the paragraph its input.

    The data comes in one part and with no prompt, so split and prompt are this project's. F1 and exact match are those
    of SQuAD 2.0's evaluation: lower case, without punctuation and articles; the best over the right answers.
    """

    name = "telequad"
    metric = "f1"
    summary = "4,485 questions on 3GPP documents answered from a paragraph, one client a document; reads SQuAD as well"
    source = (
        "Ericsson Research, TeleQuAD v4 (github.com/EricssonResearch/TeleQuAD); measures: Rajpurkar et al., SQuAD, "
        "arXiv 1606.05250 and 1806.03822, evaluate-v2.0.py"
    )
    Options: ClassVar[type[TaskOptions]] = TeleQuadOptions
    options: TeleQuadOptions

    def load(self, seed: int) -> Corpus:
        """The corpus; ``seed`` draws what is held out."""
        questions = self._read(self.options.path)
        if self.options.test_path is not None:
            train, test = questions, self._read(self.options.test_path)
        else:
            train, test = self._split(questions, seed)
        return Corpus(self.kind, train=_rows(train), test=_rows(test), metric=self.options.measure)

    def score(self, predictions: Sequence[str], rows: Dataset) -> np.ndarray:
        """F1 over words, or 1 for an exact match and else 0."""
        return best(f1 if self.options.measure == "f1" else exact, predictions, rows)

    def _read(self, path: Path) -> list[Question]:
        document = reading.document(path, REMEDY)
        found = [x for i, article in enumerate(document.entries("data")) for x in _questions(article, i)]
        kept = [x for x in found if self.options.unanswerable or x.answers != [""]]
        if not kept:
            raise DataError(f"{path}: has no question{' that can be answered' if found else ''}; {REMEDY}")
        return kept

    def _split(self, questions: Sequence[Question], seed: int) -> tuple[list[Question], list[Question]]:
        """A share of each document's questions is held out; a document of one question trains."""
        generator = np.random.default_rng(seed)
        train: list[Question] = []
        test: list[Question] = []
        for document in dict.fromkeys(x.document for x in questions):
            own = [x for x in questions if x.document == document]
            order = generator.permutation(len(own))
            count = min(len(own) - 1, max(1, round(self.options.held_out * len(own))))
            test += [own[i] for i in sorted(order[:count])]
            train += [own[i] for i in sorted(order[count:])]
        return train, test


@dataclass(frozen=True)
class Question:
    """A question, the paragraph that answers it, and the right answers: one that is empty where there is none."""

    document: str
    paragraph: str
    text: str
    answers: list[str]


def _questions(article: Entry, number: int) -> list[Question]:
    document = str(article.values.get("docid") or article.values.get("title") or number)
    found = []
    for paragraph in article.entries("paragraphs"):
        context = paragraph.text("context")
        for entry in paragraph.entries("qas"):
            texts = [answer.text("text") for answer in entry.entries("answers")]
            answers = [text for text in texts if words(text)] or [""]
            found.append(Question(document, context, entry.text("question"), answers))
    return found


def _rows(questions: Sequence[Question]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt": [alpaca(x.text, x.paragraph) for x in questions],
            "target": [x.answers[0] for x in questions],
            "targets": [x.answers for x in questions],
            "client": [x.document for x in questions],
        }
    )


def words(text: str) -> list[str]:
    """SQuAD's normal form of an answer, as words.

    >>> words("The 5G-NR, a radio!")
    ['5gnr', 'radio']
    """
    plain = "".join(x for x in text.lower() if x not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact(answer: str, right: str) -> float:
    """Whether the two are the same words."""
    return float(words(answer) == words(right))


def f1(answer: str, right: str) -> float:
    """2·P·R/(P+R) over words, with repeats; where one has no words, whether neither has."""
    given, wanted = words(answer), words(right)
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))
