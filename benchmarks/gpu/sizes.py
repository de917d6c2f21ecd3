"""The rounds that the gate measures."""

from __future__ import annotations

from collections import Counter

from benchmarks import models
from benchmarks.models import ModelRound


def rounds(quick: bool) -> dict[str, ModelRound]:
    """By name: round-7b with 100 clients of rank 16, and of rank 64."""
    if quick:
        small = models.decoder(2, 64, 64, 172)
        return {f"6 x r{r}": ModelRound("round-7b", small, (r,) * 6) for r in (4, 8)}
    return {f"100 x r{r}": ModelRound("round-7b", models.LLAMA_2_7B, (r,) * 100) for r in (16, 64)}


def kept(quick: bool) -> int:
    """k: the same for either round."""
    return 8 if quick else 64


def one_of_each(round_: ModelRound) -> dict[tuple[int, int], tuple[str, int]]:
    """By shape (m, n): the first layer of it, and how many there are."""
    counts = Counter((m, n) for _, m, n in round_.layers)
    return {(m, n): (name, counts[m, n]) for name, m, n in reversed(round_.layers)}


def streamed(quick: bool) -> dict[str, ModelRound]:
    """By name: rounds whose factors do not lie on the device, the smaller first."""
    layers, counts = (models.decoder(2, 64, 64, 172), (6, 20)) if quick else (models.LLAMA_2_7B, (100, 1000))
    rank = 4 if quick else 16
    return {f"{count:,} x r{rank}": ModelRound("round-7b", layers, (rank,) * count) for count in counts}
