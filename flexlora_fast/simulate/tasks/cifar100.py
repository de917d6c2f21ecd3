"""CIFAR-100: what is in a small picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from flexlora_fast.errors import DataError
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.classifying import ImageTask, from_hub

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "uoft-cs/cifar100"
SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE  # coarse label, fine label, then the red, the green and the blue plane, row by row
REMEDY = "unpack cifar-100-binary.tar.gz from cs.toronto.edu/~kriz/cifar.html and give its folder"


class Cifar100Options(TaskOptions):
    """``path``: the folder of the authors' binary version (train.bin, test.bin, *_label_names.txt); None takes the copy
    on the hub. ``labels``: the 100 "fine" classes, or the 20 "coarse" ones.
    """

    path: Path | None = None
    labels: Literal["fine", "coarse"] = "fine"


class Cifar100(ImageTask):
    """The authors' split: 50,000 images of 32 × 32 to train on, 10,000 to test on."""

    name = "cifar100"
    summary = "60,000 small images, 100 classes (or 20 coarse ones)"
    source = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009 (cs.toronto.edu/~kriz/cifar.html)"
    Options: ClassVar[type[TaskOptions]] = Cifar100Options
    options: Cifar100Options

    def load(self, seed: int) -> Corpus:
        """The corpus; nothing is drawn."""
        column = f"{self.options.labels}_label"
        if self.options.path is None:
            parts = from_hub(HUB, ["img", column])
            labels = tuple(parts["train"].features[column].names)
            train, test = (normalised(parts[name], column) for name in ("train", "test"))
        else:
            labels = names(self.options.path / f"{column}_names.txt")
            train, test = (self._read(self.options.path / f"{name}.bin", len(labels)) for name in ("train", "test"))
        return Corpus("image", train=train, test=test, labels=labels)

    def _read(self, path: Path, classes: int) -> Dataset:
        """The images of one of the authors' binary files."""
        from datasets import Dataset, Features, Image, Value

        content = read(path)
        labels = content[:, 1 if self.options.labels == "fine" else 0]
        wrong = np.flatnonzero(labels >= classes)
        if len(wrong):
            raise DataError(
                f"{path}: image {wrong[0]} has the label {labels[wrong[0]]}, and there are {classes} "
                f"{self.options.labels} ones; {REMEDY}"
            )
        pixels = content[:, 2:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        return Dataset.from_dict(
            {"image": list(pixels), "label": labels.tolist()},
            features=Features({"image": Image(), "label": Value("int64")}),
        )


def read(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(images, RECORD) uint8 of one of the authors' binary files. Raises ``DataError``."""
    if not path.is_file() and path.with_suffix("").is_file():
        raise DataError(
            f"{path.with_suffix('')}: is a pickle of the Python version, which could run any code when it is read; "
            f"{REMEDY}"
        )
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    if not len(content) or len(content) % RECORD:
        raise DataError(f"{path}: its {len(content)} bytes are not images of {RECORD} each; {REMEDY}")
    return content.reshape(-1, RECORD)


def names(path: Path) -> tuple[str, ...]:
    """The names of the classes, one a line. Raises ``DataError``."""
    try:
        found = tuple(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    if not found:
        raise DataError(f"{path}: names no class; {REMEDY}")
    return found


def normalised(rows: Dataset, column: str) -> Dataset:
    """The hub's rows in the corpus's columns."""
    from datasets import Value

    rows = rows.select_columns(["img", column]).rename_columns({"img": "image", column: "label"})
    return rows.cast_column("label", Value("int64"))
