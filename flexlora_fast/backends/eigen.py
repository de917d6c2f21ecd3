"""Symmetric eigenproblems of many small matrices at once.

torch's solver on CUDA takes matrices of more than 32 columns one after the other
(https://github.com/pytorch/pytorch/issues/174674: 500 of 100×100 in 914 ms, in one batch 8 ms). cuSOLVER has batched
solvers; CuPy, where it is installed, reaches one of them; and there is a kernel of this package's own.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexlora_fast.backends import cusolver, launcher, reference

Solver = Callable[[Tensor], tuple[Tensor, Tensor]]


def eigh(C: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (b, l), largest first, and eigenvectors (b, l, l) of the symmetric float64 C (b, l, l)."""
    if C.device.type != "cuda":
        return reference.eigh_small(C)
    _, solver = on_cuda()
    values, vectors = solver(C)
    return values.flip(-1), vectors.flip(-1)


@functools.cache
def on_cuda() -> tuple[str, Solver]:
    """The name of the solver used on CUDA, and the solver: eigenvalues ascending, as torch gives them.

    Warns, once, where only torch's is there.
    """
    if (reason := cusolver.obstacle()) is None:
        return "cuSOLVER XsyevBatched", cusolver.eigh
    try:
        cupy: Any = importlib.import_module("cupy")
    # A CuPy that does not fit the driver raises whatever it raises; that, too, is only a reason.
    except Exception as error:
        if launcher.obstacle() is None:
            return "Jacobi's method, compiled", _by_jacobi
        warnings.warn(
            f"eigenproblems run one layer at a time on this GPU, which takes most of a round: cuSOLVER's batched "
            f"solver is not reachable ({reason}), and CuPy cannot be imported ({error}): `pip install cupy-cuda13x`",
            RuntimeWarning,
            stacklevel=2,
        )
        return "torch, one matrix at a time", lambda C: tuple(torch.linalg.eigh(C))
    return "CuPy syevjBatched", functools.partial(_by_cupy, cupy)


def _by_jacobi(C: Tensor) -> tuple[Tensor, Tensor]:
    from flexlora_fast.backends.cuda import jacobi_eigh

    values, vectors, _ = jacobi_eigh(C.contiguous())
    return values, vectors


def _by_cupy(cupy: Any, C: Tensor) -> tuple[Tensor, Tensor]:
    with cupy.cuda.Device(C.device.index), cupy.cuda.ExternalStream(torch.cuda.current_stream(C.device).cuda_stream):
        values, vectors = cupy.linalg.eigh(cupy.from_dlpack(C.contiguous()))
        return torch.from_dlpack(values), torch.from_dlpack(vectors)
