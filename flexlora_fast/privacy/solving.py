"""A layer of a private round: the clients' clipped sum, noised, and its leading triplets.

Noise has full rank, so nothing is left of the factors' small space: the noised matrix is either formed ("dense"), or
made again, tile by tile, at each multiplication ("factored", "subspace"). Both multiply by the same float32 numbers,
all noised before anything else is done with them, so that every solver is post-processing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from flexlora_fast import memory
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.dense import from_triplets, solve_matrix
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.krylov import Operator, block_krylov, product
from flexlora_fast.methods import Contribution
from flexlora_fast.privacy.mechanism import Release

# Bytes for the rows of a tile, and what each entry takes of them: the sum, noise, the tile before, a product's copy,
# and as much again that lies idle between allocations.
TILE, _ENTRY = 32 * 1024**2, 64


def tile_rows(n: int) -> int:
    """Rows of a matrix of n columns that fit a tile, at least one."""
    return max(1, TILE // (_ENTRY * n))


def scratch(m: int, n: int, batch: int, widest: int) -> int:
    """Peak bytes of making tiles, beside the factors as they were read, the noised matrix and what its solver needs.

    ``widest``: the largest rank of one client.
    """
    return _ENTRY * min(m, tile_rows(n)) * n + batch * 16 * n * (memory.PIECE_COLUMNS + widest)


def sum_bytes(m: int, n: int, batch: int, widest: int) -> int:
    """What it takes beside that to sum up whole matrices in float64, for clients that come in pieces."""
    return batch * (8 * m * n + 16 * m * (memory.PIECE_COLUMNS + widest))


def noised_matrix(
    release: Release,
    spec: LayerSpec,
    pieces: Iterable[Sequence[Contribution]],
    device: torch.device,
    *,
    folded: bool = False,
) -> Tensor:
    """The noised matrix (E, m, n) float32 of one layer, from its clients; ``folded``: they come in several pieces."""
    D = torch.empty(spec.experts, spec.m, spec.n, dtype=torch.float32, device=device)
    if not folded:
        for e, rows, W in Tiles(release, spec, [c for piece in pieces for c in piece], device):
            D[e, rows] = W
        return D
    total = torch.zeros(D.shape, dtype=torch.float64, device=device)
    for contributions in pieces:
        for P, Q in _columns(contributions):
            total.baddbmm_(P, Q)
    for e, rows in _tiles(spec):
        D[e, rows] = release.released(_name(spec, e), total[e, rows], rows.start * spec.n)
    return D


class Tiles:
    """The noised matrix, of which only some rows exist at a time."""

    def __init__(
        self, release: Release, spec: LayerSpec, contributions: Sequence[Contribution], device: torch.device
    ) -> None:
        self._release, self._spec, self._contributions, self._device = release, spec, contributions, device

    def __iter__(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Expert, rows, and these rows, (rows, n) float32: one after another, the same in every pass."""
        spec = self._spec
        for e, rows in _tiles(spec):
            total = torch.zeros(rows.stop - rows.start, spec.n, dtype=torch.float64, device=self._device)
            for P, Q in _columns(self._contributions, e, rows):
                total.addmm_(P[0], Q[0])
            yield e, rows, self._release.released(_name(spec, e), total, rows.start * spec.n)

    def apply(self, X: Tensor) -> Tensor:
        """The matrix times X (E, n, l): (E, m, l)."""
        out = X.new_empty(X.shape[0], self._spec.m, X.shape[2])
        for e, rows, W in self:
            out[e, rows] = product(W[None], X[e : e + 1])[0]
        return out

    def apply_t(self, Y: Tensor) -> Tensor:
        """Its transpose times Y (E, m, l): (E, n, l), summed up in float64."""
        out = torch.zeros(Y.shape[0], self._spec.n, Y.shape[2], dtype=torch.float64, device=Y.device)
        for e, rows, W in self:
            out[e] += product(W.mT[None], Y[e : e + 1, rows])[0]
        return out.to(Y.dtype)

    def energy(self) -> Tensor:
        """‖·‖_F² (E,) float64."""
        total = torch.zeros(self._spec.experts, dtype=torch.float64, device=self._device)
        for e, _, W in self:
            total[e] += W.double().square().sum()
        return total

    def solve(self, k: int, key: int, tol: float, solver: str) -> Factorization:
        """The k leading triplets, by block Krylov ("factored") or subspace iteration ("subspace")."""
        of = self._spec
        energy = self.energy()
        op = Operator(of.m, of.n, of.experts, self.apply, self.apply_t, energy, torch.float32, self._device)
        return from_triplets(block_krylov(op, k, tol, key, depth=1 if solver == "subspace" else None), solver, key)


def solve_noised(
    release: Release,
    spec: LayerSpec,
    pieces: Iterable[Sequence[Contribution]],
    k: int,
    *,
    key: int,
    tol: float,
    solver: str,
    folded: bool,
    device: torch.device,
) -> Factorization:
    """The k leading triplets of one layer's noised sum, with the certificate of that.

    Args:
        pieces: the clients' contributions, with clipped scales. folded: whether they are several, for "dense" alone.
        key: of the test matrices, which are public.
        solver: "dense", "factored" or "subspace".
    """
    if solver == "dense":
        return solve_matrix(noised_matrix(release, spec, pieces, device, folded=folded), k, key, tol)
    contributions = [c for piece in pieces for c in piece]
    return Tiles(release, spec, contributions, device).solve(k, key, tol, solver)


def _name(spec: LayerSpec, expert: int) -> str:
    return f"layer/{expert}/{spec.name}"


def _tiles(spec: LayerSpec) -> Iterator[tuple[int, slice]]:
    step = tile_rows(spec.n)
    for e in range(spec.experts):
        for lo in range(0, spec.m, step):
            yield e, slice(lo, min(lo + step, spec.m))


def _columns(
    contributions: Sequence[Contribution], expert: int | None = None, rows: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """P·diag(w·s) (E, m, c) and Q (E, c, n) in float64, of some clients at a time; of one ``expert`` (1, …)."""
    part = slice(None) if expert is None else slice(expert, expert + 1)
    group, width = list[Contribution](), 0
    for i, c in enumerate(contributions):
        group.append(c)
        width += c.rank
        if width >= memory.PIECE_COLUMNS or i == len(contributions) - 1:
            yield _packed(group, width, part, rows)
            group, width = [], 0


def _packed(group: Sequence[Contribution], width: int, part: slice, rows: slice) -> tuple[Tensor, Tensor]:
    """Side by side, without another copy of any."""
    B, A = group[0].B[part, rows], group[0].A[part]
    P = B.new_empty(B.shape[0], B.shape[1], width, dtype=torch.float64)
    Q = A.new_empty(A.shape[0], width, A.shape[2], dtype=torch.float64)
    lo = 0
    for c in group:
        hi = lo + c.rank
        P[:, :, lo:hi] = c.B[part, rows]
        P[:, :, lo:hi] *= c.weight * c.scale
        Q[:, lo:hi] = c.A[part]
        lo = hi
    return P, Q
