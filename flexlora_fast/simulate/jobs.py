"""What the server and its worker processes say to each other: small values; adapters and data go by files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flexlora_fast.methods.sparse import Mask
from flexlora_fast.simulate.learners.base import About, LoraSpec, ModelSpec
from flexlora_fast.simulate.spec import Training


@dataclass(frozen=True)
class Setup:
    """What all jobs of a run share.

    Attributes:
        data: the folder with the corpus. rank: of the learner as it is made. seed: of what is drawn in making it.
        trains: which of LoRA's factors clients train ("A", "B"). penalty: of HetLoRA's last (1 − gamma) of the columns.
        batch: rows at a time in tests.
    """

    data: Path
    model: ModelSpec
    lora: LoraSpec
    about: About
    rank: int
    seed: int
    training: Training
    batch: int
    trains: tuple[str, ...] = ("A", "B")
    gamma: float | None = None
    penalty: float = 0.0


@dataclass(frozen=True)
class Model:
    """The global model as somebody has it: an adapter folder, and what was added to the base weights (a file)."""

    adapter: Path
    base: Path | None = None


@dataclass(frozen=True)
class Sparse:
    """The entries of base weights that a client trains, what they start from, and the file they are written to."""

    mask: Mask
    start: Path | None
    out: Path


@dataclass(frozen=True)
class TrainJob:
    """One client in one round: start from ``model`` and leave what was trained in ``out``.

    Attributes:
        rows: first and last + 1 of the training data. factor: of the learning rates. sparse: in an SLoRA stage what is
            trained in place of the adapter.
    """

    client: str
    rows: tuple[int, int]
    model: Model
    out: Path
    seed: int
    factor: float = 1.0
    sparse: Sparse | None = None


@dataclass(frozen=True)
class Trained:
    """What came of a ``TrainJob``: mean loss (nats), examples seen, ‖ΔW‖_F of the upload and its size in bytes."""

    loss: float
    examples: int
    seconds: float
    rank: int
    norm: float
    bytes: int


@dataclass(frozen=True)
class EvaluateJob:
    """Rows ``rows[0]`` … ``rows[1] - 1`` of a part of the data ("test", "unseen"), tested with a model."""

    model: Model
    part: str
    rows: tuple[int, int]


@dataclass(frozen=True)
class Tested:
    """Of each row of an ``EvaluateJob``: the metric in [0, 1] and the loss in nats, float64."""

    values: np.ndarray = field(repr=False)
    loss: np.ndarray = field(repr=False)
