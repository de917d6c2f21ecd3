"""Triton kernels, one operation a file: the formula, the kernel, the host function.

Each operation takes all layers of one shape at once, from a table of where the clients' columns lie
(``table.Table``): no factor is packed or copied. They write float32 results in an order of summation that depends on
shape, type and precision alone, and use no atomics.

    project.project, project_t  ΔW·X and ΔWᵀ·Y; of two halves, contract.contract and combine.combine
    gram.gram                   PᵀP and QQᵀ
    materialize.materialize     ΔW, added to what is there
    pack.pack                   P and Q as contiguous tensors

``python -m flexlora_fast.kernels.report`` shows what they take of GPUs that need not be there; ``…kernels.tune``
chooses their tile sizes on one that is.

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
