"""The eigenproblem whose leading vectors are the left singular vectors of ΔW, for many layers of one shape at once.

What ``filtered`` iterates on: an operator C that is self-adjoint in the inner product xᵀGy, given by the two halves of
its product, x ↦ G·x (``image``) and G·x ↦ C·x (``apply``), and what its eigenvectors stand for (``left``).
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flexlora_fast.backends import small
from flexlora_fast.backends.group import Group


class Core(Protocol):
    """The operators of L layers, of one size.

    Attributes:
        solver: the name of results. size: entries of a vector.
        energy: ‖ΔW‖_F² (L,) float64, the sum of all eigenvalues. out_of_range: (L,) bool, where float32 may not hold
            what comes up.
    """

    solver: ClassVar[str]
    size: int
    energy: Tensor
    out_of_range: Tensor

    def image(self, X: Tensor) -> Tensor:
        """G·X for X (L, size, l)."""
        ...

    def apply(self, H: Tensor) -> Tensor:
        """C·X for the image H = G·X."""
        ...

    def left(self, X: Tensor) -> Tensor:
        """The left vectors (L, m, l) that X stands for."""
        ...

    def project_t(self, Y: Tensor) -> Tensor:
        """ΔWᵀ·Y (L, n, l) for Y (L, m, l)."""
        ...


class Grams:
    """In R dimensions, as core.py does and with its notation: C = M·G, with unit diagonal in G (L, W, W) float32.

    Products stay float32: entries of the Grams rounded to bfloat16 (2⁻⁹) hide every σ below σ₁/20.
    """

    solver: ClassVar[str] = "filtered"

    def __init__(self, group: Group) -> None:
        self.group = group
        self.G, self.M = group.gram()
        self.size = self.G.shape[1]
        self._norms, self.out_of_range, self.energy = small.scale_grams(self.G, self.M, group.d)

    def image(self, X: Tensor) -> Tensor:
        return self.G @ X

    def apply(self, H: Tensor) -> Tensor:
        return self.M @ H

    def left(self, X: Tensor) -> Tensor:
        return self.group.combine(X / self._norms.unsqueeze(2))

    def project_t(self, Y: Tensor) -> Tensor:
        return self.group.project_t(Y)


class Dense:
    """On ΔW itself, for R beyond mn/(m+n): D·Dᵀ for D (L, m, n) float32 of m ≤ n, otherwise DᵀD; G is the identity."""

    solver: ClassVar[str] = "dense"

    def __init__(self, D: Tensor) -> None:
        self.D = D
        m, n = D.shape[1:]
        self.size = min(m, n)
        # Squares and sum in float64 (float32 row norms are biased by 3e-8), a slab at a time for their memory.
        squares = [slab.double().square().sum(dim=(1, 2)) for slab in D.split(256, dim=1)]
        self.energy = torch.stack(squares).sum(dim=0) if squares else D.new_zeros(D.shape[0], dtype=torch.float64)
        low, high = small.RANGE
        self.out_of_range = ~((self.energy > low**2) & (self.energy < high**2))
        self._outer, self._inner = (D, D.mT) if m <= n else (D.mT, D)

    def image(self, X: Tensor) -> Tensor:
        return X

    def apply(self, H: Tensor) -> Tensor:
        return self._outer @ (self._inner @ H)

    def left(self, X: Tensor) -> Tensor:
        return X if self._outer is self.D else self.D @ X

    def project_t(self, Y: Tensor) -> Tensor:
        return self.D.mT @ Y
