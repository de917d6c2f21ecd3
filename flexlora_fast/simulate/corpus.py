"""What a task gives to a simulation: rows in columns that do not depend on where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["text", "image", "generation"]
# What rows of a kind must have; they may have more.
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text", "label"),
    "image": ("image", "label"),
    "generation": ("prompt", "target"),
}
CLIENT = "client"


@dataclass(frozen=True)
class Corpus:
    """Rows to train on, and rows to test on.

    Attributes:
        kind: "text" (columns ``text`` str, ``label`` int), "image" (``image`` datasets.Image, ``label`` int), or
            "generation" (``prompt`` str, ``target`` str and, where there are more references, ``targets`` list[str]).
            A ``client`` column (str) is a natural partition: task = client, domain = client.
        train: rows that clients share out.
        test: rows of the same clients or classes that nobody trains on.
        unseen: rows of clients that never train; None where there are none.
        labels: names of the classes, by their index in ``label``; empty for generation.
        metric: the name of the score in [0, 1] that each row gets: "accuracy", "rougeL", "exact match".
    """

    kind: Kind
    train: Dataset
    test: Dataset
    unseen: Dataset | None = None
    labels: tuple[str, ...] = ()
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        for part, rows in (("train", self.train), ("test", self.test), ("unseen", self.unseen)):
            missing = [] if rows is None else [name for name in COLUMNS[self.kind] if name not in rows.column_names]
            if missing:
                raise ValueError(f"{part} of a {self.kind} corpus lacks the columns {', '.join(missing)}")
