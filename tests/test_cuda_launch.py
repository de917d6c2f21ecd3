"""csrc/cuda/launch.cu against a CUDA runtime that is made up: what it is asked for, and what its refusals become."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import build_cuda

ROOT = Path(__file__).parents[1]

RUNTIME = r"""
#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#include "cuda/launch.h"

// What the environment says, or a number of no meaning.
static int said(const char* name, int otherwise) {
    const char* const text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

static thread_local int current = 0;
static std::atomic<int> allowed = 0;

extern "C" {
cudaError_t cudaDriverGetVersion(int* version) { return *version = said("DRIVER", 13000), cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaError_t(said("COUNT", 0)); }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return std::printf("device %d\n", current = device), cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaError_t(said("PENDING", 0)); }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfSomeKind"; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidValue ? "bad value" : "other"; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaError_t(said("IMAGE", 0)); }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    allowed = bytes;
    std::this_thread::sleep_for(std::chrono::milliseconds(said("SLOW", 0)));
    return std::printf("allowed %d\n", bytes), cudaError_t(said("ALLOW", 0));
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    return properties->major = 7, properties->minor = 5, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void** values, size_t shared, cudaStream_t stream) {
    std::printf("launched (%u, %u, %u) (%u, %u, %u) %zu on %p:", grid.x, grid.y, grid.z, block.x, block.y, block.z,
                shared, static_cast<void*>(stream));
    std::printf(" %p %d %lld %g %g\n", *static_cast<void**>(values[0]), *static_cast<int*>(values[1]),
                *static_cast<long long*>(values[2]), *static_cast<double*>(values[3]), *static_cast<float*>(values[4]));
    return shared > 48 * 1024 && int(shared) > allowed ? cudaErrorInvalidValue : cudaError_t(said("LAUNCH", 0));
}
}

namespace flexlora::cuda {

void kernel(const double*, int, long long, double, float) {}

const Kernels& kernels() {
    static const Kernels all{{"made_up", kernel_of(&kernel)}};
    return all;
}

}  // namespace flexlora::cuda

static void launch_with(int shared) {
    using namespace flexlora::cuda;
    try {
        const Address address{0x70, "float64"};
        const std::vector<Argument> arguments{address, std::int64_t{-7}, std::int64_t{1} << 40, 0.1, 0.5};
        launch("made_up", {1, 2, 3}, {4, 5, 6}, shared, 1, reinterpret_cast<void*>(0x50), arguments);
    } catch (const std::runtime_error& error) {
        std::printf("%s\n", error.what());
    }
}

int main(int, char** given) {
    std::printf("obstacle: %s\n", flexlora::cuda::obstacle(1).c_str());
    const int shared = std::atoi(given[1]), other = said("OTHER", 0);
    std::thread another([&] {
        for (int i = 0; other && i < 20; ++i) launch_with(other);
    });
    for (int i = 0; i < (other ? 20 : 1); ++i) launch_with(shared);
    another.join();
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc = build_cuda.find_nvcc()
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("no CUDA headers or no g++ here")
    folder = tmp_path_factory.mktemp("launch")
    source, built = folder / "runtime.cpp", folder / "program"
    source.write_text(RUNTIME)
    csrc, headers = ROOT / "csrc", build_cuda.runtime_library(nvcc).parents[1] / "include"
    # There is no device code in launch.cu, so any compiler takes it.
    sources = [source, csrc / "cuda" / "launch.cu", csrc / "cuda" / "kernel.cpp"]
    flags = ["-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{csrc}", f"-isystem{headers}", "-x", "c++"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(built)], check=True)
    return built


def run(program: Path, shared: int = 0, **said: int) -> list[str]:
    environment = {name: str(value) for name, value in said.items()}
    done = subprocess.run([program, str(shared)], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


LAUNCHED = "launched (1, 2, 3) (4, 5, 6) {} on 0x50: 0x70 -7 1099511627776 0.1 0.5"


@pytest.mark.parametrize(("shared", "allowed"), [(0, []), (49152, []), (49153, ["allowed 49153"])])
def test_a_launch_on_another_device_and_back(program: Path, shared: int, allowed: list[str]) -> None:
    probed = ["device 1", "device 0", "obstacle: "]
    assert run(program, shared) == [*probed, "device 1", *allowed, LAUNCHED.format(shared), "device 0"]


@pytest.mark.parametrize(
    ("shared", "said"),
    [(0, {"LAUNCH": 1}), (0, {"PENDING": 1}), (60000, {"ALLOW": 1})],
)
def test_refusals_quote_kernel_geometry_and_cudas_words(program: Path, shared: int, said: dict[str, int]) -> None:
    *_, back, words = run(program, shared, **said)
    assert back == "device 0" and words == (
        f"kernel 'made_up' with grid (1, 2, 3), block (4, 5, 6) and {shared} bytes of shared memory was refused on "
        "cuda:1: bad value (cudaErrorOfSomeKind)"
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"DRIVER": 0}, "no NVIDIA driver is loaded"),
        (
            {"DRIVER": 12040, "COUNT": 35},
            "the NVIDIA driver is for CUDA 12.4 at most and the kernels were built with ",
        ),
        ({"COUNT": 100}, "other (cudaErrorOfSomeKind)"),
        ({"IMAGE": 209}, "they were not built for this GPU: rebuild with TORCH_CUDA_ARCH_LIST=7.5"),
        ({"IMAGE": 222}, "they were not built for this GPU: rebuild with TORCH_CUDA_ARCH_LIST=7.5"),
    ],
)
def test_obstacles_say_what_to_do(program: Path, said: dict[str, int], words: str) -> None:
    (found,) = (line.removeprefix("obstacle: ") for line in run(program, **said) if line.startswith("obstacle: "))
    assert found.startswith(words)


def test_threads_do_not_lower_what_each_other_are_allowed(program: Path) -> None:
    lines = run(program, 60000, OTHER=90000, SLOW=1)
    for shared in (60000, 90000):
        assert lines.count(LAUNCHED.format(shared)) == 20
    assert not [line for line in lines if "refused" in line]
