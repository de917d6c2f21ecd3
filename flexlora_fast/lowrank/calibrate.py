"""Measure a device's constants for the planner: ``python -m flexlora_fast.lowrank.calibrate [--device cuda]``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flexlora_fast.backends import cpu, eigen
from flexlora_fast.lowrank import plan
from flexlora_fast.lowrank.plan import Constants
from flexlora_fast.precision import full_precision


def median_seconds(call: Callable[[], object], repeats: int = 5, wait: Callable[[], object] = bool) -> float:
    """Median wall time of ``call`` after one warm-up; ``wait`` returns when the device has done it."""
    call()
    wait()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_cuda(device: torch.device, side: int = 8192, layers: int = 64) -> Constants:
    """The same on a GPU, for layers in groups: eigenproblems, factors and calls per matrix of a batch.

    ``side`` and ``layers`` are the sizes of the products and of the batches.
    """
    torch.manual_seed(0)
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else bool
    seconds = functools.partial(median_seconds, wait=wait)
    a32 = torch.randn(side, side, device=device)
    a16 = a32.bfloat16()
    a64 = a32[: side // 4, : side // 4].double()
    grams = torch.randn(layers, side // 8, side // 8, device=device)
    thin = torch.randn(layers, side // 8, 80, device=device)
    small = torch.randn(layers, 80, 160, device=device, dtype=torch.float64)
    small = small @ small.mT
    one = torch.randn(side // 16, side // 16, device=device, dtype=torch.float64)
    tall = torch.randn(side, side // 2, device=device)
    return Constants(
        gemm32=2 * side**3 / seconds(lambda: a32 @ a32),
        gemm16=2 * side**3 / seconds(lambda: a16 @ a16),
        gemm64=2 * (side // 4) ** 3 / seconds(lambda: a64 @ a64),
        thin32=2 * grams.numel() * 80 / seconds(lambda: grams @ thin),
        eigh64=seconds(lambda: eigen.eigh(small)) / layers / 80**3,
        svd64=seconds(lambda: torch.linalg.svd(one, full_matrices=False), 3) / one.shape[0] ** 3,
        cholesky64=seconds(lambda: torch.linalg.cholesky_ex(small)) / layers / 80**3,
        bytes_per_second=2 * 4 * tall.numel() / seconds(tall.clone),
        call=seconds(lambda: torch.linalg.cholesky_ex(small[0] @ small[0]), 50) / 3,
        measured_on=f"{_name(device)}, torch {torch.__version__}",
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def measure() -> Constants:
    """Time one representative op for each constant (about 20 s on two cores)."""
    torch.manual_seed(0)
    side, n, width = 2048, 768, 48
    a32 = torch.randn(side, side)
    a64 = a32[:1024, :1024].double()
    thin = torch.randn(side, width)
    spd = torch.randn(n, 2 * n, dtype=torch.float64)
    spd = spd @ spd.T
    small = torch.randn(8, 8)
    tall = torch.randn(2048, 1024)
    gemm32 = 2 * side**3 / median_seconds(lambda: cpu.matmul(a32, a32))
    gemm16 = gemm32  # without the instructions, bfloat16 factors are multiplied in float32
    if cpu.usable("bfloat16"):
        a16 = a32.bfloat16()
        gemm16 = 2 * side**3 / median_seconds(lambda: cpu.matmul(a16, a16, precision="bfloat16"))
    return Constants(
        gemm32=gemm32,
        gemm16=gemm16,
        gemm64=2 * 1024**3 / median_seconds(lambda: a64 @ a64),
        thin32=2 * side**2 * width / median_seconds(lambda: cpu.matmul(a32.mT, cpu.matmul(a32, thin))) * 2,
        eigh64=median_seconds(lambda: torch.linalg.eigh(spd)) / n**3,
        svd64=median_seconds(lambda: torch.linalg.svd(spd, full_matrices=False), 3) / n**3,
        cholesky64=median_seconds(lambda: torch.linalg.cholesky(spd)) / n**3,
        bytes_per_second=12 * tall.numel() / median_seconds(tall.double),
        call=median_seconds(lambda: torch.linalg.cholesky_ex(small.double().mT @ small.double() + 1), 200) / 3,
        measured_on=f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="default: the file that the planner reads for this device")
    arguments = parser.parse_args()
    device = arguments.device
    out = arguments.out or plan.constants_file(device)
    with full_precision():
        measured = measure() if device.type == "cpu" else measure_cuda(device)
    constants = {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in dataclasses.asdict(measured).items()
    }
    out.write_text(json.dumps(constants, indent=2) + "\n")
    print(f"{out}: {json.dumps(constants, indent=2)}")


if __name__ == "__main__":
    main()
