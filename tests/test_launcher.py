"""Which way CUDA kernels are launched, what is said where there is none, and the compiled way without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import build_cuda
from flexlora_fast import _native, doctor
from flexlora_fast.backends import launcher, nvrtc
from flexlora_fast.errors import BackendError

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)


class Way:
    """A way to the kernels that keeps what was launched, or says why it is closed."""

    def __init__(self, reason: str | None = None, error: Exception | None = None) -> None:
        self.reason, self.error, self.launched = reason, error, list[Any]()

    def obstacle(self, device: int) -> str | None:
        return self.reason

    def launch(self, *arguments: Any) -> None:
        if self.error:
            raise self.error
        self.launched.append(arguments)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU with one stream, and nothing remembered of what another test made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device))
    launcher._ways.cache_clear(), launcher._warn.cache_clear()
    yield
    launcher._ways.cache_clear(), launcher._warn.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, compiled: Way | str, run_time: Way) -> None:
    """``compiled``: a way, or why the extension has no kernels."""
    extension = SimpleNamespace() if isinstance(compiled, str) else SimpleNamespace(cuda=compiled)
    monkeypatch.setattr(_native, "extension", extension)
    info = {"cuda_reason": compiled} if isinstance(compiled, str) else {}
    info |= {"cuda_release": "13.0", "cuda_architectures": ["9.0"]}
    monkeypatch.setattr(_native, "build_info", lambda: info)
    for name in ("obstacle", "launch"):
        monkeypatch.setattr(nvrtc, name, getattr(run_time, name))


def test_the_compiled_kernels_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, run_time = Way(), Way()
    install(monkeypatch, compiled, run_time)
    assert launcher.path(GPU) == launcher.path() == "compiled"
    assert launcher.obstacle(GPU) is None and launcher.detours() == "" and launcher.usable(GPU)
    launcher.launch("k", (3,), (4, 5), (1, 2.0, None), device=torch.device("cuda"), shared_bytes=6)
    assert compiled.launched == [("k", (3, 1, 1), (4, 5, 1), 6, 0, 70, (1, 2.0, None))] and not run_time.launched


def test_then_those_compiled_now(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, run_time = Way("no NVIDIA driver is loaded"), Way()
    install(monkeypatch, compiled, run_time)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launcher.usable(GPU)
    assert launcher.path() == "NVRTC through CuPy" and launcher.detours() == "compiled: no NVIDIA driver is loaded"
    launcher.launch("k", (1,), (1,), (), device=GPU)
    assert run_time.launched and not compiled.launched


def test_none_is_said_once_by_name_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "FLEXLORA_CUDA=0 was set while building", Way("CuPy cannot be imported"))
    reason = "compiled: the native extension was built without them: FLEXLORA_CUDA=0 .*; NVRTC through CuPy: CuPy can"
    with pytest.warns(RuntimeWarning, match=rf"many operations of torch.*\({reason}.*pip install cupy-cuda13x"):
        assert not launcher.usable(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not launcher.usable(GPU) and not launcher.usable(torch.device("cpu"))
    assert launcher.path() is None
    with pytest.raises(BackendError, match=f"kernel 'k' cannot be launched on cuda:0 \\({reason}.*pip install"):
        launcher.launch("k", (1,), (1,), (), device=GPU)


def test_without_a_gpu_there_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Way("no driver"), Way("no driver"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launcher.obstacle() == "torch sees no CUDA GPU" and launcher.path() is None
    for device in (GPU, torch.device("cuda")):
        with pytest.raises(BackendError, match="torch sees no CUDA GPU"):
            launcher.launch("k", (1,), (1,), (), device=device)
    with pytest.raises(ValueError, match="'k' runs on a CUDA GPU only, not on cpu"):
        launcher.launch("k", (1,), (1,), (), device=torch.device("cpu"))


def test_a_launch_that_fails_raises_and_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    run_time = Way()
    install(monkeypatch, Way(error=RuntimeError("kernel 'k' was refused on cuda:0: invalid argument")), run_time)
    with pytest.raises(BackendError, match="refused on cuda:0: invalid argument; device='cpu'"):
        launcher.launch("k", (1,), (1,), (), device=GPU)
    assert not run_time.launched
    launcher._ways.cache_clear()
    install(monkeypatch, Way(error=ValueError("argument 1 of 4")), run_time)
    with pytest.raises(ValueError, match="argument 1 of 4"):
        launcher.launch("k", (1,), (1,), (), device=GPU)


@pytest.mark.parametrize("grid", [(), (0,), (1, 2, 3, 4), (4, 0), (-1,)])
def test_extents_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, grid: tuple[int, ...]) -> None:
    install(monkeypatch, Way(), Way())
    with pytest.raises(ValueError, match="one to three numbers from 1"):
        launcher.launch("k", grid, (1,), (), device=GPU)
    with pytest.raises(ValueError, match="one to three numbers from 1"):
        launcher.launch("k", (1,), grid, (), device=GPU)


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536)])
def test_more_matrices_than_a_grid_holds_are_refused(monkeypatch: pytest.MonkeyPatch, grid: tuple[int, ...]) -> None:
    way = Way()
    install(monkeypatch, way, Way())
    launcher.launch("k", (65536, *(65535 for _ in grid[1:])), (1,), (), device=GPU)
    with pytest.raises(ValueError, match=r"kernel 'k': of \(1, .*65536.*at most 65535: launch it for fewer matrices"):
        launcher.launch("k", grid, (1,), (), device=GPU)
    assert len(way.launched) == 1


def test_without_an_extension_the_reason_is_its(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "reason", "it was built for another torch")
    assert launcher.not_compiled() == "there is no native extension: it was built for another torch"


@pytest.mark.parametrize(
    ("compiled", "run_time", "status", "words"),
    [
        (None, None, "ok", "compiled with CUDA 13.0 for 9.0"),
        ("the driver is old", None, "ok", "NVRTC through CuPy, since compiled: the driver is old"),
        ("the driver is old", "no CuPy", "broken", "none: compiled: the driver is old; NVRTC through CuPy: no CuPy"),
        ("FLEXLORA_CUDA=0", "no CuPy", "absent", "none: compiled: the native extension was built without them: FLEX"),
    ],
)
def test_doctor_names_the_way(
    monkeypatch: pytest.MonkeyPatch, compiled: str | None, run_time: str | None, status: str, words: str
) -> None:
    left_out = compiled is not None and compiled.startswith("FLEXLORA")
    install(monkeypatch, compiled if left_out and compiled else Way(compiled), Way(run_time))
    check = doctor._guarded("cuda kernels", doctor._cuda_kernels)
    assert check.status == status and check.detail.startswith(words)
    assert ("cupy" in check.remedy) == (compiled is not None)


@pytest.mark.parametrize(("compiled", "words"), [("no nvcc", "not compiled: the native"), (None, "compiled with CUDA")])
def test_doctor_says_what_was_built_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, compiled: str | None, words: str
) -> None:
    install(monkeypatch, compiled or Way(), Way())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = doctor._guarded("cuda kernels", doctor._cuda_kernels)
    assert check.status == "absent" and check.detail.endswith("; torch sees no GPU") and check.remedy
    assert check.detail.startswith(words)


# -- the compiled way, as nvcc builds it ---

PROBE = r"""
#include <cstdio>
#include <stdexcept>

#include "cuda/launch.h"

using namespace flexlora::cuda;

int main() {
    for (const auto& [name, kernel] : kernels()) {
        std::printf("%s", name.c_str());
        for (const std::string& parameter : kernel.parameters) std::printf(" %s", parameter.c_str());
        std::printf("\n");
    }
    std::printf("obstacle: %s\n", obstacle(0).c_str());
    const auto attempt = [](const char* name, std::size_t shared, const std::vector<Argument>& arguments) {
        try {
            launch(name, {1, 2, 3}, {256, 1, 1}, shared, 0, nullptr, arguments);
        } catch (const std::invalid_argument& error) {
            std::printf("invalid_argument: %s\n", error.what());
        } catch (const std::runtime_error& error) {
            std::printf("runtime_error: %s\n", error.what());
        }
    };
    const Address null{0, ""};
    attempt("flexlora_signs", 0, {null, std::int64_t{1}, 2.0, null});
    attempt("flexlora_signs", 0, {null, std::int64_t{0}, std::int64_t{0}, null});
    attempt("flexlora_signs", 100000, {null, std::int64_t{0}, std::int64_t{0}, null});
    attempt("nobody", 0, {});
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_the_compiled_way_without_a_gpu(tmp_path: Path) -> None:
    """nvcc's objects and CUDA's runtime, linked without torch: the table, and errors where there is no GPU."""
    nvcc = build_cuda.find_nvcc()
    toolkit = build_cuda.Toolkit(nvcc, build_cuda.release(nvcc), build_cuda.runtime_library(nvcc), ["9.0"])
    objects = build_cuda.compile_objects(toolkit, ROOT / "csrc", tmp_path)
    (tmp_path / "probe.cpp").write_text(PROBE)
    sources = [str(tmp_path / "probe.cpp"), str(ROOT / "csrc" / "cuda" / "kernel.cpp")]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    libraries = [str(toolkit.runtime), "-lrt", "-lpthread", "-ldl"]
    program = str(tmp_path / "probe")
    subprocess.run(["c++", *flags, *sources, *objects, *libraries, "-o", program], check=True)
    # Also on a machine with a GPU, none is to be seen.
    done = subprocess.run([program], capture_output=True, text=True, check=True, env={"CUDA_VISIBLE_DEVICES": ""})
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("flexlora_")]
    assert {name: tuple(parameters) for name, *parameters in table} == nvrtc.kernels()
    obstacle, wrong, refused, more, nobody = done.stdout.splitlines()[len(table) :]
    assert obstacle.removeprefix("obstacle: ")
    assert wrong == "invalid_argument: kernel 'flexlora_signs', argument 3 of 4: expected int32, got the float 2"
    words = "runtime_error: kernel 'flexlora_signs' with grid (1, 2, 3), block (256, 1, 1) and {} bytes of shared "
    for line, shared in ((refused, 0), (more, 100000)):
        assert line.startswith(words.format(shared) + "memory was refused on cuda:0: ") and "(cudaError" in line
    assert nobody.startswith("invalid_argument: there is no kernel 'nobody', only flexlora_")


def test_the_installed_table_is_the_parsed_one() -> None:
    if (reason := launcher.not_compiled()) is not None:
        pytest.skip(reason)
    table = _native.extension.cuda.kernels()  # type: ignore[union-attr]
    assert {name: tuple(parameters) for name, parameters in table.items()} == nvrtc.kernels()
