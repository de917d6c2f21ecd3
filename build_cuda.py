"""How setup.py builds csrc/cuda: with nvcc itself, into objects that need neither torch's headers nor its libraries.

CUDA's runtime is linked statically, so what was built loads beside any torch of its version, on machines without a
GPU or a driver too; there it says so when it is first asked to do something.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Ampere, Hopper and Blackwell: GPUs that compute in float64 at a useful rate. Newer ones compile the last one's PTX.
USUAL = ("8.0", "9.0", "10.0")
# As CuPy compiles the same sources at run time, so that results are the same bits either way.
FLAGS = ("-O3", "-std=c++17", "-ftz=true", "-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden")


@dataclass(frozen=True)
class Toolkit:
    """What the kernels are built with, and the GPUs they are built for.

    ``release``: its version, "13.0". ``runtime``: CUDA's runtime as a static library. ``architectures``: "9.0", or
    "9.0+PTX" where PTX is kept as well.
    """

    nvcc: Path
    release: str
    runtime: Path
    architectures: list[str]


def choice() -> str:
    """FLEXLORA_CUDA: "0", "1", or "" where it is left to what is installed."""
    said = os.environ.get("FLEXLORA_CUDA", "")
    if said not in {"", "0", "1"}:
        raise SystemExit(f"FLEXLORA_CUDA={said!r}: set it to 0 or 1, or leave it unset")
    return said


def plan(folder: Path, torch: ModuleType) -> Toolkit | str:
    """What to build the sources in ``folder`` with, or why they are left out.

    Asks for the toolkit and not for a GPU: wheels are built on machines without one.
    """
    if (said := choice()) == "0":
        return "FLEXLORA_CUDA=0 was set while building"
    if not list(folder.glob("*.cu")):
        return "there are no CUDA sources in csrc/cuda"
    if said == "" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (FLEXLORA_CUDA=1 builds them all the same)"
    nvcc = find_nvcc()
    if nvcc is None:
        where = f"in {home}/bin" if (home := toolkit_home()) else "on PATH or in /usr/local/cuda"
        return f"no CUDA toolkit: there is no nvcc {where}"
    present = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    try:
        names = architectures(
            os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            [torch.cuda.get_device_capability(index) for index in present],
            supported(nvcc),
        )
        return Toolkit(nvcc, release(nvcc), runtime_library(nvcc), names)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return f"{error}"


def toolkit_home() -> str | None:
    """The toolkit's folder, where the environment names it."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def find_nvcc() -> Path | None:
    """nvcc of the toolkit that is named; otherwise on PATH, or in /usr/local/cuda. None if there is none."""
    home = toolkit_home()
    named = [str(Path(home, "bin", "nvcc"))] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((Path(found) for found in map(shutil.which, named) if found), None)


def release(nvcc: Path) -> str:
    """The toolkit's version: "13.0"."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"`{nvcc} --version` names no release: {done.stdout.strip()}")
    return found[1]


def runtime_library(nvcc: Path) -> Path:
    """CUDA's runtime as a static library, from where nvcc would link it. Raises RuntimeError if it is not there."""
    done = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False, timeout=60
    )
    line = next((line for line in done.stderr.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    folders = [Path(folder) for folder in re.findall(r'"-L([^"]+)"', line)]
    for folder in folders:
        if (library := folder / "libcudart_static.a").exists():
            return library.resolve()
    raise RuntimeError(f"no libcudart_static.a where {nvcc} looks: {', '.join(map(str, folders)) or 'nowhere'}")


def architectures(listed: str, present: Sequence[tuple[int, int]], supported: Sequence[str]) -> list[str]:
    """The architectures to compile for: "9.0", or "9.0+PTX" where PTX is kept as well.

    ``listed`` (TORCH_CUDA_ARCH_LIST) where it says something; otherwise the GPUs ``present``, (major, minor) each; on
    a machine without any, the usual ones that nvcc has ``supported``, the last with PTX. Raises ValueError, quoting
    what is not a number.

    >>> architectures("", [], ["8.0", "9.0", "12.0"])
    ['8.0', '9.0+PTX']
    """
    if listed.strip():
        found = list(dict.fromkeys(re.split(r"[;,\s]+", listed.strip())))
        for name in found:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise ValueError(f"TORCH_CUDA_ARCH_LIST={listed!r}: {name!r} is no architecture; write 9.0 or 9.0+PTX")
        return found
    if present:
        return [f"{major}.{minor}" for major, minor in sorted(set(present))]
    usual = [name for name in USUAL if name in supported]
    return [*usual[:-1], *(f"{name}+PTX" for name in usual[-1:])]


def supported(nvcc: Path) -> list[str]:
    """The architectures this nvcc compiles for: "9.0"."""
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True, timeout=60)
    return [f"{name[:-1]}.{name[-1]}" for name in re.findall(r"sm_(\d+)", done.stdout)]


def code_flags(names: Sequence[str]) -> list[str]:
    """nvcc's options for these architectures.

    >>> code_flags(["9.0+PTX"])
    ['-gencode=arch=compute_90,code=[sm_90,compute_90]']
    """
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def compile_objects(toolkit: Toolkit, include: Path, folder: Path) -> list[str]:
    """Compile ``include``/cuda/*.cu; the objects, in ``folder``. Raises RuntimeError in nvcc's words."""
    folder.mkdir(parents=True, exist_ok=True)
    host = os.environ.get("CXX", "").split()[:1]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    flags = [*FLAGS, *(["-ccbin", *host] if host else []), "--threads", jobs, *code_flags(toolkit.architectures)]
    objects = []
    for source in sorted(include.glob("cuda/*.cu")):
        target = folder / f"{source.stem}.cu.o"
        command = [str(toolkit.nvcc), *flags, f"-I{include}", "-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode:
            raise RuntimeError(f"nvcc cannot compile {source.name}: {(done.stderr or done.stdout).strip()}")
        objects.append(str(target))
    return objects
