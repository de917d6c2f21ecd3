"""Triton, or a BackendError that says what is missing; and how every kernel is launched."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from flexlora_fast.errors import BackendError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise BackendError(
        f"the Triton kernels need Triton, which cannot be imported ({error}): "
        "`pip install triton` (Linux), or take another backend"
    ) from error

from flexlora_fast.kernels.configuration import Configuration

__all__ = ["ELEMENTS", "launch", "programs", "require_runnable", "tl", "triton"]

# The element types of factors and of what is multiplied with them.
ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Triton's interpreter has no multiprocessors: a few programs, so that the persistent loop is walked.
INTERPRETED_PROGRAMS = 3


def require_runnable(op: str, device: torch.device, kernel: object) -> None:
    """Raise BackendError where ``kernel`` cannot run on tensors of ``device``."""
    interpreted = not isinstance(kernel, triton.runtime.JITFunction)
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        raise BackendError(
            f"{op}: the factors are on {device}, and Triton kernels run on a CUDA GPU (or, slowly, on the "
            "CPU with TRITON_INTERPRET=1 in the environment before Python starts)"
        )


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(configuration: Configuration, device: torch.device) -> int:
    """Programs of a persistent grid: as many as are resident at once."""
    return multiprocessors(device) * configuration.resident if device.type == "cuda" else INTERPRETED_PROGRAMS


def launch(
    kernel: Any, tiles: int, configuration: Configuration, device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Run ``kernel`` over ``tiles`` in a persistent grid, on the current stream of ``device``.

    The kernel's last argument before its constants is the number of tiles; each program takes every so many of them,
    and what a tile computes does not depend on which program takes it.
    """
    if tiles == 0:
        return
    if tiles >= 2**31:
        raise ValueError(f"{kernel.__name__}: {tiles} tiles do not fit an int32: compute fewer layers in one call")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        grid = (min(tiles, programs(configuration, device)),)
        kernel[grid](*arguments, tiles, **constants, **configuration.constants, **configuration.options)
