"""The small dense problems alone: batches of symmetric eigenproblems, and panels made orthonormal.

Eigenproblems are those of a round's 224 layers, at several numbers of columns; each answer is held against the matrix
that it is of. Panels are of known condition; what counts is how far from orthonormal they come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import ops, stage
from benchmarks.gpu.stage import Deadline, Options, Report, median_seconds, wall

# Columns, and how many matrices of each.
COLUMNS = {False: (32, 64, 80, 96, 128, 192, 256), True: (6, 40)}
MATRICES = {False: 224, True: 12}
# Panels (b, m, l), and their condition numbers.
PANELS = {False: (64, 4096, 80), True: (2, 96, 8)}
CONDITIONS = (1e2, 1e4, 1e6)
# A solver that takes one matrix after the other is timed on so many, where all would take longer than so many seconds.
_SAMPLE, _LONG = 8, 0.2
_REPEATS, _BUDGET = 10, 0.3


def symmetric(count: int, columns: int, device: str) -> Tensor:
    """Positive definite matrices (count, l, l) float64 with σ² from 1 down to 1/l², as Rayleigh-Ritz makes them."""
    g = torch.Generator(device).manual_seed(columns)
    X = torch.randn(count, 2 * columns, columns, generator=g, device=device, dtype=torch.float64)
    X = X / torch.arange(1, columns + 1, device=device)
    return X.mT @ X / (2 * columns)


def panels(size: tuple[int, int, int], condition: float, device: str) -> Tensor:
    """Panels (b, m, l) float32 whose singular values fall from 1 to 1/condition in equal steps of their logarithm."""
    b, m, columns = size
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=torch.float64)

    X = normal(b, m, columns)
    for _ in range(2):  # Cholesky QR, in float64 of a Gaussian panel as good as any
        L = torch.linalg.cholesky(X.mT @ X)
        X = torch.linalg.solve_triangular(L.mT, X, upper=True, left=False)
    values = torch.logspace(0, -math.log10(condition), columns, device=device, dtype=torch.float64)
    return ((X * values) @ torch.linalg.qr(normal(columns, columns))[0]).float()


def residual(C: Tensor, values: Tensor, vectors: Tensor) -> float:
    """max |C·V − V·Λ| over max |C|, the worst of all matrices."""
    error = (C @ vectors.double() - vectors.double() * values.unsqueeze(1)).abs().amax(dim=(1, 2))
    return float((error / C.abs().amax(dim=(1, 2))).max())


def skew(Q: Tensor) -> float:
    """‖QᵀQ − I‖₂, the worst of all panels."""
    Q = Q.double()
    gram = (Q.mT @ Q).cpu()  # small, and one after the other on a GPU
    return float(torch.linalg.eigvalsh(gram - torch.eye(gram.shape[1], dtype=gram.dtype)).abs().max())


def timed(call: Callable[[], object], device: str) -> float:
    """Median seconds, of few runs where one is long. The first, which may load and compile, is not counted."""
    call()
    once = wall(call, device)
    return once if once > _BUDGET else median_seconds(call, device, min(_REPEATS, 1 + int(_BUDGET / once)), 0)


def eigen_row(name: str, solver: Callable[[Tensor], tuple[Tensor, Tensor]], C: Tensor, device: str) -> dict[str, Any]:
    """Seconds of all matrices and how far off the answers are; ``scaled`` from a sample where they would take long."""
    sample = C[:_SAMPLE] if name == ops.TORCH_EIGH else C
    seconds, share = timed(lambda: solver(sample), device), len(C) / len(sample)
    if share > 1 and seconds * share <= _LONG:
        seconds, sample, share = timed(lambda: solver(C), device), C, 1.0
    values, vectors, *_ = solver(sample)
    return {"seconds": seconds * share, "scaled": share != 1, "error": residual(sample, values, vectors)}


def measure_eigen(options: Options, report: Report, deadline: Deadline) -> None:
    """Fill ``report["eigen"]``: a row for each number of columns, smallest first, by solver; or why not."""
    solvers = ops.eigensolvers(options.device)
    report["matrices"] = MATRICES[options.quick]
    report["not_run"] |= {name: found for name, found in solvers.items() if isinstance(found, str)}
    report["eigen"] = []
    for columns in COLUMNS[options.quick]:
        row: dict[str, Any] = {"columns": columns, "by": {}, "not_run": {}}
        report["eigen"].append(row)
        C = symmetric(MATRICES[options.quick], columns, options.device)
        for name, solver in solvers.items():
            if isinstance(solver, str):
                continue
            if deadline.left < 0:
                row["not_run"][name] = "no time left"
                continue
            with report.attempt(f"{name}, {columns} columns"):
                row["by"][name] = eigen_row(name, solver, C, options.device)
            report.write()
        print(f"{columns} columns: {', '.join(row['by'])}; {deadline.left:.0f} s left", flush=True)


def measure_panels(options: Options, report: Report) -> None:
    """Fill ``report["orthonormal"]``: a row for each method, its skew by condition, and seconds at the middle one."""
    size = PANELS[options.quick]
    report["panels"] = dict(zip(("count", "rows", "columns"), size, strict=True))
    made = {condition: panels(size, condition, options.device) for condition in CONDITIONS}
    report["orthonormal"] = []
    for name, method in ops.orthonormalizers(options.device).items():
        if isinstance(method, str):
            report["not_run"][name] = method
            report.write()
            continue
        with report.attempt(name):
            found = {f"{condition:.0e}": skew(method(Y)) for condition, Y in made.items()}
            seconds = timed(lambda method=method: method(made[CONDITIONS[1]]), options.device)
            report["orthonormal"].append({"by": name, "seconds": seconds, "skew": found})
            report.write()


def measure(options: Options, report: Report) -> None:
    deadline = Deadline(0.7 * options.seconds)
    report["not_run"] = {}
    measure_panels(options, report)
    measure_eigen(options, report, deadline)


if __name__ == "__main__":
    stage.run(measure)
