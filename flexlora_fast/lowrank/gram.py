"""The exact solver: both Grams of the factors, then everything in R×R float64.

With P = U_P·L₁ᵀ and Q = L₂·U_Qᵀ (Cholesky factors L₁L₁ᵀ = PᵀP, L₂L₂ᵀ = QQᵀ), ΔW = U_P·C·U_Qᵀ with the R×R core
C = L₁ᵀ·diag(c)·L₂, so C has ΔW's singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.backends import reference
from flexlora_fast.lowrank.dense import dense64
from flexlora_fast.lowrank.factorization import Factorization, finish
from flexlora_fast.stack import Stack


@dataclass(frozen=True)
class Core:
    """C (b, R, R) float64 with the maps back: U = P·p⁻¹·L₁⁻ᵀ·U_C, V = Qᵀ·q⁻¹·L₂⁻ᵀ·V_C."""

    C: Tensor
    P: Tensor  # (b, m, R) float64
    Q: Tensor  # (b, R, n) float64
    p: Tensor  # (b, R) norms of P's columns
    q: Tensor  # (b, R) norms of Q's rows
    L1: Tensor  # (b, R, R) lower triangular
    L2: Tensor

    @property
    def energy(self) -> Tensor:
        """‖ΔW‖_F² (b,): the Frobenius norm is unchanged by the orthonormal factors around C."""
        return self.C.square().sum(dim=(1, 2))

    def expand(self, Uc: Tensor, Vc: Tensor) -> tuple[Tensor, Tensor]:
        """Core vectors (b, R, k) back to the layer: U (b, m, k), V (b, n, k), float64."""
        Tu = torch.linalg.solve_triangular(self.L1.mT, Uc, upper=True) / _nonzero(self.p).unsqueeze(2)
        Tv = torch.linalg.solve_triangular(self.L2.mT, Vc, upper=True) / _nonzero(self.q).unsqueeze(2)
        return self.P @ Tu, self.Q.mT @ Tv


def core_of(stack: Stack) -> Core:
    """The core of a stack. Grams are float64: squaring float32 ones costs 5e-5 of excess at k = 64 and more beyond.

    They are scaled to a unit diagonal, which takes a badly balanced pair (1e6·B, 1e-6·A) out of the Cholesky factors;
    the norms p and q go into the coefficients c = d·p·q.
    """
    P, Q = stack.packed_P(torch.float64), stack.packed_Q(torch.float64)
    G1, p = _unit_diagonal(reference.gram_of(P))
    G2, q = _unit_diagonal(reference.gram_of(Q.mT))
    L1, L2 = _cholesky(G1), _cholesky(G2)
    c = stack.d.to(stack.device) * p * q
    return Core(L1.mT @ (c.unsqueeze(2) * L2), P, Q, p, q, L1, L2)


def _unit_diagonal(G: Tensor) -> tuple[Tensor, Tensor]:
    """G (b, R, R) scaled to a unit diagonal (rows of zeros stay), and the norms (b, R) that were taken out."""
    norms = G.diagonal(dim1=-2, dim2=-1).sqrt()
    divisor = _nonzero(norms)
    return G / (divisor.unsqueeze(1) * divisor.unsqueeze(2)), norms


def _nonzero(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def _cholesky(G: Tensor) -> Tensor:
    """Lower Cholesky factor of a unit-diagonal Gram, regularised only where it is singular to rounding.

    Adding εI is the exact factorisation of factors with √ε·I appended as extra rows, so σ² moves by at most ε times
    the energy of the coefficients: with ε = R·2⁻⁵², far below float32 rounding of the inputs.
    """
    L, info = torch.linalg.cholesky_ex(G)
    R = G.shape[-1]
    ridge = R * 2.0**-52
    while int(info.max() if info.numel() else 0) or (R and float(L.diagonal(dim1=-2, dim2=-1).amin()) < ridge**0.5):
        L, info = torch.linalg.cholesky_ex(G + ridge * torch.eye(R, dtype=G.dtype, device=G.device))
        if int(info.max()) == 0:
            break
        ridge *= 10
    return L


def solve_gram(stack: Stack, k: int, key: int) -> Factorization:
    """Exact, from the R×R core or, where R exceeds the layer's shorter side, from the dense ΔW in float64."""
    if min(stack.m, stack.n) <= stack.R:
        return _solve_side(stack, k, key)
    core = core_of(stack)
    values, Vc = reference.eigh_small(core.C.mT @ core.C)
    S = values[:, :k].clamp_min(0).sqrt()
    Vc = Vc[:, :, :k]
    U, V = core.expand(core.C @ Vc * _safe_inverse(S), Vc)
    return Factorization(*finish(U, S, V, key), core.energy, "gram")


def _solve_side(stack: Stack, k: int, key: int) -> Factorization:
    """Exact through the smaller of ΔWᵀΔW and ΔWΔWᵀ, float64."""
    D = dense64(stack)
    tall = stack.m >= stack.n
    values, vectors = reference.eigh_small(D.mT @ D if tall else D @ D.mT)
    S = values[:, :k].clamp_min(0).sqrt()
    near = vectors[:, :, :k]
    far = (D if tall else D.mT) @ near * _safe_inverse(S)
    U, V = (far, near) if tall else (near, far)
    return Factorization(*finish(U, S, V, key), D.square().sum(dim=(1, 2)), "gram")


def _safe_inverse(S: Tensor) -> Tensor:
    """1/S as (b, 1, k), zero where S is zero to rounding of its square (σ ≲ 1e-8·σ₁ is noise here)."""
    floor = 1e-8 * S.amax(dim=-1, keepdim=True)
    return torch.where(floor < S, 1 / S, torch.zeros_like(S)).unsqueeze(1)
