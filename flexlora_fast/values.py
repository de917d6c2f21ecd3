"""Whether the numbers that a client sends can be aggregated: finite, and a ΔW that float32 can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flexlora_fast.errors import AdapterError
from flexlora_fast.lowrank.solve import LARGEST
from flexlora_fast.methods import Contribution
from flexlora_fast.methods.averages import update_norm

# Bounds of norms below this settle the matter: they are finite, so no entry is NaN or infinite, and with a scale below
# it as well the product of two is below LARGEST.
SAFE = 1e12


def check_finite(tensor: Tensor, key: str, *, client: str | None = None, layer: str | None = None) -> None:
    """Raise ``AdapterError`` for NaN or infinite values, naming the tensor and how many it has."""
    if not tensor.is_floating_point():
        return
    # one pass, no mask: only a sum that is not finite needs the slower look
    if bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise AdapterError(
            f"{key!r} holds {bad} NaN or infinite values of {tensor.numel()}; leave this client out, or "
            "have it train again with a lower learning rate",
            client=client,
            layer=layer,
        )


def check_layer(
    A: Tensor, B: Tensor, bias: Tensor | None, scale: float, *, keys: Iterable[str], client: str, layer: str
) -> None:
    """Raise ``AdapterError`` for a layer of a client that no sum may take up: then no sum of others can overflow.

    Args:
        A, B, bias: (E, r, n), (E, m, r) and (m,) or None, as sent. keys: their names.
        scale: s.
    """
    parts = [A, B] if bias is None else [A, B, bias]
    if all(_bound(X) < SAFE for X in parts) and abs(scale) < SAFE:
        return
    for X, key in zip(parts, keys, strict=True):
        check_finite(X, key, client=client, layer=layer)
    norms = [float(torch.linalg.vector_norm(X, dtype=torch.float64)) for X in (A, B)]
    # The product of norms bounds the norm of the product; only where it is large does the latter need computing.
    norm = abs(scale) * norms[0] * norms[1]
    if norm >= LARGEST:
        norm = update_norm(Contribution("", A, B, scale, 1.0))
    shift = 0.0 if bias is None else abs(scale) * float(bias.double().abs().max())
    if not max(norm, shift, *norms) < LARGEST:
        raise AdapterError(
            f"‖ΔW‖_F is {norm:.3g} (alpha/r = {scale:.3g}, ‖A‖ = {norms[0]:.3g}, ‖B‖ = {norms[1]:.3g}), beyond "
            "what float32 factors can hold; leave this client out, or have it train again",
            client=client,
            layer=layer,
        )


def harmless(largest: float, entries: int, scale: float) -> bool:
    """Whether tensors of at most so many entries, none of them larger in magnitude, pass ``check_layer``."""
    return math.sqrt(entries) * largest < SAFE and scale < SAFE


def _bound(X: Tensor) -> float:
    """√numel·max|x| ≥ ‖X‖_F; NaN or infinite where an entry is. One pass without a temporary."""
    low, high = torch.aminmax(X)
    return math.sqrt(X.numel()) * float(torch.maximum(-low, high))
