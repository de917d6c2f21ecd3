"""Compile what the stages after this one launch, in several processes at a time, into Triton's cache on disk.

Triton compiles on one core, and compiling is most of what a first run of a kernel takes: one process after the other,
the stages would spend their time limits on it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.gpu import ops, roofline, sanitize, stage
from benchmarks.gpu.stage import NEEDS_GPU, Deadline, Options, Report

# What a process does: all ops in one precision at the roofline's sizes, or the sanitizer's cases.
JOBS = (*(precision for precisions in ops.PRECISIONS.values() for precision in precisions), "cases")


def run_job(job: str, device: str, size: tuple[int, int, int, tuple[int, ...]] = roofline.SIZE) -> int:
    """Every op of the job once; how many."""
    if job == "cases":
        return sanitize.run_cases(device)
    (dtype,) = (dtype for dtype, precisions in ops.PRECISIONS.items() if job in precisions)
    L, m, n, ranks = size
    factors = ops.stacks(L, m, n, ranks, dtype, device)
    count = 0
    for width in roofline.WIDTHS[dtype]:
        X, Y = (torch.randn(L, side, width, device=device) for side in (n, m))
        for call in ops.kernel_ops(factors, X, Y, job).values():
            call()
            count += 1
    stage.synchronize(device)
    return count


def measure(options: Options, report: Report) -> None:
    """All jobs at once. Fails where one fails, after the others are done."""
    deadline = Deadline(0.85 * options.seconds)
    obstacle = ops.kernels_obstacle() if options.cuda else NEEDS_GPU
    if obstacle:
        report.skip(obstacle)
        return
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.warm", "job"]
    running = {job: subprocess.Popen([*command, job, options.device]) for job in JOBS}
    done: dict[str, Any] = {}
    for job, process in running.items():
        try:
            code = process.wait(max(0.1, deadline.left))
            done[job] = time.monotonic() - start if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            done[job] = "stopped at the time limit"
        report["seconds"] = done
    if failed := [job for job, outcome in done.items() if isinstance(outcome, str)]:
        sys.exit(f"not compiled: {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        run_job(*sys.argv[2:4])
    else:
        stage.run(measure)
