"""Tasks of classes: each reads files of its published format, and says what is wrong with others."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate import tasks
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks import banking77, cifar100, newsgroups
from tests import published


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """``load_dataset`` keeps what it read in the user's home otherwise."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(name: str, path: Path, seed: int = 0, **options: Any) -> Corpus:
    return tasks.make(name, {"path": path, **options}).load(seed)


def test_trec_holds_out_by_seed(tmp_path: Path) -> None:
    path = published.trec(tmp_path)
    corpus = load("trec", path, test=20)
    assert (len(corpus.train), len(corpus.test)) == (100, 20)
    assert not set(corpus.train["text"]) & set(corpus.test["text"])
    assert corpus.labels == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    told = {"Who": "HUM", "Where": "LOC", "How": "NUM"}
    assert all(told[row["text"].split()[0]] == corpus.labels[row["label"]] for row in corpus.train)
    assert "café" in corpus.train[0]["text"]
    assert load("trec", path, test=20).test["text"][:] == corpus.test["text"][:]
    assert load("trec", path, seed=1, test=20).test["text"][:] != corpus.test["text"][:]
    assert load("trec", path, seed=1, test=20, split=0).test["text"][:] == corpus.test["text"][:]


def test_banking77_reads_the_authors_csv(tmp_path: Path) -> None:
    corpus = load("banking77", published.banking77(tmp_path))
    assert (len(corpus.train), len(corpus.test)) == (90, 12)
    assert corpus.labels == ("age_limit", "card_arrival", "Refund_not_showing_up")  # without regard to case
    assert corpus.train[1] == {"text": 'Where, "please", is my €1?\nRefund_not_showing_up', "label": 2}


def test_banking77_reads_the_hubs_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"text {i}", "label": i % 2, "label_text": ("activate", "Zap")[i % 2]} for i in range(6)]
    hub(tmp_path, rows)
    monkeypatch.setattr(banking77, "HUB", str(tmp_path))
    corpus = tasks.make("banking77", {}).load(0)
    assert corpus.labels == ("activate", "Zap")
    assert corpus.test[:2] == {"text": ["text 0", "text 1"], "label": [0, 1]}


@pytest.mark.parametrize(
    ("remove", "text"),
    [
        (["headers", "footers", "quotes"], "About alt.atheism, naïve post 0.\nIt goes on."),
        (["headers"], None),
        ([], None),
    ],
)
def test_newsgroups_are_cleaned_as_scikit_learn_does(tmp_path: Path, remove: list[str], text: str | None) -> None:
    corpus = load("newsgroups", published.newsgroups(tmp_path), remove=remove)
    assert corpus.labels == published.GROUPS
    assert (len(corpus.train), len(corpus.test)) == (30, 6)
    assert all(f"About {corpus.labels[row['label']]}" in row["text"] for row in corpus.train)
    first = corpus.train["text"][0]
    if text is not None:
        assert first.strip() == text
    assert ("From: someone" in first) == ("headers" not in remove)
    assert ("> quoted" in first) == ("quotes" not in remove)
    assert ("Somewhere" in first) == ("footers" not in remove)


def test_newsgroups_read_the_hubs_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"text {i}", "label": i % 3, "label_text": published.GROUPS[i % 3]} for i in range(6)]
    hub(tmp_path, rows)
    monkeypatch.setattr(newsgroups, "HUB", str(tmp_path))
    corpus = tasks.make("newsgroups", {}).load(0)
    assert corpus.labels == published.GROUPS
    assert corpus.train["label"][:] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(OptionError, match=r"task\.remove.*task\.path"):
        tasks.make("newsgroups", {"remove": ["headers"]}).load(0)


@pytest.mark.parametrize(("labels", "names"), [("fine", published.FINE), ("coarse", published.COARSE)])
def test_cifar100_reads_the_binary_version(tmp_path: Path, labels: str, names: tuple[str, ...]) -> None:
    corpus = load("cifar100", published.cifar100(tmp_path), labels=labels)
    assert (len(corpus.train), len(corpus.test), corpus.labels) == (24, 8, names)
    assert corpus.train["label"][:4] == ([0, 1, 2, 3] if labels == "fine" else [0, 0, 1, 1])
    raw = np.fromfile(tmp_path / "train.bin", dtype=np.uint8).reshape(-1, 3074)
    image = np.asarray(corpus.train[5]["image"])
    assert image.shape == (32, 32, 3)
    # Byte for byte, by the page's own words: rows of the red plane first, then green, then blue.
    assert image[3, 7].tolist() == [raw[5, 2 + 1024 * plane + 3 * 32 + 7] for plane in range(3)]


def test_cifar100_reads_the_hubs_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, Image

    names = {
        "fine_label": ClassLabel(names=list(published.FINE)),
        "coarse_label": ClassLabel(names=list(published.COARSE)),
    }
    pixels = [np.full((32, 32, 3), 10 * i, dtype=np.uint8) for i in range(4)]
    rows = {"img": pixels, "fine_label": [0, 1, 2, 3], "coarse_label": [0, 0, 1, 1]}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=Features({"img": Image(), **names})).to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setattr(cifar100, "HUB", str(tmp_path))
    corpus = tasks.make("cifar100", {"labels": "coarse"}).load(0)
    assert corpus.labels == published.COARSE
    assert corpus.train["label"][:] == [0, 0, 1, 1]
    assert np.asarray(corpus.test[2]["image"]).max() == 20


def test_domainnet_has_a_client_a_domain(tmp_path: Path) -> None:
    path = published.domainnet(tmp_path)
    corpus = load("domainnet", path, domains=["clipart", "real"], unseen=["sketch"])
    assert corpus.labels == published.FINE
    assert corpus.train["client"][:] == ["clipart"] * 12 + ["real"] * 12
    assert (len(corpus.test), set(corpus.test["client"])) == (8, {"clipart", "real"})
    assert corpus.unseen is not None
    assert set(corpus.unseen["client"]) == {"sketch"}
    assert corpus.train[2]["image"].getpixel((0, 0))[0] == pytest.approx(120, abs=8)
    few = load("domainnet", path, domains=["real"], classes=["whale", "bear"])
    assert (few.labels, few.unseen) == (("bear", "whale"), None)
    assert few.train["label"][:] == [0, 1] * 3


def hub(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A folder of JSON Lines, as copies on the hub are."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    """A change of a published folder: a file with other content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def short(folder: Path) -> None:
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])


def pickled(folder: Path) -> None:
    (folder / "train.bin").unlink()
    (folder / "train").write_bytes(pickle.dumps({"data": []}))


def other_group(folder: Path) -> None:
    (folder / "20news-bydate-test" / "talk.other").mkdir()
    (folder / "20news-bydate-test" / "talk.other" / "1").write_text("A: b\n\nc\n")


WRONG = [
    ("banking77", removed("test.csv"), r"test\.csv: cannot be read.*PolyAI-LDN"),
    ("banking77", written("train.csv", "text,label\na,b\n"), r"train\.csv:1: the header is \['text', 'label'\]"),
    (
        "banking77",
        written("train.csv", 'text,category\na,b\n"x\ny",c,d\n'),
        r"train\.csv:4: .*'c', 'd'.*not a text and",
    ),
    ("banking77", written("train.csv", "text,category\na,\n"), r"train\.csv:2: .*not a text and a category"),
    ("banking77", written("train.csv", "text,category\n"), r"train\.csv: has no question"),
    ("banking77", written("train.csv", b"text,category\n\xff,b\n"), r"train\.csv: cannot be read.*utf-8"),
    ("banking77", written("test.csv", "text,category\nWhy?,new\n"), r"question 1 of the test set.*Why\?.*'new'"),
    ("newsgroups", other_group, r"talk\.other is in one of its two folders only.*qwone"),
    ("cifar100", removed("fine_label_names.txt"), r"fine_label_names\.txt: cannot be read.*cifar-100-binary"),
    ("cifar100", written("fine_label_names.txt", "\n"), "names no class"),
    (
        "cifar100",
        written("fine_label_names.txt", "apple\nbear\n"),
        r"train\.bin: image 2 has the label 2.*there are 2 fine",
    ),
    ("cifar100", short, r"train\.bin: its 73775 bytes are not images of 3074 each"),
    ("cifar100", pickled, r"train: is a pickle.*run any code.*cifar-100-binary"),
    ("domainnet", removed("real_test.txt"), r"real_test\.txt: cannot be read.*M3SDA"),
    (
        "domainnet",
        written("real_train.txt", "real/apple/x.jpg\n"),
        r"real_train\.txt:1: .*is not 'real/class/image\.jpg label'",
    ),
    ("domainnet", written("real_train.txt", "\nclipart/apple/x.jpg 0\n"), r"real_train\.txt:2: 'clipart/apple"),
    ("domainnet", written("real_train.txt", "real/../x.jpg 0\n"), r"real_train\.txt:1: .*\.\./x\.jpg"),
    (
        "domainnet",
        written("real_train.txt", "real/apple/none.jpg 0\n"),
        r"real_train\.txt:1: real/apple/none\.jpg is not there",
    ),
    ("domainnet", written("real_train.txt", "\n"), r"real_train\.txt: names no image"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_other_files_are_refused(tmp_path: Path, name: str, change: Callable[[Path], object], message: str) -> None:
    getattr(published, name)(tmp_path)
    change(tmp_path)
    options = {"domains": ["clipart", "real"]} if name == "domainnet" else {}
    with pytest.raises(DataError, match=message):
        load(name, tmp_path, **options)


def test_newsgroups_need_both_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"20news-bydate-train: is no folder with a folder a group.*qwone"):
        load("newsgroups", tmp_path)
    (tmp_path / "20news-bydate-train" / "sci.space").mkdir(parents=True)
    with pytest.raises(DataError, match="has no post"):
        load("newsgroups", tmp_path)


def test_domainnet_labels_and_classes_belong_together(tmp_path: Path) -> None:
    published.domainnet(tmp_path)
    path = tmp_path / "real_test.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace(" 0", " 1"), *lines[1:]]))
    with pytest.raises(DataError, match=r"label 1 and class 'apple' do not belong together"):
        load("domainnet", tmp_path, domains=["real"])
    path.write_text("\n".join(lines))
    with pytest.raises(OptionError, match=r"task\.classes names zebra"):
        load("domainnet", tmp_path, domains=["real"], classes=["apple", "zebra"])
    with pytest.raises(OptionError, match=r"share \['real'\]"):
        load("domainnet", tmp_path, domains=["real"], unseen=["real"])
    for split in ("train", "test"):
        listed = (tmp_path / f"real_{split}.txt").read_text()
        (tmp_path / f"real_{split}.txt").write_text(
            "".join(f"{line}\n" for line in listed.splitlines() if line[-1] != "2")
        )
    with pytest.raises(DataError, match="no image of the lists has label 2"):
        load("domainnet", tmp_path, domains=["real"])


def test_trec_says_what_is_wrong(tmp_path: Path) -> None:
    path = published.trec(tmp_path, count=10)
    with pytest.raises(DataError, match=r"10 questions cannot give 500 for testing.*task\.test"):
        load("trec", path)
    path.write_text("HUM:ind Who ?\nXXX:ind What ?\n")
    with pytest.raises(DataError, match=r"question_labels\.txt:2: expected 'COARSE:fine question'.*XXX"):
        load("trec", path)


def test_what_the_hub_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banking77, "HUB", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"cannot be loaded \(.*go online, or give task\.path"):
        tasks.make("banking77", {}).load(0)
    hub(tmp_path, [{"text": "a", "label": 0}])
    monkeypatch.setattr(banking77, "HUB", str(tmp_path))
    with pytest.raises(DataError, match="its split 'train' lacks label_text"):
        tasks.make("banking77", {}).load(0)


@pytest.mark.parametrize("name", ["trec", "banking77", "newsgroups", "cifar100", "domainnet"])
def test_tasks_describe_themselves_and_refuse_unknown_options(name: str) -> None:
    cls = tasks.task_class(name)
    assert (cls.name, cls.metric) == (name, "accuracy")
    assert cls.summary
    assert cls.source
    with pytest.raises(ValueError, match="paht"):
        tasks.make(name, {"paht": "x"})
