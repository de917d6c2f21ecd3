"""The doctor: every part is looked at, nothing raises, and whatever is not well comes with a remedy."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch

from flexlora_fast import _native, doctor
from flexlora_fast.doctor import Check

NAMES = [
    "python", "torch", "threads", "cpu", "extension", "cuda toolkit", "gpu", "cuda kernels", "gpu round",
    "memory", "safetensors", "triton", "cupy", "peft", "transformers", "flwr", "nvflare",
]  # fmt: skip


def find(name: str) -> Check:
    """One check alone, run as checks() runs it."""
    return doctor._guarded(name, doctor._PROBES[name])


def test_everything_is_looked_at_and_has_a_remedy_where_needed():
    found = doctor.checks()
    assert [check.name for check in found] == NAMES
    for check in found:
        assert check.status in {"ok", "absent", "broken"} and check.detail, check
        assert check.status == "ok" or check.remedy, check


def test_the_essentials_are_ok_here():
    assert {name: find(name).status for name in ("python", "torch", "safetensors")} == {
        "python": "ok", "torch": "ok", "safetensors": "ok",
    }  # fmt: skip
    assert torch.__version__ in find("torch").detail


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError("lib.so missing"), SystemExit(3), AttributeError("x")])
def test_a_check_that_fails_is_reported_not_raised(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setitem(doctor._PROBES, "gpu", fail)
    check = next(c for c in doctor.checks() if c.name == "gpu")
    assert check.status == "broken" and type(error).__name__ in check.detail and check.remedy


def test_a_package_that_is_not_installed_is_absent(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    check = find("peft")
    assert (check.status, check.remedy) == ("absent", "optional: `pip install 'flexlora_fast[peft]'`")


def test_a_package_that_does_not_import_is_broken(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    check = find("cupy")
    assert check.status == "broken" and "libcuda.so.1" in check.detail


def test_cupy_is_known_by_its_module_whatever_its_wheel_is_called(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    module = ModuleType("cupy")
    module.__version__ = "14.0.1"
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.importlib.metadata, "version", not_found)
    assert find("cupy") == Check("cupy", "ok", "14.0.1")


def test_a_version_outside_the_declared_range_is_broken(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.4.0")
    check = find("peft")
    assert check.status == "broken"
    assert "0.4.0 is outside the supported" in check.detail and "pip install 'peft" in check.remedy


def test_an_uninstalled_checkout_supports_any_version(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", not_found)
    assert doctor._supported("peft") is None


@pytest.mark.parametrize(("broken", "status"), [(True, "broken"), (False, "absent")])
def test_a_missing_extension_says_why(monkeypatch, broken, status):
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "reason", "it was not built: no compiler")
    monkeypatch.setattr(_native, "broken", broken)
    check = find("extension")
    assert (check.status, check.detail) == (status, "it was not built: no compiler")
    assert "pip install --no-build-isolation" in check.remedy


@pytest.mark.parametrize(
    ("float32", "bfloat16", "status", "words"),
    [
        (None, None, "ok", "multiplies float32; multiplies bfloat16"),
        (None, "this CPU is old", "ok", "multiplies float32; does not multiply bfloat16: this CPU is old"),
        ("it is an ARM", "it is an ARM", "absent", "does not multiply float32: it is an ARM; does not multiply bf"),
    ],
)
def test_the_extension_names_the_precisions_it_multiplies(monkeypatch, float32, bfloat16, status, words):
    extension = ModuleType("_C")
    extension.obstacle = {"float32": float32, "bfloat16": bfloat16}.__getitem__
    monkeypatch.setattr(_native, "extension", extension)
    check = find("extension")
    assert check.status == status and words in check.detail and (check.status == "ok" or check.remedy)


def test_the_extension_here_says_the_same():
    if _native.extension is None:
        pytest.skip(f"no native extension: {_native.reason}")
    for precision in ("float32", "bfloat16"):
        said = f"does not multiply {precision}" not in find("extension").detail
        assert said == _native.extension.can_multiply(precision)


def test_more_threads_than_cores_is_called_out(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    check = find("threads")
    assert check.status == "broken" and "OMP_NUM_THREADS" in check.remedy


def test_a_cuda_torch_without_a_gpu_is_broken_only_beside_a_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert find("gpu").status == "broken"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find("gpu").status == "absent" and "CPU build" in find("gpu").detail
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert find("gpu").detail == "no NVIDIA driver found"


def test_gpus_are_listed_with_their_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 * doctor.GIB, 139 * doctor.GIB))
    check = find("gpu")
    assert check.status == "ok"
    assert check.detail.startswith("cuda:0 NVIDIA H200 (sm_90, 100.0 of 139.0 GiB free); cuda:1")


def test_a_toolkit_that_does_not_run_is_broken(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find("cuda toolkit").status == "broken"
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    check = find("cuda toolkit")
    assert check.status == "ok" and check.detail == f"{nvcc}: release 13.0, V13.0.88"


def test_free_memory_is_the_containers_where_that_is_less(tmp_path):
    assert doctor._free_memory(tmp_path)[0] is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable:    4194304 kB\n")
    assert doctor._free_memory(tmp_path) == (4 * doctor.GIB, "this machine")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{doctor.GIB}\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert doctor._free_memory(tmp_path) == (4 * doctor.GIB, "this machine")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{3 * doctor.GIB}\n")
    assert doctor._free_memory(tmp_path) == (2 * doctor.GIB, "this container's limit")
