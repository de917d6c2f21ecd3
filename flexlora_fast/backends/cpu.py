"""Primitive ops on the compiled extension's products; ``reference`` has their twins in plain torch.

The extension multiplies tables of client factors block by block with oneDNN's kernels, which reach 98 % of these CPUs'
peak where torch's own products of thin matrices reach 25 to 60 % (`python -m benchmarks.rates`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import reference
from flexlora_fast.stack import Stack

Precision = Literal["float32", "bfloat16"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def usable(precision: Precision) -> bool:
    """Whether the extension is there and this machine has its kernels for ``precision``."""
    return _native.extension is not None and _native.extension.can_multiply(precision)


def matmul(
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    *,
    precision: Precision = "float32",
    symmetric: bool = False,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    joined: tuple[int, int] = (1, 0),
) -> Tensor:
    """A·diag(scale)·B (M, N) float32 for A (M, K) and B (K, N), or tables of pieces of them.

    Args:
        precision: "bfloat16" rounds the operands (factors of that type stay as they are); sums are float32.
        symmetric: a promise that the product is; half of it is then computed.
        scale: (K,) float64.
        out: float32 (M, N) that the product is added to.
        joined: the axis along which the pieces of A and of B lie side by side.
    """
    a, b = [A] if isinstance(A, Tensor) else list(A), [B] if isinstance(B, Tensor) else list(B)
    if usable(precision):
        assert _native.extension is not None
        return _native.extension.matmul(a, joined[0], b, joined[1], precision, symmetric, scale, out)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left = torch.cat([x.to(dtype).float() for x in a], dim=joined[0])
    right = torch.cat([x.to(dtype).float() for x in b], dim=joined[1])
    product = (left if scale is None else left * scale.float()) @ right
    return product if out is None else out.add_(product)


def takes(stack: Stack) -> bool:
    """Whether the extension can read this stack's factors where they are."""
    dtypes = all(X.dtype in _DTYPES for block in stack.blocks for X in (block.B, block.A))
    return usable("float32") and dtypes and stack.device.type == "cpu" and bool(stack.blocks)


def materialize(stack: Stack, out: Tensor | None = None) -> Tensor:
    """The dense ΔW (b, m, n) float32, or ``out`` with it added, as ``reference.materialize``.

    bfloat16 factors are multiplied as they are, which is exact; all others in float32.
    """
    if not takes(stack):
        return reference.materialize(stack, out)
    if out is None:
        out = torch.zeros(stack.batch, stack.m, stack.n)
    sixteen = all(X.dtype == torch.bfloat16 for block in stack.blocks for X in (block.B, block.A))
    precision: Precision = "bfloat16" if sixteen and usable("bfloat16") else "float32"
    for i in range(stack.batch):
        B, A = [block.B[i] for block in stack.blocks], [block.A[i] for block in stack.blocks]
        matmul(B, A, precision=precision, scale=stack.d, out=out[i])
    return out
