"""reasoning-gym: puzzles made by rules, as many as wanted, one client a kind; needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks.answering import AnsweringOptions, AnsweringTask, alpaca
from flexlora_fast.simulate.tasks.base import TaskOptions

if TYPE_CHECKING:
    from datasets import Dataset

# Puzzles with short questions and answers, which small models learn something of.
SHORT = [
    "basic_arithmetic",
    "bitwise_arithmetic",
    "chain_sum",
    "count_bits",
    "gcd",
    "lcm",
    "letter_counting",
    "number_sequence",
    "simple_equations",
    "spell_backward",
]


class ReasoningOptions(AnsweringOptions):
    """``tasks``: names of reasoning-gym's, one client each. ``unseen``: those that nobody trains on.

    ``train``, ``test``: puzzles of each. ``settings``: a task's own settings, by its name. ``draw``: the seed that
    makes the puzzles; None takes the experiment's.
    """

    tasks: list[str] = Field(default_factory=lambda: list(SHORT))
    unseen: list[str] = Field(default_factory=list)
    train: int = Field(100, ge=1)
    test: int = Field(20, ge=1)
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    draw: int | None = Field(None, ge=0)
    max_new_tokens: int = Field(48, ge=1)

    @model_validator(mode="after")
    def _some_train(self) -> ReasoningOptions:
        if not set(self.tasks) - set(self.unseen):
            raise ValueError("no task is left to train on; name some in tasks that are not in unseen")
        return self


class ReasoningGym(AnsweringTask):
    """Instructed by reasoning-gym's prompt "direct", answered in its ``<answer>`` tags, and scored by each task's own
    scorer, which gives some a part of the point; no tags score 0. Puzzles in the test part that the training part has
    as well are left out.
    """

    name = "reasoning-gym"
    metric = "score"
    summary = "puzzles made by rules: arithmetic, letters, logic; one client a kind, no download"
    source = "Stojanovski et al., Reasoning Gym, NeurIPS 2025, arXiv 2505.24760 (package reasoning-gym)"
    Options: ClassVar[type[TaskOptions]] = ReasoningOptions
    options: ReasoningOptions

    def load(self, seed: int) -> Corpus:
        """The corpus; puzzle i of a task depends on its settings, the seed and i alone."""
        draw = seed if self.options.draw is None else self.options.draw
        seen = [name for name in self.options.tasks if name not in self.options.unseen]
        parts = [self._puzzles(name, draw) for name in seen]
        never = [self._puzzles(name, draw)[1] for name in self.options.unseen]
        return Corpus(
            self.kind,
            train=_rows([row for train, _ in parts for row in train]),
            test=_rows([row for _, test in parts for row in test]),
            unseen=_rows([row for test in never for row in test]) if never else None,
            metric=self.metric,
        )

    def score(self, predictions: Sequence[str], rows: Dataset) -> np.ndarray:
        """What the scorer of each row's task gives, in [0, 1]."""
        from reasoning_gym.utils import extract_answer

        sources: dict[tuple[str, int], Any] = {}
        scores = np.zeros(len(predictions))
        keys = zip(rows["client"], rows["draw"], rows["index"], strict=True)
        for i, (text, (name, draw, index)) in enumerate(zip(predictions, keys, strict=True)):
            if (name, draw) not in sources:
                sources[name, draw] = self._source(name, draw)
            source, answer = sources[name, draw], extract_answer(text)
            scores[i] = 0.0 if answer is None else source.score_answer(answer, source[index])
        return scores

    def _source(self, name: str, draw: int) -> Any:
        """reasoning-gym's data set of that name. Raises ``OptionError``."""
        try:
            from reasoning_gym import create_dataset
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise OptionError("task 'reasoning-gym' needs the package: install flexlora_fast[reasoning]") from error
        if name not in DATASETS:
            raise OptionError(f"task.tasks: reasoning-gym has no {name!r}; it has {', '.join(sorted(DATASETS))}")
        settings = self.options.settings.get(name, {})
        try:
            return create_dataset(name, seed=draw, size=self.options.train + self.options.test, **settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise OptionError(f"task.settings.{name}: {settings} does not fit ({error})") from error

    def _puzzles(self, name: str, draw: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows to train and to test on."""
        source = self._source(name, draw)
        rows = [_row(name, draw, i, source[i]) for i in range(self.options.train + self.options.test)]
        train, rest = rows[: self.options.train], rows[self.options.train :]
        known = {row["prompt"] for row in train}
        test = [row for row in rest if row["prompt"] not in known]
        if not test:
            raise DataError(
                f"reasoning-gym's {name} makes too few different puzzles: none of {len(rest)} is new after "
                f"{len(train)}; ask for fewer in task.train, or give task.settings.{name}"
            )
        return train, test


def _row(name: str, draw: int, index: int, puzzle: dict[str, Any]) -> dict[str, Any]:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    if not isinstance(puzzle["answer"], str):
        raise OptionError(f"task.tasks: reasoning-gym's {name} has no answer to learn from; leave it out")
    prompt, target = alpaca(SYSTEM_PROMPTS["direct"], puzzle["question"]), f"<answer>{puzzle['answer']}</answer>"
    return {"prompt": prompt, "target": target, "client": name, "draw": draw, "index": index}


def _rows(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)
