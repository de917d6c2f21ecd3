"""Each op alone: bytes and flops by formula, seconds by CUDA events, and the share of this device's measured ceilings.

Layers are many enough that one call streams several times the L2. Bytes are compulsory traffic: each factor and each
operand read once, each result written once. Flops are those that the op needs; a precision that computes a product from
three is held against a third of its unit's rate.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import ops, stage
from benchmarks.gpu.ceilings import tf32
from benchmarks.gpu.stage import NEEDS_GPU, Deadline, Options, Report, median_seconds

# Layers, m, n, ranks: 0.8 GB of bfloat16 factors; and a size for the CPU.
SIZE = (32, 4096, 4096, (16,) * 100)
_TINY = (2, 64, 48, (4,) * 3)
# Columns of X. Uploads are bfloat16: of float32 factors one width is enough.
WIDTHS = {torch.bfloat16: (16, 80, 256), torch.float32: (80,)}

# The width at which ops are measured that do not depend on it.
_ALONE = 80

Size = tuple[int, int, int, int]


def work(op: str, size: Size, width: int, factor_bytes: int, thin_bytes: int) -> tuple[float, float]:
    """Flops and bytes of an op over L layers (m, n) of R columns; size = (L, m, n, R).

    ``factor_bytes``, ``thin_bytes``: of an element of the factors and of X or Y, which has ``width`` columns. Results
    are float32, but a packed copy, which has the factors' type. Of a Gram one triangle is computed, all is written.
    """
    L, m, n, R = size
    factors = factor_bytes * (m + n) * R
    if op in ("project", "project_t"):
        rows_in, rows_out = (n, m) if op == "project" else (m, n)
        return L * 2.0 * (m + n) * R * width, L * (factors + (thin_bytes * rows_in + 4.0 * rows_out) * width)
    if op == "gram":
        return L * 1.0 * (m + n) * R**2, L * (factors + 2 * 4.0 * R**2)
    if op == "materialize":
        return L * 2.0 * m * n * R, L * (factors + 4.0 * m * n)
    if op == "pack":
        return 0.0, 2.0 * L * factors
    raise ValueError(f"{op!r} has no formula: add it to benchmarks.gpu.roofline.work")


def placed(
    op: str, precision: str, flops: float, moved: float, seconds: float, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Where a measurement lies: what bounds the op, and how much of that ceiling it reaches."""
    products, unit = ops.products(op, precision)
    row: dict[str, Any] = {"flops": flops, "bytes": moved, "seconds": seconds}
    if not isinstance(ceilings.get("copy"), float) or not isinstance(ceilings.get(unit), float):
        return row | {
            "bound": None,
            "share": None,
            "why": f"the ceilings of copies and {unit} products were not measured",
        }
    streaming, computing = moved / ceilings["copy"], products * flops / ceilings[unit]
    floor = max(streaming, computing)
    bound = "copy" if streaming >= computing else unit
    return row | {"bound": bound, "floor_seconds": floor, "share": floor / seconds}


def measure_ops(calls: dict[str, ops.Op], about: dict[str, Any], size: Size, options: Options, report: Report) -> None:
    """One row for each op; those that X's width does not touch at one width only."""
    width, precision = about["width"], about["precision"]
    thin = 2 if precision == "bf16" else 4
    for op, call in calls.items():
        if op in ("gram", "materialize", "pack") and width != _ALONE:
            continue
        with report.attempt(f"{op} by {about['by']}, {precision}, {width} columns"):
            seconds = median_seconds(call, options.device, repeats=5, warm_up=2)
            flops, moved = work(op, size, width, about["factor_bytes"], thin)
            row = placed(op, precision, flops, moved, seconds, options.found("ceilings"))
            report["rows"].append({"op": op} | about | row)
            report.write()


def measure(options: Options, report: Report) -> None:
    deadline = Deadline(0.85 * options.seconds)
    L, m, n, ranks = _TINY if options.quick else SIZE
    size = (L, m, n, sum(ranks))
    report["size"] = {"layers": L, "m": m, "n": n, "R": sum(ranks), "clients": len(ranks)}
    report["rows"], report["not_run"] = [], {}
    obstacle = ops.kernels_obstacle() if options.cuda else NEEDS_GPU
    if obstacle:
        report["not_run"]["kernels"] = obstacle
        report.write()
    for dtype, precisions in ops.PRECISIONS.items():
        factors = ops.stacks(L, m, n, ranks, dtype, options.device)
        about = {"factors": str(dtype).removeprefix("torch."), "factor_bytes": dtype.itemsize}
        for width in WIDTHS[dtype]:
            X, Y = (torch.randn(L, side, width, device=options.device) for side in (n, m))
            named = "bf16" if dtype == torch.bfloat16 else "float32"
            if deadline.left < 0:
                report["not_run"][f"{named} factors, {width} columns"] = "no time left"
                report.write()
                continue
            with tf32(False):
                calls = ops.torch_ops(factors, X, Y, dtype)
                measure_ops(calls, about | {"by": "torch", "precision": named, "width": width}, size, options, report)
                del calls
            for precision in precisions if obstacle is None else ():
                calls = ops.kernel_ops(factors, X, Y, precision)
                measure_ops(
                    calls, about | {"by": "kernels", "precision": precision, "width": width}, size, options, report
                )
                del calls
        del factors
        if options.cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    stage.run(measure)
