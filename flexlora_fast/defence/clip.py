"""Rules about one update's norm: reject what is absurd, shorten what is long. And the same around a centre."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexlora_fast.defence.base import Judgement, Rule, check_count, check_number, lower_quantile, normalised, norms_of
from flexlora_fast.errors import OptionError

if TYPE_CHECKING:
    from flexlora_fast.update import GlobalUpdate


# How fast a carried bound follows its quantile: η of Andrew et al. 2021, section 3.
_RATE = 0.2


@dataclass(frozen=True)
class Clip(Rule):
    """Reject updates of absurd norm, and clip the others: c_i = min(1, τ/‖ΔW_i‖_F), joint over all layers.

    τ is the ``quantile`` of the norms of this round (of those > 0), or ``norm`` where it is given. A client with
    ‖ΔW_i‖_F > ``zeroing``·τ is rejected (None: never), and τ is taken again from those that are left, until none is:
    the round is as if the rejected had never come.

    Weights: a rejected client counts as absent, so its weight is shared out. A clipped one keeps its weight: the mean
    of shortened updates is the rule, and to renormalise would undo it. The quantile counts clients, as the source does:
    a weight may be what a client says of itself, and must not move the bound of others. So weight k is not k copies
    here, but for ``norm``.

    After TensorFlow Federated's ``tff.learning.robust_aggregator``, which clips at the 0.8-quantile of norms, estimated
    over the rounds before (Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, arXiv
    1905.03871, without its noise), and zeroes values beyond a multiple of the 0.98-quantile. A round by itself has no
    history: its quantile is safe only while fewer than 1 − quantile of the clients are hostile, hence the median here,
    which stands up to just under a half. :meth:`after` carries a bound over rounds. Clipping bounds what one client
    can do; it does not find one that points the wrong way at an ordinary length.
    """

    quantile: float = 0.5
    zeroing: float | None = 10.0
    norm: float | None = None
    name = "clip"
    norms_only = True

    def __post_init__(self) -> None:
        check_number(self.name, "quantile", self.quantile, 0, 1, open_low=True)
        if self.zeroing is not None:
            check_number(self.name, "zeroing", self.zeroing, 1, math.inf)
        if self.norm is not None:
            check_number(self.name, "norm", self.norm, 0, math.inf, open_low=True)

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        norms = norms_of(gram)
        bound, kept = self._bound(norms)
        factors = torch.where(norms > bound, bound / norms.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        what = "‖ΔW‖_F {:.4g} is {} {:.4g}" + (f" ({self.quantile:g}-quantile)" if self.norm is None else "")
        reasons = [
            what.format(norm, f"more than {self.zeroing:g} ×", bound)
            if not keep
            else what.format(norm, "more than", bound)
            if norm > bound
            else ""
            for norm, keep in zip(norms.tolist(), kept.tolist(), strict=True)
        ]
        return Judgement(normalised(weights * kept), torch.where(kept, factors, 0.0), reasons)

    def _bound(self, norms: Tensor) -> tuple[float, Tensor]:
        """τ, and who is kept (K,): fewer clients have a lower quantile, so whoever was rejected stays so."""
        kept = torch.ones_like(norms, dtype=torch.bool)
        while True:
            counted = norms[kept & (norms > 0)]
            bound = self.norm or (lower_quantile(counted, self.quantile) if len(counted) else math.inf)
            left = norms <= (math.inf if self.zeroing is None else self.zeroing * bound)
            if torch.equal(left, kept):
                return bound, kept
            kept = left

    def after(self, update: GlobalUpdate) -> Clip:
        """The rule for the next round: τ of this round, moved towards the quantile of this round's norms.

        τ ← τ·exp(−0.2·(b − ``quantile``)), where b is the share of the clients, without the rejected, with ‖ΔW‖_F ≤ τ
        (Andrew et al. 2021, equation 1). The first round has its own quantile for τ. A bound that is carried moves by
        less than a quarter a round, whatever hostile clients send. ``update``: one that this rule has judged.

        Raises ``OptionError`` for an update without verdicts.
        """
        if not update.verdicts:
            raise OptionError("clip: this update has no verdicts to learn a bound from; aggregate it with defence=clip")
        norms = torch.tensor([verdict.norm for verdict in update.verdicts], dtype=torch.float64)
        bound, kept = self._bound(norms)
        if not math.isfinite(bound):  # nobody has trained yet
            return self
        below = float((norms[kept] <= bound).double().mean())
        return dataclasses.replace(self, norm=bound * math.exp(-_RATE * (below - self.quantile)))


@dataclass(frozen=True)
class CentredClipping(Rule):
    """v ← v + Σ w_i·(ΔW_i − v)·min(1, τ/‖ΔW_i − v‖_F), from v = 0 until it stands still, at most ``iterations`` times.

    τ is ``radius``; None takes the weighted median of the distances ‖ΔW_i − v‖ in each iteration.
    In coordinates v = Σ a_i·ΔW_i: a ← (1 − Σ w_i·c_i)·a + w∘c, so everything comes from the Gram.

    Weights: a/Σa, with one factor Σa ≤ 1 for all: what is missing from 1 is what is left of the start at 0, which
    vanishes with the iterations. Weight k equals k copies.

    Source: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021 (arXiv
    2012.10333), algorithm 2; there v starts at the aggregate of the last round and takes a few steps. Here it is 0.
    """

    radius: float | None = None
    iterations: int = 100
    name = "centred-clipping"

    def __post_init__(self) -> None:
        if self.radius is not None:
            check_number(self.name, "radius", self.radius, 0, math.inf, open_low=True)
        check_count(self.name, "iterations", self.iterations, 1)

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        a = torch.zeros_like(weights)
        for _ in range(self.iterations):
            before, distance = a, distances_to(gram, a)
            radius = weighted_median(distance, weights) if self.radius is None else self.radius
            clipped = torch.where(distance > radius, radius / distance.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
            a = (1 - (weights * clipped).sum()) * a + weights * clipped
            if float((a - before).abs().max()) <= 1e-12:
                break
        reasons = [
            f"{d:.4g} from the centre, {c:.3f} of it counts" if c < 1 else ""
            for d, c in zip(distance.tolist(), clipped.tolist(), strict=True)
        ]
        return Judgement(normalised(a), torch.full_like(a, float(a.sum())), reasons)


def distances_to(gram: Tensor, a: Tensor) -> Tensor:
    """‖ΔW_i − Σ_j a_j·ΔW_j‖_F (K,) = √(G_ii − 2(Ga)_i + aᵀGa)."""
    inner = gram @ a
    return (gram.diagonal() - 2 * inner + a @ inner).clamp_min(0).sqrt()


def weighted_median(values: Tensor, weights: Tensor) -> float:
    """The least of ``values`` (K,) at which half of the weight is reached."""
    ordered, index = values.sort()
    below = weights[index].cumsum(0)
    return float(ordered[int((below >= 0.5 * below[-1] - 1e-12).int().argmax())])
