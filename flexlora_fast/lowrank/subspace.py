"""Randomized subspace iteration on the factors: ΔW is only ever multiplied, never formed.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm 4.4, iterated
until the estimated excess is below ``tol``. Memory is one block of vectors beside the factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.backends import reference
from flexlora_fast.lowrank.dense import from_triplets
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.krylov import Operator, block_krylov
from flexlora_fast.stack import Stack


def factor_energy(stack: Stack) -> Tensor:
    """‖ΔW‖_F² = Σ_ij d_i·d_j·(PᵀP)_ij·(QQᵀ)_ij, (b,) float64, tile by tile: (m+n)·R² flops, no R×R matrix kept."""
    P, Q, d = stack.P, stack.Q, stack.d.to(stack.device)
    tile = reference._GRAM_TILE
    total = torch.zeros(stack.batch, dtype=torch.float64, device=stack.device)
    for lo in range(0, stack.R, tile):
        hi = min(lo + tile, stack.R)
        for start, stop, twice in (
            (lo, hi, 1.0),
            (hi, stack.R, 2.0),
        ):  # the diagonal tile, then all beyond it
            if start == stop:
                continue
            left = P[:, :, lo:hi].mT @ P[:, :, start:stop]
            right = Q[:, lo:hi] @ Q[:, start:stop].mT
            products = left.double().mul_(right)
            total += twice * torch.einsum("bij,i,j->b", products, d[lo:hi], d[start:stop])
    return total.clamp_min_(0)


def solve_subspace(stack: Stack, k: int, key: int, tol: float, *, depth: int | None = 1) -> Factorization:
    """Subspace iteration (``depth=1``), or block Krylov (``depth=None``), on P·diag(d)·Q itself."""
    energy = factor_energy(stack)
    op = Operator(
        stack.m,
        stack.n,
        stack.batch,
        lambda X: reference.project(stack, X),
        lambda Y: reference.project_t(stack, Y),
        energy,
        torch.float32,
        stack.device,
    )
    t = block_krylov(op, k, tol, key, depth=depth)
    return from_triplets(t, energy, "subspace" if depth else "factored", key)
