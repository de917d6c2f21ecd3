"""What the best rank-k approximation leaves, in float64, and by how much an answer exceeds it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads import Clients


class Residual:
    """‖ΔW − BA‖_F² of any answer, in float64, from the factors: no m×n matrix is formed.

    Computed where the clients' factors are.
    """

    def __init__(self, clients: Clients) -> None:
        self.P = torch.cat([B.double() * c for B, _, c in clients], dim=1)  # (m, R)
        self.Q = torch.cat([A.double() for _, A, _ in clients])  # (R, n)
        slabs = self.P.split(1024)
        self.energy = float(sum(torch.linalg.vector_norm(slab @ self.Q).square() for slab in slabs))

    def of(self, B: Tensor, A: Tensor) -> float:
        B, A = B.to(self.P), A.to(self.P)
        inner = float(((self.P.mT @ B) * (self.Q @ A.mT)).sum())
        own = float(((B.mT @ B) * (A @ A.mT)).sum())
        return max(self.energy - 2 * inner + own, 0.0)


class Truth(Residual):
    """ΔW's energy and spectrum in float64, without a full SVD with vectors.

    Only ‖ΔW‖_F² and the k leading σ² are needed. Where R is below the layer's short side they come from the R×R core
    of two QR factorisations, else from the eigenvalues of the smaller Gram of ΔW.
    """

    def __init__(self, clients: Clients) -> None:
        self.P = torch.cat([B.double() * c for B, _, c in clients], dim=1)  # (m, R)
        self.Q = torch.cat([A.double() for _, A, _ in clients])  # (R, n)
        if self.P.shape[1] < min(self.P.shape[0], self.Q.shape[1]):
            core = torch.linalg.qr(self.P, mode="r")[1] @ torch.linalg.qr(self.Q.mT, mode="r")[1].mT
            self.squares = self._squares(core)
        else:
            delta = self.P @ self.Q
            delta = delta if delta.shape[0] <= delta.shape[1] else delta.mT
            self.squares = self._squares_of_gram(delta)
        self.energy = float(self.squares.sum())

    def _squares(self, core: Tensor) -> Tensor:
        """σ², descending. On a GPU from the Gram: its SVD takes seconds for what is lost below 1e-13 of the energy."""
        return self._squares_of_gram(core) if core.is_cuda else torch.linalg.svdvals(core).square()

    def _squares_of_gram(self, X: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(X @ X.mT).flip(0).clamp_min(0)

    def tail(self, k: int) -> float:
        """‖ΔW − ΔW_k‖_F²."""
        return float(self.squares[k:].sum())

    def excess(self, B: Tensor, A: Tensor, k: int) -> float:
        """‖ΔW − BA‖_F / ‖ΔW − ΔW_k‖_F − 1.

        Where nothing is left out (k at least ΔW's rank) it is ‖ΔW − BA‖_F / ‖ΔW‖_F, the relative error.
        """
        error = self.of(B, A)
        best = self.tail(k)
        if best <= 1e-14 * self.energy:
            return (error / self.energy) ** 0.5
        return (error / best) ** 0.5 - 1
