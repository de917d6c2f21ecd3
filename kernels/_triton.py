"""Triton, or a BackendError that says what is missing; and the check every host function starts with."""

from __future__ import annotations

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

__all__ = ["require_runnable", "tl", "triton"]

FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def require_runnable(op: str, kernel: object, **tensors: torch.Tensor) -> None:
    """Raise BackendError where ``kernel`` cannot run on these tensors, ValueError for a dtype no factor has."""
    interpreted = not isinstance(kernel, triton.runtime.JITFunction)
    for name, tensor in tensors.items():
        if tensor.dtype not in FACTOR_DTYPES:
            raise ValueError(f"{op}: {name} is {tensor.dtype}: expected float16, bfloat16 or float32")
        if not tensor.is_cuda and not interpreted:
            raise BackendError(
                f"{op}: {name} is on {tensor.device}, and Triton kernels run on a CUDA GPU (or, slowly, on the "
                "CPU with TRITON_INTERPRET=1 in the environment before Python starts)"
            )
