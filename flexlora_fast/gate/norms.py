"""The values of an adapter: finite, and within the policy's bounds. Every tensor is read once, layer by layer."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flexlora_fast import values
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, RefusedError
from flexlora_fast.gate.reasons import Reason
from flexlora_fast.methods import Contribution
from flexlora_fast.methods.averages import update_norm
from flexlora_fast.precision import full_precision

_REMEDY = "leave this client out, or have it train again with a lower learning rate"


@full_precision()
def check(adapter: Adapter, client: str, layer_bound: float, bound: float, extra_bound: float) -> None:
    """Raise ``RefusedError`` for values that are not finite (not-finite), or too large (norm).

    Args:
        layer_bound: of ‖s·B·A‖_F of each layer and, with ``lora_bias``, of ‖s·b‖. bound: of the root of the sum of
            squares of ‖s·B·A‖_F over the layers. extra_bound: of ‖x‖ of every other tensor. Infinite: what float32
            can hold.
    """
    norms = {layer: _layer(adapter, layer, client, layer_bound) for layer in adapter.layers}
    if math.hypot(*norms.values()) > bound:
        norms = {layer: _norm(*adapter.factors(layer), adapter.scale(layer)) for layer in adapter.layers}
        if not math.hypot(*norms.values()) <= bound:
            raise _beyond("‖ΔW‖_F over all layers", math.hypot(*norms.values()), bound)
    for key, tensor in adapter.extras.items():
        _finite(tensor, key, None)
        if tensor.is_floating_point():
            norm = _vector_norm(tensor)
            if not norm <= extra_bound:
                raise _beyond(f"‖{key!r}‖", norm, extra_bound)


def _layer(adapter: Adapter, layer: str, client: str, bound: float) -> float:
    """The norm of a layer's update, or a bound of it that is no larger than ``bound``."""
    A, B, bias = adapter.factors_and_bias(layer)
    scale, keys = adapter.scale(layer), adapter.skeleton.keys_of(layer)
    if bias is None:
        quick = _quick(A, B, scale)
        if quick < min(bound, values.SAFE):
            return quick
    try:
        values.check_layer(A, B, bias, scale, keys=keys, client=client, layer=layer)
    except AdapterError as error:
        for X, key in zip((A, B) if bias is None else (A, B, bias), keys, strict=True):
            _finite(X, key, layer)
        raise RefusedError(
            error.message.rpartition("; ")[0], code=Reason.NORM, layer=layer, value=error.message, remedy=_REMEDY
        ) from None
    shift = 0.0 if bias is None else abs(scale) * _vector_norm(bias)
    if not shift <= bound:
        raise _beyond("‖s·b‖ of lora_B.bias", shift, bound, layer)
    # The product of norms bounds the norm of the product, at a fraction of its price.
    norm = abs(scale) * _vector_norm(A) * _vector_norm(B)
    if not norm <= bound:
        norm = _norm(A, B, scale)
    if not norm <= bound:
        raise _beyond("‖s·B·A‖_F", norm, bound, layer)
    return norm


def _quick(A: Tensor, B: Tensor, scale: float) -> float:
    """A bound of |s|·‖B·A‖_F from Grams in float32, close to it for factors that are not all but parallel; below
    ``values.SAFE`` only where every entry is finite, and ‖A‖ and ‖B‖ are far below what float32 can hold.

    ‖B·A‖_F² = ⟨BᵀB, AAᵀ⟩. In sums of k products float32 is wrong by at most k·2⁻²⁴·Σ|x·y| (Higham, Accuracy and
    Stability of Numerical Algorithms, §3.1), so the product by 2(m+n)·2⁻²⁴·‖A‖²‖B‖²; twice that, for what the
    conversion of wider factors rounds. What is too small for float32's squares is at most 2⁻¹²⁶ in each of them.
    """
    A, B = A.float(), B.float()
    # (E, r, r) each; NumPy's calls are several times as quick on arrays as small as these
    AA, BB = ((X @ X.mT).cpu().numpy().astype(np.float64) for X in (A, B.mT))
    a, b = np.einsum("eii->e", AA), np.einsum("eii->e", BB)  # ‖A‖² and ‖B‖² of each expert
    if not a.sum() + b.sum() < values.SAFE:
        return math.inf
    sides = A.shape[2] + B.shape[1]
    wrong = sides * 2.0**-22 * (a @ b) + sides * A.shape[1] * 2.0**-120 * float(a.sum() + b.sum() + 1)
    return abs(scale) * math.sqrt(max(0.0, float(np.vdot(AA, BB) + wrong)))


def _norm(A: Tensor, B: Tensor, scale: float) -> float:
    return update_norm(Contribution("", A, B, scale, 1.0))


def _vector_norm(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X, dtype=torch.float64))


def _finite(tensor: Tensor, key: str, layer: str | None) -> None:
    try:
        values.check_finite(tensor, key)
    except AdapterError as error:
        raise RefusedError(
            error.message.rpartition("; ")[0],
            code=Reason.NOT_FINITE,
            layer=layer,
            value=error.message.rpartition("; ")[0],
            remedy=_REMEDY,
        ) from None


def _beyond(what: str, norm: float, bound: float, layer: str | None = None) -> RefusedError:
    return RefusedError(
        f"{what} is {norm:.4g}, the policy allows {bound:.4g}",
        code=Reason.NORM,
        layer=layer,
        value=norm,
        remedy=_REMEDY,
    )
