"""What a defence is: a rule from the Gram matrix of the clients' updates to how much of each goes into the sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flexlora_fast import named
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import OptionError


@dataclass(frozen=True)
class Verdict:
    """What a defence made of one client.

    Attributes:
        client: its name.
        norm: ‖ΔW_i‖_F over all layers.
        weight, share: its normalised weight before and after; shares of a round sum to 1.
        factor: c_i, what ΔW_i is multiplied by: the round sums up Σ share_i·c_i·ΔW_i.
        status: "accepted", "clipped" (c_i < 1), "reweighted" (another share) or "rejected" (share·c is 0).
        reason: in words; empty for a client that is accepted as it is.
    """

    client: str
    norm: float
    weight: float
    share: float
    factor: float
    status: str
    reason: str


@dataclass(frozen=True)
class Judgement:
    """What a rule gives for K clients: the sum becomes Σ shares_i·factors_i·ΔW_i.

    Attributes:
        shares: (K,) float64 ≥ 0 that sum to 1, or all 0 where everybody is rejected: of whom the mean is.
        factors: (K,) float64 ≥ 0: c_i, what each update is scaled by before. They are no part of the mean's weights:
            a clipped client counts in full, with a shorter update.
        reasons: K texts, empty where nothing is to be said.
    """

    shares: Tensor
    factors: Tensor
    reasons: list[str]


@runtime_checkable
class Defence(Protocol):
    """A rule that outputs client weights. Anything with these attributes is one.

    Attributes:
        name: what ``defence=`` takes, and reports show.
        reference: an update of the server's own that the rule compares with; None for most.

    With an attribute ``norms_only`` that is true, the rule is given a Gram of which nothing but the diagonal was
    computed, and the rest is zero: for many clients that costs a small part.
    """

    name: str
    reference: Adapter | None

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        """Judge K clients in canonical order.

        Args:
            gram: G_ij = ⟨ΔW_i, ΔW_j⟩, (K, K) float64, over all layers (with the scale s, without weights). Where the
                rule has a ``reference`` it is (K+1, K+1), and the reference comes last.
            weights: (K,) float64 > 0 that sum to 1.

        Raises:
            OptionError: the rule's settings do not fit so many clients.
        """


class Rule:
    """Base of the rules here: dataclasses whose fields are their settings."""

    name = ""
    reference: Adapter | None = None
    norms_only = False

    def __str__(self) -> str:
        """As ``defence=`` would take it, settings that are not the default included."""
        return named.spelled(self)


def norms_of(gram: Tensor) -> Tensor:
    """‖ΔW_i‖_F (K,) float64."""
    return gram.diagonal().clamp_min(0).sqrt()


def squared_distances(gram: Tensor) -> Tensor:
    """‖ΔW_i − ΔW_j‖_F² (K, K) = G_ii + G_jj − 2·G_ij.

    The Gram's products are float32, so a distance is resolved to about 3e-4 of the norms.
    """
    square = gram.diagonal()
    return (square.unsqueeze(0) + square.unsqueeze(1) - 2 * gram).clamp_min(0).fill_diagonal_(0)


def lower_quantile(values: Tensor, q: float) -> float:
    """The ⌈qK⌉-th smallest of ``values`` (K,), 0 < q ≤ 1: one of them, since of two one may be hostile."""
    ordered = values.sort().values
    return float(ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)])


def normalised(weights: Tensor) -> Tensor:
    """``weights`` (K,) ≥ 0 over their sum; zeros stay zeros."""
    total = float(weights.sum())
    return weights / total if total > 0 else torch.zeros_like(weights)


def check_number(rule: str, name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ``OptionError`` for a setting that is no number in [low, high], or (low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not good or (open_low and value == low):
        bounds = f"{'>' if open_low else '≥'} {low:g}" + (f" and ≤ {high:g}" if math.isfinite(high) else "")
        raise OptionError(f"{rule}: {name} is {value!r}; give a number {bounds}")


def check_count(rule: str, name: str, value: object, low: int) -> None:
    """Raise ``OptionError`` for a setting that is no integer ≥ low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise OptionError(f"{rule}: {name} is {value!r}; give an integer ≥ {low}")
