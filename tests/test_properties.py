"""The contract on rounds that nobody chose: hypothesis draws shapes, ranks, weights, dtypes, solvers and layouts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexlora_fast as ff
from flexlora_fast.lowrank.plan import SOLVERS
from flexlora_fast.methods import METHODS
from tests import rounds
from tests.checks import Case, assert_best, assert_identical, assert_right, effect
from tests.checks_hard import assert_trainable
from tests.rounds import Client, Layer

FEW = settings(max_examples=100)
SIDES = st.integers(1, 24)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@st.composite
def layers(draw: st.DrawFn) -> list[Layer]:
    """One to three layers of any kind and shape; MoE comes alone, as PEFT's names for it depend on the model."""
    if draw(st.integers(0, 5)) == 0:
        return list(rounds.experts("moe", draw(st.integers(2, 4)), draw(SIDES), draw(st.integers(1, 9))))
    made = []
    for i in range(draw(st.integers(1, 3))):
        kind, m = draw(st.sampled_from(["linear", "linear", "embedding", "conv"])), draw(SIDES)
        if kind == "conv":
            made.append(rounds.conv(f"l{i}", m, draw(st.integers(1, 6)), *draw(st.sampled_from([(1,), (3,), (3, 2)]))))
        else:
            made.append(Layer(f"l{i}", m, draw(SIDES), kind))
    return made


@st.composite
def drawn_rounds(draw: st.DrawFn) -> list[Client]:
    """One to six clients over the same layers; some lack a layer, some send zeros, scales may be negative."""
    shape = draw(layers())
    moe = any(layer.experts > 1 for layer in shape)
    clients = []
    for i in range(draw(st.integers(1, 6))):
        c = rounds.client(
            f"c{i}",
            shape,
            rank=draw(st.integers(1, 12)),
            alpha=draw(st.floats(0.1, 64)) * draw(st.sampled_from([1, 1, -1])),
            weight=draw(st.floats(0.05, 1000)),
            rslora=draw(st.booleans()),
            dtype=draw(DTYPES),
        )
        if draw(st.integers(0, 9)) == 0:
            c = c.mapped(lambda _, A, B: (A, B * 0))
        if not moe and len(shape) > 1 and draw(st.integers(0, 3)) == 0:
            c = c.without(draw(st.sampled_from([layer.name for layer in shape])))
        clients.append(c)
    return clients


CASES = st.builds(Case, st.sampled_from(sorted(METHODS)), st.sampled_from(["auto", *SOLVERS]), st.just("drawn"))


@FEW
@given(drawn_rounds(), CASES, st.sampled_from(["zero", "renormalize"]))
def test_any_round_is_right(clients: list[Client], case: Case, missing: str) -> None:
    assert_right(case, case.aggregate(clients, missing=missing), clients, missing)


@FEW
@given(drawn_rounds(), CASES, st.integers(1, 40), st.sampled_from(["B", "balanced", "A"]))
def test_any_adapter_is_right_and_can_learn(clients: list[Client], case: Case, rank: int, split: Any) -> None:
    update = case.aggregate(clients, rank=1000)
    adapter = update.adapter(rank=rank, split=split)
    for layer in adapter.layers:
        assert_best(update, layer, case.truth(clients, layer), rank, effect(update, adapter, layer))
    if not case.sliced:
        assert_trainable(adapter)


@FEW
@given(drawn_rounds(), CASES, st.randoms(use_true_random=False))
def test_any_order_of_arrival(clients: list[Client], case: Case, random: Any) -> None:
    shuffled = random.sample(clients, len(clients))
    assert_identical(case.aggregate(clients), case.aggregate(shuffled))


@FEW
@given(drawn_rounds(), CASES)
def test_errors_fall_with_the_rank(clients: list[Client], case: Case) -> None:
    update = case.aggregate(clients)
    for layer in update.values():
        errors = [layer.error(rank) for rank in range(layer.rank + 1)]
        assert np.isfinite(errors).all()
        assert errors[0] <= layer.norm * (1 + 1e-6)
        if not case.sliced:  # slices of averaged factors may get worse before they get better
            assert all(a >= b for a, b in itertools.pairwise(errors))


@FEW
@given(drawn_rounds(), st.sampled_from(["auto", *SOLVERS]), st.floats(-8, 8))
def test_twice_the_alpha_is_twice_the_update(clients: list[Client], solver: str, factor: float) -> None:
    """ΔW is linear in the scales, and with them the norm and the spectrum."""
    case = Case("flexlora", solver, "drawn")
    factor = 2.0 ** round(factor)
    scaled = [
        c.but(
            config=c.config | {"lora_alpha": c.config["lora_alpha"] * factor},
            scales={layer: s * factor for layer, s in c.scales.items()},
        )
        for c in clients
    ]
    one, two = case.aggregate(clients), case.aggregate(scaled)
    for layer in one.layers:
        assert abs(two[layer].norm - factor * one[layer].norm) <= 1e-6 * two[layer].norm
        S, T = one[layer].factorization.S, two[layer].factorization.S
        assert (T - factor * S).abs().max() <= 1e-3 * two[layer].norm


@FEW
@given(drawn_rounds(), drawn_rounds())
def test_two_rounds_in_one_update_never_mix(first: list[Client], second: list[Client]) -> None:
    """Other layers in the round change nothing here, but the shares that weights are."""
    second = [
        c.but(name=f"d{i}", factors={}, scales={}, layers={}).but(
            layers={f"x.{k}": Layer(f"x.{k}", v.m, v.n) for k, v in c.layers.items() if v.kind == "linear"},
            factors={f"x.{k}": c.factors[k] for k, v in c.layers.items() if v.kind == "linear"},
            scales={f"x.{k}": c.scales[k] for k, v in c.layers.items() if v.kind == "linear"},
        )
        for i, c in enumerate(second)
    ]
    second = [c for c in second if c.layers]
    both = ff.aggregate([c.adapter() for c in first + second], [c.weight for c in first + second], solver="svd")
    alone = ff.aggregate([c.adapter() for c in first], [c.weight for c in first], solver="svd")
    share = sum(c.weight for c in first) / sum(c.weight for c in first + second)
    for layer in alone.layers:
        assert abs(both[layer].norm - share * alone[layer].norm) <= 1e-6 * alone[layer].norm
