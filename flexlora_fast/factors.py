"""The factors of an adapter: which of them holds the magnitude, columns beyond the rank of ΔW, the scale, the dtype.

Throughout, A is (E, r, n) and B (E, m, r), with E = 1 but for MoE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from flexlora_fast.errors import AdapterError
from flexlora_fast.lowrank.factorization import Factorization, complete

Split = Literal["B", "balanced", "A"]
SPLITS = ("B", "balanced", "A")


def split_triplets(f: Factorization, rank: int, split: Split) -> tuple[Tensor, Tensor]:
    """A and B, float32, with B·A = U·diag(S)·Vᵀ cut to ``rank`` (or to all there is): S in one of them, or √S in each.

    ``split`` says where: "B", "A" or "balanced".
    """
    root = f.S[:, :rank].sqrt().to(f.U)  # the root of a float64: S itself may be below float32
    S = f.S[:, :rank].to(f.U)
    if split == "B":
        B, A = f.U[:, :, :rank] * S.unsqueeze(1), f.V[:, :, :rank].mT
    elif split == "A":
        B, A = f.U[:, :, :rank], f.V[:, :, :rank].mT * S.unsqueeze(2)
    else:
        B = f.U[:, :, :rank] * root.unsqueeze(1)
        # A zero singular value would leave both factors zero, and such a column never learns.
        A = f.V[:, :, :rank].mT * torch.where(root > 0, root, torch.ones_like(root)).unsqueeze(2)
    return A, B


def pad(A: Tensor, B: Tensor, rank: int, split: Split, key: int) -> tuple[Tensor, Tensor]:
    """Extend both to ``rank`` without changing B·A; ``key`` addresses the random numbers of the new directions."""
    missing = rank - A.shape[1]
    if missing <= 0:
        return A, B
    if split == "A":
        fresh = torch.stack([_fresh(b, rank, key) for b in B])
        return torch.cat([A, A.new_zeros(A.shape[0], missing, A.shape[2])], dim=1), torch.cat([B, fresh], dim=2)
    fresh = torch.stack([_fresh(a.T, rank, key) for a in A]).mT
    return torch.cat([A, fresh], dim=1), torch.cat([B, B.new_zeros(*B.shape[:2], missing)], dim=2)


def _fresh(X: Tensor, count: int, key: int) -> Tensor:
    """Unit columns, orthogonal to the span of X (m, r) while there is room, up to ``count`` in all."""
    # Through QR, since X need not have orthonormal columns; only the fresh part is used.
    basis = torch.linalg.qr(X.double())[0].to(X.dtype)[:, : X.shape[1]]
    return complete(basis, basis.shape[1] + count - X.shape[1], key)[:, basis.shape[1] :]


def descale(A: Tensor, B: Tensor, scale: float, split: Split, *, sliced: bool) -> tuple[Tensor, Tensor]:
    """Take the scale out of the factors, from the side (or sides) that the split puts the magnitude on."""
    if sliced or split == "balanced":
        root = abs(scale) ** 0.5
        return A / root, B / (root if scale > 0 else -root)
    return (A / scale, B) if split == "A" else (A, B / scale)


def copy_as(X: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of another dtype, or of the same: never the tensor itself."""
    return X.to(dtype, copy=True, memory_format=torch.contiguous_format)


def check_representable(tensors: Mapping[str, Tensor], layer: str) -> None:
    """Raise ``AdapterError``, naming the tensor, where the dtype that it was cast to could not hold a value."""
    for name, X in tensors.items():
        if not bool(torch.isfinite(X).all()):
            raise AdapterError(f"{name} overflows {X.dtype}; ask for dtype=torch.float32", layer=layer)
