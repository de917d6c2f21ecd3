"""Dense linear algebra on many small matrices at once, in float64, without a look at any value.

These are the small problems of a round over groups of layers (``lowrank.filtered``): Grams of panels of l = k + 16
columns, their Cholesky factors and eigenproblems. What goes wrong with one matrix comes back as a flag or as NaN in its
own results, and never as an exception or in another's.

Each function is the twin, in torch, of the CUDA kernels behind the function of its name in ``cuda``, which it hands
over to on a GPU that has them (``launcher.usable``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexlora_fast.backends import cuda, launcher, reference
from flexlora_fast.backends.eigen import eigh

# Unit columns whose part outside the columns before them is smaller have lost it to float32 rounding of the products.
SHARE = 3e-3
# What is added to the unit diagonal of a Gram matrix that has no Cholesky factor of such shares. Rounding of float32
# products leaves eigenvalues of -1e-6 at most.
SHIFT = 1e-5
# Columns up to which the kernels of one thread block a matrix are tested.
_WIDEST = 256
# Column norms of the factors between which float32 Grams neither overflow nor vanish.
RANGE = (1e-12, 1e12)


def gram64(X: Tensor, Y: Tensor, entries: int = 1 << 27) -> Tensor:
    """Xᵀ·Y (L, w, v) in float64 for X (L, m, w) and Y (L, m, v) float32.

    So many ``entries`` at a time: copies in float64 are twice as large.
    """
    if launcher.usable(X.device):
        return cuda.gram64(X, Y)
    layers = max(1, entries // max(1, X.shape[1] * X.shape[2]))
    pairs = zip(X.split(layers), Y.split(layers), strict=True)
    return torch.cat([x.double().mT @ y.double() for x, y in pairs])


def orthonormalize(Y: Tensor) -> Tensor:
    """``reference.orthonormalize``: an orthonormal basis of the columns of Y (L, m, l), zeros for those that vanish."""
    if Y.dtype == torch.float32 and _has_kernels(Y):
        return cuda.orthonormalize(Y if Y.stride(2) == 1 else Y.contiguous())
    return reference.orthonormalize(Y)


def whiten(gram: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """T (L, w, w), upper triangular, with Tᵀ·gram·T = I; and where it is only nearly so, (L,) bool.

    Those are Gram matrices too near to a singular one for the shares of their columns to be more than rounding, which
    get a multiple of the diagonal added; and matrices that are not finite, for which T only scales.
    """
    if _has_kernels(gram):
        return cuda.whiten(gram, dtype)
    unit, norms, finite = _unit(gram)
    L, info = torch.linalg.cholesky_ex(unit)
    shifted = (info != 0) | ~(L.diagonal(dim1=1, dim2=2).amin(dim=1) > SHARE) | ~finite
    # Computed for all layers: which ones need it is not known here.
    other, failed = torch.linalg.cholesky_ex(unit + SHIFT * _eye(unit))
    chosen = torch.where(shifted.view(-1, 1, 1), other, L)
    return _inverse(chosen, torch.where(shifted, failed, info), norms).to(dtype), shifted


def condition(gram: Tensor) -> Tensor:
    """T (L, w, w) float32: X·T has far from dependent columns for X of this Gram matrix, and spans what X does.

    A pass of shifted Cholesky QR (Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, SIAM J. Sci. Comput. 42, 2020):
    it lifts what float32 can still see of the small directions by 1/√shift.
    """
    if _has_kernels(gram):
        return cuda.condition(gram)
    unit, norms, _ = _unit(gram)
    L, info = torch.linalg.cholesky_ex(unit + SHIFT * _eye(unit))
    return _inverse(L, info, norms).float()


def ritz(gram: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz on X·span, from gram = XᵀGX and core = XᵀGCGX, both (L, w, w) float64.

    Returns the Ritz values (L, w) float64, at least 0, descending, NaN where they are not finite; the rotation
    (L, w, w) float32 such that the columns of X·rotation are the Ritz vectors; and where ``whiten`` had to shift, (L,)
    bool.
    """
    if _has_kernels(gram):
        return cuda.ritz(gram, core)
    turn, values, vectors, shifted = _rotated(gram, core)
    return values, (turn @ vectors).float(), shifted


def singular(gram: Tensor, core: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k leading singular triplets of a matrix on the span of X, from gram = XᵀX and core the Gram matrix of its
    image W of X, both (L, w, w) float64.

    Returns S (L, k) float64, descending; rotations (L, w, k) float32 that take X to the one side's vectors, and W to
    the other's, with zeros where S ≤ 1e-7 of the largest; and where ``whiten`` had to shift, (L,) bool.
    """
    if _has_kernels(gram):
        return cuda.singular(gram, core, k)
    turn, values, vectors, shifted = _rotated(gram, core)
    S, rotation = values[:, :k].sqrt(), turn @ vectors[:, :, :k]
    inverse = torch.where(1e-7 * S[:, :1] < S, 1 / S.clamp_min(1e-300), torch.zeros_like(S)).unsqueeze(1)
    return S, rotation.float(), (rotation * inverse).float(), shifted


def _rotated(gram: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T of ``whiten``, eigenvalues and vectors of Tᵀ·core·T, and where T was shifted."""
    turn, shifted = whiten(gram)
    small = turn.mT @ core @ turn
    finite = small.isfinite().all(dim=2).all(dim=1)
    values, vectors = eigh(_symmetric(torch.where(finite.view(-1, 1, 1), small, torch.zeros_like(small))))
    values = torch.where(finite.unsqueeze(1), values.clamp_min(0), torch.full_like(values, math.nan))
    return turn, values, vectors, shifted


def chebyshev(
    product: Tensor, now: Tensor, before: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, *, out: Tensor
) -> Tensor:
    """out = a·product + b·now + c·before for (L, W, w) float32 and coefficients (L, w) float32 of each column.

    Without ``before`` and ``c`` the last term is left out. out: where to, which may be one of the others.
    """
    if launcher.usable(product.device):
        return cuda.chebyshev(product, now, before, a, b, c, out=out)
    total = a.unsqueeze(1) * product + b.unsqueeze(1) * now
    if before is not None and c is not None:
        total += c.unsqueeze(1) * before
    return out.copy_(total)


def scale_grams(G: Tensor, M: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PᵀP and QQᵀ (L, W, W) float32 become G with unit diagonal, and M = diag(c)·Q̂Q̂ᵀ·diag(c) as in core.py, in place.

    Returns the column norms (L, W) float32 taken out of P, 1 for columns of zeros and those behind a layer's own;
    where norms leave the range that float32 Grams can hold, (L,) bool; and ⟨M, G⟩ = ‖ΔW‖_F² (L,) float64.
    """
    if launcher.usable(G.device):
        return cuda.scale_grams(G, M, d)
    norms = [X.diagonal(dim1=1, dim2=2).double().sqrt() for X in (G, M)]
    c = d * norms[0] * norms[1]
    low, high = RANGE
    bad = [~((x == 0) | ((x > low) & (x < high))).all(dim=1) for x in (*norms, c.abs())]
    p, q = (torch.where(x > 0, x, torch.ones_like(x)).float() for x in norms)
    G.div_(p.unsqueeze(2)).div_(p.unsqueeze(1))
    row = (c / q).float()
    M.mul_(row.unsqueeze(2)).mul_(row.unsqueeze(1))
    return p, torch.stack(bad).any(dim=0), _inner(G, M)


def _has_kernels(matrices: Tensor) -> bool:
    return matrices.shape[-1] <= _WIDEST and launcher.usable(matrices.device)


def _inner(G: Tensor, M: Tensor, layers: int = 16) -> Tensor:
    """⟨G, M⟩ of each layer (L,), summed in float64; some layers at a time, for the memory of the products."""
    pairs = zip(G.split(layers), M.split(layers), strict=True)
    return torch.cat([torch.sum(g * m, dim=(1, 2), dtype=torch.float64) for g, m in pairs])


def _unit(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The symmetric part of Gram matrices with unit diagonal, the scaling of columns that made it so (L, w), and where
    they are finite (L,): the identity stands for those that are not.
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    # Of columns that vanish, float32 products can leave a square that is not even positive: they stay out.
    norms = torch.where(squares > 1e-60, squares.clamp_min(1e-60).rsqrt(), torch.zeros_like(squares))
    unit = _symmetric(gram) * norms.unsqueeze(1) * norms.unsqueeze(2)
    finite = unit.isfinite().all(dim=2).all(dim=1)
    return torch.where(finite.view(-1, 1, 1), unit, _eye(unit)), norms, finite


def _inverse(L: Tensor, info: Tensor, norms: Tensor) -> Tensor:
    """diag(norms)·L⁻ᵀ of Cholesky factors, as ``cholesky_ex`` gives them; with L = I where there is none."""
    L = torch.where((info != 0).view(-1, 1, 1), _eye(L), L)
    inverse = torch.linalg.solve_triangular(L, _eye(L).expand_as(L), upper=False)
    return inverse.mT * norms.unsqueeze(2)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def _symmetric(C: Tensor) -> Tensor:
    return (C + C.mT) / 2
