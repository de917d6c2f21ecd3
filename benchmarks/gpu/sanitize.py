"""compute-sanitizer's memcheck over every kernel at small, awkward sizes."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import torch

from benchmarks.gpu import ops, stage, tools
from benchmarks.gpu.stage import NEEDS_GPU, Deadline, Options, Report

# L, m, n, ranks, width of X: remainders everywhere and rank 1; and whole tiles.
AWKWARD, WHOLE = (2, 65, 130, (1, 7, 30), 5), (1, 64, 128, (16, 16), 16)
# Factors, precision, size: each is compiled and then run under the sanitizer, and time is short.
CASES = (
    *((torch.bfloat16, precision, AWKWARD) for precision in ("bf16x3", "bf16", "float32")),
    (torch.bfloat16, "bf16x3", WHOLE),
    (torch.float32, "tf32x3", AWKWARD),
)
# The sanitizer's own; any other code is the program's.
FOUND = 99
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
_ERROR = re.compile(r"={9} (Invalid \S+ (?:read|write).*|Misaligned .*|.*Program hit .*)")


def run_cases(device: str) -> int:
    """Every op in every case; how many ran. That they are right is for the tests."""
    count = 0
    for dtype, precision, (L, m, n, ranks, width) in CASES:
        factors = ops.stacks(L, m, n, ranks, dtype, device)
        X, Y = (torch.randn(L, side, width, device=device) for side in (n, m))
        for op, call in ops.kernel_ops(factors, X, Y, precision).items():
            call()
            stage.synchronize(device)
            count += 1
            print(f"case {count}: {op} {precision} {dtype} {(L, m, n, ranks, width)}", flush=True)
    return count


def parse(output: str) -> dict[str, Any]:
    """Errors that memcheck counted, the first few of them, and how many cases had run by then."""
    summary = _SUMMARY.findall(output)
    return {
        "errors": int(summary[-1]) if summary else None,
        "first": _ERROR.findall(output)[:5],
        "cases": len(re.findall(r"^case \d+:", output, re.MULTILINE)),
    }


def unavailable(output: str) -> str | None:
    """Why the sanitizer could not look at all; None where it did."""
    for pattern in (r"Device not supported[^\n]*", r"Unable to (?:find|load)[^\n]*", r"LibraryNotLoaded[^\n]*"):
        if match := re.search(pattern, output):
            return match[0]
    return None


def measure(options: Options, report: Report) -> None:
    deadline = Deadline(0.75 * options.seconds)
    obstacle = ops.kernels_obstacle() if options.cuda else NEEDS_GPU
    if obstacle:
        return report.skip(obstacle)
    tool = tools.find("compute-sanitizer")
    # Once without it: kernels are compiled into Triton's cache, and a failure is not taken for the sanitizer's.
    report["cases"] = run_cases(options.device)
    if tool is None:
        return report.skip("compute-sanitizer is not available: neither on PATH nor under CUDA_HOME")
    program = [sys.executable, "-m", "benchmarks.gpu.sanitize", "cases", options.device]
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), *program]
    # torch's allocator hands out parts of large blocks: an access beyond a tensor would still be inside one.
    ran = tools.run(command, deadline.left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    found = parse(ran.output)
    report["memcheck"] = found | {"code": ran.code}
    if reason := unavailable(ran.output):
        return report.skip(f"compute-sanitizer is not available: {reason}")
    print(ran.output[-4000:], flush=True)
    if ran.code is None:
        sys.exit(f"memcheck: over its time after {found['cases']} of {report['cases']} cases")
    if ran.code or found["errors"] or found["errors"] is None:
        sys.exit(f"memcheck: {found['errors']} errors, exit code {ran.code}: {ran.last}")
    if found["cases"] != report["cases"]:
        sys.exit(f"memcheck: saw {found['cases']} of {report['cases']} cases")
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["cases"]:
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
        run_cases(sys.argv[2])
    else:
        stage.run(measure)
