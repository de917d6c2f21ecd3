"""Sums with coefficients of any sign: against dense float64, certified, the same in any order."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexlora_fast as ff
from flexlora_fast import errors
from tests import checks, oracle, rounds

ALL = 60  # more columns than all terms have together
COEFFICIENTS = (1.5, -0.5, 2.0, -1.0, 0.25)


def rich(clients):
    """Heads, a table of integers and a trained bias of B in some of them."""
    made = []
    for i, c in enumerate(clients):
        generator = torch.Generator().manual_seed(i)
        extras = {"head.weight": torch.randn(3, 7, generator=generator).to([torch.float32, torch.bfloat16][i % 2])}
        extras |= {"steps": torch.tensor([i, 2 * i])} if i in (0, 2) else {}
        layer = next(name for name, spec in c.layers.items() if spec.kind == "linear")
        bias = {layer: torch.randn(c.layers[layer].m, generator=generator)} if i in (1, 4) else {}
        made.append(c.but(extras=extras, bias=bias, config=c.config | {"lora_bias": bool(bias)}))
    return made


def assert_sum(got, deltas, layer, bound=1e-6):
    """``deltas``: c_j and ΔW_j (E, m, n) float64; bound relative to Σ|c|·‖ΔW‖."""
    truth = oracle.Truth(sum(c * D for c, D in deltas))
    mass = sum(abs(c) * np.linalg.norm(D) for c, D in deltas) + 1e-300
    assert np.linalg.norm(checks.batched(got.delta(layer)) - truth.whole) <= bound * mass
    assert abs(got[layer].norm - truth.norm) <= bound * mass
    for rank in (1, 2, 4):
        one = checks.batched(got.delta(layer, min(rank, got[layer].rank)))
        if truth.unique(rank):
            assert np.linalg.norm(one - truth.at(min(rank, got[layer].rank))) <= 1e-4 * mass
        assert got[layer].error(rank) == pytest.approx(truth.error(rank), rel=1e-5, abs=2e-5 * mass)


@pytest.mark.parametrize("model", ["linear", "mixed", "weird", "moe"])
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_adapters_against_dense(model, dtype):
    clients = rounds.typical(model, dtype)
    got = ff.combine([(c, client.adapter()) for c, client in zip(COEFFICIENTS, clients, strict=True)], rank=ALL, tol=0)
    assert got.method == "combination" and got.clients == [] and got.weight is None
    for layer in got.layers:
        deltas = [(c, oracle.product(client, layer)) for c, client in zip(COEFFICIENTS, clients, strict=True)]
        assert_sum(got, deltas, layer)
        assert got[layer].inherited == 0


def test_updates_and_adapters_together_in_any_order(tmp_path):
    clients = rich(rounds.typical("mixed"))
    north = ff.aggregate([c.adapter() for c in clients[:2]], rank=ALL)
    south = ff.aggregate([c.adapter() for c in clients[2:4]], method="fedit")
    south = ff.GlobalUpdate.load(south.save(tmp_path / "south"))
    clients[4].adapter().save(tmp_path / "single")
    terms = [(1.5, north), (-0.5, south), (0.25, ff.Adapter.load(tmp_path / "single"))]
    got = ff.combine(terms, rank=ALL)
    for order in itertools.permutations(terms):
        checks.assert_identical(ff.combine(order, rank=ALL), got)
    for layer in got.layers:
        mean = oracle.truth("flexlora", [c.but(weight=1.0) for c in clients[:2]], layer).whole
        averaged = oracle.truth("fedit", [c.but(weight=1.0) for c in clients[2:4]], layer).whole
        assert_sum(got, [(1.5, mean), (-0.5, averaged), (0.25, oracle.product(clients[4], layer))], layer)
        shift = [c * x for c, x in [(1.5, north[layer].bias)] if x is not None]
        shift += [0.25 * clients[4].scales[layer] * clients[4].bias[layer]] if layer in clients[4].bias else []
        assert (got[layer].bias is None) == (not shift)
        if shift:
            torch.testing.assert_close(got[layer].bias, sum(shift))
    head, steps = "base_model.model.head.weight", "base_model.model.steps"
    expected = (
        1.5 * north.extras[head].double() - 0.5 * south.extras[head].double() + 0.25 * clients[4].extras["head.weight"]
    )
    torch.testing.assert_close(got.extras[head], expected.float())
    assert torch.equal(got.extras[steps], (1.5 * north.extras[steps] - 0.5 * south.extras[steps]).round().long())
    assert "combination" in got.report().summary()
    again = ff.GlobalUpdate.load(got.save(tmp_path / "sum"))
    checks.assert_identical(again, got)
    one = again.adapter(rank=2)
    assert set(one.extras) == {head, steps} and one.layers == got.layers
    for layer in got.layers:
        torch.testing.assert_close(
            one.delta(layer), got.delta(layer, 2).reshape(one.delta(layer).shape), rtol=1e-4, atol=1e-5
        )


def test_layers_that_only_some_have_count_as_zero_elsewhere():
    clients = rounds.typical("linear")
    one, two = clients[0].without("h.0.up"), clients[1].without("h.1.down")
    got = ff.combine([(-2.0, one.adapter()), (3.0, two.adapter())], rank=ALL)
    assert got.layers == sorted(clients[0].layers)
    for layer in got.layers:
        having = [(c, client) for c, client in ((-2.0, one), (3.0, two)) if layer in client.factors]
        assert_sum(got, [(c, oracle.product(client, layer)) for c, client in having], layer)
    config = clients[0].config
    assert got.adapter(config=config).layers == got.layers


def test_terms_that_cancel_leave_nothing_and_an_adapter_that_learns():
    client = rounds.client("c0", "linear").adapter()
    gone = ff.combine([(1.0, client), (-1.0, client)])
    assert all(gone[layer].norm <= 1e-6 * float(client.delta(layer).norm()) for layer in gone.layers)
    adapter = gone.adapter(rank=3)
    assert all(adapter.factors(layer)[0].norm() > 0 for layer in adapter.layers)
    update = ff.aggregate([client])
    checks.assert_identical(ff.combine([(2.0, client), (0.0, update)]), ff.combine([(2.0, client)]))
    same = ff.combine([(1.0, update)])
    for layer in update.layers:  # nothing is left to be solved
        assert same[layer] is update[layer]
    assert ff.combine([(1.0, update)], rank=2)["h.0.up"].rank == 2


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    coefficients=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    cut=st.integers(1, 8),
    kept=st.integers(1, 8),
)
def test_the_certificate_holds(seed, m, n, ranks, coefficients, cut, kept):
    """Whatever terms had cut off, ``error`` bounds the distance to the sum of what they stand for."""
    clients = [rounds.client(f"c{i}", [rounds.Layer("fc", m, n)], rank=r, seed=seed) for i, r in enumerate(ranks)]
    pairs = list(zip(coefficients, clients, strict=False))
    if all(c == 0 for c, _ in pairs):
        return
    terms = [
        (c, client.adapter() if i % 2 else ff.aggregate([client.adapter()], rank=cut, solver="gram"))
        for i, (c, client) in enumerate(pairs)
    ]
    got = ff.combine(terms, rank=kept, solver="gram")
    got = ff.combine([(0.5, got), (0.5, got)], rank=kept, solver="gram")["fc"]  # and of sums of sums
    whole = sum(c * oracle.product(client, "fc") for c, client in pairs)
    mass = sum(abs(c) * np.linalg.norm(oracle.product(client, "fc")) for c, client in pairs)
    update = ff.GlobalUpdate({"fc": got})
    for rank in range(1, got.rank + 1):
        error = np.linalg.norm(checks.batched(update.delta("fc", rank)) - whole)
        assert error <= got.error(rank) + 1e-6 * mass + 1e-30
        assert got.error(rank) <= error + 2 * got.inherited + 1e-5 * mass + 1e-30


def test_updates_that_merge_into_the_frozen_weight_count_with_all_they_change():
    clients = rounds.typical("linear")
    adapters = [c.adapter() for c in clients]
    for method in ("flora", "fedex-lora"):
        terms = adapters if method == "flora" else [rounds.client(f"c{i}", rank=3, seed=i).adapter() for i in range(3)]
        update = ff.aggregate(terms, method=method)
        got = ff.combine([(-2.0, update)], rank=ALL)
        for layer in got.layers:
            assert_sum(got, [(-2.0, checks.batched(update.delta(layer)))], layer)


def test_what_cannot_be_combined():
    clients = rounds.typical("linear")
    a, update = clients[0].adapter(), ff.aggregate([clients[1].adapter()])
    bad = (
        clients[2].mapped(lambda layer, A, B: (A, B.clone().fill_(float("nan")) if layer == "h.0.up" else B)).adapter()
    )
    spent = ff.privacy.Spent(0.5, 1.0, 1.0, 4.0, 1e-5, 3.0, 3.0, 1)
    odd = rounds.client("odd", [rounds.Layer("h.0.up", 31, 12)]).adapter()
    heads = [clients[i].but(extras={"head": torch.ones(3 + i)}).adapter() for i in range(2)]
    for terms, why, kind in (
        ([], "no terms", errors.EmptyRoundError),
        ([(0.0, a), (0, update)], "all 2 coefficients are 0", errors.WeightError),
        ([(float("nan"), a)], "coefficient of term 0 is nan", errors.WeightError),
        ([(float("inf"), a)], "coefficient of term 0 is inf", errors.WeightError),
        ([(True, a)], "coefficient of term 0 is True", errors.WeightError),
        ([("1", a)], "coefficient of term 0 is '1'", errors.WeightError),
        ([a], "term 0 is a Adapter", errors.OptionError),
        ([(1.0, "folder")], "term 0 is a tuple", errors.OptionError),
        ([(1.0, a), (1.0, bad)], r"client 'c2', layer 'h\.0\.up'.*NaN", errors.AdapterError),
        ([(1.0, a), (1.0, odd)], r"layer 'h\.0\.up': the linear weight of 31 outputs", errors.IncompatibleAdapterError),
        ([(1.0, h) for h in heads], r"head' has shape \(4,\) in c1 and \(3,\) in c0", errors.IncompatibleAdapterError),
        ([(1.0, dataclasses.replace(update, privacy=spent))], "term 0 is of a private round", errors.OptionError),
        (
            [(1.0, a), (1.0, rounds.client("x", base_model_name_or_path="another").adapter())],
            "base_model_name_or_path of x is 'another', that of c0 is 'base'",
            errors.IncompatibleAdapterError,
        ),
    ):
        with pytest.raises(kind, match=why):
            ff.combine(terms)
    for options, kind in (
        ({"rank": 0}, errors.RankError),
        ({"rank": True}, errors.RankError),
        ({"tol": -1}, errors.OptionError),
        ({"solver": "no"}, errors.OptionError),
        ({"device": "none"}, errors.BackendError),
    ):
        with pytest.raises(kind):
            ff.combine([(1.0, a)], **options)
