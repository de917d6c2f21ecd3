"""DomainNet: the same things as photographs, paintings, sketches …; a domain is a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from flexlora_fast.errors import DataError, OptionError, shown
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.classifying import ImageTask

if TYPE_CHECKING:
    from datasets import Dataset

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
REMEDY = "take the cleaned version's zip and its two lists from ai.bu.edu/M3SDA, and unpack the zip beside the lists"


class DomainNetOptions(TaskOptions):
    """``path``: the folder with the lists ``<domain>_train.txt`` and ``<domain>_test.txt`` and the domains' folders.

    ``domains``: the clients. ``unseen``: domains that never train and are tested on as unseen. ``classes``: only these
    (FedBN takes ten); None takes all 345.
    """

    path: Path
    domains: tuple[str, ...] = Field(DOMAINS, min_length=1)
    unseen: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = Field(None, min_length=2)


@dataclass(frozen=True)
class Item:
    """A line of a list: an image, and the number and the name of its class."""

    image: Path
    label: int
    name: str


class DomainNet(ImageTask):
    """The authors' split of their cleaned version. Labels are the lists', or places in ``classes`` sorted by name."""

    name = "domainnet"
    summary = "586,575 images of six styles, 345 classes; a style is a client"
    source = "Peng et al., Moment Matching for Multi-Source Domain Adaptation, ICCV 2019 (ai.bu.edu/M3SDA)"
    Options: ClassVar[type[TaskOptions]] = DomainNetOptions
    options: DomainNetOptions

    def load(self, seed: int) -> Corpus:
        """The corpus; nothing is drawn."""
        domains, unseen = self.options.domains, self.options.unseen
        if set(domains) & set(unseen):
            raise OptionError(
                f"task.unseen and task.domains share {sorted(set(domains) & set(unseen))}; name each once"
            )
        train = {domain: self._read(domain, "train") for domain in domains}
        test = {domain: self._read(domain, "test") for domain in (*domains, *unseen)}
        labels = self._labels([*train.values(), *test.values()])
        never = {domain: test[domain] for domain in unseen}
        return Corpus(
            "image",
            train=self._rows(train, labels),
            test=self._rows({domain: test[domain] for domain in domains}, labels),
            unseen=self._rows(never, labels) if never else None,
            labels=labels,
        )

    def _read(self, domain: str, split: str) -> list[Item]:
        """One of the authors' lists: ``domain/class/image.jpg label`` a line."""
        path = self.options.path / f"{domain}_{split}.txt"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from error
        items = [self._item(line, domain, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not items:
            raise DataError(f"{path}: names no image; {REMEDY}")
        return items

    def _item(self, line: str, domain: str, where: str) -> Item:
        name, _, label = line.strip().rpartition(" ")
        parts = PurePosixPath(name).parts
        if len(parts) != 3 or parts[0] != domain or ".." in parts or not label.isdecimal():
            raise DataError(f"{where}: {shown(line)} is not '{domain}/class/image.jpg label'; {REMEDY}")
        image = self.options.path / name
        if not image.is_file():
            raise DataError(f"{where}: {name} is not there; {REMEDY}")
        return Item(image, int(label), parts[1])

    def _labels(self, lists: Sequence[Sequence[Item]]) -> tuple[str, ...]:
        """Names of the classes by their number, which every list must agree on."""
        names: dict[int, str] = {}
        numbers: dict[str, int] = {}
        for item in (item for items in lists for item in items):
            if (
                names.setdefault(item.label, item.name) != item.name
                or numbers.setdefault(item.name, item.label) != item.label
            ):
                raise DataError(
                    f"{item.image}: label {item.label} and class {item.name!r} do not belong together: elsewhere "
                    f"{item.label} is {names[item.label]!r} and {item.name!r} is {numbers.get(item.name)}; {REMEDY}"
                )
        if self.options.classes is not None:
            missing = sorted(set(self.options.classes) - set(numbers))
            if missing:
                raise OptionError(f"task.classes names {', '.join(missing)}, which no list has; take names of folders")
            return tuple(sorted(self.options.classes))
        if sorted(names) != list(range(len(names))):
            gap = next(number for number in range(len(names)) if number not in names)
            raise DataError(
                f"{self.options.path}: no image of the lists has label {gap}; {REMEDY}, or set task.classes"
            )
        return tuple(names[number] for number in range(len(names)))

    def _rows(self, lists: dict[str, list[Item]], labels: tuple[str, ...]) -> Dataset:
        from datasets import Dataset, Features, Image, Value

        number = {name: i for i, name in enumerate(labels)}
        rows = [
            (str(item.image), number[item.name], domain)
            for domain, items in lists.items()
            for item in items
            if item.name in number
        ]
        return Dataset.from_dict(
            {
                "image": [image for image, _, _ in rows],
                "label": [label for _, label, _ in rows],
                "client": [domain for _, _, domain in rows],
            },
            features=Features({"image": Image(), "label": Value("int64"), "client": Value("string")}),
        )
