"""Measure this machine's constants for the planner: ``python -m flexlora_fast.lowrank.calibrate [--out FILE]``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flexlora_fast.backends import cpu
from flexlora_fast.lowrank.plan import Constants


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of ``call`` after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("constants.json"))
    out = parser.parse_args().out
    constants = {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in dataclasses.asdict(measure()).items()
    }
    out.write_text(json.dumps(constants, indent=2) + "\n")
    print(f"{out}: {json.dumps(constants, indent=2)}")


if __name__ == "__main__":
    main()
