"""Primitive ops on the compiled extension's products; ``reference`` has their twins in plain torch.

The extension multiplies tables of client factors block by block with oneDNN's kernels, whose rate by themselves is 117
GFLOP/s on a Zen 4 core in float32. Of that, whole products reach 85 to 91 % for Grams and dense sums, and
62 to 91 % for 48 columns, where torch's own reach 46 to 68 % (4096 x 1600, one thread).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import reference
from flexlora_fast.stack import Block, Stack

Precision = Literal["float32", "bfloat16"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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

    Each entry is summed in an order that depends on K and ``scale`` alone, whatever the number of threads and wherever
    it stands. Without the extension, torch multiplies packed copies.

    Args:
        precision: "bfloat16" allows operands to be rounded to it (factors of that type stay as they are), where the
            CPU multiplies such numbers faster; sums are float32. Elsewhere products are float32, never emulated.
        symmetric: a promise that the product is; half of it is then computed.
        scale: (K,) float64.
        out: float32 (M, N) that the product is added to.
        joined: the axis along which the pieces of A and of B lie side by side.

    Raises:
        ValueError: where shapes or types do not fit.
    """
    a, b = [A] if isinstance(A, Tensor) else list(A), [B] if isinstance(B, Tensor) else list(B)
    if usable("float32") and all(t.device.type == "cpu" for t in (*a[:1], *b[:1])):
        assert _native.extension is not None
        native = precision if usable(precision) else "float32"
        return _native.extension.matmul(a, joined[0], b, joined[1], native, symmetric, scale, out)
    left = torch.cat([x.float() for x in a], dim=joined[0])
    right = torch.cat([x.float() for x in b], dim=joined[1])
    product = (left if scale is None else left * scale.to(left)) @ right
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
        out = torch.zeros(stack.batch, stack.m, stack.n, dtype=torch.float32)
    precision = _precision(stack)
    for i in range(stack.batch):
        B, A = [block.B[i] for block in stack.blocks], [block.A[i] for block in stack.blocks]
        matmul(B, A, precision=precision, scale=stack.d, out=out[i])
    return out


def gram(stack: Stack) -> tuple[Tensor, Tensor]:
    """The two Grams PᵀP and QQᵀ, each (b, R, R) float32, as ``reference.gram``; exact products of bfloat16 factors."""
    if not takes(stack):
        return reference.gram(stack)
    precision = _precision(stack)
    left, right = [], []
    for i in range(stack.batch):
        B, A = [block.B[i] for block in stack.blocks], [block.A[i] for block in stack.blocks]
        left.append(matmul([b.mT for b in B], B, precision=precision, symmetric=True, joined=(0, 1)))
        right.append(matmul(A, [a.mT for a in A], precision=precision, symmetric=True, joined=(0, 1)))
    return _stacked(left), _stacked(right)


def cross_gram(rows: Sequence[Block], columns: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """The parts of the two Grams between two runs of blocks: P₁ᵀP₂ and Q₁Q₂ᵀ, each (b, R₁, R₂) float32."""
    batch, m, _ = rows[0].B.shape
    both = Stack([*rows, *columns], m, rows[0].A.shape[2], batch)
    if not takes(both):
        first, second = Stack(rows, m, both.n, batch), Stack(columns, m, both.n, batch)
        return first.P.mT @ second.P, first.Q @ second.Q.mT
    precision = _precision(both)
    left, right = [], []
    for i in range(batch):
        left.append(matmul([x.B[i].mT for x in rows], [y.B[i] for y in columns], precision=precision, joined=(0, 1)))
        right.append(matmul([x.A[i] for x in rows], [y.A[i].mT for y in columns], precision=precision, joined=(0, 1)))
    return _stacked(left), _stacked(right)


def project(stack: Stack, X: Tensor) -> Tensor:
    """ΔW·X for X (b, n, l) float32 -> (b, m, l) float32, as ``reference.project``."""
    if not takes(stack):
        return reference.project(stack, X)
    d = stack.d.float().unsqueeze(1)
    inner = [matmul([block.A[i] for block in stack.blocks], x, joined=(0, 0)) for i, x in enumerate(X)]
    return combine(stack, _stacked([z * d for z in inner]))


def combine(stack: Stack, Z: Tensor) -> Tensor:
    """P·Z for Z (b, R, l) float32 -> (b, m, l) float32: combinations of the clients' columns."""
    if not takes(stack):
        return stack.P @ Z
    return _stacked([matmul([block.B[i] for block in stack.blocks], z) for i, z in enumerate(Z)])


def project_t(stack: Stack, Y: Tensor) -> Tensor:
    """ΔWᵀ·Y for Y (b, m, l) float32 -> (b, n, l) float32, as ``reference.project_t``."""
    if not takes(stack):
        return reference.project_t(stack, Y)
    d = stack.d.float().unsqueeze(1)
    inner = [matmul([block.B[i].mT for block in stack.blocks], y, joined=(0, 0)) for i, y in enumerate(Y)]
    return _stacked([matmul([block.A[i].mT for block in stack.blocks], z * d) for i, z in enumerate(inner)])


def _stacked(matrices: list[Tensor]) -> Tensor:
    """(b, …) without a copy where b is 1."""
    return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)


def _precision(stack: Stack) -> Precision:
    """bfloat16 where all factors are, whose products are then exact; otherwise float32."""
    return "bfloat16" if stack.sixteen and usable("bfloat16") else "float32"
