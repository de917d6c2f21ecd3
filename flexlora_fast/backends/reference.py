"""The primitive ops in plain torch: complete, readable, and the twin every fast op is tested against.

Each op takes a :class:`~flexlora_fast.stack.Stack` of b same-shape matrices ΔW = P·diag(d)·Q. Accumulation
is float32 at least; coefficients are applied to float32 intermediates, never folded into 16-bit factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.stack import Block, Stack

# Rows of a Gram matrix computed per product: large enough for full GEMM speed, small enough that skipping the lower
# triangle saves nearly half (measured on 2 cores, R = 1600: 512 gives 0.58 of the full product's time, 256 0.61).
_GRAM_TILE = 512
# Columns gathered per product when ΔW is accumulated.
_GROUP_COLUMNS = 512


def gram_of(X: Tensor) -> Tensor:
    """Xᵀ·X for X (b, m, R) -> (b, R, R) in X's dtype, computing one triangle and mirroring it."""
    R = X.shape[2]
    if R <= 2 * _GRAM_TILE:
        return X.mT @ X
    G = X.new_empty(X.shape[0], R, R)
    for lo in range(0, R, _GRAM_TILE):
        hi = min(lo + _GRAM_TILE, R)
        G[:, lo:hi, lo:] = X[:, :, lo:hi].mT @ X[:, :, lo:]
        G[:, hi:, lo:hi] = G[:, lo:hi, hi:].mT
    return G


def gram(stack: Stack) -> tuple[Tensor, Tensor]:
    """The two Grams PᵀP and QQᵀ, each (b, R, R) float32."""
    return gram_of(stack.P), gram_of(stack.Q.mT)


def project(stack: Stack, X: Tensor) -> Tensor:
    """ΔW·X = P·(d ∘ (Q·X)) for X (b, n, l) float32 -> (b, m, l) float32."""
    return stack.P @ ((stack.Q @ X) * stack.d.to(X).unsqueeze(1))


def project_t(stack: Stack, Y: Tensor) -> Tensor:
    """ΔWᵀ·Y = Qᵀ·(d ∘ (Pᵀ·Y)) for Y (b, m, l) float32 -> (b, n, l) float32."""
    return stack.Q.mT @ ((stack.P.mT @ Y) * stack.d.to(Y).unsqueeze(1))


def materialize(stack: Stack, out: Tensor | None = None) -> Tensor:
    """The dense ΔW (b, m, n) float32, or ``out`` with it added, by groups of clients: no packed copy of all factors.

    A group holds enough columns for full GEMM speed; adding clients of rank 8 one at a time would read and write all
    of ΔW for each (100 clients of r = 16 at 4096²: 0.36 s in groups, 1.3 s one by one, 2 cores).
    """
    if out is None:
        out = torch.zeros(stack.batch, stack.m, stack.n, dtype=torch.float32, device=stack.device)
    group: list[Block] = []
    for i, block in enumerate(stack.blocks):
        group.append(block)
        if sum(b.d.numel() for b in group) >= _GROUP_COLUMNS or i == len(stack.blocks) - 1:
            B = torch.cat([b.B.float() * b.d.to(out) for b in group], dim=2)
            A = torch.cat([b.A.float() for b in group], dim=1)
            out.baddbmm_(B, A)
            group = []
    return out


def orthonormalize(Y: Tensor) -> Tensor:
    """An orthonormal basis of the columns of Y (b, m, l), by Cholesky QR twice with float64 Grams.

    Float64 Grams keep the method stable up to a condition number of about 1e8, beyond what float32 columns can
    express (Yamamoto et al., ETNA 44, 2015). Directions that vanish to rounding (below 1e-6 of the unit columns) come
    out as zero columns, which Rayleigh-Ritz ignores, rather than as noise or NaN.
    """
    scale = torch.linalg.vector_norm(Y, dim=1, keepdim=True)
    # Normalising first keeps tiny columns apart from dependent ones; 0/0 cannot occur.
    Y = Y / torch.where(scale > 0, scale, torch.ones_like(scale))
    for _ in range(2):
        Y64 = Y.double()
        G = Y64.mT @ Y64
        L, info = torch.linalg.cholesky_ex(G)
        pivot = L.diagonal(dim1=-2, dim2=-1).amin()
        if int(info.max()) == 0 and float(pivot) > 1e-6:
            Y = torch.linalg.solve_triangular(L.mT, Y64, upper=True, left=False).to(Y.dtype)
        else:
            Y = (Y64 @ _inverse_root(G)).to(Y.dtype)
    return Y


def _inverse_root(G: Tensor) -> Tensor:
    """E·Λ^(-1/2) of the symmetric G (b, l, l), with zero columns where Λ is rounding noise."""
    values, vectors = torch.linalg.eigh(G)
    keep = values > 1e-12 * values.amax(dim=-1, keepdim=True).clamp_min(1e-300)
    root = torch.where(keep, values, torch.ones_like(values)).rsqrt() * keep
    return vectors * root.unsqueeze(-2)


def eigh_small(C: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (b, l), largest first, and eigenvectors (b, l, l) of the symmetric float64 C (b, l, l).

    LAPACK's divide and conquer can fail to converge on many equal eigenvalues; a diagonal perturbation of the size of
    its own rounding error separates them.
    """
    try:
        values, vectors = torch.linalg.eigh(C)
    except torch.linalg.LinAlgError:
        spread = torch.linspace(-1, 1, C.shape[-1], dtype=C.dtype, device=C.device)
        values, vectors = torch.linalg.eigh(C + torch.diag(spread) * (C.abs().amax() * C.shape[-1] * 2.0**-52))
    return values.flip(-1), vectors.flip(-1)
