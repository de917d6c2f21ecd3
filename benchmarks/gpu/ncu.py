"""Nsight Compute's figures for the kernels that dominate: achieved bandwidth, arithmetic, occupancy."""

from __future__ import annotations

import csv
import re
import sys
from typing import Any

import torch

from benchmarks.gpu import ops, stage, tools
from benchmarks.gpu.stage import NEEDS_GPU, Deadline, Options, Report

# As round-7b, fewer layers: L, m, n, ranks, width of X. ncu runs each kernel several times and saves what it writes.
_SIZE = (16, 4096, 4096, (16,) * 100, 80)
_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy")
# By ncu's name of a metric: ours, and its unit.
_WANTED = {
    "Duration": "seconds",
    "DRAM Throughput": "dram_share",
    "Memory Throughput": "memory_share",
    "L2 Cache Throughput": "l2_share",
    "Compute (SM) Throughput": "compute_share",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
}
_SCALE = {"%": 1e-2, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "second": 1.0, "msecond": 1e-3, "usecond": 1e-6}
_SCALE |= {"nsecond": 1e-9, "register/thread": 1.0, "": 1.0}


def run_workload(device: str) -> None:
    """The ops of a round, warmed up, then once each between the profiler's marks."""
    L, m, n, ranks, width = _SIZE
    factors = ops.stacks(L, m, n, ranks, torch.bfloat16, device)
    X, Y = (torch.randn(L, side, width, device=device) for side in (n, m))
    calls = ops.kernel_ops(factors, X, Y, "bf16x3") | ops.extension_ops(device, L, m, width)
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def parse(output: str) -> list[dict[str, Any]]:
    """One row a launch, from ncu's CSV (``--csv --page details``), whatever the program printed around it."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return []
    table = [line for line in lines[start:] if line.startswith('"')]
    rows: dict[str, dict[str, Any]] = {}
    for entry in csv.DictReader(table):
        name = re.sub(r"\(.*", "", entry["Kernel Name"])
        row = rows.setdefault(entry["ID"], {"kernel": name, "grid": entry["Grid Size"], "block": entry["Block Size"]})
        metric, unit = entry["Metric Name"], entry["Metric Unit"]
        if metric in _WANTED and unit in _SCALE:
            row.setdefault(_WANTED[metric], float(entry["Metric Value"].replace(",", "")) * _SCALE[unit])
    return list(rows.values())


def unavailable(ran: tools.Ran) -> str:
    """Why there are no figures."""
    for pattern in (r"ERR_NVGPUCTRPERM[^\n]*", r"LibraryNotLoaded[^\n]*", r"==ERROR==[^\n]*"):
        if match := re.search(pattern, ran.output):
            return match[0]
    return "it took too long" if ran.code is None else f"exit code {ran.code}: {ran.last}"


def measure(options: Options, report: Report) -> None:
    deadline = Deadline(0.75 * options.seconds)
    obstacle = ops.kernels_obstacle() if options.cuda else NEEDS_GPU
    if obstacle:
        return report.skip(obstacle)
    tool = tools.find("ncu")
    if tool is None:
        return report.skip("ncu is not available: neither on PATH nor under /opt/nvidia/nsight-compute")
    program = [sys.executable, "-m", "benchmarks.gpu.ncu", "workload", options.device]
    sections = [argument for section in _SECTIONS for argument in ("--section", section)]
    kernels = "regex:" + "|".join((*ops.KERNELS, ops.CUDA_KERNELS))
    # The card's clocks stay as they are: others may share it.
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", kernels]
    ran = tools.run([*command, *sections, "--csv", "--page", "details", *program], deadline.left)
    launches = parse(ran.output)
    if not launches:
        print(ran.output[-4000:], flush=True)
        return report.skip(f"ncu is not available: {unavailable(ran)}")
    report["launches"] = launches
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["workload"]:
        run_workload(sys.argv[2])
    else:
        stage.run(measure)
