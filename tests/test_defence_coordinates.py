"""Median and trimmed mean of the entries of dense updates: against NumPy on copies of the clients, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast import defence
from flexlora_fast.defence import coordinates
from flexlora_fast.errors import OptionError
from tests import checks, oracle, rounds, where
from tests.defences import alike, attacked, error_of
from tests.rounds import Client

RULES = ("median", "trimmed-mean:fraction=0.25")


def aggregate(clients: Sequence[Client], rule: Any, **options: Any) -> ff.GlobalUpdate:
    weights = [c.weight for c in clients]
    return ff.aggregate([c.adapter() for c in clients], weights, defence=rule, device=where.DEVICE, **options)


def stated(rule: str, X: np.ndarray, copies: Sequence[int]) -> np.ndarray:
    """The definitions, (K, …) -> (…), with as many copies of each client as it has weight."""
    X = np.sort(np.repeat(X, copies, axis=0), axis=0)
    if rule == "median":
        return np.median(X, axis=0)
    cut = len(X) // 4
    assert cut * 4 == len(X), "the definition is for whole clients"
    return X[cut : len(X) - cut].mean(axis=0)


def by_hand(rule: str, clients: Sequence[Client], layer: str, missing: str = "zero") -> np.ndarray:
    having = [c for c in clients if missing == "zero" or layer in c.factors]
    spec = next(c.layers[layer] for c in clients if layer in c.factors)
    zero = np.zeros((spec.experts, spec.m, spec.n))
    X = np.stack([oracle.product(c, layer) if layer in c.factors else zero for c in having])
    return stated(rule, X, [int(c.weight) for c in having])


def assert_is(update: ff.GlobalUpdate, layer: str, expected: np.ndarray) -> None:
    truth = oracle.Truth(expected)
    for rank in {1, update[layer].rank}:
        checks.assert_best(update, layer, truth, rank, checks.batched(update.delta(layer, rank)))


@pytest.mark.parametrize("model", ["linear", "moe", "mixed", "weird"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rules_do_what_their_source_says(rule: str, weighted: bool, model: str) -> None:
    clients = attacked([c.but(weight=1.0) for c in alike(8, model)], "scaling ×100", 2)
    if weighted:
        clients = [c.but(weight=float(w)) for c, w in zip(clients, (2, 1, 1, 2, 3, 1, 4, 2), strict=True)]
    update = aggregate(clients, rule, rank=1000)
    assert update.defence == rule and update.verdicts == []
    for layer in update.layers:
        assert update[layer].solver == "dense"
        assert_is(update, layer, by_hand(rule, clients, layer))


@pytest.mark.parametrize("missing", ["zero", "renormalize"])
@pytest.mark.parametrize("rule", RULES)
def test_a_client_without_a_layer(rule: str, missing: str) -> None:
    clients = [c.but(weight=1.0) for c in alike(8)]
    clients[1:5] = [c.without("h.0.up") for c in clients[1:5]]
    update = aggregate(clients, rule, missing=missing, rank=30)
    for layer in update.layers:
        assert_is(update, layer, by_hand(rule, clients, layer, missing))


@pytest.mark.parametrize("rule", RULES)
def test_a_low_rank_is_the_best_of_what_the_rule_gives(rule: str) -> None:
    """The rule's matrix has a higher rank than any client's: what is cut off is certified all the same."""
    clients = [c.but(weight=1.0) for c in alike(4)]
    update = aggregate(clients, rule, rank=2)
    for layer in update.layers:
        expected = by_hand(rule, clients, layer)
        assert_is(update, layer, expected)
        assert update[layer].norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
        assert not update[layer].complete


@pytest.mark.parametrize("rule", RULES)
def test_tiles_order_and_gauge_change_nothing(rule: str, monkeypatch) -> None:
    clients = alike(7)
    one, two = aggregate(clients, rule), aggregate(clients[::-1], rule)
    checks.assert_identical(one, two)
    monkeypatch.setattr(coordinates, "TILE", 1)
    assert coordinates.tile_rows(12, 7) == 1
    checks.assert_identical(one, aggregate(clients, rule))
    turned = aggregate([c.mapped(lambda _, A, B: (A * 8, B / 8)) for c in clients], rule)  # exact in float32
    checks.assert_identical(one, turned)
    mixed = aggregate([c.mapped(_swapped) for c in clients], rule)
    for layer in one.layers:
        torch.testing.assert_close(one.delta(layer), mixed.delta(layer), rtol=0, atol=1e-5 * one[layer].norm)


def _swapped(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(B·M, M⁻¹·A) for the M that subtracts the first column from the last and reverses their order."""
    A, B = A.clone(), B.clone()
    B[:, :, -1] -= B[:, :, 0]
    A[:, 0] += A[:, -1]
    return A.flip(1), B.flip(2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attack", ["sign flip", "scaling ×100", "colluding copies", "noise ×3", "product poisoning"])
def test_a_fifth_of_hostile_clients_does_no_harm(rule: str, attack: str) -> None:
    clients = [c.but(weight=1.0) for c in alike(10, spread=0.2)]
    update = aggregate(attacked(clients, attack, 2), rule, rank=30)
    assert error_of(update, clients[2:]) < 0.3
    assert error_of(aggregate(attacked(clients, attack, 2), None, rank=30), clients[2:]) > 0.3


@pytest.mark.parametrize("attack", ["gauge games", "rank inflation"])
@pytest.mark.parametrize("rule", RULES)
def test_other_factors_of_the_same_update_gain_nothing(rule: str, attack: str) -> None:
    one, two = (aggregate(attacked(alike(8), kind, 2), rule, rank=30) for kind in ("sign flip", attack))
    for layer in one.layers:
        torch.testing.assert_close(one.delta(layer), two.delta(layer), rtol=0, atol=1e-5 * one[layer].norm)


@pytest.mark.parametrize("rule", RULES)
def test_heads_and_biases_are_treated_alike(rule: str) -> None:
    values = (1.0, 2.0, 3.0, 1e9)
    clients = [
        c.but(
            weight=1.0,
            extras={"head.weight": torch.full((2, 3), x)},
            bias={"h.0.up": torch.full((29,), x) / c.scales["h.0.up"]},
            config=c.config | {"modules_to_save": ["head"], "lora_bias": True},
        )
        for c, x in zip(alike(4), values, strict=True)
    ]
    update = aggregate(clients, rule)
    expected = stated(rule, np.array(values)[:, None], [1] * 4).item()
    np.testing.assert_allclose(update.extras["base_model.model.head.weight"].numpy(), expected)
    np.testing.assert_allclose(update["h.0.up"].bias.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_bad_values_and_edge_cases(rule: str) -> None:
    clients = attacked(alike(5), "NaN", 1)
    update = aggregate(clients, rule)
    assert [r.client for r in update.refused] == ["c00"]
    checks.assert_identical(update, aggregate(clients[1:], rule))
    only = clients[1]
    alone = aggregate([only], rule)
    for layer in alone.layers:
        torch.testing.assert_close(
            alone.delta(layer), only.adapter().delta(layer), rtol=0, atol=1e-5 * alone[layer].norm
        )
    away = rounds.client("zz", weight=0.0)
    checks.assert_identical(aggregate(clients[1:], rule), aggregate([*clients[1:], away], rule))
    assert aggregate([c.mapped(lambda _, A, B: (A, B * 0)) for c in clients[1:]], rule).norm == 0


def test_limits_and_settings() -> None:
    with pytest.raises(OptionError, match="defence 'median', which takes all clients of a layer at once"):
        aggregate(alike(3), "median", memory_limit=10_000)
    with pytest.raises(
        OptionError, match=r"'median' takes the place of the sum.*'fedit' is not made from .*; use method 'flexlora'"
    ):
        ff.Aggregator(method="fedit", defence="median")
    for fraction in ("0.5", "-0.1", "nan"):
        with pytest.raises(OptionError, match="fraction is"):
            defence.get(f"trimmed-mean:fraction={fraction}")
    with pytest.raises(NotImplementedError, match="Coordinates must implement"):
        defence.Coordinates().combine(torch.ones(2, 2), torch.full((2,), 0.5, dtype=torch.float64))


def test_the_tile_is_counted_in_the_plan() -> None:
    """What the plan adds for a tile is what a tile may take, at least one row."""
    assert coordinates.tile_bytes(4096, 4096, 100) <= coordinates.TILE
    assert coordinates.tile_bytes(2, 10, 3) == 2 * 10 * 4 * 48
    assert coordinates.tile_bytes(10, 10**6, 100) == 10**6 * 101 * 48


def test_weights_at_a_tie() -> None:
    """Ten times 0.1 is less than 1 in float64; the median of an even number is between the middle two all the same."""
    X = torch.arange(10.0).flip(0)
    assert float(defence.Median().combine(X, torch.full((10,), 0.1, dtype=torch.float64))) == 4.5
    assert float(defence.Median().combine(X[:3], torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))) == 7.5
    assert math.isclose(
        float(defence.TrimmedMean(fraction=0.1).combine(X, torch.full((10,), 0.1, dtype=torch.float64))), 4.5
    )
