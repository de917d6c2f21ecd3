"""The result of a solve: leading singular triplets, with what is needed to certify them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        energy_error: (b,) float64, the standard error of ``energy`` where it was estimated; None where it was computed.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    energy: Tensor
    solver: str
    iterations: int = 0
    excess: float = 0.0
    energy_error: Tensor | None = None


# Below this share of the largest singular value a direction cannot be told from float32 rounding of the factors.
_NEGLIGIBLE = 1e-9
# Vectors further than this from orthonormal are made so again; float32 rounding alone stays below it.
_SKEW = 2e-6


def finish(U: Tensor, S: Tensor, V: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical float32 vectors: orthonormal, signs fixed, and directions of no energy replaced by random ones.

    The sign rule is the contract's: the entry of largest magnitude in each column of U is positive (first one on a
    tie). Where S is zero to rounding the vectors that a solver leaves are noise, or zero; they are completed to an
    orthonormal set by addressed random vectors, so that an adapter made from them can still learn (a LoRA pair with
    zeros in both factors has no gradient).
    """
    U, V = U.to(torch.float32), V.to(torch.float32)
    if S.numel():
        valid = S.gt(_NEGLIGIBLE * S.amax(dim=-1, keepdim=True))
        for X in (U, V):  # a solver that found no vector for a tiny singular value leaves zeros
            valid &= torch.linalg.vector_norm(X, dim=1).gt(0.5)
        valid = valid.cumprod(dim=1).bool()
        S = torch.where(valid, S, torch.zeros_like(S))
        U, V = _orthonormal(U, valid, key), _orthonormal(V, valid, key + 1)
        largest = U.abs().argmax(dim=1, keepdim=True)  # (b, 1, k)
        sign = torch.where(U.gather(1, largest) < 0, -1.0, 1.0).to(U)
        U, V = U * sign, V * sign
    return U.contiguous(), S.contiguous(), V.contiguous()


def _orthonormal(X: Tensor, valid: Tensor, key: int) -> Tensor:
    """X (b, m, k) with random columns behind its valid ones, and orthonormal from the left.

    Vectors of small singular values come out of a solver with the rounding of the large ones in them: at σ = 1e-7·σ₁,
    float32 products leave more noise than vector. QR takes that out and leaves the leading columns as they are.
    """
    if not bool(valid.all()):
        X = torch.stack([complete(x[:, ok], x.shape[1], key) for x, ok in zip(X, valid, strict=True)])
    skew = X.mT @ X
    skew.diagonal(dim1=-2, dim2=-1).sub_(1)
    if float(skew.abs().amax()) <= _SKEW:
        return X
    Q, R = torch.linalg.qr(X.double())
    return (Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q).unsqueeze(1)).to(X.dtype)


def complete(X: Tensor, count: int, key: int) -> Tensor:
    """X (m, j) with orthonormal columns, extended by addressed random columns to (m, count).

    The new columns are orthonormal and orthogonal to X while count ≤ m; beyond m they are unit columns.
    Householder QR gives a full set even where the random signs are dependent, as they often are for small m.
    """
    m, have = X.shape
    if have >= count:
        return X
    fresh = signs(m, count - have, key).to(X)[0] / m**0.5
    room = max(0, min(count, m) - have)
    Q = torch.linalg.qr(torch.cat([X, fresh[:, :room]], dim=1).double())[0]
    return torch.cat([X, Q[:, have : have + room].to(X.dtype), fresh[:, room:]], dim=1)
