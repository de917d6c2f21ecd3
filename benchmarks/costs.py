"""Work of each method by formula: flops, bytes moved, and what a first run would need.

Leading terms only, one multiply-add counted as two flops, whatever the precision it is done in. R is the stack's width,
k the target rank, w = k + 10 a sketch's width. SVD and QR counts are those of Golub & Van Loan, "Matrix Computations",
4th ed., sections 5.2 and 8.6. Bytes are compulsory traffic: each pass over the factors or over a dense ΔW that does not
fit in cache, at float32.
"""

from __future__ import annotations

from benchmarks.machine import Limits
from benchmarks.peers import ESTIMATED, OURS
from benchmarks.workloads import AnyWorkload
from flexlora_fast.lowrank.krylov import block_width

# flops, bytes
Work = tuple[float, float]


def full_svd_flops(rows: int, columns: int) -> float:
    """Thin SVD with both sets of vectors: the cheaper of Golub-Reinsch and R-SVD."""
    short, long = sorted((rows, columns))
    return min(14.0 * long * short**2 + 8.0 * short**3, 6.0 * long * short**2 + 20.0 * short**3)


def qr_flops(rows: int, columns: int) -> float:
    """Householder QR, and the thin Q formed from its reflectors."""
    short = min(rows, columns)
    reduce = 4.0 * rows * columns * short - 2.0 * (rows + columns) * short**2 + 4.0 / 3 * short**3
    return reduce + 2.0 * rows * short**2 - 2.0 / 3 * short**3


class Layer:
    """The sizes that formulas use, and the costs of the pieces that methods share."""

    def __init__(self, m: int, n: int, R: int, k: int, clients: int) -> None:
        self.m, self.n, self.R, self.k, self.clients = m, n, R, min(k, R, m, n), clients
        self.short, self.long = sorted((m, n))
        self.factors = 4.0 * (m + n) * R  # bytes of one pass over them
        self.dense = 4.0 * m * n  # bytes of one pass over ΔW
        self.form = 2.0 * m * n * R  # flops of ΔW from the stacks
        self.apply = 2.0 * (m + n) * R  # flops of ΔW, factored, times one vector


def method_work(name: str, layer: Layer, solver: str = "", steps: int = 0) -> Work | None:
    """Flops and bytes of one method; None where it has no formula here."""
    if name in (OURS, ESTIMATED):
        return solver_work(layer, solver, steps, exact=name == OURS)
    m, n, R, k, short, long = layer.m, layer.n, layer.R, layer.k, layer.short, layer.long
    w = min(k + 10, short)
    svd, formed = full_svd_flops(m, n), layer.factors + layer.dense
    if name == "FlexLoRA authors' loop":  # each client: a product, its scaling and the sum each pass over ΔW
        return layer.form + svd, layer.factors + 6 * layer.clients * layer.dense
    if name == "PEFT add_weighted_adapter":  # K dense products, their stack, a weighted copy; full U and Vᵀ
        return layer.form + svd + 4.0 * long * long * short, layer.factors + 7 * layer.clients * layer.dense
    if name == "dense + linalg.svd":
        return layer.form + svd, formed + 2 * layer.dense
    if name == "dense + svd_lowrank":  # one product to start, two in each of 4 iterations, one to project
        return layer.form + 10 * 2.0 * m * n * w + 5 * 4.0 * (m + n) * w**2, formed + 10 * layer.dense
    if name == "sklearn randomized_svd":
        iterations = 7 if k < 0.1 * short else 4
        passes = 2 * iterations + 2
        return layer.form + passes * 2.0 * m * n * w + iterations * 2.0 * (m + n) * w**2, formed + passes * layer.dense
    if name == "QR + QR + core SVD":
        a, b = min(m, R), min(n, R)
        flops = qr_flops(m, R) + qr_flops(n, R) + 2.0 * a * R * b + full_svd_flops(a, b) + 2.0 * (m * a + n * b) * k
        return flops, 4 * layer.factors
    if name == "two-stage sketch":
        return 2 * layer.apply * w + qr_flops(m, w) + full_svd_flops(n, w) + 2.0 * m * w * k, 2 * layer.factors
    if name == "PROPACK on the factors":  # steps counts products with ΔW or ΔWᵀ; full re-orthogonalisation
        return steps * layer.apply + 2.0 * (m + n) * steps**2 / 4, (2 + steps) * layer.factors
    return None


def solver_work(layer: Layer, solver: str, steps: int, exact: bool = True) -> Work | None:
    """Flops and bytes of one of our solvers; ``steps`` are its block steps.

    Block Krylov takes three products with a block to start (ΔW, ΔWᵀ, ΔW) and two a step; its basis grows by a block a
    step and is kept orthogonal twice. ‖ΔW‖_F², the certificate, is in all of them: (m+n)·R² from the Grams' lower
    halves, where ΔW is not formed, or 32 probes where it is estimated.
    """
    m, n, R, k, short, long = layer.m, layer.n, layer.R, layer.k, layer.short, layer.long
    grams = 1.0 * (m + n) * R**2
    block, products = min(block_width(k), short), 3 + 2 * steps
    columns = min(short, block * (steps + 1))
    keep_orthogonal = (4.0 * short + long) * columns**2
    if solver == "gram" and short > R:
        return grams + (2.0 + 9.0) * R**3 + 2.0 * (m + n) * R * k, 2 * layer.factors
    if solver == "gram":
        return layer.form + long * short**2 + 9.0 * short**3 + 2.0 * m * n * k, layer.factors + 3 * layer.dense
    if solver == "krylov":  # in R dimensions, and a last product of the factors with k columns each way
        inside = 4.0 * R**2 * columns + 5.0 * R * columns**2 if steps else 11.0 * R**3
        return grams + inside + 2 * layer.apply * k, 4 * layer.factors
    if solver == "filtered":  # ``steps`` counts products in R dimensions
        return grams + 4.0 * R**2 * (k + 16) * steps + 2 * layer.apply * k, 4 * layer.factors
    if solver in ("factored", "subspace") and not exact:
        grams = layer.apply * 32
    if solver == "factored":
        return grams + products * layer.apply * block + keep_orthogonal, (2 + products) * layer.factors
    if solver == "subspace":
        w, products = k + max(10, k // 5), 3 + 3 * steps
        return grams + products * (layer.apply * w + 4.0 * long * w**2), (2 + products) * layer.factors
    if solver == "dense":
        flops = layer.form + products * 2.0 * m * n * block + keep_orthogonal
        return flops, layer.factors + (2 + products) * layer.dense
    if solver == "svd":
        return layer.form + full_svd_flops(m, n), layer.factors + 3 * layer.dense
    return None


def layer_of(workload: AnyWorkload) -> Layer:
    return Layer(workload.m, workload.n, workload.R, workload.k, len(workload.ranks))


def needed_bytes(name: str, layer: Layer) -> float:
    """Memory that a method is known to need, beyond a few copies of the factors and of ΔW."""
    return 3 * layer.clients * layer.dense if name == "PEFT add_weighted_adapter" else 0.0


def predicted_seconds(name: str, layer: Layer, limits: Limits) -> float:
    """Expected seconds of the methods with a full SVD, by the measured rate of one; 0 for the others."""
    full = {"FlexLoRA authors' loop", "PEFT add_weighted_adapter", "dense + linalg.svd"}
    if name not in full:
        return 0.0
    work = method_work(name, layer)
    assert work is not None
    flops, moved = work
    return layer.form / limits.matrix_float32 + (flops - layer.form) / limits.svd_float32 + moved / limits.copy
