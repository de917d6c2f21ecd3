"""The dense float64 truth: each method's ΔW, its best approximations and their errors, by NumPy alone.

Nothing of the package is used here but the names of its methods. Everything is (E, m, n), E = 1 but for MoE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, finfo

from tests.rounds import Client

Array = np.ndarray


def array(X: Tensor) -> Array:
    return X.detach().cpu().double().numpy()


def product(client: Client, layer: str) -> Array:
    """s·B·A of one client."""
    A, B = client.factors[layer]
    return client.scales[layer] * (array(B) @ array(A))


def shares(clients: Sequence[Client], layer: str | None = None, missing: str = "zero") -> list[float]:
    """Normalised weights; with ``missing="renormalize"`` over the clients that have the layer only."""
    counted = [c.weight if missing == "zero" or layer is None or layer in c.factors else 0.0 for c in clients]
    return [weight / sum(counted) for weight in counted]


@dataclass(frozen=True)
class Truth:
    """ΔW of one layer. ``averaged``: B̄ and Ā, for methods that hand out slices of averaged factors (none at all where
    adapters begin anew). ``base``: what clients add to their frozen weight.
    """

    whole: Array  # (E, m, n)
    averaged: tuple[Array, Array] | None = None
    base: Array | float = 0.0
    mass: float = 0.0  # Σ w·‖s·B·A‖_F: what rounding is relative to where updates cancel

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.whole))

    @property
    def spectrum(self) -> Array:
        """(E, min(m, n)), descending."""
        return np.linalg.svd(self.whole, compute_uv=False)

    def at(self, rank: int) -> Array:
        """What an adapter of that rank must be, with the base: the truncated SVD, or the first columns."""
        if self.averaged is not None:
            B, A = self.averaged
            return self.base + B[:, :, :rank] @ A[:, :rank]
        U, S, Vh = np.linalg.svd(self.whole, full_matrices=False)
        return (U[:, :, :rank] * S[:, None, :rank]) @ Vh[:, :rank]

    def error(self, rank: int) -> float:
        """‖ΔW − at(rank)‖_F."""
        if self.averaged is not None:
            return float(np.linalg.norm(self.whole - self.at(rank)))
        return float(np.sqrt((self.spectrum[:, rank:] ** 2).sum()))

    def unique(self, rank: int) -> bool:
        """Whether ``at(rank)`` is the only best choice: there is a gap behind σ_rank in every expert."""
        if self.averaged is not None or rank >= self.spectrum.shape[1]:
            return True
        S = self.spectrum
        return bool((S[:, rank - 1] - S[:, rank] > 1e-5 * S[:, 0]).all())


def truth(method: str, clients: Sequence[Client], layer: str, missing: str = "zero") -> Truth:
    """ΔW of one layer of a round under that method."""
    having = [(c, w) for c, w in zip(clients, shares(clients, layer, missing), strict=True) if layer in c.factors]
    mass = sum(w * float(np.linalg.norm(product(c, layer))) for c, w in having)
    exact = sum(w * product(c, layer) for c, w in having)
    if method in ("flexlora", "florist"):
        return Truth(exact, mass=mass)
    if method == "flora":
        return Truth(exact, (exact[:, :, :0], exact[:, :0]), exact, mass)
    if method == "raflora":
        return Truth(by_slices(having, layer), mass=mass)
    if method == "ffa-lora":
        B, A = over_one_A(having, layer)
        return Truth(B @ A, (B, A), mass=mass)
    if method == "fedex-lora":
        B, A = zero_padded(having, layer)
        # Both parts round by what they are themselves, however much of them cancels.
        mass = max(mass, 100 * float(np.linalg.norm(B @ A)))
        return Truth(exact, (B, A), exact - B @ A, mass)
    if method == "hetlora":
        having = by_norm(having, layer)
    elif method != "fedit":
        raise KeyError(f"the oracle does not know method {method!r}; state its formula here")
    B, A = zero_padded(having, layer)
    return Truth(B @ A, (B, A), mass=mass)


def by_norm(having: list[tuple[Client, float]], layer: str) -> list[tuple[Client, float]]:
    """Weights ∝ w·‖s·B·A‖_F with their sum kept (HetLoRA)."""
    total = sum(w for _, w in having)
    raw = [w * float(np.linalg.norm(product(c, layer))) for c, w in having]
    if not sum(raw):
        return having
    return [(c, total * value / sum(raw)) for (c, _), value in zip(having, raw, strict=True)]


def by_slices(having: list[tuple[Client, float]], layer: str) -> Array:
    """raFLoRA: column j of every client whose rank reaches it, over the weight of those; all have column 0."""
    whole = sum(w for _, w in having)
    total: Array | float = 0.0
    for j in range(max(c.rank(layer) for c, _ in having)):
        reaching = [(c, w) for c, w in having if c.rank(layer) > j]
        mean: Array | float = 0.0
        for c, w in reaching:
            A, B = (array(X) for X in c.factors[layer])
            mean = mean + w * c.scales[layer] * B[:, :, j, None] * A[:, j, None]
        total = total + mean * whole / sum(w for _, w in reaching)
    return np.asarray(total)


def over_one_A(having: list[tuple[Client, float]], layer: str) -> tuple[Array, Array]:
    """FFA-LoRA: Σ w·s·B over zero-padded B, and the one A, of the largest rank and finest dtype."""
    rank = max(c.rank(layer) for c, _ in having)
    finest = min((c for c, _ in having if c.rank(layer) == rank), key=lambda c: finfo(c.factors[layer][0].dtype).eps)
    B: Array | float = 0.0
    for c, w in having:
        own = array(c.factors[layer][1])
        B = B + w * c.scales[layer] * np.pad(own, ((0, 0), (0, 0), (0, rank - own.shape[2])))
    return np.asarray(B), array(finest.factors[layer][0])


def zero_padded(having: list[tuple[Client, float]], layer: str) -> tuple[Array, Array]:
    """Σ w·√s·B and Σ w·√s·A over factors padded with zeros to the largest rank (a negative s is B's)."""
    rank = max(c.rank(layer) for c, _ in having)
    A_mean, B_mean = 0.0, 0.0
    for c, w in having:
        A, B = (array(X) for X in c.factors[layer])
        s, gap = c.scales[layer], rank - A.shape[1]
        A_mean = A_mean + w * abs(s) ** 0.5 * np.pad(A, ((0, 0), (0, gap), (0, 0)))
        B_mean = B_mean + w * abs(s) ** 0.5 * np.sign(s) * np.pad(B, ((0, 0), (0, 0), (0, gap)))
    return B_mean, A_mean


def excess(truth: Truth, X: Array, rank: int) -> float:
    """‖ΔW−X‖/‖ΔW−ΔW_rank‖ − 1 in float64."""
    return float(np.linalg.norm(truth.whole - X)) / truth.error(rank) - 1.0
