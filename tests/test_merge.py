"""Updates of parts of a round made one: equal to the flat round where all is kept, certified where it is not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexlora_fast as ff
from flexlora_fast import errors
from tests import checks, oracle, rounds

ALL = 40  # more columns than the clients of these rounds have together


def aggregate(clients, **options):
    return ff.aggregate([c.adapter() for c in clients], [c.weight for c in clients], **options)


def with_more(clients):
    """Heads that all have, an integer table that some have, and a trained bias of B in two of them."""
    made = []
    for i, c in enumerate(clients):
        generator = torch.Generator().manual_seed(i)
        extras = {"head.weight": torch.randn(3, 7, generator=generator)}
        extras |= {"steps": torch.tensor([i, 2 * i])} if i in (0, 2, 3) else {}
        layer = next(name for name, spec in c.layers.items() if spec.kind == "linear")
        bias = {layer: torch.randn(c.layers[layer].m, generator=generator)} if i in (1, 4) else {}
        made.append(c.but(extras=extras, bias=bias, config=c.config | {"lora_bias": bool(bias)}))
    return made


def assert_flat(merged, flat, clients, method="flexlora", missing="zero"):
    """The merged update is that of the flat round, to rounding, and says so."""
    assert merged.layers == flat.layers and merged.extras.keys() == flat.extras.keys()
    for layer in flat.layers:
        truth = oracle.truth(method, clients, layer, missing)
        assert np.linalg.norm(checks.batched(merged.delta(layer)) - truth.whole) < 1e-6 * truth.norm
        assert merged[layer].norm == pytest.approx(truth.norm, rel=1e-6)
        assert merged[layer].inherited == 0
        one, two = merged[layer].bias, flat[layer].bias
        assert (one is None) == (two is None) and (one is None or torch.allclose(one, two, rtol=1e-6))
        for rank in (1, 2, 4):
            assert merged[layer].error(rank) == pytest.approx(flat[layer].error(rank), rel=1e-5, abs=1e-5 * truth.norm)
    for key in flat.extras:
        torch.testing.assert_close(merged.extras[key], flat.extras[key])
    assert [c.name for c in merged.clients] == [c.name for c in flat.clients]
    for a, b in zip(merged.clients, flat.clients, strict=True):
        assert a.weight == pytest.approx(b.weight, rel=1e-12) and (a.config, a.ranks) == (b.config, b.ranks)
    assert merged.weight == pytest.approx(flat.weight) == pytest.approx(sum(c.weight for c in clients))


@pytest.mark.parametrize("model", ["linear", "mixed", "weird", "moe"])
def test_edges_that_keep_all_give_the_flat_round(model):
    clients = rounds.typical(model)
    if model in ("linear", "mixed"):
        clients = with_more(clients)
    edges = [aggregate(part, rank=ALL) for part in (clients[:2], clients[2:4], clients[4:])]
    flat = aggregate(clients, rank=ALL)
    merged = ff.merge(edges, rank=ALL)
    assert_flat(merged, flat, clients)
    checks.assert_identical(ff.merge([edges[2], edges[0], edges[1]], rank=ALL), merged)
    for c in clients:
        one, two = merged.adapter(client=c.name), flat.adapter(client=c.name)
        assert one.config == two.config
        for layer in one.layers:
            assert (one.delta(layer) - two.delta(layer)).norm() < 1e-5 * flat[layer].norm + 1e-5


def test_regions_of_edges():
    clients = with_more(rounds.typical("mixed"))
    edges = [aggregate([c], rank=ALL) for c in clients]
    regions = [ff.merge(edges[:3], rank=ALL), ff.merge(edges[3:], rank=ALL)]
    assert_flat(ff.merge(regions, rank=ALL), aggregate(clients, rank=ALL), clients)


def test_layers_that_only_some_clients_have():
    clients = rounds.typical("linear")
    clients[0], clients[3] = clients[0].without("h.0.up"), clients[3].without("h.0.up", "h.1.down")
    clients[4] = clients[4].without("h.1.down")
    for missing in ("zero", "renormalize"):
        edges = [aggregate(part, rank=ALL, missing=missing) for part in (clients[:1], clients[1:3], clients[3:])]
        assert "h.0.up" not in edges[0] and "h.1.down" not in edges[2]
        assert_flat(ff.merge(edges, rank=ALL), aggregate(clients, rank=ALL, missing=missing), clients, missing=missing)


def test_averages_of_factors_merge_as_averages_of_factors():
    clients = rounds.typical("linear")
    edges = [aggregate(part, method="fedit") for part in (clients[:2], clients[2:])]
    merged, flat = ff.merge(edges), aggregate(clients, method="fedit")
    for layer in flat.layers:
        truth = oracle.truth("fedit", clients, layer)
        for rank in (1, 3, 4):
            off = np.linalg.norm(checks.batched(merged.delta(layer, rank)) - truth.at(rank))
            assert off < 1e-6 * truth.norm
    with pytest.raises(errors.OptionError, match="method 'hetlora' do not add up"):
        ff.merge([aggregate(part, method="hetlora") for part in (clients[:2], clients[2:])])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    ranks=st.lists(st.integers(1, 6), min_size=2, max_size=7),
    cuts=st.lists(st.integers(1, 8), min_size=3, max_size=3),
    kept=st.integers(1, 8),
    levels=st.booleans(),
)
def test_the_certificate_of_a_merge_holds(seed, m, n, ranks, cuts, kept, levels):
    """Whatever edges cut off, ``error`` bounds the distance to the flat round's ΔW, at every rank and level."""
    layers = [rounds.Layer("fc", m, n)]
    clients = [
        rounds.client(f"c{i}", layers, rank=r, alpha=r * (1 + i % 3), weight=1.0 + i, seed=seed)
        for i, r in enumerate(ranks)
    ]
    parts = [clients[i::3] for i in range(3) if clients[i::3]]
    edges = [aggregate(part, rank=cut, solver="gram") for part, cut in zip(parts, cuts, strict=False)]
    if levels:
        edges = [ff.merge(edges[:2], rank=kept + 1, solver="gram"), *edges[2:]]
    merged = ff.merge(edges, rank=kept, solver="gram")["fc"]
    truth = oracle.truth("flexlora", clients, "fc")
    whole = ff.merge(edges, rank=kept, solver="gram")
    for rank in range(1, merged.rank + 1):
        error = float(np.linalg.norm(checks.batched(whole.delta("fc", rank)) - truth.whole))
        assert error <= merged.error(rank) + 1e-6 * truth.norm
        assert merged.error(rank) <= error + 2 * merged.inherited + 1e-6 * truth.norm  # no looser than it must be
        assert truth.error(rank) <= error + 1e-6 * truth.norm
    assert abs(merged.norm - truth.norm) <= merged.inherited + 1e-6 * truth.norm


def test_a_merge_of_files_into_a_file(tmp_path):
    clients = with_more(rounds.typical("mixed"))
    parts = (clients[:2], clients[2:])
    edges = [aggregate(part, rank=2, out=tmp_path / f"edge-{i}") for i, part in enumerate(parts)]
    merged = ff.merge([ff.GlobalUpdate.load(tmp_path / f"edge-{i}") for i in range(2)], out=tmp_path / "new" / "merged")
    checks.assert_identical(merged, ff.merge(edges))
    again = ff.GlobalUpdate.load(tmp_path / "new" / "merged")
    inherited = {layer: again[layer].inherited for layer in again.layers}
    assert inherited == {layer: ff.merge(edges)[layer].inherited for layer in again.layers}
    assert max(inherited.values()) > 0 and again.weight == merged.weight == sum(c.weight for c in clients)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]
    row = next(row for row in again.report().rows if row["inherited"])
    assert row["error"][2] > row["inherited"]
    assert "of what the merged updates kept, which left out up to" in again.report().summary()
    assert again.report().total["energy_kept"][2] == pytest.approx(again.energy_kept(2))


def test_estimated_certificates_are_taken_with_a_margin():
    clients = [rounds.client(f"c{i}", [rounds.Layer("fc", 400, 350)], rank=60, seed=i) for i in range(4)]
    edges = [aggregate(part, rank=4, solver="factored", certificate="estimate") for part in (clients[:2], clients[2:])]
    assert edges[0]["fc"].energy_error > 0
    merged = ff.merge(edges)
    assert merged["fc"].inherited > sum(edge["fc"].error(4) / 2 for edge in edges)
    error = np.linalg.norm(checks.batched(merged.delta("fc")) - oracle.truth("flexlora", clients, "fc").whole)
    assert error <= merged["fc"].error(merged["fc"].rank)


def test_weights_are_the_clients_or_those_given():
    clients = rounds.typical("linear")
    edges = [aggregate(clients[:2], rank=ALL), aggregate(clients[2:], rank=ALL)]
    assert [edge.weight for edge in edges] == [4.0, 6.75]
    doubled = ff.merge(edges, weights=[4.0, 13.5], rank=ALL)
    heavier = [c.but(weight=c.weight * (1 if i < 2 else 2)) for i, c in enumerate(clients)]
    assert_flat(doubled, aggregate(heavier, rank=ALL), heavier)
    checks.assert_identical(ff.merge(edges, weights=[1, 0]), ff.merge(edges[:1]))
    for weights, why in (([1], "1 weights for 2"), ([1, -1], "weight of update 1 is -1"), ([0, 0], "sum to 0")):
        with pytest.raises(errors.WeightError, match=why):
            ff.merge(edges, weights=weights)
    with pytest.raises(errors.WeightError, match="does not say what its clients weigh"):
        ff.merge([ff.GlobalUpdate(edges[0].layer_updates)])


def test_what_cannot_be_merged():
    clients = rounds.typical("linear")
    edge = aggregate(clients[:2])
    with pytest.raises(errors.EmptyRoundError):
        ff.merge([])
    with pytest.raises(errors.IncompatibleAdapterError, match=r"client 'c0': it is in update 1 and in update 0"):
        ff.merge([edge, aggregate(clients[:1])])
    twice = ff.merge([edge, edge], names=["north", "south"])
    assert [c.name for c in twice.clients] == ["north/c0", "north/c1", "south/c0", "south/c1"]
    assert twice.adapter(client="south/c1").layers == edge.layers
    with pytest.raises(errors.OptionError, match="give each update one of its own"):
        ff.merge([edge, edge], names=["north", "north"])
    with pytest.raises(errors.OptionError, match="rank is 0"):
        ff.merge([edge], rank=0)
    others = {
        "method='fedit'": aggregate(clients[2:], method="fedit"),
        "missing='renormalize'": aggregate(clients[2:], missing="renormalize"),
        "base_model_name_or_path": aggregate([rounds.client("x", base_model_name_or_path="another")]),
        "31 outputs and 12 inputs of update 1": aggregate([rounds.client("x", [rounds.Layer("h.0.up", 31, 12)])]),
    }
    for why, other in others.items():
        with pytest.raises(errors.IncompatibleAdapterError, match=why):
            ff.merge([edge, other])
    private = dataclasses.replace(
        aggregate(clients[2:]), privacy=ff.privacy.Spent(0.5, 1.0, 1.0, 4.0, 1e-5, 3.0, 3.0, 1)
    )
    with pytest.raises(errors.OptionError, match="update 1 is of a private round"):
        ff.merge([edge, private])
    head = (
        aggregate([clients[3].but(extras={"head": torch.ones(3)})]),
        aggregate([clients[4].but(extras={"head": torch.ones(4)})]),
    )
    with pytest.raises(errors.IncompatibleAdapterError, match=r"tensor 'base_model.model.head' has shape"):
        ff.merge(head)
