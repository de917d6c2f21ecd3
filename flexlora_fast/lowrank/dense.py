"""Solvers on the dense ΔW: accumulate it once, then iterate on it, or take its full SVD in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.backends import cpu
from flexlora_fast.lowrank.factorization import Factorization, finish
from flexlora_fast.lowrank.krylov import Operator, Triplets, block_krylov, product
from flexlora_fast.stack import Stack


def dense_energy(D: Tensor) -> Tensor:
    """‖D‖_F² (b,), squares and sum in float64 (float32 row norms are biased by 3e-8), by slabs that stay in cache."""
    slabs = [slab.double().square().sum(dim=(1, 2)) for slab in D.split(256, dim=1)]
    return torch.stack(slabs).sum(dim=0)


def dense64(stack: Stack) -> Tensor:
    """ΔW (b, m, n) in float64."""
    return (stack.packed_P(torch.float64) * stack.d.to(stack.device)) @ stack.packed_Q(torch.float64)


def from_triplets(t: Triplets, solver: str, key: int) -> Factorization:
    """Normalise the left vectors of an iterative solve."""
    inverse = torch.where(t.S > 0, 1 / t.S, torch.zeros_like(t.S)).unsqueeze(1)
    U, S, V = finish(t.left * inverse.to(t.left.dtype), t.S, t.V, key)
    error = t.energy_error if bool(t.energy_error.any()) else None
    return Factorization(U, S, V, t.energy, solver, t.steps, t.excess, error)


def solve_dense(stack: Stack, k: int, key: int, tol: float) -> Factorization:
    """Accumulate ΔW in float32 (2·m·n·R flops), then block Krylov on it: the route for R beyond mn/(m+n)."""
    return solve_matrix(cpu.materialize(stack), k, key, tol)


def solve_matrix(D: Tensor, k: int, key: int, tol: float) -> Factorization:
    """Block Krylov on the dense D (b, m, n) float32 itself, however it was accumulated."""
    b, m, n = D.shape
    energy = dense_energy(D)
    op = Operator(m, n, b, lambda X: product(D, X), lambda Y: product(D.mT, Y), energy, torch.float32, D.device)
    return from_triplets(block_krylov(op, k, tol, key), "dense", key)


def solve_svd(stack: Stack, k: int, key: int) -> Factorization:
    """The oracle: ΔW and its full SVD in float64."""
    D = dense64(stack)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return Factorization(*finish(U[:, :, :k], S[:, :k], Vh[:, :k].mT, key), S.square().sum(dim=1), "svd")
