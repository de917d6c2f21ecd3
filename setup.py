"""Builds the optional extension ``flexlora_fast._C``; everything else is said in pyproject.toml.

The package is complete without the extension, so a build that fails leaves a working pure-Python package.
What happened is printed, and written to ``flexlora_fast/_build_info.json``, where the doctor reads it.

Environment:
    FLEXLORA_NO_EXTENSION=1   do not build the extension
    FLEXLORA_CUDA=0           build it without csrc/cuda, whatever is installed
    FLEXLORA_CUDA=1           build it with csrc/cuda, and fail the installation where that is not possible
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    torch = None
    NO_TORCH = f"torch cannot be imported while building ({error}); build with `pip install --no-build-isolation`"
    BaseBuild: type[build_ext] = build_ext
else:
    BaseBuild = cpp_extension.BuildExtension

ROOT = Path(__file__).resolve().parent
NAME = "flexlora_fast._C"
INFO = "_build_info.json"


def cuda_obstacle() -> str | None:
    """Why csrc/cuda cannot be built here; None if it can.

    Asks for the toolkit and not for a GPU: wheels are built on machines without one.
    """
    if not list(ROOT.glob("csrc/cuda/*.cu")):
        return "there are no CUDA sources in csrc/cuda"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit found (CUDA_HOME is not set and nvcc is not on PATH)"
    return None


def cuda_wanted() -> bool:
    """Whether to build csrc/cuda: FLEXLORA_CUDA where it is set, otherwise wherever it is possible."""
    choice = os.environ.get("FLEXLORA_CUDA", "")
    if choice not in {"", "0", "1"}:
        raise SystemExit(f"FLEXLORA_CUDA={choice!r}: set it to 0 or 1, or leave it unset")
    if choice == "0":
        return False
    obstacle = cuda_obstacle()
    if choice == "1" and obstacle:
        raise SystemExit(f"FLEXLORA_CUDA=1, but {obstacle}")
    return obstacle is None


def skip_reason() -> str | None:
    """Why the extension is not even tried; None if it is."""
    if os.environ.get("FLEXLORA_NO_EXTENSION", "0") not in {"", "0"}:
        return "FLEXLORA_NO_EXTENSION was set while building"
    if torch is None:
        return NO_TORCH
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler: none of {', '.join(compilers)} is on PATH; install g++ or clang, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')}: install Python's headers (python3-dev)"
    return None


def extension() -> Extension:
    """The extension, with csrc/cuda where wanted; a bare placeholder where it will be skipped."""
    if reason := skip_reason():
        if os.environ.get("FLEXLORA_CUDA") == "1":
            raise SystemExit(f"FLEXLORA_CUDA=1, but {reason}")
        return Extension(NAME, sources=[])
    cuda = cuda_wanted()
    folders = ["csrc", "csrc/cpu", "csrc/cuda"]  # csrc/cuda/*.cpp run its device code on the CPU
    patterns = ["*.cpp"] + ["*.cu"] * cuda
    sources = sorted(str(p.relative_to(ROOT)) for f in folders for glob in patterns for p in (ROOT / f).glob(glob))
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    # No -march=native: the wheel must run on other machines. Products come from oneDNN's kernels inside torch, which
    # pick their instructions at run time, and so do the loops around them. The C++ standard is the one torch's headers
    # ask for. OpenMP is torch's thread pool: without the flag at::parallel_for, a template in its headers, runs on one
    # thread.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []
    return make(
        NAME,
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": ["-O3", "-g0", "-Wall", "-Wextra", *openmp], "nvcc": ["-O3"]},
        extra_link_args=openmp,
        define_macros=[("FLEXLORA_WITH_CUDA", "1")] if cuda else [],
    )


class BuildNative(BaseBuild):
    """``build_ext`` that may fail: the reason is printed and kept, and the package installs without it."""

    def run(self) -> None:
        """Build the extension if possible, and write down what came of it."""
        reason, inplace = skip_reason(), self.inplace
        if reason is None:
            try:
                super().run()
            # Whatever a compiler, ninja or torch's helper raises, the package works without the extension.
            except Exception as error:
                if os.environ.get("FLEXLORA_CUDA") == "1":
                    raise
                reason = (
                    f"the build failed ({type(error).__name__}: {error}); `pip install -v` shows the compiler's words"
                )
                self.inplace = inplace  # setuptools clears it while it builds
        if reason is not None:
            self.remove_leftover()
            self.extensions = []  # or setuptools would try to copy what was not built
        self.write_info(reason)
        self.announce_result(reason)

    def package_folder(self) -> Path:
        """Where the extension goes: into the checkout for an editable install, otherwise into the build."""
        in_checkout = self.inplace or self.editable_mode
        return ROOT / "flexlora_fast" if in_checkout else Path(self.build_lib) / "flexlora_fast"

    def remove_leftover(self) -> None:
        """Remove the extension of an earlier build: it would be loaded, though its sources are older."""
        (self.package_folder() / Path(self.get_ext_filename("_C")).name).unlink(missing_ok=True)

    def write_info(self, reason: str | None) -> None:
        """Write the build's outcome for flexlora_fast._native and the doctor."""
        info = {
            "built": reason is None,
            "reason": reason,
            "cuda": reason is None and any(s.endswith(".cu") for e in self.extensions for s in e.sources),
            "torch": None if torch is None else torch.__version__,
            "python": platform.python_version(),
        }
        folder = self.package_folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INFO).write_text(json.dumps(info, indent=2) + "\n")

    def announce_result(self, reason: str | None) -> None:
        """Say loudly whether the extension is there."""
        if reason is None:
            print(f"flexlora_fast: built the native extension {NAME}", file=sys.stderr, flush=True)
            return
        bar = "*" * 100
        print(
            f"\n{bar}\nflexlora_fast: building WITHOUT the native extension {NAME}: everything works, "
            f"the CPU path is slower.\nReason: {reason}\n{bar}\n",
            file=sys.stderr,
            flush=True,
        )


def packages() -> list[str]:
    """The package's folders, plus kernels/, which lives at the top of the checkout beside csrc/."""
    inner = [f"flexlora_fast.{name}" for name in find_packages("flexlora_fast")]
    return ["flexlora_fast", *inner, "flexlora_fast.kernels"]


setup(
    packages=packages(),
    package_dir={"flexlora_fast.kernels": "kernels"},
    package_data={
        "flexlora_fast": ["py.typed"],
        "flexlora_fast.lowrank": ["constants.json", "constants-cuda.json"],
        "flexlora_fast.kernels": ["tuned.json"],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildNative},
)
