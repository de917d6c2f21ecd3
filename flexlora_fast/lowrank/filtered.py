"""Chebyshev-filtered subspace iteration for many layers of one shape at once, without waiting for the device.

Source: Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace
iteration", J. Comput. Phys. 219 (2006). Between two Rayleigh-Ritz steps the subspace goes through a polynomial that
is at most 1 where the unwanted part of the spectrum lies, and grows fastest beyond it. Block Krylov (krylov.py) needs
fewer products, but a basis of 4 to 6 blocks whose eigenproblem has to be solved whole; here all small problems have
k + 16 columns, which is what a GPU can do for hundreds of layers at a time.

It iterates on a ``cores.Core``: in R dimensions on two Grams, or on ΔW itself.

Nothing here depends on a value: layers take the same steps, and what went wrong with one is read at the end from
its numbers. Such layers are solved again, by more steps or by the solvers that look (``solve``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.backends import small
from flexlora_fast.backends.group import Group
from flexlora_fast.lowrank.cores import Core, Dense, Grams
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.krylov import estimate
from flexlora_fast.lowrank.plan import degrees
from flexlora_fast.lowrank.random import signs_of
from flexlora_fast.lowrank.replayed import replays

# Columns beyond k: with 16 a filter of degree 3 shrinks the excess of a flat spectrum 8 times, with 32 15 times.
OVERSAMPLING = 16
# Products before the first Rayleigh-Ritz step: they find the large directions of a steep spectrum.
_POWERS = 2
# Ritz vectors of this many times another's value are taken out of it as it goes through the filter: in the 1e12-fold
# growth of the first, float32 rounding of the second would drown it.
_APART = 8.0
# Gains are not believed to shrink faster than by this factor from one step to the next.
_SLOWEST = 0.15
_RESOLUTION = 3e-8
_TINY = 1e-300
# Filters added to the usual ones: a layer that these have not brought to ``tol`` gets the next number, and no more.
MORE = (0, 3)


@dataclass(frozen=True)
class Found:
    """Triplets of L layers on the device, and what tells whether they are good; nothing of it has been looked at.

    Attributes:
        U (L, m, k), V (L, n, k) float32, orthonormal, signs canonical. S (L, k) float64, descending.
        report: (L, 7) float64: energy, captured at the last three Rayleigh-Ritz steps, captured by S, whether
            the numbers left their range or a Cholesky factor of these steps had to be shifted, largest skew of U and V.
        products: multiplications by the operator. solver: the name of results.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    report: Tensor
    products: int
    solver: str


def takes(R: int, m: int, n: int, k: int) -> bool:
    """Whether a layer has the columns for it: k and more on the way, and a part of the spectrum beyond."""
    return min(R, m, n) >= k + 2 * OVERSAMPLING


def leading_triplets(core: Core, k: int, start: Tensor, schedule: Sequence[int]) -> Found:
    """The k leading triplets of every layer, by filters of the degrees in ``schedule`` (two at least).

    Args:
        start: (L, size, w) float32, random.
    """
    width = start.shape[2]
    X = _conditioned(start, core.image(start))
    for _ in range(_POWERS):
        X = core.apply(core.image(X))
        X = _conditioned(X, core.image(X))
    captured, shifts = [], [core.out_of_range]
    for degree in (*schedule, 0):
        ritz = _rayleigh_ritz(core, X)
        captured.append(ritz.values[:, :k].sum(dim=1))
        shifts.append(ritz.shifted)
        X = _filtered(core, ritz, degree) if degree else ritz.X
    # A few columns more than k, which rounding may have put on the wrong side of the cut.
    U, S, V, shifted = _last_pass(core, core.left(X[:, :, : min(width, k + 8)]), k)
    poor = torch.stack([shifts[0], *shifts[-3:], shifted]).any(dim=0)
    skew = torch.maximum(_skew(U), _skew(V))
    report = torch.stack([core.energy, *captured[-3:], S.square().sum(dim=1), poor.double(), skew], dim=1)
    return Found(*_signed(U, V, S), report, _POWERS + sum(schedule) + 1, core.solver)


def launch(operand: Group | Tensor, addresses: Sequence[tuple[int, int]], k: int, tol: float, more: int = 0) -> Found:
    """Have the device begin with the k leading triplets of layers that it ``takes``.

    Args:
        operand: the layers as a group, solved on its Grams; or their dense ΔW (L, m, n) float32.
        addresses: of each layer's random start, as ``random.signs_of`` takes them.
        more: filters beyond those that ``tol`` usually takes.
    """
    schedule = degrees(tol, more)
    size = min(operand.shape[1:]) if isinstance(operand, Tensor) else operand.W
    start = signs_of(addresses, size, min(size, k + OVERSAMPLING), device=operand.device)
    if isinstance(operand, Tensor):
        return leading_triplets(Dense(operand), k, start, schedule)

    def compute(group: Group, start: Tensor) -> Found:
        return leading_triplets(Grams(group), k, start, schedule)

    if operand.device.type != "cuda":
        return compute(operand, start)
    return replays.found(operand, start, compute, (k, schedule))


def collected(found: Found, batches: Sequence[int], tol: float) -> list[Factorization | None]:
    """The results of a launch, which this waits for; None for those whose numbers do not prove them good.

    Args:
        batches: how many neighbours of the group each result is for (a layer's experts, or 1).
    """
    # The one place that waits for the device: both in one copy.
    numbers = torch.cat([found.report, found.S], dim=1).cpu()
    report, S = numbers[:, : found.report.shape[1]], numbers[:, found.report.shape[1] :]
    excess, good = judged(report, tol)
    results, at = list[Factorization | None](), 0
    for batch in batches:
        part = slice(at, at + batch)
        at += batch
        results.append(_result(found, report, S, excess, part) if bool(good[part].all()) else None)
    return results


def _result(found: Found, report: Tensor, S: Tensor, excess: Tensor, part: slice) -> Factorization:
    energy = torch.maximum(report[part, 0], S[part].square().sum(dim=1))
    return Factorization(
        found.U[part], S[part].clone(), found.V[part], energy, found.solver, found.products, float(excess[part].max())
    )


def judged(report: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """The estimated excess of each layer (L,), and which layers are good: from ``Found.report`` on the CPU.

    Good are those whose excess is at most ``tol``, whose factors hold what the Grams promised, and whose vectors are
    orthonormal. NaN is never good, nor is a layer with so little energy beyond k that float32 products cannot tell an
    excess of ``tol``.
    """
    energy, captured, held, poor, skew = report[:, 0], report[:, 1:4], report[:, 4], report[:, 5], report[:, 6]
    _, _, excess = estimate(captured.unbind(dim=1), energy, _RESOLUTION, _SLOWEST)
    rest = (energy - held).clamp_min(0)
    shortfall = (captured[:, 2] - held).clamp_min(0)
    excess = excess + torch.where(rest > 1e-7 * energy, 0.5 * shortfall / rest.clamp_min(_TINY), torch.zeros_like(rest))
    fits = (shortfall <= torch.maximum(tol * rest, 1e-7 * energy)) & (2 * tol * rest >= _RESOLUTION * energy)
    return excess, fits & (excess <= tol) & (poor == 0) & (skew <= 1e-5) & (energy > 0) & report.isfinite().all(dim=1)


# -- steps ---


@dataclass(frozen=True)
class _Ritz:
    """Ritz vectors X (L, W, w), their images H, operator·X = Y, values (L, w) float64 descending; see small.ritz."""

    X: Tensor
    H: Tensor
    Y: Tensor
    values: Tensor
    shifted: Tensor


def _rayleigh_ritz(core: Core, X: Tensor) -> _Ritz:
    H = core.image(X)
    Y = core.apply(H)
    values, rotation, shifted = small.ritz(small.gram64(X, H), small.gram64(H, Y))
    return _Ritz(X @ rotation, H @ rotation, Y @ rotation, values, shifted)


def _filtered(core: Core, ritz: _Ritz, degree: int) -> Tensor:
    """p(operator)·X for the Chebyshev polynomial of ``degree`` on 0 … the smallest Ritz value, 1 at each own value.

    With g = 2θ/a − 1 ≥ 1 the recurrence for T_j(g·)/T_j(g) is σ_{j+1} = 1/(2g − σ_j), column by column: a common
    scaling would leave the columns of small values below float32's range.
    """
    top = ritz.values[:, :1].clamp_min(_TINY)
    half = torch.maximum(ritz.values[:, -1:], 1e-7 * top) / 2  # (L, 1)
    ratio = (half / (ritz.values - half).clamp_min(half)).float()  # 1/g, (L, w)
    inverse = (1 / half).float()
    apart = (ritz.values.unsqueeze(2) > _APART * ritz.values.unsqueeze(1)).float()  # [j, i]: take j out of i

    def clean(Z: Tensor) -> Tensor:
        return torch.baddbmm(Z, ritz.X, apart * (ritz.H.mT @ Z), alpha=-1)

    sigma, before, spare = ratio, ritz.X, torch.empty_like(ritz.X)
    now = small.chebyshev(clean(ritz.Y), ritz.X, None, inverse * ratio, -ratio, None, out=torch.empty_like(ritz.X))
    for _ in range(degree - 1):
        following = 1 / (2 / ratio - sigma)
        product = clean(core.apply(core.image(now)))
        twice = 2 * following
        small.chebyshev(product, now, before, twice * inverse, -twice, -sigma * following, out=spare)
        now, before, spare = spare, now, before if before is not ritz.X else torch.empty_like(now)
        sigma = following
    return now


def _last_pass(core: Core, left: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz with ΔW itself on the span of ``left``: U, S, V and whether a Cholesky factor was shifted."""
    turn, first = small.whiten(small.gram64(left, left), torch.float32)
    U = left @ turn
    W = core.project_t(U)
    # U is orthonormal to float32 rounding only, which would bias the Ritz values (see core._last_pass).
    S, to_U, to_V, second = small.singular(small.gram64(U, U), small.gram64(W, W), k)
    (U, third), (V, fourth) = _orthonormal(U @ to_U), _orthonormal(W @ to_V)
    return U, S, V, first | second | third | fourth


def _orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns from the left, as QR gives them, for columns that nearly are; and whether a shift was used.

    Vectors of small singular values come with the rounding of the large ones in them.
    """
    turn, shifted = small.whiten(small.gram64(X, X), torch.float32)
    return X @ turn, shifted


def _conditioned(X: Tensor, H: Tensor) -> Tensor:
    """Columns that span what X (L, W, w) does and are far from dependent; H are their images.

    They need not be orthonormal, since Rayleigh-Ritz takes the inner product into account.
    """
    for _ in range(3):
        turn = small.condition(small.gram64(X, H))
        X, H = X @ turn, H @ turn
    return X


def _skew(X: Tensor) -> Tensor:
    """max |XᵀX − I| of each layer (L,) float64."""
    gram = X.mT @ X
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    return gram.abs().amax(dim=(1, 2)).double()


def _signed(U: Tensor, V: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entry of largest magnitude in each column of U positive, as ``factorization.finish`` has it."""
    largest = U.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(U.gather(1, largest) < 0, -1.0, 1.0).to(U)
    return U * sign, S, V * sign
