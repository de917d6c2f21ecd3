"""Each rule of ``flexlora_fast.defence`` as its source states it, on dense float64 vectors, and attacks to try it on.

The rules use nothing of the package but the clients' factors: a client is one long vector of all its s·B·A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

import flexlora_fast as ff
from tests import oracle, rounds
from tests.rounds import Client, Layer

Array = np.ndarray


def vectors(clients: Sequence[Client]) -> Array:
    """(K, D) float64: all s·B·A and s·bias of a client in a row, zeros where it has no such layer."""
    layers = {name: layer for c in clients for name, layer in c.layers.items()}
    rows = []
    for c in clients:
        parts = []
        for name, layer in sorted(layers.items()):
            there = name in c.factors
            parts.append((oracle.product(c, name) if there else np.zeros((layer.experts, layer.m, layer.n))).ravel())
            parts.append(c.scales[name] * oracle.array(c.bias[name]) if name in c.bias else np.zeros(layer.m))
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def shares(clients: Sequence[Client]) -> Array:
    return np.array(oracle.shares(clients))


# -- rules: X (K, D), w (K,) -> the sum's coefficients (K,) ---


def clip(X: Array, w: Array) -> Array:
    norms = np.linalg.norm(X, axis=1)
    kept = np.full(len(X), True)
    for _ in range(len(X)):  # each time somebody is rejected, or all is settled
        positive = np.sort(norms[kept & (norms > 0)])
        bound = positive[math.ceil(len(positive) / 2) - 1] if len(positive) else np.inf
        kept &= norms <= 10 * bound
    return np.where(kept, w, 0) / w[kept].sum() * np.minimum(1, bound / np.maximum(norms, 1e-300))


def krum_order(X: Array, byzantine: int) -> Array:
    K = len(X)
    scores = []
    for i in range(K):
        others = sorted(float(((X[i] - X[j]) ** 2).sum()) for j in range(K) if j != i)
        scores.append(sum(others[: max(1, K - byzantine - 2)]))
    return np.argsort(scores, kind="stable")


def krum(X: Array, w: Array) -> Array:
    chosen = krum_order(X, max(0, (len(X) - 3) // 2))[:1]
    return np.isin(np.arange(len(X)), chosen).astype(float)


def multi_krum(X: Array, w: Array) -> Array:
    K = len(X)
    byzantine = max(0, (K - 3) // 2)
    kept = np.isin(np.arange(K), krum_order(X, byzantine)[: max(1, K - byzantine - 2)])
    return np.where(kept, w, 0) / w[kept].sum()


def geometric_median(X: Array, w: Array) -> Array:
    norms = np.linalg.norm(X, axis=1)
    if not norms.any():
        return w
    order = np.argsort(norms[norms > 0], kind="stable")
    below = np.cumsum(w[norms > 0][order])
    floor = 1e-3 * norms[norms > 0][order][np.searchsorted(below, 0.5 * below[-1] - 1e-12)]
    a = w
    for _ in range(3000):
        v = a @ X
        b = w / np.maximum(np.linalg.norm(X - v, axis=1), floor)
        a = b / b.sum()
    return a


def centred_clipping(X: Array, w: Array) -> Array:
    a, v = np.zeros(len(X)), np.zeros(X.shape[1])
    for _ in range(100):
        distance = np.linalg.norm(X - v, axis=1)
        order = np.argsort(distance, kind="stable")
        radius = distance[order][np.searchsorted(np.cumsum(w[order]), 0.5 - 1e-12)]
        c = np.minimum(1, radius / np.maximum(distance, 1e-300))
        v = v + (w * c) @ (X - v)
        a = a * (1 - (w * c).sum()) + w * c
    return a


def foolsgold(X: Array, w: Array) -> Array:
    K = len(X)
    if K == 1:
        return w
    norms = np.linalg.norm(X, axis=1)
    cs = X @ X.T / np.maximum(np.outer(norms, norms), 1e-300)
    v = [max(cs[i, j] for j in range(K) if j != i) for i in range(K)]
    alpha = np.zeros(K)
    for i in range(K):
        pardoned = [cs[i, j] * v[i] / v[j] if v[j] > v[i] >= 0 else cs[i, j] for j in range(K) if j != i]
        alpha[i] = min(1, max(0, 1 - max(pardoned)))
    alpha[alpha < 1e-5] = 0
    alpha /= alpha.max()
    with np.errstate(divide="ignore"):
        alpha = np.clip(np.log(alpha) - np.log1p(-alpha) + 0.5, 0, 1)
    return w * alpha / (w @ alpha)


def fltrust(X: Array, w: Array, own: Array) -> Array:
    norms = np.linalg.norm(X, axis=1)
    trust = w * np.maximum(0, X @ own / np.maximum(norms * np.linalg.norm(own), 1e-300))
    return trust / trust.sum() * np.linalg.norm(own) / np.maximum(norms, 1e-300)


RULES: dict[str, Callable[[Array, Array], Array]] = {
    "clip": clip,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
    "centred-clipping": centred_clipping,
    "foolsgold": foolsgold,
}


# -- clients ---


def alike(count: int, model: str | Sequence[Layer] = "linear", seed: int = 0, spread: float = 0.4) -> list[Client]:
    """Honest clients: all saw the same task, each its own data; ranks, scales and weights differ."""
    shared = rounds.client("shared", model, rank=4, alpha=4, seed=seed)
    made = []
    for i in range(count):
        rank = 2 + i % 3
        own = rounds.client(f"c{i:02d}", model, rank=rank, alpha=rank, seed=seed, weight=1.0 + i % 2)

        def mixed(name: str, A: torch.Tensor, B: torch.Tensor, rank: int = rank) -> tuple[torch.Tensor, torch.Tensor]:
            A0, B0 = shared.factors[name]
            return A0[:, :rank] + spread * A, B0[:, :, :rank] + spread * B

        made.append(own.mapped(mixed))
    return made


def attacked(clients: Sequence[Client], attack: str, count: int) -> list[Client]:
    return [*ATTACKS[attack](clients[:count]), *clients[count:]] if count else list(clients)


def error_of(update: ff.GlobalUpdate, honest: Sequence[Client]) -> float:
    """‖ΔW − honest mean‖_F/‖honest mean‖_F over all layers."""
    weights = shares(honest)
    off = norm = 0.0
    for layer in honest[0].layers:
        mean = sum(w * oracle.product(c, layer) for w, c in zip(weights, honest, strict=True))
        got = oracle.array(update.delta(layer)).reshape(mean.shape)
        off, norm = off + float(((got - mean) ** 2).sum()), norm + float((mean**2).sum())
    return math.sqrt(off / norm)


# -- attacks: what hostile clients send in place of their own adapters ---


def _each(change: Callable[[str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Callable:
    return lambda hostile: [c.mapped(change) for c in hostile]


def collude(hostile: Sequence[Client]) -> list[Client]:
    """All send the first one's update turned round, under their own names and weights."""
    first = hostile[0].mapped(lambda _, A, B: (A, -B))
    return [first.but(name=c.name, weight=c.weight) for c in hostile]


def noise(hostile: Sequence[Client]) -> list[Client]:
    """Factors of noise, three times as large as their own."""
    generator = torch.Generator().manual_seed(7)

    def drawn(_: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(X.shape, generator=generator) for X in (A, B))
        return 3**0.5 * a * A.norm() / a.norm(), 3**0.5 * b * B.norm() / b.norm()

    return [c.mapped(drawn) for c in hostile]


def product_poison(hostile: Sequence[Client]) -> list[Client]:
    """Factors of three times their norms, as a check of each would pass, with all columns along one direction: the
    product is 9·√r times an ordinary one.
    """

    def aligned(_: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = torch.ones_like(A), torch.ones_like(B)
        return 3 * a * A.norm() / a.norm(), 3 * b * B.norm() / b.norm()

    return [c.mapped(aligned) for c in hostile]


ATTACKS: dict[str, Callable[[Sequence[Client]], list[Client]]] = {
    "sign flip": _each(lambda _, A, B: (A, -B)),
    "scaling ×100": _each(lambda _, A, B: (A, 100 * B)),
    "colluding copies": collude,
    "NaN": _each(lambda _, A, B: (A, torch.full_like(B, torch.nan))),
    "noise ×3": noise,
    "product poisoning": product_poison,
}
