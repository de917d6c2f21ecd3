"""Randomized subspace iteration on the factors: ΔW is only ever multiplied, never formed.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm 4.4, iterated
until the estimated excess is below ``tol``. Memory is one block of vectors beside the factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.backends import cpu
from flexlora_fast.lowrank.dense import from_triplets
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.krylov import Operator, block_krylov
from flexlora_fast.stack import Block, Stack

# Columns of a tile of the Grams: enough for full speed, few enough that the diagonal tiles' lower halves cost little.
_TILE = 512


def factor_energy(stack: Stack) -> Tensor:
    """‖ΔW‖_F² = Σ_ij d_i·d_j·(PᵀP)_ij·(QQᵀ)_ij, (b,) float64, tile by tile: (m+n)·R² flops, no R×R matrix kept."""
    total = torch.zeros(stack.batch, dtype=torch.float64, device=stack.device)
    groups = _groups(stack.blocks)
    for i, group in enumerate(groups):
        d = torch.cat([block.d for block in group]).to(stack.device)
        for beyond, twice in ((group, 1.0), ([block for later in groups[i + 1 :] for block in later], 2.0)):
            if not beyond:
                continue
            left, right = cpu.cross_gram(group, beyond)  # (b, r, r')
            products = left.double().mul_(right)
            other = torch.cat([block.d for block in beyond]).to(stack.device)
            total += twice * torch.einsum("bij,i,j->b", products, d, other)
    return total.clamp_min_(0)


def _groups(blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks in runs of about _TILE columns."""
    groups: list[list[Block]] = []
    columns = _TILE
    for block in blocks:
        if columns >= _TILE:
            groups.append([])
            columns = 0
        groups[-1].append(block)
        columns += block.d.numel()
    return groups


def solve_subspace(
    stack: Stack, k: int, key: int, tol: float, *, depth: int | None = 1, certificate: str = "exact"
) -> Factorization:
    """Subspace iteration (``depth=1``), or block Krylov (``depth=None``), on P·diag(d)·Q itself.

    ``certificate="estimate"`` leaves out the (m+n)·R² flops of ‖ΔW‖_F², which are most of the work where R is large.
    """
    energy = factor_energy(stack) if certificate == "exact" else None
    op = Operator(
        stack.m,
        stack.n,
        stack.batch,
        lambda X: cpu.project(stack, X),
        lambda Y: cpu.project_t(stack, Y),
        energy,
        torch.float32,
        stack.device,
    )
    t = block_krylov(op, k, tol, key, depth=depth)
    return from_triplets(t, "subspace" if depth else "factored", key)
