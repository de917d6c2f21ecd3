"""The matrices that the server and every client make for themselves from the plan's seed."""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.random import signs, stream
from flexlora_fast.secure.plan import CORE, PROBES, Plan


def right(plan: Plan, spec: LayerSpec) -> Tensor:
    """Ω (E, n, width), for ΔW·Ω."""
    return _unit(plan, spec, "right", spec.n, plan.width)


def left(plan: Plan, spec: LayerSpec) -> Tensor:
    """Γ (E, m, width), for ΔWᵀ·Γ in one round."""
    return _unit(plan, spec, "left", spec.m, plan.width)


def core(plan: Plan, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Φ (E, m, 4·width) and Ψ (E, n, 4·width), for the core Φᵀ·ΔW·Ψ of one round."""
    count = CORE * plan.width
    return _unit(plan, spec, "core left", spec.m, count), _unit(plan, spec, "core right", spec.n, count)


def probes(plan: Plan, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Like ``core``, (E, m, 32) and (E, n, 32), for the certificate; nothing that makes the update
    depends on them.
    """
    return _unit(plan, spec, "probes left", spec.m, PROBES), _unit(plan, spec, "probes right", spec.n, PROBES)


def _unit(plan: Plan, spec: LayerSpec, role: str, rows: int, columns: int) -> Tensor:
    """Independent random signs over √rows, float64: every column has length 1, on which the bound of a client's entries
    rests. The same on every machine, bit for bit.
    """
    key = stream(plan.seed, f"{role} of {spec.name}")
    return signs(rows, columns, key, batch=spec.experts, dtype=torch.float64) / rows**0.5
