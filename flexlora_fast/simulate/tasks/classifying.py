"""What tasks that tell classes apart have in common: their corpus, and copies of published data on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexlora_fast.errors import DataError
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks.base import Task

Row = tuple[str, int]  # a text and its class


class TextTask(Task):
    """A task of kind "text", scored by the share of texts whose class is told."""

    kind = "text"
    metric = "accuracy"


class ImageTask(Task):
    """A task of kind "image", scored by the share of images whose class is told."""

    kind = "image"
    metric = "accuracy"


def text_corpus(train: Sequence[Row], test: Sequence[Row], labels: Sequence[str]) -> Corpus:
    """The corpus of these rows."""
    from datasets import Dataset

    def rows(part: Sequence[Row]) -> Any:
        return Dataset.from_dict({"text": [text for text, _ in part], "label": [label for _, label in part]})

    return Corpus("text", train=rows(train), test=rows(test), labels=tuple(labels))


def from_hub(name: str, columns: Sequence[str], config: str | None = None) -> dict[str, Any]:
    """The splits "train" and "test" of a data set on the hub (or in a folder laid out as one).

    Raises ``DataError`` where it cannot be had or lacks one of ``columns``.
    """
    from datasets import load_dataset

    try:
        parts = load_dataset(name, config)
    except (OSError, ValueError) as error:  # whatever datasets and the hub's client raise is one of the two
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{name} cannot be loaded ({reason}); go online, or give task.path") from error
    for split in ("train", "test"):
        missing = [column for column in columns if split not in parts or column not in parts[split].column_names]
        if missing:
            raise DataError(f"{name}: its split {split!r} lacks {', '.join(missing)}; give task.path instead")
    return {"train": parts["train"], "test": parts["test"]}
