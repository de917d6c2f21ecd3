"""Which solver for which layer: predicted seconds from a cost model whose constants were measured, not guessed.

The constants lie in ``constants.json`` beside this file; ``make calibrate`` (``flexlora_fast.lowrank.calibrate``)
measures them anew. ``benchmarks/planner.py`` measures every solver beside
the chosen one, and a test holds the choices against the committed measurements.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from flexlora_fast.errors import OptionError

SOLVERS = ("gram", "krylov", "filtered", "factored", "subspace", "dense", "svd")
CERTIFICATES = ("exact", "estimate")
EXACT = frozenset({"gram", "svd"})
# Iterating in float32 cannot resolve an excess below about this (products round at 6e-8, squared spectrum).
FLOAT32_TOL = 1e-6


@dataclass(frozen=True)
class Constants:
    """Speeds of one machine: flops per second for products, seconds for the rest."""

    gemm32: float  # flop/s of large float32 products
    gemm16: float  # flop/s of the same where all factors are bfloat16
    gemm64: float  # flop/s of large float64 products
    thin32: float  # flop/s of float32 products with a block of vectors
    eigh64: float  # seconds per n³ of a float64 symmetric eigenproblem
    svd64: float  # seconds per L·s² of a float64 SVD
    cholesky64: float  # seconds per n³
    bytes_per_second: float  # streaming through memory, conversion included
    call: float  # seconds of overhead per op
    measured_on: str = ""

    @classmethod
    def load(cls, path: Path | None = None) -> Constants:
        return cls(**json.loads((path or Path(__file__).with_name("constants.json")).read_text()))


@functools.cache
def default_constants() -> Constants:
    return Constants.load()


def constants_file(device: torch.device) -> Path:
    """Where the constants of a kind of device are; those of CUDA stand for all accelerators."""
    return Path(__file__).with_name("constants.json" if device.type == "cpu" else "constants-cuda.json")


@functools.cache
def constants_of(device: torch.device) -> Constants:
    """The constants of a kind of device."""
    return Constants.load(constants_file(device))


@dataclass(frozen=True)
class Shape:
    """What a solve costs by: b matrices of m×n, stack width R, target rank k, tolerance.

    ``sixteen``: all factors are bfloat16, so that their products are exact at twice the speed.
    """

    m: int
    n: int
    R: int
    k: int
    tol: float = 1e-3
    batch: int = 1
    certificate: str = "exact"
    sixteen: bool = False

    @property
    def short(self) -> int:
        return min(self.m, self.n)

    @property
    def steps(self) -> float:
        """Block steps expected: each gains a factor of about 8 (``iterations`` of a result says how many it took)."""
        return 2 + math.log(max(1 / max(self.tol, FLOAT32_TOL), 2)) / math.log(8)

    def basis(self, side: int) -> float:
        """Krylov basis columns expected at the end, for vectors of ``side`` entries."""
        return min(side, max(8, self.k / 2) * (self.steps + 1))


def seconds(shape: Shape, c: Constants) -> dict[str, float]:
    """Predicted seconds of every solver on one layer."""
    m, n, R, k = shape.m, shape.n, max(shape.R, 1), shape.k
    s, long = shape.short, max(m, n)
    large = c.gemm16 if shape.sixteen else c.gemm32
    convert = 3 * 12 * (m + n) * R / c.bytes_per_second
    dense64 = 2 * m * n * R / c.gemm64 + convert
    grams = (m + n) * R**2 * _DIAGONAL / large
    energy = 4.0 * (m + n) * R * 32 / c.thin32  # a block of probes
    if shape.certificate == "exact":
        energy = grams + 8 * R**2 / c.bytes_per_second
    dense_loop = _krylov(shape, c, product=4.0 * m * n / c.thin32, side=s, long=long, rate=c.thin32)
    product = 4.0 * (m + n) * R / (_TABLES * c.thin32)
    factor_loop = _krylov(shape, c, product=product, side=s, long=long, rate=c.thin32)
    width = k + max(10, k // 5)
    power = 3 * shape.steps * (4.0 * (m + n) * R * width / c.thin32 + 8 * long * width**2 / c.gemm64 + 20 * c.call)
    costs = {
        "gram": _gram(shape, c, dense64, convert) + 40 * c.call,
        "krylov": grams + 24 * R**2 / c.bytes_per_second + _core(shape, c) + 80 * c.call,
        "filtered": grams + 24 * R**2 / c.bytes_per_second + _filtered(shape, c),
        "factored": energy + factor_loop,
        "subspace": energy + power,
        "dense": _form(shape, c) + dense_loop,
        "svd": dense64 + c.svd64 * long * s**2,
    }
    return {name: shape.batch * cost for name, cost in costs.items()}


# Thin products from tables of small factors run at this share of those of one packed matrix: each client's columns are
# a few short rows (64 to 80 against 94 to 105 GFLOP/s a core, 100 clients of r = 16 at 4096², 32 to 64 columns).
_TABLES = 0.6
# A Gram's triangle is computed in blocks: this much of half the products.
_DIAGONAL = 1.08


def _form(shape: Shape, c: Constants) -> float:
    """Seconds of forming ΔW in float32."""
    large = c.gemm16 if shape.sixteen else c.gemm32
    return 2 * shape.m * shape.n * max(shape.R, 1) / large + 8 * shape.m * shape.n / c.bytes_per_second


def _gram(shape: Shape, c: Constants, dense64: float, convert: float) -> float:
    """Seconds of the exact solver."""
    m, n, R, k, s, long = shape.m, shape.n, max(shape.R, 1), shape.k, shape.short, max(shape.m, shape.n)
    if s <= R:
        return dense64 + 2 * long * s**2 / c.gemm64 + c.eigh64 * s**3 + 2 * m * n * k / c.gemm64
    core = 2 * (m + n) * R**2 / c.gemm64 + convert + 2 * c.cholesky64 * R**3 + 2 * R**3 / c.gemm64
    expand = 2 * (m + n) * R * k / c.gemm64 + 4 * R**2 * k / c.gemm64
    return core + 2 * R**3 / c.gemm64 + c.eigh64 * R**3 + expand


def _core(shape: Shape, c: Constants) -> float:
    """Seconds of the Gram-core solver behind its Grams: the iteration in R dimensions, and the last pass."""
    m, n, R, k = shape.m, shape.n, max(shape.R, 1), shape.k
    width = k + 8
    last = (4 * m + 2 * n) * R * width / c.thin32 + 6 * (m + n) * width**2 / c.gemm64 + c.eigh64 * width**3
    if direct(R, k):
        return last + (c.eigh64 + 2 * c.cholesky64) * R**3 + 4 * R**3 / c.gemm64
    columns = min(R, shape.basis(R) * 1.3)  # leading directions drop out of the blocks as they converge
    steps = columns / max(16, k / 2)
    small = 12 * R * columns**2 / c.gemm64 + 0.4 * c.eigh64 * steps * columns**3 / 4 + c.eigh64 * columns**3
    return last + 4.0 * R**2 * columns / c.thin32 + small + 45 * steps * c.call


def _filtered(shape: Shape, c: Constants) -> float:
    """Seconds a layer of filtered subspace iteration behind its Grams; a group shares the overhead of its calls."""
    m, n, R = shape.m, shape.n, max(shape.R, 1)
    return _filters(shape, c, product=4.0 * R**2, nbytes=8.0 * R**2, last=(4.0 * m + 2 * n) * R)


def _filtered_dense(shape: Shape, c: Constants) -> float:
    """The same on ΔW, once that is formed."""
    mn = float(shape.m * shape.n)
    return _filters(shape, c, product=4 * mn, nbytes=8 * mn, last=4 * mn)


def _filters(shape: Shape, c: Constants, *, product: float, nbytes: float, last: float) -> float:
    """``product`` and ``last``: flops a column of one multiplication by the operator, and of the last pass."""
    width = shape.k + 16
    loop = (2 + sum(degrees(shape.tol)) + 1) * max(product * width / c.thin32, nbytes / c.bytes_per_second)
    end = last * width / c.thin32 + 8 * (shape.m + shape.n) * width**2 / c.gemm64
    return loop + end + 5 * c.eigh64 * width**3


def degrees(tol: float, more: int = 0) -> tuple[int, ...]:
    """Degrees of the filters that usually reach an excess of ``tol`` (see filtered.py); ``more`` adds as many.

    A filter of degree 3 shrinks it 8 to 10 times where the spectrum is flat, which is the hardest.
    """
    filters = max(2, math.ceil(math.log10(1 / min(max(tol, FLOAT32_TOL), 1.0))))
    return (2, *(3,) * (filters - 1 + more))


def direct(R: int, k: int) -> bool:
    """Whether one R×R eigenproblem is cheaper than the Krylov steps it replaces.

    It is where the steps fill much of the space: k = 64 at R = 320, 14 ms against 13 (decaying spectrum) or 35 (flat);
    k = 128 at R = 512, 45 against 46 or 92.
    """
    return max(256, 4 * k + 64) >= R


def _krylov(shape: Shape, c: Constants, *, product: float, side: int, long: int, rate: float) -> float:
    """Seconds of the block Krylov loop: products, re-orthogonalisation, Gram growth, and one eigenproblem a step.

    ``product`` is the seconds of ΔW and ΔWᵀ times one vector.
    """
    dim = shape.basis(side)
    steps = shape.steps
    orthogonal = 8 * side * dim**2 / 2 / rate + 8 * side * dim * dim / steps / c.gemm64
    gram = 2 * long * dim**2 / 2 / c.gemm64
    values = 0.4 * c.eigh64 * sum((dim * (i + 1) / steps) ** 3 for i in range(int(steps)))
    final = c.eigh64 * dim**3 + 4 * (side + long) * dim * shape.k / rate
    return dim * product + orthogonal + gram + values + final + 60 * steps * c.call


def choose(shape: Shape, constants: Constants | None = None, *, grouped: bool = False) -> str:
    """The solver expected to be fastest while keeping the promise of ``tol``.

    ``grouped``: other layers of this shape can be solved together with it, by "filtered" or as dense ΔW.
    """
    c = constants or default_constants()
    costs = seconds(shape, c)
    if not grouped or shape.tol < FLOAT32_TOL:
        del costs["filtered"]
    else:
        costs["dense"] = min(costs["dense"], shape.batch * (_form(shape, c) + _filtered_dense(shape, c)))
    rank = min(shape.R, shape.short)
    # Nothing to iterate on where most of the spectrum is kept, or where float32 products cannot resolve tol.
    if shape.tol < FLOAT32_TOL or 2 * shape.k >= rank:
        names = EXACT | {"krylov"} if shape.tol >= FLOAT32_TOL and direct(shape.R, shape.k) else EXACT
        return min(names, key=lambda name: (costs[name], name))
    return min(costs, key=lambda name: (costs[name], name))


def check_certificate(certificate: str) -> str:
    if certificate not in CERTIFICATES:
        raise OptionError(f"certificate {certificate!r} is neither 'exact' nor 'estimate'")
    return certificate


def check_solver(solver: str) -> str:
    if solver not in (*SOLVERS, "auto"):
        raise OptionError(f"solver {solver!r} is not one of {', '.join(('auto', *SOLVERS))}")
    return solver
