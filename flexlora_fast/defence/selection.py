"""Rules that choose among clients by the distances between their updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.defence.base import Judgement, Rule, check_count, normalised, squared_distances
from flexlora_fast.errors import OptionError


@dataclass(frozen=True)
class Krum(Rule):
    """The one update whose K − f − 2 nearest others are nearest: argmin_i Σ_{j near i} ‖ΔW_i − ΔW_j‖_F².

    f is ``byzantine``, how many clients may be hostile, with K ≥ 2f + 3; None takes the most that K clients allow.
    Distances count clients, as the source does, not weights: a weight may be what a client says of itself, and one
    that counted as k copies would have them for its nearest neighbours. So weight k is not k copies here.

    Weights: the chosen client has all of it.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """

    byzantine: int | None = None
    name = "krum"

    def __post_init__(self) -> None:
        if self.byzantine is not None:
            check_count(self.name, "byzantine", self.byzantine, 0)

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        return _chosen(gram, weights, _tolerated(self.name, self.byzantine, len(weights)), 1)


@dataclass(frozen=True)
class MultiKrum(Rule):
    """The weighted mean of the ``select`` updates of the lowest Krum scores (see :class:`Krum`).

    ``select``: None takes K − f − 2, the most that the source's bound allows.

    Weights: those of the chosen, renormalised; the others count as absent. Whom it chooses does not depend on weights.

    Source: Blanchard et al. 2017, section 4; El Mhamdi et al., "The Hidden Vulnerability of Distributed Learning in
    Byzantium", ICML 2018 (arXiv 1802.07927) for the bound on ``select``.
    """

    byzantine: int | None = None
    select: int | None = None
    name = "multi-krum"

    def __post_init__(self) -> None:
        if self.byzantine is not None:
            check_count(self.name, "byzantine", self.byzantine, 0)
        if self.select is not None:
            check_count(self.name, "select", self.select, 1)

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        hostile = _tolerated(self.name, self.byzantine, len(weights))
        most = max(1, len(weights) - hostile - 2)
        if self.select is not None and self.select > most:
            raise OptionError(
                f"multi-krum: select is {self.select}, and of {len(weights)} clients with byzantine={hostile} at most "
                f"{most} can be chosen; give less"
            )
        return _chosen(gram, weights, hostile, self.select or most)


def krum_scores(gram: Tensor, byzantine: int) -> Tensor:
    """Σ of the K − f − 2 smallest ‖ΔW_i − ΔW_j‖², j ≠ i: (K,) float64; at least one counts, if there is one."""
    squares = squared_distances(gram).fill_diagonal_(torch.inf)
    neighbours = min(max(1, len(gram) - byzantine - 2), len(gram) - 1)
    return squares.sort(dim=1).values[:, :neighbours].sum(dim=1)


def _tolerated(rule: str, byzantine: int | None, K: int) -> int:
    if byzantine is None:
        return max(0, (K - 3) // 2)
    if byzantine and 2 * byzantine + 3 > K:
        raise OptionError(
            f"{rule}: byzantine={byzantine} needs at least {2 * byzantine + 3} clients (2f + 3), this round has {K}; "
            "give a smaller number, or have more clients"
        )
    return byzantine


def _chosen(gram: Tensor, weights: Tensor, byzantine: int, count: int) -> Judgement:
    scores = krum_scores(gram, byzantine)
    ranks = torch.empty(len(scores), dtype=torch.int64)
    ranks[scores.sort(stable=True).indices] = torch.arange(len(scores))  # ties: the name that sorts first
    kept = ranks < count
    reasons = [
        "" if keep else f"score {score:.4g} is number {place + 1} of {len(scores)}, {count} chosen"
        for keep, score, place in zip(kept.tolist(), scores.tolist(), ranks.tolist(), strict=True)
    ]
    return Judgement(normalised(weights * kept), kept.double(), reasons)
