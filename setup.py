"""Builds the optional extension ``flexlora_fast._C``; everything else is said in pyproject.toml.

The package is complete without the extension, so a build that fails leaves a working pure-Python package.
What happened is printed, and written to ``flexlora_fast/_build_info.json``, where the doctor reads it.

Its CUDA kernels (csrc/cuda) are built into it where torch is a CUDA build and nvcc is there.

Environment:
    FLEXLORA_NO_EXTENSION=1   do not build the extension
    FLEXLORA_CUDA=0           build it without the CUDA kernels, whatever is installed
    FLEXLORA_CUDA=1           build it with them whatever torch is here, and fail where that is not possible
    TORCH_CUDA_ARCH_LIST      the GPUs to build them for, as "8.0;9.0+PTX"; where it is unset, the GPUs of this machine,
                              and on one without any "8.0;9.0;10.0+PTX", as far as nvcc knows them
    CUDA_HOME                 the toolkit, where nvcc is not on PATH or in /usr/local/cuda
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
sys.path.insert(0, str(ROOT))  # an isolated build does not have this folder there
import build_cuda  # noqa: E402
from build_cuda import Toolkit  # noqa: E402

NAME = "flexlora_fast._C"
INFO = "_build_info.json"


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
    """The extension without its CUDA kernels, which the build adds; a bare placeholder where it will be skipped."""
    if skip_reason():
        return Extension(NAME, sources=[])
    folders = ("csrc", "csrc/cpu", "csrc/cuda")  # csrc/cuda/*.cpp run its device code on the CPU
    sources = sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob("*.cpp"))
    # No -march=native: the wheel must run on other machines. Products come from oneDNN's kernels inside torch, which
    # pick their instructions at run time, and so do the loops around them. C++20 is what torch 2.13's headers ask for;
    # 2.11 would leave it at 17. OpenMP is torch's thread pool: without the flag at::parallel_for, a template in its
    # headers, runs on one thread.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() else []
    return cpp_extension.CppExtension(
        NAME,
        sources,
        depends=[str(path) for pattern in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(pattern)],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", *openmp],
        extra_link_args=openmp,
    )


class BuildNative(BaseBuild):
    """``build_ext`` that may fail: the reason is printed and kept, and the package installs without it."""

    cuda: Toolkit | str = "the extension was not built"

    def run(self) -> None:
        """Build the extension if possible, and write down what came of it."""
        reason, inplace = skip_reason(), self.inplace
        if build_cuda.choice() == "1" and reason is not None:
            raise SystemExit(f"FLEXLORA_CUDA=1, but {reason}")
        if reason is None:
            self.add_cuda()
            try:
                super().run()
            # Whatever a compiler, ninja or torch's helper raises, the package works without the extension.
            except Exception as error:
                if build_cuda.choice() == "1":
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

    def add_cuda(self) -> None:
        """Compile the CUDA kernels and have them linked in; without them, and with the reason, where that fails."""
        self.cuda = build_cuda.plan(ROOT / "csrc/cuda", torch)
        if isinstance(self.cuda, Toolkit):
            try:
                objects = build_cuda.compile_objects(self.cuda, ROOT / "csrc", Path(self.build_temp) / "cuda")
            except (OSError, RuntimeError) as error:
                self.cuda = f"{error}"
            else:
                (target,) = self.extensions
                target.extra_objects += [*objects, str(self.cuda.runtime)]
                # Another library's copy of CUDA's runtime, in this process, must not be taken for this one.
                hidden = f"-Wl,--exclude-libs,{self.cuda.runtime.name}"
                target.extra_link_args += [hidden, "-lrt", "-lpthread", "-ldl"]
                target.define_macros.append(("FLEXLORA_WITH_CUDA", "1"))
        if isinstance(self.cuda, str) and build_cuda.choice() == "1":
            raise SystemExit(f"FLEXLORA_CUDA=1, but {self.cuda}")
        if isinstance(self.cuda, Toolkit) or self.earlier_info().get("cuda"):
            self.force = True  # sources as old as before do not mean that what is linked in is

    def package_folder(self) -> Path:
        """Where the extension goes: into the checkout for an editable install, otherwise into the build."""
        in_checkout = self.inplace or self.editable_mode
        return ROOT / "flexlora_fast" if in_checkout else Path(self.build_lib) / "flexlora_fast"

    def remove_leftover(self) -> None:
        """Remove the extension of an earlier build: it would be loaded, though its sources are older."""
        (self.package_folder() / Path(self.get_ext_filename("_C")).name).unlink(missing_ok=True)

    def earlier_info(self) -> dict[str, object]:
        """What the last build here wrote down."""
        try:
            return dict(json.loads((self.package_folder() / INFO).read_text()))
        except (OSError, ValueError):
            return {}

    def write_info(self, reason: str | None) -> None:
        """Write the build's outcome for flexlora_fast._native and the doctor."""
        info = {
            "built": reason is None,
            "reason": reason,
            "cuda": reason is None and isinstance(self.cuda, Toolkit),
            "cuda_reason": self.cuda if isinstance(self.cuda, str) else reason,
            "cuda_release": self.cuda.release if isinstance(self.cuda, Toolkit) else None,
            "cuda_architectures": self.cuda.architectures if isinstance(self.cuda, Toolkit) else [],
            "torch": None if torch is None else torch.__version__,
            "python": platform.python_version(),
        }
        folder = self.package_folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INFO).write_text(json.dumps(info, indent=2) + "\n")

    def announce_result(self, reason: str | None) -> None:
        """Say loudly whether the extension is there."""
        if reason is None:
            cuda = self.cuda
            kernels = f"no CUDA kernels: {cuda}" if isinstance(cuda, str) else f"CUDA kernels for {cuda.architectures}"
            print(f"flexlora_fast: built the native extension {NAME}; {kernels}", file=sys.stderr, flush=True)
            return
        bar = "*" * 100
        print(
            f"\n{bar}\nflexlora_fast: building WITHOUT the native extension {NAME}: everything works, "
            f"the CPU path is slower.\nReason: {reason}\n{bar}\n",
            file=sys.stderr,
            flush=True,
        )


def packages() -> list[str]:
    """The package's folders, plus two of the checkout's: kernels/, and csrc/ for what CuPy compiles at run time."""
    inner = [f"flexlora_fast.{name}" for name in find_packages("flexlora_fast")]
    return ["flexlora_fast", *inner, "flexlora_fast.kernels", "flexlora_fast.csrc"]


setup(
    packages=packages(),
    package_dir={"flexlora_fast.kernels": "kernels", "flexlora_fast.csrc": "csrc"},
    package_data={
        "flexlora_fast": ["py.typed"],
        "flexlora_fast.lowrank": ["constants.json", "constants-cuda.json"],
        "flexlora_fast.kernels": ["tuned.json"],
        "flexlora_fast.simulate": ["page.html.j2"],
        "flexlora_fast.csrc": ["cuda/*.cuh"],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildNative},
)
