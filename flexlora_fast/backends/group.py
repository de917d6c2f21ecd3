"""The primitive ops over a group of layers of one shape at once, and their twin in plain torch.

Layer λ of a group is ΔW_λ = P_λ·diag(d_λ)·Q_λ, m×n, with R_λ columns. Where ranks differ, everything is as wide as the
widest layer (W), with zero columns behind a layer's own.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flexlora_fast.backends.reference import gram_of
from flexlora_fast.backends.transfer import moved
from flexlora_fast.stack import Stack


class Group(Protocol):
    """L layers of one shape (m, n), W columns at most.

    ``d`` is (L, W) float64 on ``device``. Products are float32, and the coefficients are applied to float32
    intermediates.
    """

    layers: int
    m: int
    n: int
    W: int
    d: Tensor
    device: torch.device

    def gram(self) -> tuple[Tensor, Tensor]:
        """PᵀP and QQᵀ, each (L, W, W), the caller's to keep."""
        ...

    def project_t(self, Y: Tensor) -> Tensor:
        """ΔWᵀ·Y for Y (L, m, l) -> (L, n, l)."""
        ...

    def combine(self, Z: Tensor) -> Tensor:
        """P·Z for Z (L, W, l) -> (L, m, l)."""
        ...

    def materialize(self, out: Tensor | None = None) -> Tensor:
        """ΔW (L, m, n) float32, or ``out`` with it added."""
        ...

    def signature(self) -> Hashable:
        """Equal for groups that differ in ``inputs`` alone: the same kernels run with the same other arguments."""
        ...

    def inputs(self) -> list[Tensor]:
        """The device tensors that the kernels read, ``d`` among them."""
        ...

    def copied(self) -> Group:
        """The same with copies of ``inputs``, for others to be put there; it keeps no factors alive."""
        ...


class Packed:
    """A group as packed float32 copies of its factors, multiplied by torch: complete, readable, on any device."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.layers = sum(stack.batch for stack in stacks)
        self.m, self.n = stacks[0].m, stacks[0].n
        self.W = max(stack.R for stack in stacks)
        self.device = next((stack.device for stack in stacks if stack.blocks), torch.device("cpu"))
        self.d = coefficients(stacks, self.W, self.device)
        self._P = torch.cat([_widened(stack.P, 2, self.W) for stack in stacks]).to(self.device)  # (L, m, W)
        self._Q = torch.cat([_widened(stack.Q, 1, self.W) for stack in stacks]).to(self.device)  # (L, W, n)

    def gram(self) -> tuple[Tensor, Tensor]:
        return gram_of(self._P), gram_of(self._Q.mT)

    def project_t(self, Y: Tensor) -> Tensor:
        return self._Q.mT @ ((self._P.mT @ Y) * self.d.unsqueeze(2).to(Y))

    def combine(self, Z: Tensor) -> Tensor:
        return self._P @ Z

    def materialize(self, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self._P.new_zeros(self.layers, self.m, self.n)
        return out.baddbmm_(self._P * self.d.unsqueeze(1).to(self._P), self._Q)

    def signature(self) -> Hashable:
        return "packed", self.layers, self.m, self.n, self.W, self.device

    def inputs(self) -> list[Tensor]:
        return [self._P, self._Q, self.d]

    def copied(self) -> Packed:
        other = copy.copy(self)
        other._P, other._Q, other.d = (X.clone() for X in self.inputs())
        return other


def coefficients(stacks: Sequence[Stack], width: int, device: torch.device) -> Tensor:
    """d of every layer of the group, (L, width) float64, zeros behind a layer's own columns."""
    rows = [torch.nn.functional.pad(stack.d, (0, width - stack.R)) for stack in stacks for _ in range(stack.batch)]
    return moved(torch.stack(rows), device)


def _widened(X: Tensor, dim: int, width: int) -> Tensor:
    """X with zeros behind it along ``dim``, up to ``width``."""
    missing = width - X.shape[dim]
    return torch.nn.functional.pad(X, (0, missing) if dim == 2 else (0, 0, 0, missing))
