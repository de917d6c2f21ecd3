"""Triton kernels, one operation a file: the formula, the kernel, the host function.

This package imports without Triton; its modules do not, and say so in a BackendError. :func:`obstacle` tells
beforehand.
"""

from __future__ import annotations

import importlib

import torch


def obstacle() -> str | None:
    """Why the kernels cannot run here, and what to do; None if they can."""
    try:
        triton = importlib.import_module("triton")
    # A broken Triton raises whatever its compiled half raises; that, too, is only a reason.
    except Exception as error:
        return f"triton cannot be imported ({type(error).__name__}: {error}): `pip install triton` (Linux)"
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "torch sees no CUDA GPU; to try the kernels on a CPU, slowly, set TRITON_INTERPRET=1"
