"""Robust weights: each rule against its dense float64 statement, and invariances."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast import defence
from flexlora_fast.backends import cpu
from flexlora_fast.defence import gram as grams
from flexlora_fast.defence.gram import gram_of
from flexlora_fast.errors import EmptyRoundError, IncompatibleAdapterError, OptionError
from flexlora_fast.planning import Settings
from flexlora_fast.work import Client as Member
from flexlora_fast.work import Work
from tests import checks, defences, oracle, rounds, where
from tests.defences import alike, attacked
from tests.rounds import Client

FIRST = ("flexlora", "fedit", "hetlora")  # the later methods take their ways: all solvers in `make test-all`
MODELS = ("linear", "moe", "mixed", "weird")


def aggregate(clients: Sequence[Client], rule: Any, **options: Any) -> ff.GlobalUpdate:
    weights = [c.weight for c in clients]
    return ff.aggregate([c.adapter() for c in clients], weights, defence=rule, device=where.DEVICE, **options)


def coefficients(update: ff.GlobalUpdate) -> np.ndarray:
    return np.array([v.share * v.factor for v in update.verdicts])


def work_of(clients: Sequence[Client], limit: int = 1 << 30) -> Work:
    members = [Member(c.name, c.adapter(), 1.0, c.adapter(), checked=False, share=1 / len(clients)) for c in clients]
    settings = Settings(2, ff.methods.get("flexlora"), "auto", 1e-3, where.DEVICE, 0, "zero", limit, room=limit)
    return Work(members, settings)


# -- the Gram ---


@pytest.mark.parametrize("dtype", sorted(rounds.DTYPES))
@pytest.mark.parametrize("model", sorted(rounds.MODELS))
def test_the_gram_is_that_of_the_dense_updates(model: str, dtype: str) -> None:
    clients = rounds.typical(model, dtype)
    clients[1] = clients[1].without(next(iter(clients[1].layers)))
    X = defences.vectors(clients)
    norms = np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(
        gram_of(work_of(clients)).numpy() / np.outer(norms, norms), X @ X.T / np.outer(norms, norms), atol=1e-6
    )


def test_biases_of_b_are_part_of_the_update() -> None:
    clients = rounds.typical("linear")
    for i, c in enumerate(clients[:3]):
        bias = {"h.0.up": torch.linspace(-1, 2 + i, 29)}
        clients[i] = c.but(bias=bias, config=c.config | {"lora_bias": True})
    X = defences.vectors(clients)
    np.testing.assert_allclose(gram_of(work_of(clients)).numpy(), X @ X.T, rtol=0, atol=1e-6 * (X**2).sum(axis=1).max())


def test_a_layer_in_pieces_has_the_same_gram() -> None:
    """Factors that do not fit the limit come two pieces at a time."""
    layers = [rounds.Layer("fc", 40, 30)]
    clients = [rounds.client(f"c{i:02d}", layers, rank=300, alpha=300) for i in range(9)]
    whole, pieces = work_of(clients), work_of(clients, limit=5 << 19)
    assert pieces.plans[0].folded and len(list(pieces.pieces_of(pieces.plans[0]))) == 3
    assert not whole.plans[0].folded
    one, two = gram_of(whole), gram_of(pieces)
    assert torch.equal(two, two.mT)
    if cpu.usable("float32"):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    X = defences.vectors(clients)
    np.testing.assert_allclose(two.numpy(), X @ X.T, rtol=0, atol=1e-6 * (X**2).sum(axis=1).max())


@pytest.mark.parametrize("solver", ["krylov", "dense"])
@pytest.mark.parametrize("limit", [1 << 30, 5 << 19])
def test_norms_alone_are_those_of_the_gram(limit: int, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a client's columns are multiplied with all others, with some, or alone, in one piece or in several."""
    layers = [rounds.Layer("fc", 40, 30)]
    clients = [rounds.client(f"c{i:02d}", layers, rank=300, alpha=300) for i in range(9)]
    clients += [rounds.client(f"d{i:02d}", layers, rank=rank, alpha=8) for i, rank in enumerate((1, 7, 60, 70))]
    work = work_of(clients, limit=limit)
    object.__setattr__(work, "settings", dataclasses.replace(work.settings, solver=solver))
    assert work.plans[0].folded == (limit < 1 << 30)
    expected = gram_of(work).diagonal()
    for together in (1, 128, 1 << 20):
        monkeypatch.setattr(grams, "_TOGETHER", together)
        found = gram_of(work, pairs=False)
        assert torch.equal(found, found.diagonal().diag())
        torch.testing.assert_close(found.diagonal(), expected, rtol=1e-6, atol=0)
        if cpu.usable("float32"):  # whose sums do not depend on what lies beside
            torch.testing.assert_close(found.diagonal(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_norms_alone_are_those_of_any_kind_of_layer(model: str) -> None:
    clients = rounds.typical(model)
    found = gram_of(work_of(clients), pairs=False).diagonal()
    np.testing.assert_allclose(found.numpy(), (defences.vectors(clients) ** 2).sum(axis=1), rtol=2e-6)


def test_norms_alone_of_cancelling_columns_are_right() -> None:
    """Each client in products of its own: one that cancels takes float64, beside others that do not."""
    clients = [rounds.client(f"c{i}", "linear", rank=4, alpha=4) for i in range(3)]
    clients[1] = clients[1].mapped(lambda _, A, B: (torch.cat([A, -A], dim=1), torch.cat([B, B * (1 + 1e-6)], dim=2)))
    clients[1] = clients[1].but(config=clients[1].config | {"r": 8, "lora_alpha": 8})
    found = gram_of(work_of(clients), pairs=False).diagonal().sqrt()
    np.testing.assert_allclose(found.numpy(), np.linalg.norm(defences.vectors(clients), axis=1), rtol=1e-3)


def test_a_rule_of_norms_alone_sees_no_pairs() -> None:
    class Curious(defence.Clip):
        name = "curious"

        def judge(self, gram: Tensor, weights: Tensor) -> defence.Judgement:
            assert torch.equal(gram, gram.diagonal().diag())
            return super().judge(gram, weights)

    clients = alike(5, rounds.MODELS["linear"])
    one, two = aggregate(clients, Curious()), aggregate(clients, "clip")
    assert [v.norm for v in one.verdicts] == [v.norm for v in two.verdicts]
    assert {name for name, rule in defence.RULES.items() if rule.norms_only} == {"clip"}


@pytest.mark.parametrize("entries", [1, 40, 1 << 16])
def test_slabs_of_a_gram_change_nothing(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends within a client, clients wider than a slab, and columns of zeros."""
    clients = [rounds.client(f"c{i}", "mixed", rank=rank, alpha=rank) for i, rank in enumerate((1, 11, 2, 7))]
    clients[2] = clients[2].mapped(lambda _, A, B: (A, torch.cat([B[:, :, :1], 0 * B[:, :, 1:]], dim=2)))
    X = defences.vectors(clients)
    monkeypatch.setattr(grams, "_ENTRIES", entries)
    found = gram_of(work_of(clients)).numpy()
    np.testing.assert_allclose(found, X @ X.T, rtol=0, atol=2e-6 * (X**2).sum(axis=1).max())
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("model", MODELS)
def test_the_gram_does_not_see_the_gauge(model: str) -> None:
    clients = rounds.typical(model)
    moved = [c.mapped(lambda _, A, B: (A.double() * 1e-7, B.double() * 1e7)).mapped(_float32) for c in clients]
    turned = [c.mapped(_turned) for c in clients]
    before = gram_of(work_of(clients))
    scale = before.diagonal().max()
    for other in (moved, turned):
        # Terms that cancel to a hundredth leave float32 rounding a hundred times as large.
        torch.testing.assert_close(gram_of(work_of(other)) / scale, before / scale, rtol=0, atol=1.2e-5)


def _float32(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.float(), B.float()


def _turned(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(B·M, M⁻¹·A) with an M of condition 30."""
    r = A.shape[1]
    generator = torch.Generator().manual_seed(r)
    U, V = (torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0] for _ in "UV")
    M = U * torch.logspace(0, math.log10(30), r, dtype=torch.float64) @ V
    return (torch.linalg.inv(M) @ A.double()).float(), (B.double() @ M).float()


def test_large_factors_with_a_small_product_cannot_hide_or_pretend() -> None:
    """Columns that cancel leave float32 products with nothing but their rounding."""
    clients = alike(4)

    def cancelling(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A, B = A.double().clone(), B.double().clone()
        A[:, 1] = A[:, 0] + 1e-5 * A[:, 1]
        B[:, :, 0] *= 1e4
        B[:, :, 1] = -B[:, :, 0]
        return A.float(), B.float()

    clients[0] = clients[0].mapped(cancelling)
    X = defences.vectors(clients)
    norms = np.linalg.norm(X, axis=1)
    A, B = clients[0].factors["h.0.up"]
    terms = ((B.mT @ B) * (A @ A.mT)).abs().sum().sqrt()
    assert norms[0] < 1e-2 * float(terms)
    np.testing.assert_allclose(gram_of(work_of(clients)).diagonal().sqrt().numpy(), norms, rtol=1e-6)


def test_the_gram_is_the_same_bits_for_any_number_of_threads() -> None:
    clients = [
        c.but(bias={"h.0.up": torch.linspace(-1, i, 29)}, config=c.config | {"lora_bias": True})
        for i, c in enumerate(alike(12, "mixed"))
    ]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gram_of(work_of(clients)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# -- rules ---


@pytest.mark.parametrize("attack", [None, *defences.ATTACKS])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("name", sorted(defences.RULES))
def test_rules_do_what_their_sources_say(name: str, count: int, attack: str | None) -> None:
    clients = alike(count)
    if attack is not None and attack != "NaN":
        clients = attacked(clients, attack, max(1, count // 3))
    X, w = defences.vectors(clients), defences.shares(clients)
    gram = torch.from_numpy(X @ X.T)
    if name == "foolsgold" and count > 1 and np.abs(np.corrcoef(X)[np.triu_indices(count, 1)]).min() > 1 - 1e-5:
        pytest.fail("these clients are copies of each other: the test says nothing")
    found = defence.get(name).judge(gram, torch.from_numpy(w))
    np.testing.assert_allclose((found.shares * found.factors).numpy(), defences.RULES[name](X, w), rtol=0, atol=1e-6)
    assert float(found.shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(defences.RULES))
def test_a_round_sums_up_what_the_rule_says(name: str) -> None:
    clients = attacked(alike(9, "mixed"), "scaling ×100", 2)
    update = aggregate(clients, name)
    X, w = defences.vectors(clients), defences.shares(clients)
    expected = defences.RULES[name](X, w)
    np.testing.assert_allclose(coefficients(update), expected, rtol=0, atol=1e-4)
    for layer in update.layers:
        truth = sum(c * oracle.product(client, layer) for c, client in zip(coefficients(update), clients, strict=True))
        best = oracle.Truth(truth)
        checks.assert_best(update, layer, best, update[layer].rank, checks.batched(update.delta(layer)))


def test_fltrust_follows_the_servers_own_update() -> None:
    clients, own = attacked(alike(9), "sign flip", 3), rounds.client("server", rank=5, alpha=5)
    shared = alike(1, spread=0.0)[0]
    own = own.mapped(
        lambda name, A, B: shared.mapped(lambda _, a, b: (_padded(a, 1, 5), _padded(b, 2, 5))).factors[name]
    )
    update = aggregate(clients, defence.FLTrust(reference=own.adapter()))
    expected = defences.fltrust(defences.vectors(clients), defences.shares(clients), defences.vectors([own])[0])
    np.testing.assert_allclose(coefficients(update), expected, rtol=0, atol=1e-5)
    assert [v.status for v in update.verdicts[:3]] == ["rejected"] * 3
    assert all(v.share > 0 for v in update.verdicts[3:])


def _padded(X: Tensor, axis: int, size: int) -> Tensor:
    shape = list(X.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([X, X.new_zeros(shape)], dim=axis)


def test_fltrust_needs_a_reference_that_fits(tmp_path) -> None:
    with pytest.raises(OptionError, match="reference is None; give the server's own adapter"):
        defence.get("fltrust")
    other = rounds.client("x", "conv").adapter()
    fits = rounds.client("x", [rounds.Layer("h.0.up", 3, 4)])
    with pytest.raises(IncompatibleAdapterError, match=r"server's reference.*h\.0\.up"):
        aggregate(alike(3), defence.FLTrust(reference=fits.adapter()))
    with pytest.raises(EmptyRoundError, match=r"rejects all 3 clients.*cosine 0\.000"):
        aggregate(alike(3), defence.FLTrust(reference=other))  # nothing in common: orthogonal
    zero = alike(1)[0].mapped(lambda _, A, B: (A, B * 0)).adapter()
    with pytest.raises(OptionError, match="reference's ΔW is zero"):
        aggregate(alike(3), defence.FLTrust(reference=zero))
    alike(1)[0].adapter().save(tmp_path / "own")
    assert aggregate(alike(3), f"fltrust:reference={tmp_path / 'own'}").defence == "fltrust"


# -- invariances, for every rule ---


@pytest.fixture(params=[*sorted(defences.RULES), "fltrust"])
def rule(request: pytest.FixtureRequest) -> Any:
    name = request.param
    return defence.FLTrust(reference=alike(1, spread=0.1)[0].adapter()) if name == "fltrust" else defence.get(name)


def test_the_gauge_of_factors_changes_nothing(rule: Any) -> None:
    clients = attacked(alike(8), "noise ×3", 2)
    one, two = aggregate(clients, rule), aggregate([c.mapped(_turned) for c in clients], rule)
    np.testing.assert_allclose(coefficients(one), coefficients(two), rtol=0, atol=1e-5)
    assert [v.status for v in one.verdicts] == [v.status for v in two.verdicts]
    for layer in one.layers:
        torch.testing.assert_close(one.delta(layer), two.delta(layer), rtol=0, atol=1e-4 * one[layer].norm)


def test_the_order_of_arrival_changes_no_bit(rule: Any) -> None:
    clients = attacked(alike(8), "scaling ×100", 2)
    one, two = aggregate(clients, rule), aggregate(clients[::-1], rule)
    assert one.verdicts == two.verdicts
    checks.assert_identical(one, two)


def test_the_names_do_not_matter(rule: Any) -> None:
    """Another order of sums: the same to rounding."""
    clients = attacked(alike(8), "noise ×3", 2)
    renamed = [c.but(name=f"z{8 - i}") for i, c in enumerate(clients)]
    one, two = coefficients(aggregate(clients, rule)), coefficients(aggregate(renamed, rule))
    np.testing.assert_allclose(one, two[::-1], rtol=0, atol=1e-5)


def test_weight_zero_is_absent(rule: Any) -> None:
    clients = alike(7)
    away = rounds.client("zz", weight=0.0).mapped(lambda _, A, B: (A, 1e4 * B))
    one, two = aggregate(clients, rule), aggregate([*clients, away], rule)
    assert one.verdicts == two.verdicts and len(two.verdicts) == 7
    checks.assert_identical(one, two)


def test_one_client_is_its_own_mean(rule: Any) -> None:
    update = aggregate(alike(1), rule)
    (verdict,) = update.verdicts
    assert verdict.share == pytest.approx(1) and verdict.status in ("accepted", "reweighted", "clipped")
    if rule.name != "fltrust":  # that one has the reference's norm
        assert verdict.factor == pytest.approx(1) and verdict.status == "accepted"


def test_missing_layers_and_mixed_ranks(rule: Any) -> None:
    clients = alike(7)
    clients[2], clients[5] = clients[2].without("h.0.up"), clients[5].without("h.1.down", "h.0.down")
    for missing in ("zero", "renormalize"):
        update = aggregate(clients, rule, missing=missing)
        by_name = {v.client: v for v in update.verdicts}
        for layer in update.layers:
            having = [c for c in clients if layer in c.factors]
            total = sum(by_name[c.name].share for c in having) if missing == "renormalize" else 1.0
            truth = sum(
                by_name[c.name].share * by_name[c.name].factor / total * oracle.product(c, layer) for c in having
            )
            got = checks.batched(update.delta(layer))
            checks.assert_best(update, layer, oracle.Truth(truth), update[layer].rank, got)


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        pytest.param(method, solver, marks=[pytest.mark.slow] * (method not in FIRST and solver != "gram"))
        for method in sorted(ff.methods.METHODS)
        for solver in ["gram", "krylov", "dense", "subspace", "svd"]
    ],
)
def test_every_method_and_solver_takes_a_defence(method: str, solver: str) -> None:
    """A clipped client's update is what it would be had it sent the shorter one; a rejected one never came."""
    clients = attacked(alike(7), "scaling ×100", 1)
    clients[1] = clients[1].mapped(lambda _, A, B: (A, 2 * B))
    clients = rounds.fitted(method, clients)
    update = aggregate(clients, "clip", method=method, solver=solver)
    by_name = {v.client: v for v in update.verdicts}
    assert by_name["c00"].status == "rejected" and by_name["c01"].status == "clipped"
    sent = [
        c.but(scales={k: s * by_name[c.name].factor for k, s in c.scales.items()}, weight=by_name[c.name].share)
        for c in clients
    ]
    case = checks.Case(method, solver, "linear")
    for layer in update.layers:
        truth = case.truth(sent[1:], layer)
        for rank in (1, update[layer].rank):
            checks.assert_best(update, layer, truth, rank, checks.batched(update.delta(layer, rank)))


@pytest.mark.parametrize("name", ["geometric-median", "centred-clipping", "clip"])
@pytest.mark.parametrize("length", [1e6, 1e12, 1e30])
def test_less_than_half_are_outvoted_however_long_their_updates_are(name: str, length: float) -> None:
    """A share of 1e-9 of an update that is 1e30 times as long is all there is: shares alone do not tell the end."""
    clients = [c.but(weight=1.0) for c in alike(7)]
    truth = defences.vectors(clients[3:]).mean(axis=0)
    long = [c.mapped(lambda _, A, B: (-length * A.float(), B.float())) for c in clients[:3]]
    update = aggregate([*long, *clients[3:]], name, rank=30)
    assert np.linalg.norm(coefficients(update) @ defences.vectors([*long, *clients[3:]]) - truth) <= np.linalg.norm(
        truth
    )
    assert update.norm <= 2 * np.linalg.norm(truth)


@pytest.mark.parametrize("name", ["geometric-median", "centred-clipping", "fltrust", "clip:norm=20"])
def test_weight_k_equals_k_copies(name: str) -> None:
    """Where the docstring says so; rules that count clients are tried below."""
    reference = alike(1, spread=0.1)[0].adapter()
    rule = defence.FLTrust(reference=reference) if name == "fltrust" else defence.get(name)
    clients = [
        c.but(weight=float(w)) for c, w in zip(attacked(alike(7), "noise ×3", 2), (3, 1, 2, 1, 4, 1, 2), strict=True)
    ]
    copies = [c.but(name=f"{c.name}.{i}", weight=1.0) for c in clients for i in range(int(c.weight))]
    one, many = aggregate(clients, rule, rank=20), aggregate(copies, rule, rank=20)
    owner = np.array([v.client.split(".")[0] for v in many.verdicts])
    summed = [coefficients(many)[owner == c.name].sum() for c in clients]
    np.testing.assert_allclose(coefficients(one), summed, rtol=0, atol=1e-6)
    for layer in one.layers:
        torch.testing.assert_close(one.delta(layer), many.delta(layer), rtol=0, atol=1e-4 * one[layer].norm)


@pytest.mark.parametrize("name", ["clip", "krum", "multi-krum", "foolsgold"])
def test_weights_say_nothing_about_who_is_trusted(name: str) -> None:
    """A hostile client may claim any weight: neither bounds nor choices move, only shares among the trusted."""
    clients = attacked(alike(9), "noise ×3", 3)
    plain = aggregate(clients, name).verdicts
    heavy = aggregate([c.but(weight=c.weight * (1000 if i < 3 else 1)) for i, c in enumerate(clients)], name).verdicts
    for one, two in zip(plain, heavy, strict=True):
        assert (one.share > 0) == (two.share > 0) and one.norm == two.norm
        assert one.factor == two.factor
