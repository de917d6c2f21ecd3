"""Fixed point modulo 2³² or 2⁶⁴: integers that add up to the code of the sum, whatever adds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora_fast.errors import ProtocolError
from flexlora_fast.secure.plan import Plan, Segment

Vector = np.ndarray[Any, np.dtype[Any]]


def encode(values: Tensor, segment: Segment, into: Vector) -> None:
    """Write the nearest integers to values/quantum (ties to even), modulo M, into a run of a vector.

    ``values``: float64, of ``segment.size`` entries, whose bound is the caller's to keep.
    """
    codes = np.rint(values.reshape(-1).numpy() / segment.quantum).astype(np.int64)
    into[:] = codes.astype(into.dtype)  # integers wrap modulo M, negative ones as well


def decode(total: Vector, segment: Segment) -> Tensor:
    """The sum that a run of a summed vector stands for, float64, of the segment's shape."""
    signed = total.view(np.int32 if total.dtype == np.uint32 else np.int64)
    # In torch's memory, which is aligned: on NumPy's, MKL's results depend on where it happens to lie.
    return torch.from_numpy(signed).double().mul_(segment.quantum).reshape(segment.shape)


def split(vector: Vector, segments: Iterable[Segment]) -> Iterable[tuple[Segment, Vector]]:
    """Every segment with its part of the vector, a view."""
    start = 0
    for segment in segments:
        yield segment, vector[start : start + segment.size]
        start += segment.size


def check(vector: Any, plan: Plan, stage: int, what: str) -> None:
    """Raise ``ProtocolError`` for what is no vector of this round."""
    if not isinstance(vector, np.ndarray) or vector.dtype != plan.dtype or vector.shape != (plan.length(stage),):
        found = f"{vector.dtype} {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
        raise ProtocolError(
            f"{what} is {found}, round {stage} of this plan has {plan.dtype} ({plan.length(stage)},); "
            "check that all use the same plan and round"
        )


def add(vectors: Iterable[Vector]) -> Vector:
    """Σ of vectors modulo M, in the clear: what a summing protocol computes without showing the summands.

    >>> add([np.array([1, 2**32 - 1], dtype=np.uint32), np.array([5, 3], dtype=np.uint32)])
    array([6, 2], dtype=uint32)
    """
    total: Vector | None = None
    for vector in vectors:
        if total is None:
            total = vector.copy()
        elif vector.dtype != total.dtype or vector.shape != total.shape:
            raise ProtocolError(
                f"vectors of {total.dtype} {total.shape} and {vector.dtype} {vector.shape} cannot be added; "
                "check that all use the same plan and round"
            )
        else:
            total += vector
    if total is None:
        raise ProtocolError("there is no vector to add; a round needs at least one client")
    return total
