"""What a task is: where its rows come from, and how an answer is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from flexlora_fast.simulate.corpus import Corpus, Kind

if TYPE_CHECKING:
    from datasets import Dataset


class TaskOptions(BaseModel):
    """The ``[task]`` table of an experiment, without its ``name``. Subclasses add fields; others are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(ABC):
    """A data set with its preprocessing and its metric, as published.

    Attributes:
        name: what an experiment calls it. kind: of its corpus. metric: the name of its score.
        summary: one line on what it is. source: whose data, preprocessing and metric these are.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    metric: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[TaskOptions]] = TaskOptions

    def __init__(self, options: TaskOptions) -> None:
        self.options = options

    @abstractmethod
    def load(self, seed: int) -> Corpus:
        """The corpus; ``seed`` decides what is drawn, where something is (splits, subsets)."""

    def score(self, predictions: Sequence[str], rows: Dataset) -> np.ndarray:
        """(N,) float64 in [0, 1]: how right each generated answer is. Only for tasks of kind "generation"."""
        raise TypeError(f"task {self.name!r} is of kind {self.kind!r}: its learner scores it")
