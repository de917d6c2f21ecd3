"""Block Krylov iteration: the leading singular triplets of anything that can be multiplied with a block of vectors.

Source: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate SVD", NeurIPS 2015,
run in the Golub-Kahan order with full re-orthogonalisation, and stopped by an estimate of the excess instead of after
a fixed number of steps. With ``depth=1`` the basis is restarted at every step, which is subspace iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.backends import cpu, reference
from flexlora_fast.backends.small import orthonormalize
from flexlora_fast.lowrank.random import signs


@dataclass(frozen=True)
class Operator:
    """b matrices of m×n known only through products.

    ``apply`` maps (b, n, l) to (b, m, l), ``apply_t`` maps (b, m, l) to (b, n, l), in ``dtype``;
    ``energy`` is ‖·‖_F² of each, (b,) float64, or None: it is then estimated.
    """

    m: int
    n: int
    batch: int
    apply: Callable[[Tensor], Tensor]
    apply_t: Callable[[Tensor], Tensor]
    energy: Tensor | None
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def transposed(self) -> Operator:
        return Operator(self.n, self.m, self.batch, self.apply_t, self.apply, self.energy, self.dtype, self.device)


@dataclass
class Triplets:
    """Leading triplets before canonicalisation: left = ΔW·V (b, m, k), V (b, n, k), S (b, k) float64.

    ``energy`` is the operator's, or its estimate with the standard error ``energy_error``, (b,) float64.
    """

    left: Tensor
    V: Tensor
    S: Tensor
    steps: int
    excess: float
    energy: Tensor
    energy_error: Tensor


# Columns of a block as a share of k. Halves need fewer columns in all than whole ones for the same excess (k = 200,
# σ ∝ 1/j: 400 columns against 612 for 1e-3). A block of l can miss further copies of a singular value repeated more
# than l times, which `Stopping.clustered` notices and a second random block of l (2·l ≥ k) cures.
_BLOCK_SHARE = 0.5
# The block kernels work on 16 columns at a time: others would be computed and thrown away.
STEP = 16
# A run of a block's width of Ritz values this close to each other may be a repeated value.
_CLUSTER_WIDTH = 0.02
# Exponent of the ratio of gains in the estimate of what is missing, see block_krylov.
_CAUTION = 0.6
# Without it 8 of 588 runs (14 spectra, k = 1…150, tol = 1e-2…1e-4) ended up to 1.2 times above tol.
_MARGIN = 1.5
# Share of rounding in a block's columns from which on they no longer continue the Krylov sequence. Where all singular
# values are within 10 % of each other, each step keeps 4 % of a column and grows its rounding 25 times.
_LOST = 0.05
# Without the basis that Krylov keeps, gains shrink fast at first and then hardly at all (a stepped or slowly decaying
# spectrum): no ratio below this is believed. With 0, 4096² at 100 clients of r = 16 stopped at 1.5e-3 for tol = 1e-3.
_RESTARTED_RATIO = 0.8
# Steps that may gain less than the noise, one after the other.
_PATIENCE = 4
# Probes of an estimated energy: two steps of the block kernels.
_PROBES = 32
# Gains below this share of the energy cannot be told from float32 rounding of the products.
_RESOLUTION = {torch.float32: 3e-8, torch.float64: 1e-15}


def block_krylov(op: Operator, k: int, tol: float, key: int, *, depth: int | None = None) -> Triplets:
    """The k leading triplets of ``op`` with an estimated excess of at most ``tol``.

    The estimate: with c_t = Σ_{j≤k} θ_j the energy captured after step t (θ the Ritz values of ΔWᵀΔW) and ρ the ratio
    of the last two gains c_t − c_{t−1}, what is still missing is taken as 1.5·gain·ρ'/(1−ρ') with ρ' = ρ^0.6. The power
    allows for gains that decay more slowly than the last ratio says: on 14 kinds of spectra (decaying, stepped, flat)
    × k = 8…150, ρ^0.6 never accepted an excess above tol = 1e-3, ρ^0.75 did in 4 of 347 steps. The excess is
    √((E − c_t)/(E − c_t − missing)) − 1.
    """
    if op.n > op.m:  # the basis lives on the shorter side: it is what is orthogonalised against
        flipped = block_krylov(op.transposed(), k, tol, key, depth=depth)
        return _flip(flipped)
    limit = op.n
    block = min(limit, block_width(k) if depth is None else _subspace_width(k))
    basis = _powered(op, _start(op, block, key))
    image = op.apply(basis)
    core = _gram64(image, image)
    image64, last_image, restarted, noise = image.double(), image, False, torch.finfo(op.dtype).eps
    energy = _Exact(op.energy) if op.energy is not None else _Probed(op, key - 2)
    energy.see(basis, image)
    stop = Stopping(k, tol, _RESOLUTION[op.dtype], 0.0 if depth is None else _RESTARTED_RATIO)
    steps = 0
    while basis.shape[2] < limit:
        steps += 1
        if depth is not None:
            basis = _powered(op, basis, image)
            image = op.apply(basis)
            core = _gram64(image, image)
            energy.restart()
            energy.see(basis, image)
        else:
            last, share = _extend(basis, op.apply_t(last_image), limit, key + steps)
            noise = noise / share if share else 1.0
            if noise > _LOST:
                # The block has become random: what it gains says nothing about how gains shrink.
                stop.captured.clear()
                noise = torch.finfo(op.dtype).eps
            last_image = op.apply(last)
            energy.see(last, last_image)
            last64 = last_image.double()
            core = _grow(core, image64, last64)
            basis, image = torch.cat([basis, last], dim=2), torch.cat([image, last_image], dim=2)
            image64 = torch.cat([image64, last64], dim=2)
        if basis.shape[2] >= k and stop.reached(core, energy.of(core)):
            if restarted or depth is not None or not stop.clustered(block):
                break
            restarted = True
            last_image = op.apply(_deflate(basis, _random_block(op, block, key - 1)))
    exhausted = basis.shape[2] >= limit
    if exhausted and not bool((torch.linalg.vector_norm(basis, dim=1) > 0.5).all()):
        # Zero columns, left where products vanished, count as searched without having been: take all directions.
        basis = torch.eye(limit, dtype=op.dtype, device=op.device).expand(op.batch, -1, -1)
        image = op.apply(basis)
        core = _gram64(image, image)
    left, V, S = _ritz(basis, image, core, k)
    total = core.diagonal(dim1=-2, dim2=-1).sum(dim=1) if exhausted and op.energy is None else energy.of(core)
    error = torch.zeros_like(total) if exhausted else energy.error
    return Triplets(left, V, S, steps, 0.0 if exhausted else stop.excess, total, error)


class _Exact:
    """An energy that is known."""

    def __init__(self, energy: Tensor) -> None:
        self.energy = energy
        self.error = torch.zeros_like(energy)

    def see(self, block: Tensor, image: Tensor) -> None: ...

    def restart(self) -> None: ...

    def of(self, core: Tensor) -> Tensor:
        """‖ΔW‖_F² (b,)."""
        return self.energy


class _Probed:
    """‖ΔW‖_F² = ‖ΔW·V‖_F² + ‖ΔW·(I − VVᵀ)‖_F²: the part inside the basis V is known, the rest is estimated.

    Each of p random sign vectors z has E‖ΔW·(I − VVᵀ)·z‖² = ‖ΔW·(I − VVᵀ)‖_F² (Hutchinson's estimator on what the
    basis leaves, as in Meyer, Musco, Musco and Woodruff, "Hutch++", SOSA 2021). ΔW·z is computed once; what the basis
    takes out of it is known from the iteration. The standard error is measured from the p values; where the rest
    spreads over ρ directions of like size it is √(2/(p·ρ)) of the rest.
    """

    def __init__(self, op: Operator, key: int) -> None:
        self.probes = signs(op.n, _PROBES, key, batch=op.batch, dtype=op.dtype).to(op.device)
        self.images = op.apply(self.probes)
        self.left = self.images
        self.error = torch.zeros(op.batch, dtype=torch.float64)

    def see(self, block: Tensor, image: Tensor) -> None:
        """Take columns of the basis and their images out of the probes' images."""
        self.left = self.left - product(image, product(block.mT, self.probes))

    def restart(self) -> None:
        """The basis is another one from here on."""
        self.left = self.images

    def of(self, core: Tensor) -> Tensor:
        """‖ΔW‖_F² (b,): the trace of the Ritz core and the mean over the probes; sets ``error``."""
        values = self.left.double().square().sum(dim=1)  # (b, p)
        self.error = values.std(dim=1).cpu() / _PROBES**0.5
        return core.diagonal(dim1=-2, dim2=-1).sum(dim=1) + values.mean(dim=1)


def _start(op: Operator, columns: int, key: int) -> Tensor:
    """Orthonormal addressed random columns (b, n, columns).

    By Householder QR, which gives a full set even where signs are dependent: of 8 columns of 9 signs, two are equal
    up to sign in one layer of ten, and the zero column in their place would count as a direction searched.
    """
    X = signs(op.n, columns, key, batch=op.batch, dtype=torch.float64).to(op.device)
    return torch.linalg.qr(X)[0].to(op.dtype)


def _random_block(op: Operator, width: int, key: int) -> Tensor:
    return signs(op.n, width, key, batch=op.batch, dtype=op.dtype).to(op.device)


def _powered(op: Operator, basis: Tensor, image: Tensor | None = None) -> Tensor:
    """An orthonormal basis of ΔWᵀ·ΔW·basis: one step of subspace iteration.

    Both sides are orthonormalised: ΔWᵀΔW squares the spectrum, and float32 would lose its lower half.
    """
    image = op.apply(basis) if image is None else image
    return orthonormalize(op.apply_t(orthonormalize(image)))


def block_width(k: int) -> int:
    """Columns of a Krylov block."""
    return -(-max(1, int(k * _BLOCK_SHARE)) // STEP) * STEP


def _subspace_width(k: int) -> int:
    """Columns of a restarted basis: oversampling of a fifth, at least 10 (Halko et al. 2011 advise 5 to 10)."""
    return k + max(10, k // 5)


def _gram64(X: Tensor, Y: Tensor) -> Tensor:
    """Xᵀ·Y in float64."""
    return X.double().mT @ Y.double()


def _extend(basis: Tensor, fresh: Tensor, limit: int, key: int) -> tuple[Tensor, float]:
    """Orthonormal columns spanning ``fresh`` outside ``basis``, never more than completes the space.

    Also the smallest share of a column that was left of it: 1/share is what rounding grew by, and 0 means that some
    columns vanished and random ones took their place.
    """
    fresh = fresh[:, :, : limit - basis.shape[2]]
    scale = torch.linalg.vector_norm(fresh, dim=1, keepdim=True)
    fresh = _deflate(basis, fresh / torch.where(scale > 0, scale, torch.ones_like(scale)))
    # Each pivot is the part of a column outside the basis and the columns before it, as a share of its length.
    L, info = torch.linalg.cholesky_ex(_gram64(fresh, fresh))
    pivot = float(L.diagonal(dim1=-2, dim2=-1).amin()) if int(info.max()) == 0 else 0.0
    if pivot < 1000 * torch.finfo(basis.dtype).eps:
        return _replace_dependent(basis, fresh, key)
    # The second pass removes what normalising small remainders blew up ("twice is enough").
    fresh = _deflate(basis, _apply_inverse(fresh, L))
    return _apply_inverse(fresh, torch.linalg.cholesky(_gram64(fresh, fresh))), pivot


def _apply_inverse(X: Tensor, L: Tensor) -> Tensor:
    """X·L⁻ᵀ, solved in float64."""
    return torch.linalg.solve_triangular(L.mT, X.double(), upper=True, left=False).to(X.dtype)


def _replace_dependent(basis: Tensor, fresh: Tensor, key: int) -> tuple[Tensor, float]:
    """The same where directions of ``fresh`` (unit columns less their part in the basis) vanish, to rounding or nearly.

    Normalised, those that vanish to rounding would come out as copies of basis vectors. Addressed random directions
    take their place: an invariant subspace was found, and what it misses (further copies of a repeated singular
    value) can only be found from outside it.
    """
    squares, rotation = reference.eigh_small(_gram64(fresh, fresh))
    gone = squares < (100 * torch.finfo(basis.dtype).eps) ** 2
    root = torch.where(gone, torch.ones_like(squares), squares).rsqrt() * ~gone
    fresh = (fresh.double() @ (rotation * root.unsqueeze(1))).to(fresh.dtype)
    share = 0.0 if bool(gone.any()) else float(squares.amin()) ** 0.5
    if share == 0.0:
        other = signs(basis.shape[1], fresh.shape[2], key, batch=basis.shape[0], dtype=basis.dtype).to(basis.device)
        fresh = torch.where(gone.unsqueeze(1), other / basis.shape[1] ** 0.5, fresh)
    for _ in range(2):
        fresh = orthonormalize(_deflate(basis, fresh))
    return fresh, share


def _deflate(basis: Tensor, X: Tensor) -> Tensor:
    """X less its part in the span of ``basis``."""
    return X - product(basis, product(basis.mT, X))


def product(A: Tensor, B: Tensor) -> Tensor:
    """A·B for A (b, i, j) and B (b, j, l), by the block kernels where they are made for it."""
    if A.dtype != torch.float32 or A.device.type != "cpu":
        return A @ B
    return torch.stack([cpu.matmul(a, b) for a, b in zip(A, B, strict=True)])


def _grow(core: Tensor, image: Tensor, last: Tensor) -> Tensor:
    """The Gram of [image, last] from the Gram of image; all float64."""
    side = image.mT @ last
    top = torch.cat([core, side], dim=2)
    return torch.cat([top, torch.cat([side.mT, last.mT @ last], dim=2)], dim=1)


class Stopping:
    """Decides when the captured energy is close enough to the most that rank k can capture."""

    def __init__(self, k: int, tol: float, resolution: float, slowest: float) -> None:
        self.k, self.tol, self.resolution = k, tol, resolution
        self.slowest = slowest
        self.captured: list[Tensor] = []
        self.values = torch.zeros(0, 0)
        self.excess = float("inf")

    def reached(self, core: Tensor, energy: Tensor) -> bool:
        """Whether the excess that the Ritz core (b, j, j) stands for is within tol of an operator of this energy."""
        energy = energy.cpu()
        self.values = torch.linalg.eigvalsh(core).cpu()[:, -self.k :].clamp_min(0)
        self.captured.append(self.values.sum(dim=1))
        rest = (energy - self.captured[-1]).clamp_min(0)
        if bool((rest <= self.resolution * energy).all()):
            self.excess = 0.0
            return True
        if len(self.captured) < 3:
            return False
        gain, before, excess = estimate(self.captured[-3:], energy, self.resolution, self.slowest)
        noise = self.resolution * energy
        self.excess = float(excess.max())
        # Gains lost in rounding say nothing more: what float32 can resolve has been reached, and more steps go on for
        # ever. The excess then stands as estimated, above tol where the best error is itself near rounding. Two steps
        # that gain a tenth of the noise are enough; above that rounding is mostly common to both (k = 64 of R = 8,000
        # with 7e-6 of the energy beyond: gains of 1e-8 were real, and stopping at them left an excess of 1.4e-3).
        gains = torch.stack(self.captured[-_PATIENCE - 1 :]).diff(dim=0)
        stalled = bool(((gain <= noise / 10) & (before <= noise / 10)).all())
        stalled |= len(gains) == _PATIENCE and bool((gains <= noise).all())
        return self.excess <= self.tol or stalled

    def clustered(self, width: int) -> bool:
        """Whether ``width`` neighbours among the k leading Ritz values are equal to within _CLUSTER_WIDTH."""
        if width >= self.k:
            return False
        low, high = self.values[:, : self.k - width + 1], self.values[:, width - 1 :]
        return bool((high - low <= _CLUSTER_WIDTH * high).any())


def estimate(
    captured: Sequence[Tensor], energy: Tensor, resolution: float, slowest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The last gain, the one before, and the estimated excess, each (b,): see ``block_krylov``.

    Args:
        captured: the energies captured after the last three steps, each (b,).
        energy: ‖ΔW‖_F² (b,). resolution: the share of it that rounding hides.
        slowest: gains are not believed to shrink faster than by this factor.
    """
    gain = (captured[2] - captured[1]).clamp_min(0)
    before = (captured[1] - captured[0]).clamp_min(1e-300)
    root = (gain / before).clamp(slowest, 0.9) ** _CAUTION
    missing = _MARGIN * gain * root / (1 - root)
    rest, noise = (energy - captured[2]).clamp_min(0), resolution * energy
    best = (rest - missing).clamp_min(noise)
    excess = torch.where(rest > noise, (rest / best).clamp_min(1).sqrt() - 1, torch.zeros_like(rest))
    return gain, before, excess


def _ritz(basis: Tensor, image: Tensor, core: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best triplets inside the basis: left = ΔW·V, V orthonormal to rounding in float64, S."""
    _, vectors = reference.eigh_small(core)
    y = vectors[:, :, :k].to(basis.dtype)
    V, left = product(basis, y), product(image, y)
    # V's columns are orthonormal only to float32 rounding of the basis; without this polish the Ritz values carry a
    # relative bias of 1e-7, which is 1e-4 of excess where the best error is 2 % of the norm.
    L, info = torch.linalg.cholesky_ex(_gram64(V, V))
    turn = torch.linalg.inv(L).mT if int(info.max()) == 0 else torch.eye(k, dtype=L.dtype, device=L.device).expand_as(L)
    values, rotation = reference.eigh_small(turn.mT @ _gram64(left, left) @ turn)
    rotation = (turn @ rotation).to(V.dtype)
    return product(left, rotation), product(V, rotation), values.clamp_min(0).sqrt()


def _flip(t: Triplets) -> Triplets:
    """Triplets of the transpose: U becomes V, and ``left`` = V·S."""
    S = t.S.unsqueeze(1)
    inverse = torch.where(S > 0, 1 / S, torch.zeros_like(S)).to(t.left.dtype)
    return Triplets(t.V * S.to(t.V.dtype), t.left * inverse, t.S, t.steps, t.excess, t.energy, t.energy_error)
