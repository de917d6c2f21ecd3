"""Block Krylov in R dimensions: the factors are read for two Grams, and once more for the last word.

ΔW = P̂·diag(c)·Q̂ with unit columns in P̂ and unit rows in Q̂. With G = P̂ᵀP̂ and M = diag(c)·Q̂Q̂ᵀ·diag(c), both R×R, the
left singular vectors of ΔW are P̂·x for the eigenvectors x of M·G, which is self-adjoint in the inner product xᵀGy, and
‖ΔW‖_F² = ⟨M, G⟩. A step costs 4·R² flops a column where one on the factors costs 4·(m+n)·R. Float32 Grams cost digits
only in the subspace: the triplets come from ΔW itself (a Rayleigh-Ritz step with the factors), and the energy they
hold is compared with what the Grams promised.

Source of the iteration: Musco and Musco, NeurIPS 2015, as in krylov.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.backends import cpu, reference
from flexlora_fast.lowrank.factorization import Factorization, finish
from flexlora_fast.lowrank.krylov import STEP, Stopping, block_width
from flexlora_fast.lowrank.plan import direct
from flexlora_fast.lowrank.random import signs
from flexlora_fast.stack import Block, Stack

# Directions whose part outside the basis is below this share of them are rounding.
_DEPENDENT = 1e-4
# Share of rounding in a block from which on it no longer continues the Krylov sequence, see krylov.py.
_LOST = 0.05
_EPS = torch.finfo(torch.float32).eps


class Unresolved(Exception):
    """Float32 Grams did not find a subspace as good as they promised: the factors are too nearly dependent.

    ``share``: the energy that was promised and not found, as a share of all of it.
    """

    def __init__(self, promised: float, found: float, energy: float) -> None:
        super().__init__(f"Grams promised an energy of {promised:.9g}, the factors hold {found:.9g}")
        self.share = (promised - found) / energy


@dataclass
class Subspace:
    """Coordinates X (R, l) of a basis P̂·X of left vectors, the energy of its best k, and how it was found."""

    X: Tensor
    captured: float
    steps: int
    excess: float


def solve_krylov(stack: Stack, k: int, key: int, tol: float) -> Factorization:
    """The k leading triplets of each matrix of the stack, to an excess of ``tol``.

    Raises ``Unresolved`` where float32 Grams are too coarse for this stack.
    """
    singles = [stack] if stack.batch == 1 else [_matrix(stack, i) for i in range(stack.batch)]
    results = [_solve(single, k, key + i, tol) for i, single in enumerate(singles)]
    return Factorization(
        torch.cat([r.U for r in results]),
        torch.cat([r.S for r in results]),
        torch.cat([r.V for r in results]),
        torch.cat([r.energy for r in results]),
        "krylov",
        max(r.iterations for r in results),
        max(r.excess for r in results),
    )


def _matrix(stack: Stack, i: int) -> Stack:
    blocks = [Block(block.B[i : i + 1], block.A[i : i + 1], block.d) for block in stack.blocks]
    return Stack(blocks, stack.m, stack.n)


def _solve(stack: Stack, k: int, key: int, tol: float) -> Factorization:
    known = stack.grams() if stack.grams else None
    G, M, p = scaled_grams(*(known or cpu.gram(stack)), stack.d.to(stack.device))
    energy = _inner(G, M)
    if energy == 0:
        found = Subspace(G.new_zeros(stack.R, k), 0.0, 0, 0.0)
    elif direct(stack.R, k):
        found = _direct(G, M, k)
    else:
        found = _iterate(G, M, energy, k, key, tol)
    U, S, V = _last_pass(stack, found.X / p.unsqueeze(1), k)
    captured = float(S.square().sum())
    rest = energy - captured
    shortfall = max(0.0, found.captured - captured)
    if shortfall > max(tol * rest, 1e-7 * energy):
        raise Unresolved(found.captured, captured, energy)
    excess = found.excess + (0.5 * shortfall / rest if rest > 1e-7 * energy else 0.0)
    triplets = finish(U[None], S[None], V[None], key)
    total = torch.tensor([max(energy, captured)], dtype=torch.float64)
    return Factorization(*triplets, total, "krylov", found.steps, excess)


def scaled_grams(left: Tensor, right: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G and M (R, R) float32, and the column norms p (R,) taken out of P, from PᵀP and QQᵀ (1, R, R), overwritten.

    Unit diagonals take a badly balanced pair (1e6·B, 1e-6·A) out of the Grams; columns of zeros keep a norm of 1.
    """
    G, M = left[0], right[0]
    p, q = (X.diagonal().double().sqrt() for X in (G, M))
    c = (d * p * q).float()
    p, q = (torch.where(x > 0, x, torch.ones_like(x)).float() for x in (p, q))
    G.div_(p.unsqueeze(1)).div_(p)
    M.mul_((c / q).unsqueeze(1)).mul_(c / q)
    return G, M, p


def _inner(G: Tensor, M: Tensor) -> float:
    """⟨G, M⟩ in float64, by slabs that stay in cache."""
    slabs = zip(G.split(64), M.split(64), strict=True)
    return float(sum(torch.dot(g.double().flatten(), m.double().flatten()) for g, m in slabs))


def _direct(G: Tensor, M: Tensor, k: int) -> Subspace:
    """All of M·G's eigenvectors, float64: with G = L·Lᵀ they are L⁻ᵀ·y for those of Lᵀ·M·L."""
    R = G.shape[0]
    unit, ridge = torch.eye(R, dtype=torch.float64, device=G.device), R * _EPS
    L, info = torch.linalg.cholesky_ex(G.double())
    # A pivot below rounding of the Gram is noise, and would be divided by.
    while int(info) or float(L.diagonal().min()) < (R * _EPS) ** 0.5 / 2:
        L, info = torch.linalg.cholesky_ex(G.double() + ridge * unit)
        ridge *= 10
    values, vectors = reference.eigh_small(L.mT @ (M.double() @ L))
    X = torch.linalg.solve_triangular(L.mT, vectors[:, :k], upper=True)
    return Subspace(X.float(), float(values[:k].clamp_min(0).sum()), 0, 0.0)


def _width(k: int, limit: int) -> int:
    """Columns taken through the last pass: k and a few that rounding may have put on the wrong side of the cut."""
    return min(limit, -(-(k + 4) // STEP) * STEP)


class _Basis:
    """A G-orthonormal basis X, its images H = G·X and N = M·H, and the Ritz core Hᵀ·M·H in float64."""

    def __init__(self, G: Tensor, M: Tensor) -> None:
        self.G, self.M = G, M
        R = G.shape[0]
        self.X = self.H = G.new_empty(R, 0)
        self.core = torch.empty(0, 0, dtype=torch.float64, device=G.device)

    @property
    def size(self) -> int:
        return self.X.shape[1]

    def extend(self, fresh: Tensor) -> tuple[Tensor | None, float]:
        """Take the part of ``fresh`` (R, w) outside the basis into it.

        Returns M·G·(that part), the next block of the Krylov sequence (None if nothing was left), and the smallest
        share of a column that was left.
        """
        along = self.H.double().mT @ fresh.double()  # (dim, w)
        fresh = fresh - self.X @ along.float()
        image = cpu.matmul(self.G, fresh)
        gram = fresh.double().mT @ image.double()
        before = (along.square().sum(dim=0) + gram.diagonal().clamp_min(0)).sqrt()
        turn, share = _whitening(gram, before)
        if turn.shape[1] == 0:
            return None, 0.0
        X, H = fresh @ turn.float(), image @ turn.float()
        # Once more: normalising small remainders blew up what rounding had left ("twice is enough").
        again = (self.H.double().mT @ X.double()).float()
        X, H = X - self.X @ again, H - self.H @ again
        turn, _ = _whitening(X.double().mT @ H.double(), X.new_ones(X.shape[1], dtype=torch.float64))
        X, H = X @ turn.float(), H @ turn.float()
        self.X, self.H = torch.cat([self.X, X], dim=1), torch.cat([self.H, H], dim=1)
        following = cpu.matmul(self.M, H)
        side = self.H.double().mT @ following.double()  # (dim, w)
        old = self.core.shape[0]
        core = side.new_empty(self.size, self.size)
        core[:old, :old], core[:, old:], core[old:, :old] = self.core, side, side[:old].mT
        core[old:, old:] = (side[old:] + side[old:].mT) / 2
        self.core = core
        return following, share


def _whitening(gram: Tensor, before: Tensor) -> tuple[Tensor, float]:
    """T with Tᵀ·gram·T = I, without the directions that vanish beside ``before``; and the smallest share left."""
    if gram.numel() == 0:
        return gram, 0.0
    before = torch.where(before > 0, before, torch.ones_like(before))
    unit = (gram + gram.mT) / (2 * before.unsqueeze(1) * before)
    L, info = torch.linalg.cholesky_ex(unit)
    share = float(L.diagonal().min()) if int(info) == 0 else 0.0
    if share > _DEPENDENT:
        return torch.linalg.inv(L).mT / before.unsqueeze(1), share
    values, vectors = torch.linalg.eigh(unit)
    keep = values > _DEPENDENT**2
    share = float(values[keep].min()) ** 0.5 if bool(keep.all()) else 0.0
    return vectors[:, keep] * values[keep].rsqrt() / before.unsqueeze(1), share


def _iterate(G: Tensor, M: Tensor, energy: float, k: int, key: int, tol: float) -> Subspace:
    """Block Krylov on M·G in the inner product of G, stopped as krylov.block_krylov is."""
    R = G.shape[0]
    block = block_width(k) + STEP  # leading directions converge first, and their columns drop out of later blocks
    basis, noise, restarted, steps = _Basis(G, M), _EPS, False, 0
    stop = Stopping(k, tol, 3e-8, 0.0)
    total = torch.tensor([energy], dtype=torch.float64)

    def random(offset: int) -> Tensor:
        """M·G·(random block), orthonormalised half-way: at once, M·G would square σ₁/σ_k beyond float32."""
        right = cpu.matmul(G, signs(R, block, key + offset)[0].to(G))
        image = cpu.matmul(M, right)
        gram = right.double().mT @ image.double()
        turn, _ = _whitening(gram, gram.diagonal().clamp_min(0).sqrt())
        return image @ turn.float()

    following: Tensor | None = random(0)
    while basis.size < R:
        steps += 1
        following, share = basis.extend(following[:, : R - basis.size])  # type: ignore[index]
        if following is not None:
            noise = noise / share if share else 1.0
            if noise > _LOST:
                stop.captured.clear()
                noise = _EPS
            done = basis.size >= k and stop.reached(basis.core.unsqueeze(0), total)
        if following is None or done:
            # Nothing is left to find but further copies of repeated singular values, from outside the subspace.
            if restarted or not (following is None or stop.clustered(block)):
                break
            restarted, following = True, random(-1)
    values, vectors = reference.eigh_small(basis.core)
    X = basis.X @ vectors[:, : _width(k, basis.size)].float()
    complete = basis.size >= R or following is None
    return Subspace(X, float(values[:k].clamp_min(0).sum()), steps, 0.0 if complete else stop.excess)


def _last_pass(stack: Stack, X: Tensor, k: int) -> tuple[Tensor, ...]:
    """Rayleigh-Ritz with ΔW itself on the span of P·X: U (m, k), S (k,) float64, V (n, k), S descending."""
    image = cpu.combine(stack, X.unsqueeze(0))[0]
    gram = _gram64(image)
    U = cpu.matmul(image, _whitening(gram, gram.diagonal().sqrt())[0].float())
    W = cpu.project_t(stack, U.unsqueeze(0))[0]
    # U is orthonormal to float32 rounding only, which would bias the Ritz values by 1e-7, 1e-4 of excess where the
    # best error is 2 % of the norm: the generalised eigenproblem takes that out.
    turn, _ = _whitening(_gram64(U), U.new_ones(U.shape[1], dtype=torch.float64))
    values, rotation = reference.eigh_small(turn.mT @ _gram64(W) @ turn)
    S = values[:k].clamp_min(0).sqrt()
    rotation = turn @ rotation[:, :k]
    inverse = torch.where(1e-7 * S[:1] < S, 1 / S, torch.zeros_like(S))
    parts = cpu.matmul(U, rotation.float()), S, cpu.matmul(W, (rotation * inverse).float())
    # Where the subspace has fewer dimensions than k, zeros stand for the vectors that `finish` completes.
    return tuple(torch.nn.functional.pad(part, (0, k - S.shape[0])) for part in parts)


def _gram64(X: Tensor) -> Tensor:
    X = X.double()
    return X.mT @ X
