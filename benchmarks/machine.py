"""What this machine can do at most, measured in the same run: matrix rates and copy bandwidth."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Limits:
    """The machine's measured limits, per second.

    ``matrix_float32`` is the better of torch's and numpy's BLAS: the rate every float32 method is held against, ours
    too. ``svd_float32`` predicts full SVDs, which are far from it.
    """

    matrix_float32: float  # flop/s
    matrix_bfloat16: float  # flop/s
    copy: float  # bytes/s, read and written bytes both counted
    svd_float32: float  # flop/s of a full SVD by the count in costs.py

    def floor(self, flops: float, moved: float) -> float:
        """The least seconds in which this machine can do this work: the slower of its arithmetic and its traffic."""
        return max(flops / self.matrix_float32, moved / self.copy)


def best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of ``repeats``: a limit is what can be reached, not what is typical."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(side: int = 2048, copied: int = 1 << 28) -> Limits:
    """Products at side³, a copy of ``copied`` bytes, and an SVD at half the side (a few seconds in all)."""
    from benchmarks.costs import full_svd_flops

    g = torch.Generator().manual_seed(0)
    X = torch.randn(side, side, generator=g)
    half, array = X.bfloat16(), X.numpy()
    source, target = torch.zeros(copied // 4), torch.empty(copied // 4)
    small = X[: side // 2, : side // 2].contiguous()
    flops = 2 * side**3
    return Limits(
        matrix_float32=flops / min(best_seconds(lambda: X @ X), best_seconds(lambda: np.matmul(array, array))),
        matrix_bfloat16=flops / best_seconds(lambda: half @ half),
        copy=2 * copied / best_seconds(lambda: target.copy_(source)),
        svd_float32=full_svd_flops(side // 2, side // 2)
        / best_seconds(lambda: torch.linalg.svd(small, full_matrices=False), 2),
    )


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(limits: Limits) -> dict[str, object]:
    """Machine, software and measured limits, for the results file."""
    from importlib.metadata import version

    packages = ("torch", "numpy", "scipy", "scikit-learn", "peft")
    return {
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "limits": asdict(limits),
    }


def commit() -> str:
    """The commit that was measured, marked where the tree differs from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
