"""What the GPU gate reads of NVIDIA's tools, from output as they document and print it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import commit, ncu, sanitize, tools
from benchmarks.gpu.stage import Options, Report
from flexlora_fast.backends import cuda

NCU = '''\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
case 1
==PROF== Profiling "contract_kernel" - 0: 0%....50%....100% - 9 passes
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"
"0","4242","python3.12","127.0.0.1","contract_kernel","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"GPU Speed Of Light Throughput","Duration","us","1,234.50","","",""
"0","4242","python3.12","127.0.0.1","contract_kernel","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"GPU Speed Of Light Throughput","DRAM Throughput","%","81.25","","",""
"0","4242","python3.12","127.0.0.1","contract_kernel","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"Launch Statistics","Registers Per Thread","register/thread","128","","",""
"0","4242","python3.12","127.0.0.1","contract_kernel","1","7","(128, 1, 1)","(528, 1, 1)","0","9.0",\
"GPU Speed Of Light Throughput","","","","SOLBottleneck","OPT","This kernel is fine, ""really"""
"1","4242","python3.12","127.0.0.1","gram_kernel(float*, int)","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0",\
"Occupancy","Achieved Occupancy","%","24.9","","",""
'''


def test_ncu_is_read() -> None:
    first, second = ncu.parse(NCU)
    assert first["kernel"] == "contract_kernel" and first["grid"] == "(528, 1, 1)"
    assert first["seconds"] == pytest.approx(1.2345e-3) and first["dram_share"] == pytest.approx(0.8125)
    assert first["registers"] == 128
    assert second["kernel"] == "gram_kernel" and second["occupancy"] == pytest.approx(0.249)
    assert ncu.parse("==PROF== no kernels were profiled\n") == []


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", 1, "ERR_NVGPUCTRPERM - The user does not"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", 255, "LibraryNotLoaded"),
        ("Traceback\nImportError: no triton\n", 1, "exit code 1: ImportError: no triton"),
        ("", None, "it took too long"),
    ],
)
def test_why_there_are_no_counters(output: str, code: int | None, words: str) -> None:
    assert ncu.unavailable(tools.Ran(code, output)).startswith(words)


MEMCHECK = """\
========= COMPUTE-SANITIZER
case 1: project bf16x3 torch.bfloat16 (2, 65, 130, (1, 7, 30), 5)
========= Invalid __global__ write of size 4 bytes
=========     at combine_kernel+0x2f0 in combine.py:71
=========     by thread (3,0,0) in block (2,0,0)
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call
case 2: gram bf16x3 torch.bfloat16 (2, 65, 130, (1, 7, 30), 5)
========= ERROR SUMMARY: 2 errors
"""


def test_memcheck_is_read() -> None:
    found = sanitize.parse(MEMCHECK)
    assert (found["errors"], found["cases"]) == (2, 2)
    assert found["first"][0] == "Invalid __global__ write of size 4 bytes"
    clean = sanitize.parse("========= COMPUTE-SANITIZER\ncase 1: x\n========= ERROR SUMMARY: 0 errors\n")
    assert clean == {"errors": 0, "first": [], "cases": 1}
    assert sanitize.parse("")["errors"] is None
    assert sanitize.unavailable("========= Error: Device not supported. Please refer to the documentation\n")
    assert sanitize.unavailable(MEMCHECK) is None


RACECHECK = """\
========= COMPUTE-SANITIZER
case 1: ritz of the extension (3, 65, 17)
========= Error: Race reported between Write access at ritz_kernel+0x2b80 in ritz.cuh:153
=========     and Read access at ritz_kernel+0x2bd0 in ritz.cuh:155 [48 hazards]
=========
========= Warning: Race reported between Read access at gram_kernel+0x140 in gram.py:30
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_racecheck_is_read() -> None:
    found = sanitize.parse(RACECHECK)
    assert (found["errors"], found["cases"]) == (1, 1)
    assert found["first"][0].startswith("Error: Race reported between Write access at ritz_kernel")
    clean = "case 1: x\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitize.parse(clean) == {"errors": 0, "first": [], "cases": 1}


@pytest.mark.parametrize(
    ("output", "code", "cases", "words"),
    [
        (RACECHECK.replace("1 error,", "0 errors,"), 0, 1, None),
        (RACECHECK, sanitize.FOUND, 1, "racecheck: 1 errors, exit code 99"),
        (RACECHECK.replace("1 error,", "0 errors,"), 1, 1, "racecheck: 0 errors, exit code 1"),
        (RACECHECK.replace("1 error,", "0 errors,"), 0, 2, "racecheck: saw 1 of 2 cases"),
        ("case 1: x\n", 0, 1, "racecheck: None errors"),  # the tool said nothing: nothing is known
        ("case 1: x\n", None, 3, "racecheck: over its time after 1 of 3 cases"),
    ],
)
def test_what_a_tool_says_against_the_kernels(output: str, code: int | None, cases: int, words: str | None) -> None:
    found = sanitize.wrong("racecheck", tools.Ran(code, output), cases)
    assert found is words is None or (found is not None and words is not None and found.startswith(words))


def test_the_cuda_kernels_are_called_as_their_host_functions_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """With launches that only note the kernel's name, on a CPU: shapes, types and keywords fit in every case."""
    launched: set[str] = set()
    monkeypatch.setattr(sanitize.ops, "extension_obstacle", lambda device: None)
    monkeypatch.setattr(cuda, "launch", lambda name, *arguments, **options: launched.add(name))
    monkeypatch.setattr(cuda, "_most_shared", lambda device: 227 * 1024, raising=False)
    for size in sanitize.EXTENSION_CASES:
        for call in sanitize.ops.extension_ops("cpu", *size).values():
            call()
    known = re.findall(r"kernel\((flexlora_\w+)\)", (commit.ROOT / "csrc/cuda/kernels.cuh").read_text())
    assert launched and launched <= set(known)
    assert all(name.startswith(sanitize.ops.CUDA_KERNELS) for name in known)


SANITIZER = """\
#!{python}
import sys
tool = sys.argv[sys.argv.index("--tool") + 1]
print("case 1: x")
print({{"memcheck": "========= ERROR SUMMARY: 0 errors", "racecheck": "========= {races}"}}[tool])
sys.exit({code} if tool == "racecheck" else 0)
"""


@pytest.mark.parametrize("races", [0, 2])
def test_both_tools_look_at_the_kernels(races: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the tool nor the kernels are there: both are made up."""
    summary = f"RACECHECK SUMMARY: {races} hazards displayed ({races} errors, 0 warnings)"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable, races=summary, code=99 if races else 0))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize.ops, "kernels_obstacle", lambda: None)
    monkeypatch.setattr(sanitize.ops, "extension_ops", lambda device, *size: {})
    monkeypatch.setattr(sanitize.ops, "extension_obstacle", lambda device: "built without nvcc")
    monkeypatch.setattr(sanitize, "run_cases", lambda device: 1)
    monkeypatch.setattr(tools, "find", lambda name: str(tool))
    report = Report(tmp_path / "sanitize.json")
    options = Options("cuda", False, 60, tmp_path / "sanitize.json")
    if races:
        with pytest.raises(SystemExit, match=r"^racecheck: 2 errors, exit code 99"):
            sanitize.measure(options, report)
    else:
        sanitize.measure(options, report)
    assert report["memcheck"] == {"errors": 0, "first": [], "cases": 1, "code": 0}
    assert report["racecheck"]["errors"] == races and report["extension"] == "built without nvcc"


def test_a_tool_is_ended_at_its_time() -> None:
    assert tools.find("no-such-tool") is None
    ran = tools.run([sys.executable, "-c", "print('here', flush=True); import time; time.sleep(60)"], 3)
    assert ran.code is None and ran.last == "here"
    assert tools.run([sys.executable, "-c", "raise SystemExit(3)"], 30).code == 3
