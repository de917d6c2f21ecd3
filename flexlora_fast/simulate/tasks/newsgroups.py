"""20 Newsgroups: which group a post was sent to."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.classifying import Row, TextTask, from_hub, text_corpus

HUB = "SetFit/20_newsgroups"
FOLDERS = {"train": "20news-bydate-train", "test": "20news-bydate-test"}
REMEDY = "unpack 20news-bydate.tar.gz from qwone.com/~jason/20Newsgroups and give the folder that holds its two"
Part = Literal["headers", "footers", "quotes"]
ALL: tuple[Part, ...] = ("headers", "footers", "quotes")


class NewsgroupsOptions(TaskOptions):
    """``path``: the folder with 20news-bydate-train and 20news-bydate-test, a folder a group in each and a file a post;
    None takes the copy on the hub. ``remove``: what is cut out of posts, all three by default, as scikit-learn advises
    and the hub's copy has it: a model would read classes from e-mail addresses.
    """

    path: Path | None = None
    remove: tuple[Part, ...] = ALL


class Newsgroups(TextTask):
    """The split by date: 11,314 posts to train on, 7,532 to test on. Posts of which nothing is left are kept."""

    name = "newsgroups"
    summary = "18,846 posts to 20 newsgroups, without headers, footers and quotes"
    source = (
        "Lang, NewsWeeder, ICML 1995; split and cleaning of scikit-learn's fetch_20newsgroups "
        "(huggingface.co/datasets/SetFit/20_newsgroups)"
    )
    Options: ClassVar[type[TaskOptions]] = NewsgroupsOptions
    options: NewsgroupsOptions

    def load(self, seed: int) -> Corpus:
        """The corpus; nothing is drawn."""
        if self.options.path is not None:
            (train, labels), (test, others) = (self._read(self.options.path / name) for name in FOLDERS.values())
            if labels != others:
                odd = sorted(set(labels) ^ set(others))
                raise DataError(f"{self.options.path}: {', '.join(odd)} is in one of its two folders only; {REMEDY}")
            return text_corpus(train, test, labels)
        if set(self.options.remove) != set(ALL):
            raise OptionError(f"task.remove is {list(self.options.remove)}, but {HUB} lacks all three; give task.path")
        parts = from_hub(HUB, ["text", "label", "label_text"])
        names = dict(zip(parts["train"]["label"], parts["train"]["label_text"], strict=True))
        rows = [list(zip(parts[name]["text"], parts[name]["label"], strict=True)) for name in ("train", "test")]
        return text_corpus(rows[0], rows[1], [names[label] for label in range(len(names))])

    def _read(self, folder: Path) -> tuple[list[Row], list[str]]:
        """The cleaned posts of one of the two folders, and the names of their groups."""
        from sklearn.datasets import load_files

        if not folder.is_dir() or not any(group.is_dir() for group in folder.iterdir()):
            raise DataError(f"{folder}: is no folder with a folder a group; {REMEDY}")
        found = load_files(folder, encoding="latin1", shuffle=False)
        if not found.data:
            raise DataError(f"{folder}: has no post; {REMEDY}")
        posts = (cleaned(text, self.options.remove) for text in found.data)
        return list(zip(posts, map(int, found.target), strict=True)), list(found.target_names)


def cleaned(text: str, remove: tuple[Part, ...]) -> str:
    """A post without the parts to remove, in scikit-learn's order and by its own functions."""
    from sklearn.datasets import _twenty_newsgroups as scikit_learn

    if "headers" in remove:
        text = scikit_learn.strip_newsgroup_header(text)
    if "footers" in remove:
        text = scikit_learn.strip_newsgroup_footer(text)
    if "quotes" in remove:
        text = scikit_learn.strip_newsgroup_quoting(text)
    return text
