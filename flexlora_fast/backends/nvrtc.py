"""The kernels of csrc/cuda compiled at run time by NVRTC, and launched by CuPy: where no compiler was at installation.

CuPy keeps what it compiled in ``~/.cupy/kernel_cache``, for this source and GPU. torch's tensors are used where they
lie, on torch's stream.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# As build_cuda.py has nvcc compile them; CuPy itself adds -ftz=true and the GPU's architecture.
OPTIONS = ("-std=c++17",)

_TYPES = {
    "double": "float64", "float": "float32", "long long": "int64", "int": "int32",
    "unsigned char": "uint8", "flexlora::flag": "uint8",
}  # fmt: skip
_SCALARS: dict[str, Any] = {"float64": np.float64, "float32": np.float32, "int64": np.int64, "int32": np.int32}
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(([^)]*)\)')

# The shared memory that is allowed belongs to a kernel: another thread's launch may not lower it before this one's.
_allowing = threading.Lock()


def folder() -> Path:
    """Where the sources are: in the package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next((found for base in (package, package.parent) if (found := base / "csrc" / "cuda").is_dir()), package)


def program() -> str:
    """What is compiled. It names its headers' contents, by which CuPy knows whether it has compiled them before."""
    headers = sorted(folder().glob("*.cuh"))
    content = hashlib.sha256(b"".join(header.read_bytes() for header in headers)).hexdigest()
    return f'#include "kernels.cuh"\n// {content}\n'


@functools.cache
def kernels() -> dict[str, tuple[str, ...]]:
    """The kernels' parameters, by name: "float64", or "float64*" for a tensor; as ``_C.cuda.kernels()`` has them."""
    text = "\n".join(header.read_text() for header in sorted(folder().glob("*.cuh")))
    return {name: tuple(map(_parameter, parameters.split(","))) for name, parameters in _KERNEL.findall(text)}


def _parameter(declared: str) -> str:
    """ "const double* G" -> "float64*"."""
    kind = re.sub(r"\b(const|__restrict__)\b", " ", declared).rsplit(maxsplit=1)[0]
    return _TYPES[" ".join(kind.replace("*", " ").split())] + ("*" if "*" in declared else "")


@functools.cache
def obstacle(device: int) -> str | None:
    """Why kernels cannot be compiled for and launched on the GPU of that index; None if they can.

    Compiles them, unless they were before, and loads them: while a CUDA graph is captured it would be too late.
    """
    if not (folder() / "kernels.cuh").exists():
        return f"the CUDA sources are not in {folder()}: reinstall flexlora_fast"
    try:
        cupy: Any = importlib.import_module("cupy")
    # A CuPy that does not fit the machine raises whatever it raises, and so does a compiler; that is only a reason.
    except Exception as error:
        return f"CuPy cannot be imported ({type(error).__name__}: {error})"
    try:
        with cupy.cuda.Device(device):
            for name in kernels():
                _ = _compiled(name).num_regs
    except Exception as error:
        return f"CuPy cannot compile them ({type(error).__name__}: {error})"
    return None


def launch(
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    device: int,
    stream: int,
    arguments: Sequence[Any],
) -> None:
    """Launch a kernel as ``_C.cuda.launch`` does, with the same errors."""
    slots = _slots(name, device, arguments)
    cupy: Any = importlib.import_module("cupy")
    try:
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device), _allowing:
            kernel = _compiled(name)
            if shared_bytes > 48 * 1024:  # more than a block has without asking
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            kernel(tuple(grid), tuple(block), slots, shared_mem=shared_bytes)
    except RuntimeError as error:
        raise RuntimeError(
            f"kernel '{name}' with grid {tuple(grid)}, block {tuple(block)} and {shared_bytes} bytes of shared memory "
            f"was refused on cuda:{device}: {error}"
        ) from error


@functools.cache
def _module() -> Any:
    cupy: Any = importlib.import_module("cupy")
    return cupy.RawModule(code=program(), options=(*OPTIONS, f"-I{folder()}"), backend="nvrtc")


@functools.cache
def _compiled(name: str) -> Any:
    return _module().get_function(name)


def _slots(name: str, device: int, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments in the kernel's own types, addresses as integers; ``slots`` of csrc/cuda/kernel.cpp does the same.

    Raises ``ValueError``, quoting kernel, position, what was expected and what came, where one does not fit.
    """
    if name not in kernels():
        raise ValueError(f"there is no kernel '{name}', only {', '.join(sorted(kernels()))}")
    parameters = kernels()[name]
    if len(arguments) != len(parameters):
        expected = ", ".join(parameters)
        raise ValueError(f"kernel '{name}' takes {len(parameters)} arguments ({expected}), got {len(arguments)}")
    slots = []
    for position, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True), start=1):
        slot = _slot(parameter, argument, device)
        if slot is None:
            raise ValueError(
                f"kernel '{name}', argument {position} of {len(parameters)}: expected {parameter}, "
                f"got {_described(argument, device)}"
            )
        slots.append(slot)
    return tuple(slots)


def _slot(parameter: str, argument: Any, device: int) -> Any:
    """The argument as a number of exactly the parameter's bytes; None where it does not fit."""
    if argument is None:
        return np.uintp(0) if parameter.endswith("*") else None
    if isinstance(argument, torch.Tensor):
        fits = _lies_on(argument, device) and parameter == _dtype_name(argument).replace("bool", "uint8") + "*"
        return np.uintp(argument.data_ptr()) if fits else None
    if isinstance(argument, float) and parameter in {"float64", "float32"}:
        return _SCALARS[parameter](argument)
    whole = isinstance(argument, int) and not isinstance(argument, bool) and parameter in {"int64", "int32"}
    if not whole or not np.iinfo(parameter).min <= argument <= np.iinfo(parameter).max:
        return None
    return _SCALARS[parameter](argument)


def _described(argument: Any, device: int) -> str:
    if argument is None:
        return "None"
    if isinstance(argument, torch.Tensor):
        where = "" if _lies_on(argument, device) else f" on {argument.device}"
        return f"a tensor of {_dtype_name(argument)}{where}"
    if isinstance(argument, float):
        return f"the float {argument:g}"
    if isinstance(argument, int) and not isinstance(argument, bool):
        return f"the int {argument}"
    return f"a {type(argument).__name__}"


def _lies_on(tensor: torch.Tensor, device: int) -> bool:
    """Whether it is on the GPU of that index; −1: on the CPU."""
    return tensor.is_cuda and tensor.get_device() == device if device >= 0 else tensor.is_cpu


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
