"""The device code of csrc/cuda compiled: for GPUs that are not here, for NVRTC's rules, and for a race detector."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "csrc" / "cuda"
HEADERS = sorted(FOLDER.glob("*.cuh"))
# Shared memory that a block can have (bytes), by target.
TARGETS = {"80": 163 * 1024, "90a": 227 * 1024, "100": 227 * 1024}
# What the CPU needs instead of what nvcc and NVRTC have built in.
HOST_ONLY = {"math.h", "stddef.h"}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def usage_by_kernel(log: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(kernel, target) -> registers, static shared bytes, bytes spilled or on the stack, from ``ptxas -v``."""
    found, current, spilled = {}, None, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            current = match.group(1), match.group(2)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = max(int(x) for x in match.groups())
        elif current and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[current] = int(match.group(1)), int(shared.group(1)) if shared else 0, spilled
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> tuple[Path, dict[tuple[str, str], tuple[int, int, int]]]:
    """All kernels of the folder for all targets, in one run of nvcc: the fat binary, and what ptxas said."""
    folder = tmp_path_factory.mktemp("cuda")
    source, binary = folder / "all.cu", folder / "all.fatbin"
    source.write_text("".join(f'#include "{header.name}"\n' for header in HEADERS))
    architectures = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS]
    flags = ["-std=c++17", "-Xptxas", "-v", "--Werror", "all-warnings", "-I", FOLDER, "--threads", "0"]
    log = run("nvcc", "-fatbin", *architectures, *flags, "-o", binary, source)
    return binary, usage_by_kernel(log)


def kernels() -> set[str]:
    pattern = r'extern "C" __global__ void\s+__launch_bounds__\([^)]*\)\s+(\w+)\('
    return {name for header in HEADERS for name in re.findall(pattern, header.read_text())}


def triton_tools() -> list[Path]:
    """The cuobjdump that comes with Triton, where that is installed."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    return [path for f in folders or [] for path in Path(f).glob("backends/nvidia/bin/cuobjdump")]


def ptx_of(binary: Path) -> str:
    source = binary.with_suffix(".cu")
    run("nvcc", "-ptx", "-std=c++17", "-arch=sm_80", "-I", FOLDER, "-o", binary.with_suffix(".ptx"), source)
    return binary.with_suffix(".ptx").read_text()


@needs_nvcc
def test_kernels_compile_without_spills(compiled, record_property):
    _, usage = compiled
    assert {name for name, _ in usage} == kernels() and len(usage) == len(kernels()) * len(TARGETS)
    grid = Table("kernel", *(f"sm_{t}" for t in TARGETS), title="registers / static shared bytes / spilled bytes")
    for name in sorted(kernels()):
        cells = [" / ".join(map(str, usage[name, target])) for target in TARGETS]
        grid.add_row(name, *cells)
        record_property(name, cells)
    Console(width=120).print(grid)
    assert not [key for key, (_, _, spilled) in usage.items() if spilled]
    assert not [key for key, (_, shared, _) in usage.items() if shared > 48 * 1024]


@needs_nvcc
def test_products_run_on_the_float64_tensor_cores(compiled):
    """The machine code has DMMA instructions; where nothing can take it apart, PTX has to have what they come from."""
    binary, _ = compiled
    names = ("flexlora_gram64", "flexlora_apply_right")
    tools = [shutil.which("cuobjdump"), *(str(path) for path in triton_tools())]
    if tool := next((t for t in tools if t), None):
        text, wanted, named = run(tool, "-sass", "-fun", ",".join(names), binary), "DMMA", r"Function : (\w+)"
    else:
        text, wanted, named = ptx_of(binary), "mma.sync.aligned.m8n8k4", r"\.visible \.entry (\w+)"
    parts = re.split(named, text)[1:]
    with_products = [name for name, code in zip(parts[::2], parts[1::2], strict=True) if wanted in code]
    for name in names:
        assert with_products.count(name) >= (len(TARGETS) if wanted == "DMMA" else 1)
    assert wanted != "DMMA" or "DMMA.16x8x4" in text  # Hopper's, at twice the rate of those of 8 rows


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
@needs_gxx
def test_every_header_stands_alone_and_keeps_to_what_nvrtc_has(header):
    text = header.read_text()
    ours = {path.name for path in HEADERS}
    assert set(re.findall(r'#include [<"]([^>"]+)[>"]', text)) <= ours | HOST_ONLY
    assert "std::" not in text and "torch" not in re.sub(r"//.*", "", text)
    run(
        "g++",
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-include",
        header,
        "-x",
        "c++",
        "/dev/null",
    )


@needs_gxx
def test_blocks_of_threads_have_no_data_races(tmp_path):
    """Every algorithm by 6 threads under ThreadSanitizer, and with the bits that one thread gives."""
    program = tmp_path / "races"
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc"]
    probe = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(probe.strip()).is_absolute():
        pytest.skip("g++ has no libtsan here")
    run("g++", *flags, "-o", program, FOLDER / "tests" / "races.cpp")
    # ThreadSanitizer wants the address space where it was built for: without randomisation it is.
    quiet = ["env", "TSAN_OPTIONS=halt_on_error=1", *(["setarch", "-R"] if shutil.which("setarch") else [])]
    assert run(*quiet, program).endswith("no races\n")
    broken = subprocess.run([*quiet, program, "race"], capture_output=True, text=True, check=False)
    assert broken.returncode and "data race" in broken.stderr


@needs_gxx
def test_lanes_of_a_gpu_have_the_entries_that_they_should(tmp_path):
    """As many threads as a GPU has, with shuffles, products of warps and late copies as they are documented."""
    program = tmp_path / "lanes"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", ROOT / "csrc"]
    run("g++", *flags, "-o", program, FOLDER / "tests" / "lanes.cpp")
    assert run(program) == "lanes agree\n"
