"""How CUDA kernels are launched here: those compiled at installation, or the same compiled now, through CuPy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import nvrtc
from flexlora_fast.errors import BackendError

REMEDY = (
    "have nvcc on PATH and reinstall flexlora_fast from its source (`pip install --no-build-isolation --no-deps "
    "--force-reinstall .`), or `pip install cupy-cuda13x` (12x for a CUDA 12 driver)"
)


# Blocks that CUDA takes in the second and the third extent of a grid.
MOST_BLOCKS = 65535


class Way(Protocol):
    """One way to the kernels: ``_C.cuda`` and ``nvrtc`` have these functions in common."""

    def obstacle(self, device: int) -> str | None: ...

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        device: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None: ...


def not_compiled() -> str | None:
    """Why the installed extension has no kernels; None if it has, for whatever GPU."""
    if _native.extension is None:
        return f"there is no native extension: {_native.reason}"
    if not hasattr(_native.extension, "cuda"):
        reason = _native.build_info().get("cuda_reason") or "its build did not say why"
        return f"the native extension was built without them: {reason}"
    return None


@functools.cache
def _ways(device: int) -> tuple[dict[str, Way], dict[str, str]]:
    """The first way that is open on the GPU of that index, by its name, and why those before it are not."""
    closed: dict[str, str] = {}
    ways: dict[str, tuple[str | None, Any]] = {
        "compiled": (not_compiled(), getattr(_native.extension, "cuda", None)),
        "NVRTC through CuPy": (None, nvrtc),
    }
    for name, (absent, way) in ways.items():
        reason = absent or way.obstacle(device)
        if reason is None:
            return {name: way}, closed
        closed[name] = reason
    return {}, closed


def _index(device: torch.device | None) -> int:
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def _way(device: torch.device) -> Way | None:
    """The way taken on a GPU, which every launch asks for."""
    if not torch.cuda.is_available():
        return None
    return next(iter(_ways(_index(device))[0].values()), None)


def path(device: torch.device | None = None) -> str | None:
    """The way taken on a GPU, the current one by default: "compiled", "NVRTC through CuPy", or None."""
    if not torch.cuda.is_available():
        return None
    return next(iter(_ways(_index(device))[0]), None)


def detours(device: torch.device | None = None) -> str:
    """Why the ways before the one taken on a GPU are closed: "compiled: …; NVRTC through CuPy: …", or nothing."""
    return "; ".join(f"{name}: {reason}" for name, reason in _ways(_index(device))[1].items())


def obstacle(device: torch.device | None = None) -> str | None:
    """Why kernels cannot be launched on a GPU, the current one by default; None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return None if path(device) else detours(device)


def usable(device: torch.device) -> bool:
    """Whether kernels can be launched on ``device``. Warns, once, where it is a GPU and they cannot."""
    if device.type != "cuda":
        return False
    if _way(device) is not None:
        return True
    _warn(obstacle(device))
    return False


@functools.cache
def _warn(reason: str | None) -> None:
    warnings.warn(
        f"the small dense problems of rounds on this GPU are solved by many operations of torch's, since there is no "
        f"way to their CUDA kernels ({reason}); {REMEDY}",
        RuntimeWarning,
        stacklevel=3,
    )


def launch(
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Tensor | int | float | None],
    *,
    device: torch.device,
    shared_bytes: int = 0,
) -> None:
    """Launch a kernel of csrc/cuda on ``device`` and torch's current stream there, and do not wait for it.

    grid, block: one to three extents. arguments: contiguous tensors on ``device`` (None: no address), ints and floats,
    as the kernel takes them. shared_bytes: dynamic shared memory of a block.

    Raises ``ValueError``, quoting kernel, position, what was expected and what came, where an argument, an extent or
    the device does not fit; and ``BackendError`` where there is no way to the kernels, or CUDA refuses, in its words.
    """
    if device.type != "cuda":
        raise ValueError(f"kernel '{name}' runs on a CUDA GPU only, not on {device}")
    way = _way(device)
    if way is None:
        raise BackendError(f"kernel '{name}' cannot be launched on {device} ({obstacle(device)}); {REMEDY}")
    index = _index(device)
    stream = torch.cuda.current_stream(index).cuda_stream
    try:
        way.launch(name, _extents(name, grid), _extents(name, block), shared_bytes, index, stream, arguments)
    except RuntimeError as error:
        raise BackendError(f"{error}; device='cpu' works without it") from error


def _extents(name: str, extents: Sequence[int]) -> tuple[int, int, int]:
    """Three extents. An empty one is an error: CuPy would launch it as 1."""
    if not 1 <= len(extents) <= 3 or min(extents) < 1:
        raise ValueError(f"kernel '{name}': grid and block are one to three numbers from 1, got {tuple(extents)}")
    x, y, z = (*extents, 1, 1)[:3]
    if max(y, z) > MOST_BLOCKS:
        raise ValueError(
            f"kernel '{name}': of {(x, y, z)}, the second and third are at most {MOST_BLOCKS}: launch it for fewer "
            "matrices at a time"
        )
    return x, y, z
