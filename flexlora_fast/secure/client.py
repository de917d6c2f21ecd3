"""The client's side: one function of the adapter and what the server sends to everybody. It keeps no state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import describe, facts_of, geometry, is_weight
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, WeightError
from flexlora_fast.precision import full_precision
from flexlora_fast.secure import matrices, message
from flexlora_fast.secure.encoding import Vector, encode, split
from flexlora_fast.secure.plan import Plan, Segment


@full_precision()
def sketch(adapter: Adapter, plan: Plan, broadcast: bytes | None = None, *, weight: float = 1.0) -> Vector:
    """A client's vector for one round, to be given to the summing protocol and to nobody else.

    Args:
        adapter: of any ranks, scales and dtypes; layers that it lacks count as zero, other tensors that it lacks not at
            all. The same one in every round.
        broadcast: ``Server.message`` of this round; None stands for that of the first.
        weight: w, at most ``plan.max_weight``; the same in every round.

    Returns:
        ``plan.length(stage)`` unsigned integers modulo M, in ``plan.dtype``. Neither their number nor, since other
        clients' are added, anything else tells the adapter's ranks.

    The update that is sketched is c·w·s·B·A with c = min(1, clip/√(Σ ‖w·s·B·A‖_F² + ‖w·s·b‖²)), joint over all layers.

    Why no entry exceeds ``clip``, whatever the adapter is. With B = Q₁R₁ and Aᵀ = Q₂R₂ (QR), the layer's update is
    Q₁·M·Q₂ᵀ with M = c·w·s·R₁R₂ᵀ, and it is computed as that: ‖Q₁MQ₂ᵀ‖₂ ≤ ‖Q₁MQ₂ᵀ‖_F = ‖M‖_F ≤ clip. Entries of
    ΔW·W are ⟨row of ΔW, column of W⟩ ≤ ‖ΔW‖_F·‖column‖, those of ΔWᵀ·W alike, and those of ΦᵀΔWΨ at most
    ‖φ‖·‖ΔW‖₂·‖ψ‖. Every column has length 1: test matrices have entries ±1/√rows, bases are checked. Cancellation
    between badly balanced columns cannot break this, since M, whose norm is taken, already holds what cancelled. What
    rounding adds is within the plan's headroom of 2⁻¹⁰.

    Cost: a QR of each factor twice, 8·(m+n)·r² flops, and 2·(m+n)·r·width for a sketch. Memory: the vector, the message
    and one layer.

    Raises:
        AdapterError: NaN or infinite values, an update beyond float64, other tensors beyond ``extra_bound``.
        IncompatibleAdapterError: layers or tensors that the plan has not, or of other shapes, or another base model.
        WeightError: no number from 0 to ``max_weight``. ProtocolError: a message that does not fit the plan.
    """
    broadcast = message.pack(plan, 1, {}) if broadcast is None else broadcast
    stage, bases = message.unpack(plan, broadcast)
    try:
        _check(adapter, plan, weight)
        share = _share(adapter, float(weight))
        factor = 1.0 if share <= plan.clip else plan.clip / share
        vector = np.zeros(plan.length(stage), dtype=plan.dtype)
        parts = groupby(split(vector, plan.stages[stage - 1]), key=lambda part: part[0].name)
        own = {spec.name: spec for spec in plan.layers if spec.name in adapter.skeleton.specs}
        for name, group in parts:
            operator = _operator(adapter, name, float(weight), factor) if name in own else None
            for segment, into in group:
                if segment.kind == "agreed":
                    into[:] = message.mark(plan, broadcast)
                    continue
                values = _values(segment, adapter, plan, operator, bases, float(weight), factor)
                if values is not None:
                    encode(values, segment, into)
    except AdapterError as error:
        raise error.at(client=adapter.client) from None
    return vector


@dataclass(frozen=True)
class _Operator:
    """c·w·s·B·A as Q₁·M·Q₂ᵀ: (E, m, r'), (E, r', r''), (E, n, r''), float64, orthonormal columns outside."""

    left: Tensor
    core: Tensor
    right: Tensor

    def times(self, W: Tensor) -> Tensor:
        return self.left @ (self.core @ (self.right.mT @ W))

    def transposed_times(self, W: Tensor) -> Tensor:
        return self.right @ (self.core.mT @ (self.left.mT @ W))

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """Wᵀ·ΔW·V."""
        return (left.mT @ self.left) @ self.core @ (self.right.mT @ right)


def _operator(adapter: Adapter, layer: str, weight: float, factor: float) -> _Operator:
    A, B = (X.double().cpu() for X in adapter.factors(layer))
    (left, R1), (right, R2) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    return _Operator(left, factor * (weight * adapter.scale(layer) * (R1 @ R2.mT)), right)


def _values(
    segment: Segment,
    adapter: Adapter,
    plan: Plan,
    operator: _Operator | None,
    bases: Mapping[str, Tensor],
    weight: float,
    factor: float,
) -> Tensor | None:
    """What the segment holds of this client, float64; None for zeros."""
    name, kind = segment.name, segment.kind
    if kind == "clients":
        return torch.ones(1, dtype=torch.float64)
    if kind == "weight" or (kind == "share" and name in adapter.skeleton.forms):
        return torch.tensor([weight], dtype=torch.float64)
    if kind == "extra" and name in adapter.skeleton.forms:
        return weight * adapter.extras[name].double().cpu()
    if operator is None:
        return None
    if kind == "bias":
        bias = adapter.lora_bias(name)
        return None if bias is None else factor * (weight * adapter.scale(name) * bias.double().cpu())
    spec = adapter.spec(name)
    if kind == "right":
        return operator.times(bases[name].double() if name in bases else matrices.right(plan, spec))
    if kind == "left":
        return operator.transposed_times(bases[name].double() if name in bases else matrices.left(plan, spec))
    if kind == "whole":
        return operator.left @ operator.core @ operator.right.mT
    return operator.between(*(matrices.core(plan, spec) if kind == "core" else matrices.probes(plan, spec)))


# -- checks ---


def _check(adapter: Adapter, plan: Plan, weight: Any) -> None:
    if not is_weight(weight) or weight > plan.max_weight:
        raise WeightError(
            f"weight is {weight!r}; this plan takes numbers from 0 to {plan.max_weight:g}", client=adapter.client
        )
    known = {spec.name: spec for spec in plan.layers}
    for layer, spec in adapter.skeleton.specs.items():
        if layer not in known or geometry(spec) != geometry(known[layer]):
            there = f"the plan has a {describe(known[layer])}" if layer in known else "the plan has no such layer"
            raise IncompatibleAdapterError(
                f"it adapts a {describe(spec)}, {there}; train on the base model and layers of this round", layer=layer
            )
    for layer in adapter.skeleton.bias_keys:
        if layer not in plan.biases:
            raise IncompatibleAdapterError(
                "it has a lora_B.bias, which the plan has not; train without lora_bias", layer=layer
            )
    agreed = facts_of(plan.config)
    for fact, (value, remedy) in facts_of(adapter.skeleton.config).items():
        if fact in agreed and agreed[fact][0] != value:
            raise IncompatibleAdapterError(f"its {fact} is {value!r}, the plan's is {agreed[fact][0]!r}; {remedy}")
    adapter.validate_finite()
    for key in adapter.skeleton.extra_keys:
        _check_extra(key, adapter, plan)


def _check_extra(key: str, adapter: Adapter, plan: Plan) -> None:
    shape = adapter.skeleton.forms[key].shape
    if key not in plan.extras or plan.extras[key].shape != shape:
        there = f"there it is {plan.extras[key].shape}" if key in plan.extras else "there is no such tensor"
        raise IncompatibleAdapterError(
            f"its tensor {key!r} of shape {shape} does not fit the plan: {there}; train what the round averages"
        )
    values = adapter.extras[key].double()
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > (plan.extra_bound or 0.0):
        raise AdapterError(
            f"{key!r} holds values up to {largest:.4g}, the plan has room for {plan.extra_bound:g}; leave this client "
            "out, or plan with a larger extra_bound"
        )


def _share(adapter: Adapter, weight: float) -> float:
    """√(Σ ‖w·s·B·A‖_F² + ‖w·s·b‖²) over all layers, from the factors, as ``_operator`` has them."""
    norms = []
    for layer in adapter.layers:
        scale = weight * adapter.scale(layer)
        A, B, bias = adapter.factors_and_bias(layer)
        R1, R2 = (torch.linalg.qr(X.double().cpu(), mode="r")[1] for X in (B, A.mT))
        norms.append(float(torch.linalg.vector_norm(scale * (R1 @ R2.mT))))
        if bias is not None:
            norms.append(float(torch.linalg.vector_norm(scale * bias.double())))
        if not math.isfinite(sum(norms)):
            raise AdapterError("‖w·s·B·A‖_F is beyond float64; leave this client out", layer=layer)
    return math.hypot(*norms)
