"""How long one client's update is, from its factors: the norm that differential privacy clips by."""

from __future__ import annotations

import math

import torch

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError
from flexlora_fast.precision import full_precision

# Of β = s·Σ_j ‖b_j‖·‖a_j‖, what is added to ‖s·B·A‖_F (at a right angle). Columns may be long and cancel: then float64
# knows neither the norm nor the sum as well as the numbers look. With it no client's columns are more than 1e4 times as
# long as what it may add, so that what sums of 10,000 columns round by stays a fiftieth of ``mechanism.MARGIN``. Of an
# ordinary update it takes 1e-8·(β/‖s·B·A‖_F)²/2, such as 3e-7 of one of rank 64.
_CANCELLED = 1e-4
_CHUNK = 1 << 20  # entries of a tensor at a time


@full_precision()
def norm_of(adapter: Adapter, reference: Adapter | None) -> float:
    """The Euclidean norm of all that a client moves, joint over its layers, or slightly more: never less.

    √(Σ ‖s·B·A‖_F² + Σ ‖s·b‖² + Σ ‖t − t₀‖²) over layers, biases of B, and other tensors, which are compared with those
    of ``reference``. ‖B·A‖_F² = ⟨BᵀB, AAᵀ⟩ in float64: no dense matrix, and the same however (B·M, M⁻¹·A) was balanced.

    Raises ``AdapterError`` where it is not finite.
    """
    parts = list[float]()
    for layer in adapter.layers:
        A, B, bias = adapter.factors_and_bias(layer)
        A, B, scale = A.double().cpu(), B.double().cpu(), abs(adapter.scale(layer))
        left, right = B.mT @ B, A @ A.mT  # (E, r, r)
        norm = math.sqrt(max(0.0, float((left * right).sum())))
        columns = (left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)).clamp_min(0).sqrt().sum(dim=1)
        parts += [scale * norm, scale * _CANCELLED * float(torch.linalg.vector_norm(columns))]
        if bias is not None:
            parts.append(scale * float(torch.linalg.vector_norm(bias.double())))
    for key in adapter.skeleton.extra_keys:
        assert reference is not None  # of rounds with such tensors
        size = math.prod(adapter.skeleton.forms[key].shape)
        for lo in range(0, size, _CHUNK):
            hi = min(lo + _CHUNK, size)
            moved = adapter.flat_extra(key, lo, hi).double().cpu() - reference.flat_extra(key, lo, hi).double().cpu()
            parts.append(float(torch.linalg.vector_norm(moved)))
    total = math.hypot(*parts)
    if not math.isfinite(total):
        raise AdapterError("its update has no finite norm; leave this client out, or have it train again")
    return total
