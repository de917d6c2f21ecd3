"""What learners that tell classes apart have in common: an ordinary Trainer, and accuracy and loss row by row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from flexlora_fast.simulate.learners.base import Learner, Scores

if TYPE_CHECKING:
    from datasets import Dataset


class Example(NamedTuple):
    """A row that the model learns from: ``content`` as ``collate`` takes it, and its class."""

    content: Any
    label: int


class ClassifyingLearner(Learner):
    """A learner whose model gives ``logits`` (batch, labels) and, with ``labels``, their mean cross-entropy."""

    @abstractmethod
    def examples(self, rows: Dataset) -> Sequence[Example]:
        """What ``collate`` takes of each row."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The model's arguments for a batch, with ``labels`` (batch,) int64."""

    def order(self, examples: Sequence[Example]) -> Sequence[int]:
        """In which order examples are tested."""
        return range(len(examples))

    def trainer(
        self, rows: Dataset, arguments: transformers.TrainingArguments, optimizer: torch.optim.Optimizer
    ) -> transformers.Trainer:
        """A Trainer of ``model`` on these rows; ready for ``train()``."""
        return transformers.Trainer(
            self.model,
            arguments,
            train_dataset=self.examples(rows),
            data_collator=self.collate,
            optimizers=(optimizer, None),
        )

    @torch.inference_mode()
    def evaluate(self, rows: Dataset, batch: int) -> Scores:
        """Test the model as it is, in the rows' order."""
        self.model.eval()
        examples = self.examples(rows)
        order = np.asarray(self.order(examples), dtype=np.int64)
        scores = Scores(np.zeros(len(order)), np.zeros(len(order)))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            inputs = {
                name: value.to(self.model.device) for name, value in self.collate(examples_at(examples, part)).items()
            }
            labels = inputs.pop("labels")
            logits = self.model(**inputs).logits.float()
            scores.values[part] = (logits.argmax(1) == labels).double().cpu().numpy()
            scores.loss[part] = cross_entropy(logits, labels, reduction="none").double().cpu().numpy()
        return scores


def examples_at(examples: Sequence[Example], indices: np.ndarray) -> list[Example]:
    """Those at the indices."""
    return [examples[i] for i in indices]
