"""Updates that come from elsewhere, as edge servers send them: whether they can be what they say, by name if not."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from flexlora_fast.errors import AdapterError
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.update import GlobalUpdate

# What Σσ² may be above ‖ΔW‖_F², and the sum of shares above 1: both are float64, of values that went through float32.
_ROUNDING = 1e-4


def check_clients(update: GlobalUpdate, name: str) -> None:
    """Raise ``AdapterError`` for shares that are none. Whose share is larger than 1 would weigh more in heads, and with
    ``missing="renormalize"``, than its whole edge.
    """
    for client in update.clients:
        if not (isinstance(client.weight, int | float) and 0 <= client.weight <= 1 + _ROUNDING):
            _refuse(name, f"the share of client {client.name!r} is {client.weight!r}, and shares are 0 to 1")
    total = math.fsum(client.weight for client in update.clients)
    if total > 1 + _ROUNDING:
        _refuse(name, f"its clients' shares sum to {total:g}, and those of a round sum to 1")


def check_layer(layer: LayerUpdate, name: str) -> None:
    """Raise ``AdapterError`` for triplets of other shapes than the layer's, values that are not finite, and a
    certificate that no update has.
    """
    f, spec = layer.factorization, layer.spec
    k = f.S.shape[-1]
    shapes = {"U": (spec.experts, spec.m, k), "S": (spec.experts, k), "V": (spec.experts, spec.n, k)}
    there = {"U": f.U, "S": f.S, "V": f.V}
    if layer.averaged is not None:
        B, A = layer.averaged
        r = A.shape[1] if A.dim() == 3 else 0
        there |= {"B": B, "A": A}
        shapes |= {"B": (spec.experts, spec.m, r), "A": (spec.experts, r, spec.n)}
    if layer.bias is not None:
        there["bias"], shapes["bias"] = layer.bias, (spec.m,)
    parts = layer.base or ()
    if len(parts) > 2:
        _refuse(name, f"what goes into the frozen weight is {len(parts)} matrices, expected 1 or 2", layer.name)
    there |= {f"base[{i}]": matrix for i, matrix in enumerate(parts)}
    if len(parts) == 2:
        c = parts[0].shape[-1] if parts[0].dim() == 3 else 0
        shapes |= {"base[0]": (spec.experts, spec.m, c), "base[1]": (spec.experts, c, spec.n)}
    elif parts:
        shapes["base[0]"] = (spec.experts, spec.m, spec.n)
    for what, tensor in there.items():
        if tuple(tensor.shape) != shapes[what]:
            _refuse(name, f"{what} has shape {tuple(tensor.shape)}, expected {shapes[what]}", layer.name)
        if not finite(tensor):
            _refuse(name, f"{what} holds NaN or Inf", layer.name)
    if bool((f.S < 0).any()):
        _refuse(name, "a singular value is negative", layer.name)
    for what, value in (("inherited", layer.inherited), ("base_error", layer.base_error), ("‖ΔW‖_F²", layer.energy)):
        if not 0 <= value < math.inf:
            _refuse(name, f"{what} is {value!r}, and it is a finite number ≥ 0", layer.name)
    kept = float(f.S.square().sum())
    room = _ROUNDING * kept + 10 * layer.energy_error
    if layer.averaged is None and layer.base is None and kept > layer.energy + room:
        _refuse(name, f"its singular values hold {kept:g}, more than ‖ΔW‖_F² = {layer.energy:g}", layer.name)


def finite(tensor: Tensor) -> bool:
    """Whether all values are; integers always."""
    return bool(torch.isfinite(tensor).all())


def _refuse(name: str, what: str, layer: str | None = None) -> NoReturn:
    raise AdapterError(f"{name} is not sound: {what}; have it sent again, or merge without it", layer=layer)
