"""Averages of zero-padded factors, which several methods are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.methods.base import Contribution


def balanced(c: Contribution) -> tuple[Tensor, Tensor]:
    """√|s|·B (with the sign of s) and √|s|·A, float64: their product is s·B·A."""
    root = abs(c.scale) ** 0.5
    return (root if c.scale >= 0 else -root) * c.B.double(), root * c.A.double()


def zero_padded(contributions: Sequence[Contribution], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Σ w·√s·B (b, m, r) and Σ w·√s·A (b, r, n) in float64, smaller ranks padded with zeros to the largest r."""
    rank, first = max(c.rank for c in contributions), contributions[0]
    B = torch.zeros(*first.B.shape[:2], rank, dtype=torch.float64, device=first.B.device)
    A = torch.zeros(first.A.shape[0], rank, first.A.shape[2], dtype=torch.float64, device=first.A.device)
    for c, weight in zip(contributions, weights, strict=True):
        b, a = balanced(c)
        B[:, :, : c.rank] += weight * b
        A[:, : c.rank] += weight * a
    return B, A


def update_norm(c: Contribution) -> float:
    """‖s·B·A‖_F from r×r Grams in float64: √Σ (BᵀB)∘(AAᵀ), no dense matrix."""
    B, A = c.B.double(), c.A.double()
    inner: Tensor = ((B.mT @ B) * (A @ A.mT)).sum()
    return abs(c.scale) * float(inner.clamp_min(0).sqrt())
