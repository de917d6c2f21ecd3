"""What tasks with generated answers have in common: their prompt, their references, how long an answer may get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from flexlora_fast.simulate.tasks.base import Task, TaskOptions

if TYPE_CHECKING:
    from datasets import Dataset

    from flexlora_fast.simulate.corpus import Kind


class AnsweringOptions(TaskOptions):
    """``max_new_tokens``: longest answer that is generated; the default is what the published evaluation takes."""

    max_new_tokens: int = Field(128, ge=1)


class AnsweringTask(Task):
    """A task of kind "generation"."""

    kind: ClassVar[Kind] = "generation"
    Options: ClassVar[type[TaskOptions]] = AnsweringOptions
    options: AnsweringOptions

    @property
    def max_new_tokens(self) -> int:
        """Longest answer that is generated, in tokens."""
        return self.options.max_new_tokens


def alpaca(instruction: str, text: str = "") -> str:
    """The prompt of Stanford Alpaca (Taori et al., 2023), which FlexLoRA's and many other codes use as is."""
    if not text:
        return (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{instruction}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        f"response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{text}"
        "\n\n### Response:"
    )


def references(rows: Dataset) -> list[list[str]]:
    """All right answers of each row: ``targets``, or ``target`` alone."""
    if "targets" in rows.column_names:
        return [list(targets) for targets in rows["targets"]]
    return [[target] for target in rows["target"]]


def best(score: Callable[[str, str], float], predictions: Sequence[str], rows: Dataset) -> np.ndarray:
    """(N,) float64: the best ``score(prediction, reference)`` over each row's references."""
    pairs = zip(predictions, references(rows), strict=True)
    return np.array([max(score(answer, right) for right in rights) for answer, rights in pairs], dtype=np.float64)
