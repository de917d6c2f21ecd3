"""The result of a solve: leading singular triplets, with what is needed to certify them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.backends import reference
from flexlora_fast.lowrank.random import signs


@dataclass(frozen=True)
class Factorization:
    """ΔW ≈ U·diag(S)·Vᵀ for each of b matrices, with orthonormal columns and S descending.

    Attributes:
        U: (b, m, k) float32.
        S: (b, k) float64.
        V: (b, n, k) float32.
        energy: (b,) float64, ‖ΔW‖_F² of the whole matrix, not only of what was kept.
        solver: which solver made it.
        iterations: block steps taken (0 for the solvers that are exact in one go).
        excess: the estimated excess at rank k; 0 where the solver is exact.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    energy: Tensor
    solver: str
    iterations: int = 0
    excess: float = 0.0


# Below this share of the largest singular value a direction cannot be told from float32 rounding of the factors.
_NEGLIGIBLE = 1e-9


def finish(U: Tensor, S: Tensor, V: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical float32 vectors: signs fixed, and directions of no energy replaced by orthonormal ones.

    The sign rule is the contract's: the entry of largest magnitude in each column of U is positive (first one on a
    tie). Where S is zero to rounding the vectors that a solver leaves are noise, or zero; they are completed to an
    orthonormal set by addressed random vectors, so that an adapter made from them can still learn (a LoRA pair with
    zeros in both factors has no gradient).
    """
    top = S.amax(dim=-1, keepdim=True) if S.shape[-1] else S
    valid = S.gt(_NEGLIGIBLE * top)
    S = torch.where(valid, S, torch.zeros_like(S))
    U, V = U.to(torch.float32), V.to(torch.float32)
    if S.numel() and not bool(valid.all()):
        U = torch.stack([complete(u[:, ok], u.shape[1], key) for u, ok in zip(U, valid, strict=True)])
        V = torch.stack([complete(v[:, ok], v.shape[1], key + 1) for v, ok in zip(V, valid, strict=True)])
    if S.numel():
        largest = U.abs().argmax(dim=1, keepdim=True)  # (b, 1, k)
        sign = torch.where(U.gather(1, largest) < 0, -1.0, 1.0)
        U, V = U * sign, V * sign
    return U.contiguous(), S.contiguous(), V.contiguous()


def complete(X: Tensor, count: int, key: int) -> Tensor:
    """X (m, j) with orthonormal columns, extended by addressed random columns to (m, count).

    The new columns are orthonormal and orthogonal to X while count ≤ m; beyond m they are unit columns.
    """
    m, have = X.shape
    if have >= count:
        return X
    fresh = signs(m, count - have, key).to(X)[0] / m**0.5
    room = max(0, min(count, m) - have)
    basis = fresh[:, :room]
    for _ in range(2):  # twice is enough (Giraud, Langou, Rozložník 2005)
        basis = basis - X @ (X.T @ basis)
        basis = reference.orthonormalize(basis.unsqueeze(0))[0] if room else basis
    return torch.cat([X, basis, fresh[:, room:]], dim=1)
