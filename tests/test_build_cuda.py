"""How setup.py builds the CUDA kernels: whether, for which GPUs, with what; and what it says where it does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import build_cuda

ROOT = Path(__file__).parents[1]


NVCC = """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
*--list-gpu-code*) printf 'sm_80\\nsm_90\\nsm_100\\nsm_120\\n' ;;
*--dryrun*) echo '#$ LIBRARIES=  "-L{folder}/lib/stubs" "-L{folder}/lib"' >&2 ;;
*) echo "$@"; {compile} ;;
esac
"""


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A toolkit that says what one says; ``make(...)`` changes what."""
    for name in ("FLEXLORA_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_PATH", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True), (home / "lib").mkdir()
    (home / "lib" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"

    def make(release: str = "13.0", compile: str = "exit 0") -> Path:
        nvcc.write_text(NVCC.format(release=release, folder=home, compile=compile))
        nvcc.chmod(0o755)
        return home

    monkeypatch.setenv("CUDA_HOME", str(make()))
    return make


def torch(cuda: str | None = "13.0", present: tuple[tuple[int, int], ...] = ()) -> Any:
    """A torch for that CUDA, which sees those GPUs."""
    return SimpleNamespace(
        __version__="2.11.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(present),
            device_count=lambda: len(present),
            get_device_capability=lambda index: present[index],
        ),
    )


SOURCES = ROOT / "csrc" / "cuda"


@pytest.mark.parametrize(
    ("listed", "present", "supported", "expected"),
    [
        ("", [], ["8.0", "9.0", "10.0", "12.0"], ["8.0", "9.0", "10.0+PTX"]),
        ("", [], ["7.5", "8.0", "9.0"], ["8.0", "9.0+PTX"]),
        ("", [(9, 0), (8, 0), (9, 0)], ["8.0"], ["8.0", "9.0"]),
        (" 8.0;9.0a 10.0+PTX, 8.0", [(9, 0)], [], ["8.0", "9.0a", "10.0+PTX"]),
    ],
)
def test_architectures(listed, present, supported, expected) -> None:
    assert build_cuda.architectures(listed, present, supported) == expected


@pytest.mark.parametrize("listed", ["Hopper", "9", "9.0+ptx", "sm_90", "8.0;all"])
def test_an_architecture_that_is_no_number_is_quoted(listed) -> None:
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST='.*' is no architecture; write 9.0 or 9.0\+PTX"):
        build_cuda.architectures(listed, [], [])


def test_flags_of_architectures() -> None:
    expected = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_100,code=[sm_100,compute_100]"]
    assert build_cuda.code_flags(["9.0a", "10.0+PTX"]) == expected


def test_a_plan(toolkit, monkeypatch) -> None:
    home = toolkit("12.8")
    found = build_cuda.plan(SOURCES, torch(present=((9, 0),)))
    assert (found.nvcc, found.release) == (home / "bin" / "nvcc", "12.8")
    assert found.runtime == (home / "lib" / "libcudart_static.a").resolve() and found.architectures == ["9.0"]
    assert build_cuda.plan(SOURCES, torch()).architectures == ["8.0", "9.0", "10.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert build_cuda.plan(SOURCES, torch()).architectures == ["8.6"]
    monkeypatch.setenv("FLEXLORA_CUDA", "1")
    assert build_cuda.plan(SOURCES, torch(cuda=None)).architectures == ["8.6"]


def test_why_they_are_left_out(toolkit, monkeypatch, tmp_path) -> None:
    home = toolkit()
    assert "torch 2.11.0 is built without CUDA" in build_cuda.plan(SOURCES, torch(cuda=None))
    assert build_cuda.plan(tmp_path, torch()) == "there are no CUDA sources in csrc/cuda"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert "'Hopper' is no architecture" in build_cuda.plan(SOURCES, torch())
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    (home / "lib" / "libcudart_static.a").unlink()
    assert build_cuda.plan(SOURCES, torch()).startswith(f"no libcudart_static.a where {home}/bin/nvcc looks")
    toolkit("of a strange kind")
    assert "names no release" in build_cuda.plan(SOURCES, torch())
    (home / "bin" / "nvcc").unlink()
    assert build_cuda.plan(SOURCES, torch()) == f"no CUDA toolkit: there is no nvcc in {home}/bin"
    monkeypatch.setenv("FLEXLORA_CUDA", "0")
    assert build_cuda.plan(SOURCES, torch()) == "FLEXLORA_CUDA=0 was set while building"
    monkeypatch.setenv("FLEXLORA_CUDA", "maybe")
    with pytest.raises(SystemExit, match="FLEXLORA_CUDA='maybe': set it to 0 or 1"):
        build_cuda.plan(SOURCES, torch())


def test_nvcc_is_asked_for_every_source(toolkit, monkeypatch, tmp_path, capsys) -> None:
    toolkit()
    monkeypatch.setenv("CXX", "g++-12 -pipe")
    monkeypatch.setenv("MAX_JOBS", "3")
    plan = build_cuda.plan(SOURCES, torch(present=((9, 0),)))
    objects = build_cuda.compile_objects(plan, ROOT / "csrc", tmp_path / "out")
    sources = sorted(SOURCES.glob("*.cu"))
    assert objects == [str(tmp_path / "out" / f"{source.stem}.cu.o") for source in sources]
    said = capsys.readouterr().out
    for source in sources:
        assert f"-c {source}" in said
    # As CuPy compiles them: numbers too small for float32's exponent are zeros in both.
    assert "-std=c++17 -ftz=true" in said and "-ccbin g++-12 --threads 3 -gencode=arch=compute_90,code=sm_90" in said


def test_nvccs_own_words_are_the_reason(toolkit, tmp_path) -> None:
    toolkit(compile="echo 'unsupported GNU version' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"nvcc cannot compile kernels.cu: unsupported GNU version"):
        build_cuda.compile_objects(build_cuda.plan(SOURCES, torch()), ROOT / "csrc", tmp_path)
