"""compute-sanitizer over every kernel at small, awkward sizes: memcheck, and racecheck of their shared memory."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
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
# Of the CUDA kernels: matrices, rows, columns. One column; an odd number; a round's own, with rows for two blocks; and
# matrices that do not fit a block's shared memory.
EXTENSION_CASES = ((1, 3, 1), (3, 65, 17), (2, 1100, 80), (1, 260, 230))
TOOLS = ("memcheck", "racecheck")
# The sanitizer's own; any other code is the program's.
FOUND = 99
# memcheck's last line, and racecheck's, which has warnings of its own: of them only errors are wrong for certain.
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error")
_ERROR = re.compile(r"={9} (Invalid \S+ (?:read|write).*|Misaligned .*|.*Program hit .*|(?:Error|Warning): Race .*)")


def run_cases(device: str) -> int:
    """Every op in every case; how many ran. That they are right is for the tests."""
    count = 0

    def run(calls: dict[str, ops.Op], about: object) -> None:
        nonlocal count
        for op, call in calls.items():
            call()
            stage.synchronize(device)
            count += 1
            print(f"case {count}: {op} {about}", flush=True)

    for dtype, precision, (L, m, n, ranks, width) in CASES:
        factors = ops.stacks(L, m, n, ranks, dtype, device)
        X, Y = (torch.randn(L, side, width, device=device) for side in (n, m))
        run(ops.kernel_ops(factors, X, Y, precision), f"{precision} {dtype} {(L, m, n, ranks, width)}")
    for size in EXTENSION_CASES:
        run(ops.extension_ops(device, *size), f"by CUDA {size}")
    return count


def parse(output: str) -> dict[str, Any]:
    """Errors that the tool counted, the first few of them, and how many cases had run by then."""
    summary = _SUMMARY.findall(output)
    return {
        "errors": int("".join(summary[-1])) if summary else None,
        "first": _ERROR.findall(output)[:5],
        "cases": len(re.findall(r"^case \d+:", output, re.MULTILINE)),
    }


def unavailable(output: str) -> str | None:
    """Why the sanitizer could not look at all; None where it did."""
    for pattern in (r"Device not supported[^\n]*", r"Unable to (?:find|load)[^\n]*", r"LibraryNotLoaded[^\n]*"):
        if match := re.search(pattern, output):
            return match[0]
    return None


def wrong(name: str, ran: tools.Ran, cases: int) -> str | None:
    """What is to be said against the kernels after a tool ran; None where it saw all cases and no error."""
    found = parse(ran.output)
    if ran.code is None:
        return f"{name}: over its time after {found['cases']} of {cases} cases"
    if ran.code or found["errors"] or found["errors"] is None:
        return f"{name}: {found['errors']} errors, exit code {ran.code}: {ran.last}"
    if found["cases"] != cases:
        return f"{name}: saw {found['cases']} of {cases} cases"
    return None


def measure(options: Options, report: Report) -> None:
    deadline = Deadline(0.8 * options.seconds)
    obstacle = ops.kernels_obstacle() if options.cuda else NEEDS_GPU
    if obstacle:
        return report.skip(obstacle)
    path = tools.find("compute-sanitizer")
    # Once without it: kernels are compiled into Triton's cache, and a failure is not taken for the sanitizer's.
    cases = report["cases"] = run_cases(options.device)
    found = sorted(ops.extension_ops(options.device, *EXTENSION_CASES[0]))
    report["extension"] = found or ops.extension_obstacle(options.device)
    if path is None:
        return report.skip("compute-sanitizer is not available: neither on PATH nor under CUDA_HOME")

    def run(tool: str) -> tools.Ran:
        program = [sys.executable, "-m", "benchmarks.gpu.sanitize", "cases", options.device]
        command = [path, "--tool", tool, "--error-exitcode", str(FOUND), *program]
        # torch's allocator hands out parts of large blocks: an access beyond a tensor would still be inside one.
        return tools.run(command, deadline.left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    with ThreadPoolExecutor() as pool:  # both at once: neither takes times
        ran = dict(zip(TOOLS, pool.map(run, TOOLS), strict=True))
    for tool, done in ran.items():
        report[tool] = parse(done.output) | {"code": done.code}
        print(done.output[-4000:], flush=True)
    reasons = {tool: reason for tool, done in ran.items() if (reason := unavailable(done.output))}
    if len(reasons) == len(TOOLS):
        return report.skip(f"compute-sanitizer is not available: {reasons[TOOLS[0]]}")
    if said := [reason for tool, done in ran.items() if (reason := wrong(tool, done, cases))]:
        sys.exit("; ".join(said))
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["cases"]:
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
        run_cases(sys.argv[2])
    else:
        stage.run(measure)
