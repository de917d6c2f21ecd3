"""Rules that give every client another weight: by its distance from the middle, its likeness to others or to a server's
own update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.defence.base import Judgement, Rule, check_count, check_number, normalised, norms_of
from flexlora_fast.defence.clip import distances_to, weighted_median
from flexlora_fast.errors import OptionError

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """argmin_v Σ w_i·‖ΔW_i − v‖_F by the smoothed Weiszfeld algorithm: β_i = w_i/max(ν, ‖ΔW_i − v‖), v ← Σβ_iΔW_i/Σβ_i.

    v = Σ a_i·ΔW_i with a = β/Σβ, so all distances come from the Gram. It starts at v = 0, where every step is shorter
    than what honest updates allow: from the mean, updates that are long enough would outlast any number of iterations.
    ν is ``smoothing`` times the weighted median norm μ; below 3e-4 of a norm distances are not resolved. It ends when
    no a_i moves by more than 1e-9, nor a_i·‖ΔW_i‖ by more than 1e-9·μ, or after ``iterations``. Breakdown point: half
    of the weight.

    Weights: a, which sum to 1 by definition. Weight k equals k copies.

    Source: Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning" (RFA), IEEE TSP 2022 (arXiv
    1912.13445), algorithm 2; there ν = 1e-6 and three iterations, for a protocol that pays for each.
    """

    smoothing: float = 1e-3
    iterations: int = 1000
    name = "geometric-median"

    def __post_init__(self) -> None:
        check_number(self.name, "smoothing", self.smoothing, 0, 1, open_low=True)
        check_count(self.name, "iterations", self.iterations, 1)

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        norms = norms_of(gram)
        if not bool((norms > 0).any()):
            return Judgement(weights.clone(), torch.ones_like(weights), [""] * len(weights))
        usual = weighted_median(norms[norms > 0], weights[norms > 0])
        # An update that is a million times as long as others moves v by as much more with the same share.
        lengths = (norms / usual).clamp_min(1)
        a = torch.zeros_like(weights)
        for _ in range(self.iterations):
            before, distance = a, distances_to(gram, a)
            a = normalised(weights / distance.clamp_min(self.smoothing * usual))
            if float(((a - before).abs() * lengths).max()) <= 1e-9:
                break
        reasons = [f"{distance:.4g} from the geometric median" for distance in distances_to(gram, a).tolist()]
        return Judgement(a, torch.ones_like(a), reasons)


@dataclass(frozen=True)
class FoolsGold(Rule):
    """Less weight for clients whose updates are alike: α_i = logit(1 − max_j cs_ij) + ½ cut to [0, 1].

    cs_ij is the cosine of ΔW_i and ΔW_j, v_i = max_j cs_ij, with pardoning cs_ij·v_i/v_j where v_j > v_i; 1 − max cs is
    divided by its largest value first. It is for many colluding copies among clients whose data differ (non-IID), and
    punishes honest clients that agree as well. The source compares sums over rounds; here it is this round alone.

    Weights: w_i·α_i, renormalised, so that the result stays a mean. Cosines know no weights, and k copies are what the
    rule is against: weight k is not k copies here.

    Source: Fung, Yoon, Beschastnikh, "The Limitations of Federated Learning in Sybil Settings", RAID 2020 (arXiv
    1808.04866), algorithm 1 with confidence κ = 1.
    """

    name = "foolsgold"

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        K = len(weights)
        if K == 1:
            return Judgement(weights.clone(), torch.ones(1, dtype=torch.float64), [""])
        norms = norms_of(gram)
        cosine = gram / (norms.unsqueeze(0) * norms.unsqueeze(1)).clamp_min(_TINY)
        cosine = cosine.fill_diagonal_(-torch.inf)
        most = cosine.max(dim=1).values
        pardoned = torch.where(most.unsqueeze(0) > most.unsqueeze(1), cosine * (most.unsqueeze(1) / most), cosine)
        # A ratio of cosines of other signs says nothing of likeness: pardoning is for v_i ≥ 0.
        pardoned = torch.where(most.unsqueeze(1) >= 0, pardoned, cosine)
        alpha = (1 - pardoned.fill_diagonal_(-torch.inf).max(dim=1).values).clamp(0, 1)
        # Float32 factors resolve a cosine of 1 to about 1e-6: copies are copies.
        alpha = torch.where(alpha < 1e-5, 0.0, alpha)
        if bool((alpha > 0).any()):
            alpha = alpha / alpha.max()
        alpha = (torch.logit(alpha) + 0.5).clamp(0, 1)
        reasons = [
            f"cosine {c:.3f} with the client most like it" if a < 1 else "" for c, a in zip(most, alpha, strict=True)
        ]
        return Judgement(normalised(weights * alpha), (alpha > 0).double(), reasons)


@dataclass(frozen=True)
class FLTrust(Rule):
    """Σ TS_i·w_i·(‖ΔW_0‖/‖ΔW_i‖)·ΔW_i / Σ TS_j·w_j with the trust score TS_i = max(0, cos(ΔW_i, ΔW_0)).

    ΔW_0 is the server's own update, trained on a small clean data set: ``reference``, an adapter or a PEFT folder for
    the same base model, of any rank. All updates get its norm; what points away from it is rejected.

    Weights: TS_i·w_i, renormalised as the source does with TS_i (it has no data weights: give equal ones for it).
    Weight k equals k copies.

    Source: Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021 (arXiv
    2012.13995), equations 2 to 4.
    """

    reference: Adapter | str | None = None  # type: ignore[assignment]
    name = "fltrust"

    def __post_init__(self) -> None:
        if isinstance(self.reference, str):
            object.__setattr__(self, "reference", Adapter.load(self.reference))
        if not isinstance(self.reference, Adapter):
            raise OptionError(
                f"fltrust: reference is {self.reference!r}; give the server's own adapter, or the path of its folder"
            )

    def judge(self, gram: Tensor, weights: Tensor) -> Judgement:
        norms = norms_of(gram)
        own, norms = norms[-1], norms[:-1]
        if float(own) == 0:
            raise OptionError("fltrust: the reference's ΔW is zero, and no direction can be compared with it; train it")
        cosine = gram[-1, :-1] / (norms * own).clamp_min(_TINY)
        # Products of float32: what is not resolved from a right angle is none.
        trust = torch.where(cosine > 1e-6, cosine, 0.0)
        shares = normalised(trust * weights)
        factors = torch.where(shares > 0, own / norms.clamp_min(_TINY), 0.0)
        reasons = [f"cosine {c:.3f} with the server's update" for c in cosine.tolist()]
        return Judgement(shares, factors, reasons)
