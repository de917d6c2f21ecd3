"""Private rounds: how far one client can move the sum, what is released, what is refused, and what is said about it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, FlexLoRAError, OptionError, RefusedError, WeightError
from flexlora_fast.privacy import Spent
from flexlora_fast.privacy.clipping import norm_of
from flexlora_fast.report import Report
from tests import checks, defences, oracle, private, rounds
from tests.private import HEAD, aggregate, aggregator, clipped_mean, fixed_key, flat, members, policy, privacy, silent
from tests.rounds import Client, Layer

__all__ = ["fixed_key", "silent"]  # the fixtures

SMALL = [Layer("a", 5, 7), Layer("b", 3, 2)]


# -- the mean ---


@pytest.mark.parametrize("model", ["linear", "mixed", "weird", "moe", "conv", "embedding"])
def test_without_noise_it_is_the_clipped_mean(silent: None, model: str) -> None:
    clients = members(5, model)
    norms = np.linalg.norm(defences.vectors(clients), axis=1)
    of = privacy(clip=float(np.median(norms)) / 2, denominator=2.5)
    update = aggregate(clients, of, model=model, rank=128)
    expected = clipped_mean(clients, of.clip, of.denominator)
    assert np.linalg.norm(flat(update) - expected) <= 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed"])
def test_dtypes_and_files_in_any_order(silent: None, tmp_path, dtype: str) -> None:
    clients = members(6, dtype=dtype)
    of = privacy(clip=2.0)
    one = aggregate(clients, of)
    expected = clipped_mean(clients, of.clip, of.denominator)
    assert np.linalg.norm(flat(one) - expected) <= 2e-6 * np.linalg.norm(expected)
    agg = aggregator(of, read="finish")
    for c in clients[::-1]:
        c.adapter().save(tmp_path / c.name)
        agg.add(tmp_path / c.name, c.weight, client=c.name)
    checks.assert_identical(agg.finish(), one)


def test_with_next_to_no_noise_it_is_the_clipped_mean() -> None:
    clients = members(4)
    of = privacy(clip=3.0, noise_multiplier=1e-7)
    expected = clipped_mean(clients, of.clip, of.denominator)
    assert np.linalg.norm(flat(aggregate(clients, of)) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_short_updates_are_not_clipped_and_weights_count(silent: None) -> None:
    clients = members(3)
    of = privacy(clip=1e3, denominator=3.0)
    expected = sum(c.weight * x for c, x in zip(clients, defences.vectors(clients), strict=True)) / 3
    np.testing.assert_allclose(flat(aggregate(clients, of)), expected, atol=1e-5)
    none = [clients[0].but(weight=0.0), *clients[1:]]
    checks.assert_identical(aggregate(none, of), aggregate(clients[1:], of))


def test_one_call_does_the_same(silent: None) -> None:
    clients = members(3)
    update = ff.aggregate(
        [c.adapter() for c in clients],
        weights=[c.weight for c in clients],
        rank=64,
        policy=policy(),
        privacy=privacy(),
    )
    checks.assert_identical(update, aggregate(clients))
    assert ff.aggregate([], rank=4, policy=policy(), privacy=privacy()).layers == update.layers


# -- how far one client can move the sum ---


@st.composite
def hostile(draw: st.DrawFn, name: str) -> Client:
    """Factors of any size that cancel, vanish, or are badly balanced; with a head and a bias of any size."""
    rank = draw(st.sampled_from([1, 2, 6]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    up, down = draw(st.integers(-30, 30)), draw(st.integers(-30, 30))
    if up + down > 34:
        down = 34 - up
    made = private.member(name, SMALL, rank, seed=draw(st.integers(0, 99)), weight=draw(WEIGHTS))
    kind = draw(st.sampled_from(["plain", "cancelling", "zero", "columns"]))

    def change(_: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = A.double(), B.double()
        if kind == "cancelling" and rank > 1:  # two long columns whose sum is short
            A[:, 1], B[:, :, 1] = A[:, 0] * (1 + 2.0**-12), -B[:, :, 0]
        if kind == "zero":
            B = B * 0
        if kind == "columns":
            sizes = 10.0 ** torch.linspace(-4, 4, rank).double()
            A, B = A * sizes[:, None], B / sizes
        return (A * 10.0**down).to(dtype), (B * 10.0**up).to(dtype)

    made = private.with_bias(made.mapped(change), "a", torch.full((5,), draw(SIZES)))
    return private.with_head(made, torch.full((2, 3), draw(SIZES)))


WEIGHTS = st.sampled_from([0.0, 1e-300, 0.3, 1.0])
SIZES = st.sampled_from([0.0, 1.0, -1e-3, 1e20])


@given(st.data())
@settings(max_examples=40)
def test_one_client_moves_the_sum_by_no_more_than_the_bound(data: st.DataObject) -> None:
    """‖f(D) − f(D′)‖ ≤ C exactly, of all that is summed up, in float64, joint over layers, biases and heads."""
    clients = [data.draw(hostile(f"c{i}")) for i in range(3)]
    clip = data.draw(st.sampled_from([1e-3, 1.0, 1e4]))
    reference = private.with_head(
        private.with_bias(private.member("own", SMALL, 8), "a", torch.ones(5)), torch.ones(2, 3)
    )
    options: dict[str, Any] = {"policy": policy(reference), "reference": reference.adapter(), "rank": 2}
    of = privacy(clip=clip)
    with pytest.MonkeyPatch.context() as patch:
        sums = private.Sums(patch)
        whole = sums.of(clients, of, **options)
        assert np.isfinite(whole).all()
        for i in range(3):
            others = sums.of([c for c in clients if c is not clients[i]], of, **options)
            assert float(np.linalg.norm(whole - others)) <= clip


def test_nobody_is_kept_out_by_a_name_that_another_has() -> None:
    """Or one client would decide about two terms of the sum. Uploads without a name get a free one."""
    agg = aggregator()
    uploads = [safetensors.torch.save(dict(c.adapter().state_dict())) for c in members(3)]
    agg.add(uploads[0], client="client-0001")
    agg.add(uploads[1])
    agg.add(uploads[2])
    assert agg.clients == ["client-0001", "client-0002", "client-0003"] and agg.refused == []


def test_the_bound_is_reached() -> None:
    """Clipping takes no more than it must: a long update keeps C, to the margin for rounding."""
    client = private.member("long", rank=64, weight=1.0)
    with pytest.MonkeyPatch.context() as patch:
        moved = np.linalg.norm(private.Sums(patch).of([client], privacy(clip=0.25)))
    assert 0.25 * (1 - 3e-6) < moved <= 0.25


def test_a_client_gains_nothing_by_how_its_factors_are_balanced(silent: None) -> None:
    client = private.member("c", weight=1.0)
    M = torch.linalg.qr(torch.randn(4, 4).double())[0] @ torch.diag(torch.tensor([1e3, 1.0, 1e-2, 5.0]).double())
    turned = client.mapped(lambda _, A, B: ((torch.linalg.inv(M) @ A.double()).float(), (B.double() @ M).float()))
    one, two = (aggregate([c], privacy(clip=0.1)) for c in (client, turned))
    np.testing.assert_allclose(flat(two), flat(one), atol=1e-6 * float(np.abs(flat(one)).max()) * 20)


@pytest.mark.parametrize("model", ["mixed", "weird"])
def test_norms_are_those_of_the_dense_updates(model: str) -> None:
    for client in [*members(4, model), *members(4, model, dtype="bfloat16")]:
        found, true = norm_of(client.adapter(), None), float(np.linalg.norm(defences.vectors([client])))
        assert true <= found <= true * (1 + 1e-6)


def test_columns_that_cancel_count_by_their_length() -> None:
    """1e7 long, and 1e-7 apart: float64 knows the product to a few digits, and the clip must not believe them."""
    client = private.member("c", [Layer("fc", 8, 9)], rank=2)

    def cancelling(_: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([A[:, 0], A[:, 0]], dim=1), 1e7 * torch.stack([B[..., 0], -B[..., 0]], dim=2)

    columns = 2e7 * 2 * float(client.factors["fc"][0][0, 0].norm() * client.factors["fc"][1][0, :, 0].norm())
    assert norm_of(client.mapped(cancelling).adapter(), None) == pytest.approx(1e-4 * columns, rel=1e-3)


# -- what is released ---


@pytest.mark.parametrize("solver", ["dense", "factored", "subspace"])
@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_the_certificate_is_that_of_the_noised_update(fixed_key: None, solver: str, noise: float) -> None:
    shape = [Layer("fc", 60, 90)]
    clients, of = members(6, shape), privacy(noise_multiplier=noise)
    whole = aggregate(clients, of, model=shape, rank=128).delta("fc").double().numpy()  # of full rank: nothing is cut
    found = aggregate(clients, of, model=shape, rank=12, solver=solver)["fc"]
    spectrum = np.linalg.svd(whole, compute_uv=False)
    assert found.solver == solver and found.total_rank == 60 and not found.complete
    assert found.norm == pytest.approx(np.linalg.norm(whole), rel=1e-6)
    for rank in (0, 1, 5, 12):
        best = math.sqrt((spectrum[rank:] ** 2).sum())
        assert best * (1 - 1e-4) <= found.error(rank) <= best * (1 + 2e-3) + 1e-6
        given = found.factorization
        X = (given.U[0, :, :rank].double() * given.S[0, :rank]) @ given.V[0, :, :rank].double().T
        assert found.error(rank) == pytest.approx(np.linalg.norm(whole - X.numpy()), rel=1e-3)


def test_solvers_tiles_and_threads_agree(fixed_key: None) -> None:
    shape = [Layer("fc", 40, 33), Layer("fd", 33, 40)]
    clients, before = members(5, shape), torch.get_num_threads()
    one = aggregate(clients, model=shape, tol=1e-6)
    try:
        torch.set_num_threads(2)
        checks.assert_identical(aggregate(clients, model=shape, tol=1e-6), one)
    finally:
        torch.set_num_threads(before)
    for solver in ("factored", "subspace"):
        other = aggregate(clients, model=shape, solver=solver, tol=1e-6)
        np.testing.assert_allclose(flat(other), flat(one), atol=1e-4)


def test_memory_decides_between_forming_and_tiles_by_shapes_alone(fixed_key: None) -> None:
    shape = [Layer("fc", 700, 900)]
    for count in (0, 4):
        clients = members(count, shape)
        small = aggregate(clients, model=shape, rank=4, memory_limit="70MiB")
        large = aggregate(clients, model=shape, rank=4, memory_limit="1GiB")
        assert small["fc"].solver in ("factored", "subspace") and large["fc"].solver == "dense"
        assert small["fc"].norm == pytest.approx(large["fc"].norm, rel=1e-6)


def test_clients_whose_factors_do_not_fit_together_come_in_pieces(silent: None, tmp_path) -> None:
    shape = [Layer("fc", 64, 64)]
    clients = [private.member(f"c{i:02d}", shape, 128, weight=1.0) for i in range(40)]
    of = privacy(clip=5.0, denominator=40.0)
    agg = aggregator(of, model=shape, rank=64, read="finish", solver="dense", memory_limit=4_150_000)
    for c in clients:
        c.adapter().save(tmp_path / c.name)
        agg.add(tmp_path / c.name, 1.0, client=c.name)
    (plan,) = ff.work.Work(agg._judged(ff.incremental.KeptGrams(None, 0))[0], agg._settings()).plans
    assert plan.folded
    expected = clipped_mean(clients, 5.0, 40.0)
    assert np.linalg.norm(flat(agg.finish()) - expected) <= 2e-6 * np.linalg.norm(expected)


def test_an_empty_round_is_a_round() -> None:
    """That nobody came is as secret as who did: every layer is there, of noise alone."""
    update = aggregate([], privacy(rate=0.01, denominator=2.0))
    assert update.layers == sorted(layer.name for layer in rounds.LINEAR)
    X = flat(update)
    X = X[X != 0]
    assert abs(X.std() / 0.5 - 1) < 6 * math.sqrt(0.5 / len(X))
    assert update.adapter(rank=3).rank("h.0.up") == 3
    assert not np.array_equal(flat(aggregate([], privacy(rate=0.01, denominator=2.0))), flat(update))


def test_refused_clients_count_as_absent(fixed_key: None) -> None:
    clients = members(4)
    bad = clients[1].mapped(lambda _, A, B: (A, B * math.nan))
    agg = aggregator()
    for c in (clients[0], bad, *clients[2:]):
        try:
            agg.add(c.adapter(), c.weight, client=c.name)
        except RefusedError as refusal:
            assert refusal.code == "not-finite" and c is bad
    checks.assert_identical(agg.finish(), aggregate([clients[0], *clients[2:]]))


def test_no_client_has_a_say_in_who_else_may_join() -> None:
    """Without privacy the first to name a base model or tokens settles them; here only the policy does."""
    own = private.member("own", rank=8).but(
        config=private.member("own", rank=8).config | {"base_model_name_or_path": None}
    )
    agg = aggregator(policy=policy(own))
    for c, base in zip(members(2), ("one", "two"), strict=True):
        agg.add(c.but(config=c.config | {"base_model_name_or_path": base}).adapter(), c.weight, client=c.name)
    odd = members(3)[2]
    with pytest.raises(FlexLoRAError, match="policy"):
        agg.add(odd.but(config=odd.config | {"trainable_token_indices": [1, 2]}).adapter(), 1.0, client=odd.name)
    assert agg.clients == ["c00", "c01"] and agg.finish().template["r"] == 8


def test_heads_move_from_the_public_ones_by_the_clipped_difference(silent: None) -> None:
    base = torch.randn(2, 3)
    heads = [base + torch.full((2, 3), x) for x in (0.5, -3.0, 100.0)]
    clients = [
        private.with_head(c, h).mapped(lambda _, A, B: (A, B * 1e-6)) for c, h in zip(members(3), heads, strict=True)
    ]
    own = private.with_head(private.member("own", rank=8), base)
    update = aggregate(clients, privacy(clip=2.0, denominator=3.0), policy=policy(own), reference=own.adapter())
    moved = np.zeros((2, 3))
    for c, h in zip(clients, heads, strict=True):
        difference = c.weight * (oracle.array(h) - oracle.array(base))
        moved += difference * min(1, 2.0 / np.linalg.norm(difference)) / 3
    np.testing.assert_allclose(update.extras[HEAD].numpy(), base.numpy() + moved, atol=1e-5)
    assert update.adapter(rank=2).extras.keys() == {HEAD}


def test_heads_and_biases_are_noised_whoever_came(tmp_path) -> None:
    own = private.with_head(private.with_bias(private.member("own", SMALL, 8), "a", torch.zeros(5)), torch.ones(500, 8))
    own.adapter().save(tmp_path / "own")
    options: dict[str, Any] = {"policy": policy(own), "reference": tmp_path / "own", "rank": 2}
    update = aggregator(privacy(clip=3.0, denominator=1.5), **options).finish(tmp_path / "update.safetensors")
    noise = update.extras[HEAD].double() - 1
    assert abs(float(noise.std()) / 2 - 1) < 6 * math.sqrt(0.5 / 4000) and abs(float(noise.mean())) < 6 * 2 / 4000**0.5
    bias = update["a"].bias
    assert bias is not None and bias.shape == (5,) and bool((bias != 0).all()) and update["b"].bias is None


def test_an_adversary_who_sees_a_round_does_not_tell_who_came() -> None:
    """One client of the largest norm, z = 1, all else known: the best test has TPR − FPR = 2Φ(1/2) − 1 = 0.383, and
    TPR ≤ e^ε·FPR + δ. Of 2 × 400 rounds the difference is known to 0.03; the bounds are 5 of that away.
    """
    shape = [Layer("fc", 6, 5)]
    target = private.member("t", shape, 2, weight=1.0)
    direction = defences.vectors([target])[0]
    direction /= np.linalg.norm(direction)
    rest = members(2, shape)
    scores = np.array(
        [
            [
                flat(aggregate(clients, privacy(denominator=1.0, delta=1e-5), model=shape)) @ direction
                for _ in range(500)
            ]
            for clients in (rest, [*rest, target])
        ]
    )
    middle = scores.mean()
    advantage = (scores[1] > middle).mean() - (scores[0] > middle).mean()
    assert 0.383 - 0.15 < advantage < 0.383 + 0.15
    epsilon = privacy(delta=1e-5).epsilon()
    for threshold in np.quantile(scores, [0.5, 0.8, 0.95]):
        tpr, fpr = (scores[1] > threshold).mean(), (scores[0] > threshold).mean()
        assert tpr <= math.exp(epsilon) * fpr + 1e-5 + 5 * math.sqrt(0.25 / 400)


# -- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": math.inf}, "clip is inf; give a finite number"),
        ({"clip": True}, "clip is True"),
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0: epsilon would be infinite"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 1.5}, "rate is 1.5; give a finite number > 0 and ≤ 1"),
        ({"denominator": 0}, "denominator is 0"),
        ({"denominator": "10"}, "denominator is '10'"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"delta": None}, "delta is None"),
        ({"clip": 1e15, "denominator": 1e-10}, "the noise of the mean, z·C/D, is 1e+25, which float32 cannot hold"),
        ({"max_epsilon": 0.0}, "max_epsilon is 0.0"),
        ({"max_epsilon": math.inf}, "max_epsilon is inf"),
        ({"ledger": "ledger.json"}, "give a flexlora_fast.privacy.Ledger"),
    ],
)
def test_settings_that_promise_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        privacy(**changes)


def test_nothing_about_the_guarantee_has_a_default() -> None:
    for name in ("clip", "noise_multiplier", "rate", "denominator", "delta"):
        given: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 1.0, "rate": 1.0, "denominator": 1.0, "delta": 1e-6}
        del given[name]
        with pytest.raises(TypeError, match=name):
            ff.Privacy(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": None}, "how many columns there are would tell a client's rank"),
        ({"defence": "clip"}, "defence 'clip' judges each client by the others"),
        ({"defence": "krum"}, "defence 'krum' judges"),
        ({"defence": "median"}, "defence 'median' judges"),
        ({"missing": "renormalize"}, "one client would change the weights of all others"),
        ({"method": "fedit"}, "method 'fedit' is not made from a sum of one term for each client"),
        ({"method": "hetlora"}, "method 'hetlora' is not made from a sum"),
        ({"solver": "gram"}, "solver 'gram' works in the space of the clients' factors"),
        ({"solver": "krylov"}, "solver 'krylov' works"),
        ({"solver": "filtered"}, "solver 'filtered' works"),
        ({"solver": "svd"}, "solver 'svd' works"),
        ({"min_clients": 2}, "whether there is an update would tell who came"),
        ({"min_weight": 0.5}, "whether there is an update would tell who came"),
    ],
)
def test_rounds_that_cannot_be_accounted_for(options: dict[str, Any], message: str) -> None:
    of = privacy()
    with pytest.raises(OptionError, match=re.escape(message)):
        aggregator(of, **options)
    assert of.ledger.rounds == []


def test_a_policy_is_needed_and_privacy_must_be_one() -> None:
    with pytest.raises(OptionError, match="needs a policy"):
        ff.Aggregator(rank=4, privacy=privacy())
    with pytest.raises(OptionError, match=r"give a flexlora_fast\.Privacy"):
        ff.Aggregator(rank=4, policy=policy(), privacy=1.0)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="give it with privacy="):
        ff.Aggregator(rank=4, policy=policy(), reference=members(1)[0].adapter())


@pytest.mark.parametrize("quota", ["max_clients", "max_round_bytes"])
def test_quotas_by_which_one_client_keeps_another_out(quota: str) -> None:
    with pytest.raises(OptionError, match="the policy has max_clients or max_round_bytes: one client would decide"):
        aggregator(policy=policy(**{quota: 10**6}))


def test_clients_that_leave_layers_out_count_as_zero_there(silent: None) -> None:
    clients = [members(2)[0].without("h.0.up"), members(2)[1]]
    update = aggregate(clients, privacy(clip=2.0), policy=policy(partial=True))
    np.testing.assert_allclose(flat(update), clipped_mean(clients, 2.0, 4.0), atol=1e-6)
    assert len(aggregate(clients[:1], privacy(clip=2.0), policy=policy(partial=True)).layers) == 4


def test_weights_above_one() -> None:
    agg = aggregator(policy=policy(max_weight=5000.0))
    with pytest.raises(WeightError, match=r"client 'c00': weight is 1200, and a private round takes 0 to 1"):
        agg.add(members(1)[0].adapter(), 1200, client="c00")
    assert agg.clients == [] and agg.refused[0].code == "weight"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "only their differences from public ones can be clipped; give reference="),
        (torch.zeros(3, 2), r"has one of shape \(3, 2\) as .*head.weight' of shape \(2, 3\)"),
        (torch.full((2, 3), torch.nan), "holds NaN or infinite values"),
        ("none", "has no such tensor"),
    ],
)
def test_heads_without_a_public_reference(head: Any, message: str) -> None:
    own = private.with_head(private.member("own", rank=8), torch.zeros(2, 3))
    reference = private.member("r") if isinstance(head, str) else None if head is None else private.with_head(own, head)
    with pytest.raises(OptionError, match=message):
        aggregator(policy=policy(own), reference=None if reference is None else reference.adapter())


def test_integer_tensors() -> None:
    own = private.with_head(private.member("own", rank=8), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(OptionError, match=r"'base_model.model.head.weight' holds torch.int64, to which no noise"):
        aggregator(policy=policy(own), reference=own.adapter())


def test_a_refused_upload_leaves_no_copy(tmp_path, monkeypatch) -> None:
    client, spool = members(1)[0], tmp_path / "spool"
    spool.mkdir()
    client.adapter().save(tmp_path / "upload")
    agg = aggregator(spool=spool)

    def refuse(*_: Any) -> float:
        raise AdapterError("no norm")

    monkeypatch.setattr(private.mechanism, "norm_of", refuse)
    with pytest.raises(AdapterError, match="client 'c00': no norm"):
        agg.add(tmp_path / "upload", 1.0, client="c00")
    assert list(spool.iterdir()) == [] and agg.clients == []


# -- what is said about it ---


def test_what_a_round_cost_is_saved_and_shown(tmp_path) -> None:
    clients = members(3)
    of = privacy(rate=0.5)
    aggregate(clients, of)
    update = aggregator(of).finish(tmp_path / "update.safetensors")
    assert isinstance(update.privacy, Spent) and update.privacy.rounds == 2
    again = ff.GlobalUpdate.load(update.save(tmp_path / "again.safetensors"))
    assert again.privacy == update.privacy
    text = f"epsilon {update.privacy.epsilon:.4g} this round, {update.privacy.total:.4g} over all 2"
    for shown in (str(update.report()), update.report().summary(), update.report().markdown()):
        assert text in " ".join(shown.split())
    assert update.report().to_dict()["privacy"]["total"] == update.privacy.total
    plain = ff.aggregate([c.adapter() for c in clients])
    assert plain.privacy is None and plain.report().to_dict()["privacy"] is None
    assert ff.GlobalUpdate.load(plain.save(tmp_path / "plain.safetensors")).privacy is None


def test_a_report_says_nothing_of_who_came(fixed_key: None) -> None:
    """The same for any clients, but for what comes of the noised sum."""
    agg = aggregator(rank=3)
    for c in members(3):
        agg.add(c.adapter(), c.weight, client=f"hospital {c.name}")
    with pytest.raises(FlexLoRAError):
        agg.add(b"junk", 1.0, client="hospital x")
    update = agg.finish()
    shown = [str(update.report()), update.report().markdown(), json.dumps(update.report().to_dict())]
    assert not any("hospital" in text or "ΔW_i" in text for text in shown)
    full, empty = update.report().to_dict(), aggregator(rank=3).finish().report().to_dict()
    assert full["clients"] == full["refused"] == [] and full["seconds"] == {} and full["ranks"] == [3]
    numbers = {"norm", "stable_rank", "effective_rank", "error", "energy_kept", "iterations", "excess"}
    for one, other in zip(full["layers"], empty["layers"], strict=True):
        assert {k: v for k, v in one.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
    assert Report(update, [1, 2]).ranks == [1, 2]


def test_the_noise_is_nowhere_to_be_found(fixed_key: None, tmp_path) -> None:
    update = aggregator(rank=3).finish(tmp_path / "u.safetensors")
    data = (tmp_path / "u.safetensors").read_bytes()
    assert private.KEY not in data and private.KEY.hex().encode() not in data
    assert private.KEY.hex() not in repr(update) and str(private.KEY) not in repr(update)
    assert update.verdicts == [] and update.seed == 0


def test_the_public_seed_has_no_part_in_the_noise(fixed_key: None) -> None:
    one, two = (aggregator(seed=seed).finish() for seed in (0, 1))
    np.testing.assert_allclose(flat(one), flat(two), atol=1e-5)


def test_clients_get_adapters_of_their_own_ranks(tmp_path) -> None:
    update = aggregate(members(3), rank=16)
    again = ff.GlobalUpdate.load(update.save(tmp_path / "update.safetensors"))
    for c in members(3):
        mine = again.adapter(client=c.name)
        assert mine.rank("h.0.up") == c.rank("h.0.up")
        torch.testing.assert_close(mine.delta("h.0.up"), update.delta("h.0.up", c.rank("h.0.up")))
    assert [c.weight for c in again.clients] == [c.weight for c in members(3)]
