"""Small files in the formats that data sets of classes are published in."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

INTENTS = ("card_arrival", "Refund_not_showing_up", "age_limit")
GROUPS = ("alt.atheism", "comp.graphics", "sci.space")
FINE, COARSE = ("apple", "bear", "clock", "whale"), ("animals", "things")


def trec(folder: Path, count: int = 120) -> Path:
    """``question_labels.txt``: lines ``COARSE:fine question`` in latin-1."""
    words = {"HUM": "Who", "LOC": "Where", "NUM": "How many"}
    names = list(words)
    lines = [f"{names[i % 3]}:ind {words[names[i % 3]]} wrote caf\xe9 number {i} ?" for i in range(count)]
    path = folder / "question_labels.txt"
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    return path


def banking77(folder: Path, train: int = 90, test: int = 12) -> Path:
    """``train.csv`` and ``test.csv``."""
    for name, count in (("train", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows([f'Where, "please", is my €{i}?\n{INTENTS[i % 3]}', INTENTS[i % 3]] for i in range(count))
    return folder


def newsgroups(folder: Path, train: int = 30, test: int = 6) -> Path:
    """The two folders of 20news-bydate, a folder a group in each, a file a post."""
    for name, count in (("20news-bydate-train", train), ("20news-bydate-test", test)):
        for i in range(count):
            group = folder / name / GROUPS[i % 3]
            group.mkdir(parents=True, exist_ok=True)
            (group / str(50000 + i)).write_text(
                f"From: someone@{GROUPS[i % 3]}\nSubject: Re: {i}\n\nIn article <{i}> another writes:\n> quoted\n"
                f"About {GROUPS[i % 3]}, na\xefve post {i}.\nIt goes on.\n\n--\nSomeone, Somewhere\n",
                encoding="latin-1",
            )
    return folder


def cifar100(folder: Path, train: int = 24, test: int = 8) -> Path:
    """``train.bin``, ``test.bin`` and the class names. An image: its coarse label, its fine label, RGB planes."""
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        records = generator.integers(0, 256, size=(count, 2 + 3072), dtype=np.uint8)
        records[:, 1] = np.arange(count) % len(FINE)
        records[:, 0] = records[:, 1] // 2
        records[:, 2:1026] = 60 * records[:, 1:2]  # a red plane that tells the class
        records.tofile(folder / f"{name}.bin")
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return folder


def domainnet(folder: Path, domains: tuple[str, ...] = ("clipart", "real", "sketch"), train: int = 12) -> Path:
    """Lists ``<domain>_train.txt`` and ``<domain>_test.txt``, and the images that they name."""
    from PIL import Image

    for domain in domains:
        for split, count in (("train", train), ("test", 4)):
            lines = []
            for i in range(count):
                name = f"{domain}/{FINE[i % 4]}/{domain}_{i % 4:03}_{split}{i:06}.jpg"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), (60 * (i % 4), 10, 10)).save(folder / name)
                lines.append(f"{name} {i % 4}")
            (folder / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder
