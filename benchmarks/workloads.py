"""The single-layer workloads: one layer's clients, with known ranks, spectrum and target rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast.stack import Block, Stack

# (B (m, r), A (r, n), w·s) of each client, float32.
Clients = list[tuple[Tensor, Tensor, float]]


@dataclass(frozen=True)
class Workload:
    """One layer of a synthetic round.

    ``spectrum``: "flat" draws independent Gaussian factors. "decay" lets clients share a subspace with σ ∝ 1/j, plus
    30 % noise (trained adapters of one task agree in their leading directions).
    """

    name: str
    m: int
    n: int
    ranks: tuple[int, ...]
    k: int
    spectrum: str = "decay"
    seed: int = 0

    @property
    def R(self) -> int:
        return sum(self.ranks)

    def clients(self, device: str = "cpu") -> Clients:
        """Every client's factors, from the seed. alpha = 16 as in the FlexLoRA paper's code, equal weights.

        ``device``: where they are drawn and stay; each kind of device has its own numbers of the same distribution.
        """
        g = torch.Generator(device).manual_seed(self.seed)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=g, device=device)

        top = max(self.ranks)
        shared_b, shared_a = normal(self.m, top), normal(top, self.n)
        clients = []
        for r in self.ranks:
            B, A = normal(self.m, r), normal(r, self.n)
            if self.spectrum == "decay":
                B = (shared_b[:, :r] + 0.3 * B) / torch.arange(1, r + 1, device=device)
                A = shared_a[:r] + 0.3 * A
            clients.append((B, A, 16 / r / len(self.ranks)))
        return clients


@dataclass(frozen=True)
class Trained:
    """One layer of a round whose adapters were really trained: the folders that examples/demo.py leaves."""

    name: str
    folders: tuple[str, ...]
    layer: str
    k: int
    m: int
    n: int
    ranks: tuple[int, ...]
    spectrum: str = "trained"

    @property
    def R(self) -> int:
        return sum(self.ranks)

    @classmethod
    def find(cls, folder: Path) -> Trained | None:
        """The last round's clients under ``folder`` (an arm and seed of the demo), widest layer; None without any."""
        rounds = sorted(folder.glob("round-*/clients"))
        if not rounds:
            return None
        folders = tuple(str(path) for path in sorted(rounds[-1].iterdir()))
        adapters = [ff.Adapter.load(path) for path in folders]
        first = adapters[0]
        layer = max(first.layers, key=lambda name: (first.spec(name).m * first.spec(name).n, name))
        ranks = tuple(adapter.rank(layer) for adapter in adapters)
        spec = first.spec(layer)
        return cls("trained", folders, layer, max(ranks), spec.m, spec.n, ranks)

    def clients(self) -> Clients:
        adapters = [ff.Adapter.load(path) for path in self.folders]
        clients = []
        for adapter in adapters:
            A, B = adapter.factors(self.layer)
            clients.append((B[0].float(), A[0].float(), adapter.scale(self.layer) / len(adapters)))
        return clients


AnyWorkload = Workload | Trained


def stack_of(clients: Clients) -> Stack:
    """The stack of one layer, fresh: nothing packed yet."""
    blocks = [Block(B[None], A[None], torch.full((A.shape[0],), c, dtype=torch.float64)) for B, A, c in clients]
    return Stack(blocks, clients[0][0].shape[0], clients[0][1].shape[1])


def paper_ranks(clients: int = 80, seed: int = 0) -> tuple[int, ...]:
    """Ranks drawn uniformly from 8/30/200, the FlexLoRA paper's client types."""
    draw = torch.randint(0, 3, (clients,), generator=torch.Generator().manual_seed(seed))
    return tuple((8, 30, 200)[i] for i in draw.tolist())


SILO_RANKS = (4, 4, 8, 8, 16, 16, 32, 32, 64, 64)
FULL = (
    Workload("silo", 4096, 4096, SILO_RANKS, 64),
    Workload("device", 4096, 4096, (16,) * 100, 64),
    Workload("flat", 4096, 4096, (16,) * 100, 64, "flat"),
    Workload("paper", 2048, 2048, paper_ranks(), 200),
    Workload("wide", 4096, 11008, (8,) * 1000, 64),
)
# The same regimes at sizes that take seconds: to see the suite run, and to test it.
QUICK = (
    Workload("silo", 256, 256, (2, 4, 8), 8),
    Workload("paper", 128, 128, (4, 8, 40) * 4, 20, "flat"),
)

# The axes along which time is plotted: the points, and the workload at each.
_BASE = Workload("sweep", 2048, 2048, (16,) * 30, 32)


def sweep(axis: str, point: int, quick: bool) -> Workload:
    """The sweep's workload at one point of an axis: "clients", "rank" (of every client) or "width" (of the layer)."""
    side = _BASE.m // 8 if quick else _BASE.m
    k = 8 if quick else _BASE.k
    if axis == "clients":
        return replace(_BASE, m=side, n=side, k=k, ranks=(8,) * point)
    if axis == "rank":
        return replace(_BASE, m=side, n=side, k=k, ranks=(point,) * 30)
    return replace(_BASE, m=point, n=point, k=k)


SWEEPS = {
    False: {"clients": (10, 30, 100, 300, 1000), "rank": (2, 8, 32, 128), "width": (512, 1024, 2048, 4096)},
    True: {"clients": (4, 16), "rank": (2, 8), "width": (64, 256)},
}
