"""What of this machine the package can use, what it cannot, and what to do about it.

Every check runs on its own and none raises: a part that fails while it is looked at is reported as broken.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

Status = Literal["ok", "absent", "broken"]
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    ``status``: "ok"; "absent", where something optional is not there and all else works; "broken", where something
    is there and does not work. ``remedy`` says what to do, and is empty where nothing needs doing.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def checks() -> list[Check]:
    """Look at everything, in the order in which one part rests on the other. Never raises.

    >>> from flexlora_fast.doctor import checks
    >>> checks()[0].name, checks()[0].status
    ('python', 'ok')
    """
    return [_guarded(name, probe) for name, probe in _PROBES.items()]


def _guarded(name: str, probe: Callable[[str], Check]) -> Check:
    """Run one probe; whatever it raises becomes its finding."""
    try:
        return probe(name)
    # SystemExit too: some packages call sys.exit() when they cannot be imported.
    except (Exception, SystemExit) as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}", f"reinstall {name}, or report this")


def _python(name: str) -> Check:
    detail = f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}"
    return Check(name, "ok", detail)


def _torch(name: str) -> Check:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    mkl = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    detail = f"{torch.__version__} ({build}, {mkl})"
    return _within_range(Check(name, "ok", detail), torch.__version__)


def _threads(name: str) -> Check:
    import torch

    threads = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{threads} torch threads on {usable} usable cores"
    limits = [f"{key}={os.environ[key]}" for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ]
    detail += f" ({', '.join(limits)})" if limits else ""
    if threads > usable:
        remedy = f"set OMP_NUM_THREADS={usable}: more threads than cores slow each other down"
        return Check(name, "broken", detail, remedy)
    return Check(name, "ok", detail)


def _cpu(name: str) -> Check:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{platform.machine()}, torch uses {capability}"
    if capability == "DEFAULT":
        return Check(name, "ok", detail, "a CPU with AVX2 or newer would be several times faster")
    return Check(name, "ok", detail)


def _extension(name: str) -> Check:
    from flexlora_fast import _native

    if _native.extension is not None:
        info = _native.build_info()
        parts = "CPU and CUDA" if info.get("cuda") else "CPU"
        found = {precision: _native.extension.obstacle(precision) for precision in ("float32", "bfloat16")}
        detail = f"loaded ({parts}), built for torch {info.get('torch', 'unknown')}; "
        detail += "; ".join(
            f"multiplies {precision}" if why is None else f"does not multiply {precision}: {why}"
            for precision, why in found.items()
        )
        if found["float32"] is None:
            return Check(name, "ok", detail)
        return Check(name, "absent", detail, "nothing needs doing: torch's own products are taken, which are slower")
    remedy = (
        "optional: `pip install --no-build-isolation --no-deps --force-reinstall -v .` in the source, "
        "with torch and a C++ compiler installed"
    )
    return Check(name, "broken" if _native.broken else "absent", _native.reason or "", remedy)


def _toolkit(name: str) -> Check:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None:
        return Check(name, "absent", "no nvcc on PATH and CUDA_HOME is not set", "only needed to compile CUDA sources")
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=True)
    release = next((line for line in done.stdout.splitlines() if "release" in line), "unknown version")
    return Check(name, "ok", f"{nvcc}: {release.partition(', ')[2] or release}")


def _gpu(name: str) -> Check:
    import torch

    if torch.cuda.is_available():
        return Check(name, "ok", "; ".join(_describe_gpu(index) for index in range(torch.cuda.device_count())))
    if shutil.which("nvidia-smi") is None:
        return Check(name, "absent", "no NVIDIA driver found", "optional: everything runs on the CPU")
    if torch.version.cuda is None:
        remedy = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        return Check(name, "absent", "there is an NVIDIA driver, but torch is a CPU build", remedy)
    remedy = "compare `nvidia-smi` with torch.version.cuda: the driver may be too old, or CUDA_VISIBLE_DEVICES empty"
    return Check(name, "broken", f"torch is built for CUDA {torch.version.cuda}, but sees no GPU", remedy)


def _describe_gpu(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor}, {memory})"


def _cuda_kernels(name: str) -> Check:
    """Which way the kernels of csrc/cuda are reached, and why not by a better one."""
    import torch

    from flexlora_fast import _native
    from flexlora_fast.backends import launcher

    info = _native.build_info()
    absent = launcher.not_compiled()
    built = f"compiled with CUDA {info.get('cuda_release')} for {', '.join(info.get('cuda_architectures', []))}"
    built = built if absent is None else f"not compiled: {absent}"
    if not torch.cuda.is_available():
        return Check(name, "absent", f"{built}; torch sees no GPU", "nothing to do: rounds run on the CPU")
    if launcher.path() == "compiled":
        return Check(name, "ok", built)
    remedy = f"optional: {launcher.REMEDY}"
    if launcher.path() is not None:
        return Check(name, "ok", f"{launcher.path()}, since {launcher.detours()}", remedy)
    # What was built for this machine and does not run there is broken; what was never built is only missing.
    return Check(name, "absent" if absent else "broken", f"none: {launcher.detours()}", remedy)


def _gpu_round(name: str) -> Check:
    """Which paths a round on the GPU takes, and why not faster ones."""
    import torch

    if not torch.cuda.is_available():
        return Check(name, "absent", "torch sees no GPU", "nothing to do: rounds run on the CPU")
    from flexlora_fast.backends import cusolver, eigen
    from flexlora_fast.kernels import obstacle

    reason = obstacle()
    products = "Triton kernels" if reason is None else f"torch on packed copies, since {reason}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is said here
        solver, _ = eigen.on_cuda()
    detail = f"products by {products}; eigenproblems by {solver}"
    if (other := cusolver.obstacle()) is not None:
        detail += f", since {other}"
    if reason is None and other is None:
        return Check(name, "ok", detail)
    remedies = ["`pip install triton`"] * (reason is not None)
    remedies += ["a torch built for CUDA 12.6.2 or newer, or `pip install cupy-cuda13x`"] * (other is not None)
    return Check(name, "broken" if "torch" in solver else "absent", detail, "; ".join(remedies))


def _memory(name: str) -> Check:
    free, source = _free_memory()
    if free is None:
        return Check(name, "absent", source, "nothing to do: the planner works without it")
    return Check(name, "ok", f"{free / GIB:.1f} GiB free ({source})")


def _free_memory(root: Path = Path("/")) -> tuple[int | None, str]:
    """Free bytes and where the figure is from: the machine's, or the container's where that is less."""
    found: list[tuple[int, str]] = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            found.append((int(fields["MemAvailable"].split()[0]) * 1024, "this machine"))
    limit, used = root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append((max(int(limit.read_text()) - int(used.read_text()), 0), "this container's limit"))
    return min(found) if found else (None, "the system does not say how much memory is free")


def _package(purpose: str, install: str) -> Callable[[str], Check]:
    """A probe for an optional package: installed, within the supported versions, and importable."""

    def probe(name: str) -> Check:
        if importlib.util.find_spec(name) is None:
            return Check(name, "absent", f"not installed; {purpose}", f"optional: `{install}`")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # cupy is installed under other names, one for each CUDA: cupy-cuda12x, cupy-cuda13x
            version = str(importlib.import_module(name).__version__)
        check = _within_range(Check(name, "ok", version), version)
        if check.status == "ok":
            importlib.import_module(name)
        return check

    return probe


def _within_range(check: Check, version: str) -> Check:
    """``check``, or "broken" where the version is outside what this package declares to work with."""
    supported = _supported(check.name)
    if supported is None or supported.specifier.contains(version, prereleases=True):
        return check
    detail = f"{check.detail} is outside the supported {supported.specifier}"
    return Check(check.name, "broken", detail, f"`pip install '{supported.name}{supported.specifier}'`")


def _supported(distribution: str) -> Requirement | None:
    """This package's own requirement on a distribution, whatever extra asks for it; None if there is none."""
    try:
        declared = importlib.metadata.requires("flexlora_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return None  # running from a checkout that was never installed
    return next((r for r in map(Requirement, declared) if r.name == distribution), None)


_PROBES: dict[str, Callable[[str], Check]] = {
    "python": _python,
    "torch": _torch,
    "threads": _threads,
    "cpu": _cpu,
    "extension": _extension,
    "cuda toolkit": _toolkit,
    "gpu": _gpu,
    "cuda kernels": _cuda_kernels,
    "gpu round": _gpu_round,
    "memory": _memory,
    "safetensors": _package("adapters are read with it", "pip install safetensors"),
    "triton": _package("GPU kernels are written in it", "pip install triton"),
    "cupy": _package("only useful beside a CUDA GPU", "pip install cupy-cuda13x"),
    "peft": _package("needed for live models only", "pip install 'flexlora_fast[peft]'"),
    "transformers": _package("needed for live models only", "pip install 'flexlora_fast[peft]'"),
    "flwr": _package("needed for the Flower integration only", "pip install flwr"),
    "nvflare": _package("needed for the NVFlare integration only", "pip install nvflare"),
}
