"""Synthetic rounds with known spectra, and how accurate an answer is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.stack import Block, Stack


@dataclass(frozen=True)
class Round:
    """One layer of a synthetic round: the clients' raw factors with their coefficients w·s.

    ``flat``: independent Gaussian factors. ``decay``: clients share a subspace with σ ∝ 1/j, plus 30 % noise
    (trained adapters of one task agree in their leading directions).
    """

    name: str
    m: int
    n: int
    ranks: tuple[int, ...]
    k: int
    spectrum: str = "decay"

    def factors(self, seed: int = 0) -> list[tuple[Tensor, Tensor, float]]:
        """(B (m, r), A (r, n), w·s) of each client, float32, alpha = 16 as in the paper's code."""
        g = torch.Generator().manual_seed(seed)
        top = max(self.ranks)
        shared_b, shared_a = torch.randn(self.m, top, generator=g), torch.randn(top, self.n, generator=g)
        clients = []
        for r in self.ranks:
            B, A = torch.randn(self.m, r, generator=g), torch.randn(r, self.n, generator=g)
            if self.spectrum == "decay":
                B = (shared_b[:, :r] + 0.3 * B) / torch.arange(1, r + 1)
                A = shared_a[:r] + 0.3 * A
            clients.append((B, A, 16 / r / len(self.ranks)))
        return clients


def stack_of(clients: list[tuple[Tensor, Tensor, float]]) -> Stack:
    """The stack of one layer, fresh: nothing packed yet."""
    blocks = [Block(B[None], A[None], torch.full((A.shape[0],), c, dtype=torch.float64)) for B, A, c in clients]
    return Stack(blocks, clients[0][0].shape[0], clients[0][1].shape[1])


def paper_ranks(clients: int = 80, seed: int = 0) -> tuple[int, ...]:
    """Ranks drawn uniformly from 8/30/200, the FlexLoRA paper's types."""
    draw = torch.randint(0, 3, (clients,), generator=torch.Generator().manual_seed(seed))
    return tuple((8, 30, 200)[i] for i in draw.tolist())


class Truth:
    """ΔW and its spectrum in float64."""

    def __init__(self, clients: list[tuple[Tensor, Tensor, float]]) -> None:
        P = torch.cat([B.double() * c for B, _, c in clients], dim=1)
        self.delta = P @ torch.cat([A.double() for _, A, _ in clients])
        self.S = torch.linalg.svdvals(self.delta)

    def excess(self, X: Tensor, k: int) -> float:
        """‖ΔW−X‖_F / ‖ΔW−ΔW_k‖_F − 1."""
        return float(torch.linalg.matrix_norm(self.delta - X.double()) / self.S[k:].square().sum().sqrt()) - 1
