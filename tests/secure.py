"""Securely aggregated rounds for tests: plans that fit synthetic clients, and sums taken in the clear."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import flexlora_fast as ff
from flexlora_fast.secure import Plan, Server, add, sketch
from tests import oracle, rounds
from tests.rounds import Client, Layer

# Large enough that sketches are smaller than ΔW at the ranks of the tests; rectangular both ways.
WIDE = (Layer("h.0.up", 210, 131), Layer("h.0.down", 97, 230))
ROUNDS = (1, 2, 3, 4)


def mixed(model: str | Sequence[Layer] = WIDE, seed: int = 0, **options: Any) -> list[Client]:
    """Four clients of ranks 1 to 6 and different weights, at most 1."""
    return [
        rounds.client(f"c{i}", model, rank=rank, alpha=3 * rank, weight=weight, seed=seed, **options)
        for i, (rank, weight) in enumerate([(1, 1.0), (6, 0.25), (3, 0.75), (4, 0.5)])
    ]


def norm(client: Client) -> float:
    """√Σ‖w·s·B·A‖² of what the client sends, over all layers and biases."""
    parts = [float(np.linalg.norm(oracle.product(client, layer))) for layer in client.factors]
    parts += [client.scales[layer] * float(bias.double().norm()) for layer, bias in client.bias.items()]
    return client.weight * math.hypot(*parts)


def plan_for(those: Sequence[Client], **options: Any) -> Plan:
    """A plan with room for them: the clip is the largest norm, the weights are at most the largest."""
    known: dict[str, Any] = {"rank": 4, "clients": 20, "clip": 1.001 * max(map(norm, those)), "oversample": 4}
    known["max_weight"] = max(c.weight for c in those)
    return Plan.from_adapter(those[0].adapter(), **known | options)


def run(plan: Plan, clients: Sequence[Client]) -> ff.GlobalUpdate:
    """All rounds, everybody there in each."""
    server = Server(plan)
    while not server.done:
        server.receive(add(sketch(c.adapter(), plan, server.message, weight=c.weight) for c in clients))
    return server.finish()


def first(plan: Plan, client: Client) -> np.ndarray:
    return sketch(client.adapter(), plan, weight=client.weight)


def signed(vector: np.ndarray) -> np.ndarray:
    """A vector's integers, those above M/2 as negative ones."""
    return vector.view(np.int32 if vector.dtype == np.uint32 else np.int64)


def off(update: ff.GlobalUpdate, clients: Sequence[Client], layer: str, rank: int | None = None) -> float:
    """‖X − ΔW‖_F of a layer, in float64."""
    whole = oracle.truth("flexlora", clients, layer).whole
    got = oracle.array(update.delta(layer, rank)).reshape(whole.shape)
    return float(np.linalg.norm(got - whole))


def same(one: ff.GlobalUpdate, other: ff.GlobalUpdate) -> bool:
    """Whether two updates agree bit for bit."""
    for layer in one:
        a, b = one[layer].factorization, other[layer].factorization
        if not all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("U", "S", "V", "energy")):
            return False
    return list(one) == list(other) and all(torch.equal(one.extras[key], other.extras[key]) for key in one.extras)


def resized(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, **changes)
