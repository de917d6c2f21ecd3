"""What this device can do at most, measured: copy bandwidth, matrix rates, PCIe, and the rate of a full SVD."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import machine
from benchmarks.costs import full_svd_flops
from benchmarks.gpu import stage
from benchmarks.gpu.stage import NEEDS_GPU, Options, Report, median_seconds

# Side of the matrix products, bytes copied on the device, bytes over PCIe, side of the SVD.
_SIZES = {False: (8192, 4 << 30, 1 << 30, 1024), True: (128, 1 << 22, 1 << 20, 64)}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """float32 products in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_rate(device: str, nbytes: int) -> float:
    """Bytes/s of a copy on the device, read and written bytes both counted."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source), device)


def matrix_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """Flop/s of a product of random square matrices through torch's library."""
    g = torch.Generator(device).manual_seed(0)
    A, B = (torch.randn(side, side, generator=g, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(A)
    return 2 * side**3 / median_seconds(lambda: torch.mm(A, B, out=out), device)


def pcie_rates(device: str, nbytes: int) -> dict[str, float]:
    """Bytes/s from pinned host memory to the device and back."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return {
        "to_device": nbytes / median_seconds(lambda: there.copy_(host, non_blocking=True), device),
        "to_host": nbytes / median_seconds(lambda: host.copy_(there, non_blocking=True), device),
    }


def svd_rate(device: str, side: int) -> float:
    """Flop/s of ``torch.linalg.svd`` with vectors, by the count in costs.py: it predicts the peers' times."""
    X = torch.randn(side, side, generator=torch.Generator(device).manual_seed(0), device=device)
    call = lambda: torch.linalg.svd(X, full_matrices=False)  # noqa: E731
    return full_svd_flops(side, side) / median_seconds(call, device, repeats=2, warm_up=1)


def describe(device: str) -> dict[str, Any]:
    """Device and software; nothing about whose machine it is."""
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": machine.cpu_name(),
    }
    if not device.startswith("cuda"):
        return about | {"device": "CPU"}
    gpu = torch.cuda.get_device_properties(device)
    return about | {
        "device": gpu.name,
        "capability": f"sm_{gpu.major}{gpu.minor}",
        "memory": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "l2": gpu.L2_cache_size,
    }


def measure(options: Options, report: Report) -> None:
    side, copied, over_pcie, svd_side = _SIZES[options.quick]
    device = options.device
    report["machine"] = describe(device)
    with report.attempt("copy"):
        report["copy"] = copy_rate(device, copied)
    with report.attempt("bf16"):
        report["bf16"] = matrix_rate(device, torch.bfloat16, side)
    with report.attempt("float32"), tf32(False):
        report["float32"] = matrix_rate(device, torch.float32, side)
    with report.attempt("float64"):
        report["float64"] = matrix_rate(device, torch.float64, side // 2)
    with report.attempt("svd"):
        report["svd_float32"] = svd_rate(device, svd_side)
    if not options.cuda:
        report["tf32"], report["pcie"] = NEEDS_GPU, NEEDS_GPU
        return
    with report.attempt("tf32"), tf32(True):
        report["tf32"] = matrix_rate(device, torch.float32, side)
    with report.attempt("pcie"):
        report["pcie"] = pcie_rates(device, over_pcie)


if __name__ == "__main__":
    stage.run(measure)
