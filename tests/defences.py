"""Each rule of ``flexlora_fast.defence`` as its source states it, on dense float64 vectors, and attacks to try it on.

The rules use nothing of the package but the clients' factors: a client is one long vector of all its s·B·A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

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


def mean_of(clients: Sequence[Client]) -> dict[str, Array]:
    """Σ w_i·ΔW_i by layer, (E, m, n) float64."""
    weights = shares(clients)
    return {
        layer: sum(w * oracle.product(c, layer) for w, c in zip(weights, clients, strict=True))
        for layer in clients[0].layers
    }


def task_of(model: str | Sequence[Layer] = "linear", seed: int = 0) -> dict[str, Array]:
    """What ``alike`` clients have in common, by layer: the mean of ever more of them."""
    return mean_of(alike(6, model, seed, spread=0.0))  # six have all combinations of ranks and weights


def error_to(update: ff.GlobalUpdate, target: Mapping[str, Array]) -> float:
    """‖ΔW − target‖_F/‖target‖_F over all layers."""
    off = norm = 0.0
    for layer, truth in target.items():
        got = oracle.array(update.delta(layer)).reshape(truth.shape)
        off, norm = off + float(((got - truth) ** 2).sum()), norm + float((truth**2).sum())
    return math.sqrt(off / norm)


def error_of(update: ff.GlobalUpdate, honest: Sequence[Client]) -> float:
    """‖ΔW − honest mean‖_F/‖honest mean‖_F over all layers."""
    return error_to(update, mean_of(honest))


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


def sent(own: Client, layers: Mapping[str, rounds.Factors]) -> Client:
    """A client that sends these A (E, r, n) and B (E, m, r), one rank for all layers, with a scale of 1."""
    (rank,) = {A.shape[1] for A, _ in layers.values()}
    factors = {name: (A.float().contiguous(), B.float().contiguous()) for name, (A, B) in layers.items()}
    return own.but(
        config=own.config | {"r": rank, "lora_alpha": rank}, factors=factors, scales=dict.fromkeys(layers, 1.0)
    )


def little_is_enough(hostile: Sequence[Client]) -> list[Client]:
    """All send the mean of their own updates less 1.5 standard deviations in every entry: inside the variance, and
    all to one side.

    Source: Baruch, Baruch, Goldberg, "A Little Is Enough", NeurIPS 2019 (arXiv 1902.06156), with z as in its tables.
    """
    layers: dict[str, rounds.Factors] = {}
    width = max(min(layer.m, layer.n) for layer in hostile[0].layers.values())
    for name in hostile[0].layers:
        products = np.stack([oracle.product(c, name) for c in hostile])
        U, S, Vt = np.linalg.svd(products.mean(axis=0) - 1.5 * products.std(axis=0), full_matrices=False)
        B, A = torch.from_numpy(U * S[:, None]), torch.from_numpy(Vt)
        rest = width - A.shape[1]
        layers[name] = torch.nn.functional.pad(A, (0, 0, 0, rest)), torch.nn.functional.pad(B, (0, rest))
    return [sent(c, layers) for c in hostile]


def inner_product(hostile: Sequence[Client]) -> list[Client]:
    """All send −½ times the mean of their own updates: short, and turned round.

    Source: Xie, Koyejo, Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", UAI
    2019 (arXiv 1903.03936), where ε is between 0 and 1 or large.
    """
    layers: dict[str, rounds.Factors] = {}
    for name in hostile[0].layers:
        A = torch.cat([c.factors[name][0].double() for c in hostile], dim=1)
        B = torch.cat([c.factors[name][1].double() * (-0.5 * c.scales[name] / len(hostile)) for c in hostile], dim=2)
        layers[name] = A, B
    return [sent(c, layers) for c in hostile]


def gauge_games(_: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turned round, in factors (B·M, M⁻¹·A) of condition 2⁴⁰ that say nothing of it by their norms; exact."""
    M = torch.tensor([2.0**20 if i % 2 else 2.0**-20 for i in range(A.shape[1])])
    return A / M[:, None], -B * M


def inflated(hostile: Sequence[Client]) -> list[Client]:
    """Turned round, every column cut into sixteen: sixteen times the rank and the same ΔW, exactly."""
    made = []
    for c in hostile:
        layers = {n: (A.repeat(1, 16, 1), -B.repeat(1, 1, 16) * (c.scales[n] / 16)) for n, (A, B) in c.factors.items()}
        made.append(sent(c, layers))
    return made


def scaled(factor: float) -> Callable[[Sequence[Client]], list[Client]]:
    """Their own updates, ``factor`` times as long."""
    return _each(lambda _, A, B: (A, factor * B))


ATTACKS: dict[str, Callable[[Sequence[Client]], list[Client]]] = {
    "sign flip": _each(lambda _, A, B: (A, -B)),
    "scaling ×100": scaled(100),
    "colluding copies": collude,
    "NaN": _each(lambda _, A, B: (A, torch.full_like(B, torch.nan))),
    "noise ×3": noise,
    "product poisoning": product_poison,
    "little is enough": little_is_enough,
    "inner product": inner_product,
    "gauge games": _each(gauge_games),
    "rank inflation": inflated,
}
