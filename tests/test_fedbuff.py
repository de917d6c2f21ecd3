"""Asynchronous rounds against a dense float64 statement, with clients of mixed ranks coming in random order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import errors
from flexlora_fast.methods.fedbuff import FedBuff
from tests import checks, rounds

ALL = 64
HEAD = "base_model.model.head.weight"
RANKS = {"anna": 2, "ben": 4, "carl": 1, "dora": 3, "eve": 4}


def fresh(name, number=0, model="linear", dtype=torch.float32, **options):
    """A client's first adapter, with a head."""
    c = rounds.client(name, model, rank=RANKS[name], alpha=2 * RANKS[name], seed=number, dtype=dtype, **options)
    head = torch.randn(3, 7, generator=torch.Generator().manual_seed(number + len(name)))
    return c.but(extras={"head.weight": head}, config=c.config | {"modules_to_save": ["head"]}).adapter()


def trained(sent, number, dtype=torch.float32):
    """What a client makes of what it was sent: factors and heads moved by noise, in the dtype it trains in."""
    generator = torch.Generator().manual_seed(number)

    def moved(x):
        return (x.float() + 0.1 * torch.randn(x.shape, generator=generator)).to(dtype)

    state = {key: moved(x) for key, x in sent.state_dict().items()}
    return ff.Adapter.from_state_dict(state, sent.config)


def dense_delta(adapter, layer):
    A, B = (X.double().numpy() for X in adapter.factors(layer))
    return adapter.scale(layer) * (B @ A)


@pytest.mark.parametrize("sent_as", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["linear", "mixed"])
def test_random_arrivals_against_dense(model, sent_as):
    """ΔW_{t+1} = ΔW_t + η Σ p s(τ)(ΔW_i − what was sent), heads likewise; factors are sent in half precision too."""
    draw, eta = np.random.default_rng(0), 0.8
    first = ff.aggregate([fresh(name, model=model) for name in RANKS], rank=ALL)
    server = FedBuff(goal=3, lr=eta, rank=ALL, initial=first, max_staleness=4, tol=0)
    X = {layer: checks.batched(first.delta(layer)).astype(float) for layer in first.layers}
    H = first.extras[HEAD].double().numpy()
    busy = {name: server.adapter_for(name, rank=rank, dtype=sent_as) for name, rank in RANKS.items()}
    buffer, taus = [], []
    for arrival in range(15):
        free = [name for name in busy if name not in server.buffered]
        name = free[draw.integers(len(free))]
        back, weight = trained(busy[name].adapter, arrival), float(draw.integers(1, 5))
        tau = server.add(back, started_from=busy[name].version, weight=weight, client=name)
        assert tau == server.version - busy[name].version
        taus.append(tau)
        buffer.append((weight, (1 + tau) ** -0.5, back, busy[name].adapter))
        if server.ready:
            total = sum(w for w, *_ in buffer)
            for layer, x in X.items():
                X[layer] = x + sum(
                    eta * w / total * s * (dense_delta(new, layer) - dense_delta(old, layer))
                    for w, s, new, old in buffer
                )
            H = H + sum(
                eta * w / total * s * (new.extras[HEAD].double().numpy() - old.extras[HEAD].double().numpy())
                for w, s, new, old in buffer
            )
            names = server.buffered
            update = server.step()
            assert update is server.current and [c.name for c in update.clients] == names and server.buffered == []
            assert sum(c.weight for c in update.clients) == pytest.approx(1) and update.weight == total
            for layer, x in X.items():
                norm = np.linalg.norm(x)
                assert np.linalg.norm(checks.batched(update.delta(layer)) - x) < 2e-5 * norm
                assert update[layer].norm == pytest.approx(norm, rel=1e-5)
            np.testing.assert_allclose(update.extras[HEAD].double().numpy(), H, rtol=1e-5, atol=1e-5)
            for c in names:
                busy[c] = server.adapter_for(c, dtype=sent_as)
                assert busy[c].version == server.version and busy[c].adapter.rank("h.0.up") == RANKS[c]
            buffer = []
    assert server.version == 5 and max(taus) > 0


def test_what_was_sent_is_what_is_subtracted():
    """A client that sends back what it got moves nothing, whatever its rank, dtype and version."""
    first = ff.aggregate([fresh(name) for name in RANKS], rank=ALL)
    for dtype in (torch.float32, torch.bfloat16):
        server = FedBuff(goal=1, rank=ALL, initial=first)
        sent = {name: server.adapter_for(name, rank=RANKS[name], dtype=dtype) for name in RANKS}
        for name, (version, adapter) in sent.items():
            assert server.add(adapter, started_from=version, client=name) == server.version
            update = server.step()
            for layer in first.layers:
                assert (update.delta(layer) - first.delta(layer)).norm() < 1e-5 * first[layer].norm
            torch.testing.assert_close(update.extras[HEAD], first.extras[HEAD])


def test_all_at_staleness_0_are_a_synchronous_round():
    """Exactly, where all start from the same: new factors at first, then the whole of the last version."""
    server, adapters = FedBuff(goal=5, tol=0), {name: fresh(name) for name in RANKS}
    weights = {name: 1.0 + i for i, name in enumerate(RANKS)}
    for number in range(3):
        for name in reversed(RANKS) if number % 2 else RANKS:
            server.add(adapters[name], started_from=number, weight=weights[name], client=name)
        update = server.step()
        flat = ff.aggregate(list(adapters.values()), list(weights.values()), clients=list(adapters), rank=4, tol=0)
        assert [(c.name, c.weight) for c in update.clients] == [(c.name, c.weight) for c in flat.clients]
        for layer in flat.layers:
            assert (update.delta(layer) - flat.delta(layer)).norm() < 1e-6 * flat[layer].norm
            assert update[layer].error(2) == pytest.approx(flat[layer].error(2), rel=1e-5)
            assert update[layer].total_rank == flat[layer].total_rank  # nothing of the last version is left
        torch.testing.assert_close(update.extras[HEAD], flat.extras[HEAD])
        adapters = {name: trained(server.adapter_for(rank=4).adapter, 10 * number + len(name)) for name in RANKS}


def test_the_order_of_arrival_does_not_show():
    first = ff.aggregate([fresh(name) for name in RANKS], rank=ALL)
    updates = []
    for order in (list(RANKS), list(reversed(RANKS))):
        server = FedBuff(goal=5, rank=3, initial=first)
        for name in order:
            sent = server.adapter_for(name, rank=RANKS[name]).adapter
            server.add(trained(sent, len(name)), started_from=0, weight=len(name), client=name)
        updates.append(server.step())
    checks.assert_identical(*updates)


def test_what_a_step_cuts_off_is_certified():
    first = ff.aggregate([fresh(name) for name in RANKS], rank=ALL)
    server = FedBuff(goal=2, rank=3, initial=first, staleness="constant")
    for number in range(3):
        old, backs = server.current, {}
        for name in ("anna", "dora"):
            sent = server.adapter_for(name, rank=RANKS[name]).adapter
            backs[name] = (trained(sent, number), sent)
            server.add(backs[name][0], started_from=number, client=name)
        update = server.step()
        for layer in update.layers:
            moved = sum((dense_delta(new, layer) - dense_delta(sent, layer)) / 2 for new, sent in backs.values())
            exact = checks.batched(old.delta(layer)) + moved
            error = np.linalg.norm(checks.batched(update.delta(layer)) - exact)
            assert update[layer].error(update[layer].rank) == pytest.approx(error, rel=1e-3, abs=1e-4)
            assert update[layer].inherited == 0 and update[layer].rank <= 3


def test_layers_that_only_some_have_and_biases():
    clients = [rounds.client(f"c{i}", rank=3, seed=i) for i in range(3)]
    clients[0] = clients[0].without("h.0.up")
    bias = torch.randn(11, generator=torch.Generator().manual_seed(0))
    clients[1] = clients[1].but(bias={"h.0.down": bias}, config=clients[1].config | {"lora_bias": True})
    server = FedBuff(goal=3, rank=ALL)
    for c in clients:
        server.add(c.adapter(), started_from=0, client=c.name)
    update = server.step()
    flat = ff.aggregate([c.adapter() for c in clients], rank=ALL)
    for layer in flat.layers:
        torch.testing.assert_close(update.delta(layer), flat.delta(layer), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(update["h.0.down"].bias, flat["h.0.down"].bias)
    for c in clients:  # each sends back what it got: nothing moves, and nobody undoes a layer it has not
        version, adapter = server.adapter_for(c.name)
        assert ("h.0.up" in adapter.layers) == (c.name != "c0")
        server.add(adapter, started_from=version, client=c.name)
    again = server.step()
    for layer in flat.layers:
        torch.testing.assert_close(again.delta(layer), update.delta(layer), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again["h.0.down"].bias, update["h.0.down"].bias)


def test_staleness_counts_as_it_was_asked_for():
    first = ff.aggregate([fresh("ben")], rank=ALL)
    for staleness, factor in (("polynomial", 3**-0.5), ("constant", 1.0), (lambda tau: 1 / (1 + 2 * tau), 0.2)):
        server = FedBuff(1, staleness, initial=first, rank=ALL)
        version, sent = server.adapter_for("anna", rank=2)
        for name in ("ben", "carl"):
            server.add(server.adapter_for(name, rank=4).adapter, started_from=server.version, client=name)
            server.step()
        back = trained(sent, 1)
        assert server.add(back, started_from=version, client="anna") == 2
        update = server.step()
        moved = factor * (dense_delta(back, "h.0.up") - dense_delta(sent, "h.0.up"))[0]
        got = (update.delta("h.0.up") - first.delta("h.0.up")).double().numpy()
        assert np.linalg.norm(got - moved) < 1e-4 * np.linalg.norm(moved) + 1e-5


def test_refusals_leave_the_buffer_as_it_was():
    first = ff.aggregate([fresh("ben")], rank=ALL)
    server = FedBuff(goal=3, initial=first, rank=ALL, max_staleness=1)
    version, sent = server.adapter_for("anna", rank=2)
    server.add(trained(sent, 0), started_from=version, client="anna")
    state = {key: x.clone() for key, x in sent.state_dict().items()}
    state[next(iter(state))].view(-1)[0] = math.nan
    hurt = ff.Adapter.from_state_dict(state, sent.config)
    odd = rounds.client("odd", [rounds.Layer("h.0.up", 31, 12)]).adapter()
    head = ff.Adapter.from_state_dict(sent.state_dict() | {HEAD: torch.ones(2, 2)}, sent.config)
    other = ff.Adapter.from_state_dict(sent.state_dict(), sent.config | {"base_model_name_or_path": "another"})
    for arguments, why, kind in (
        ((sent, 0, 1.0, "anna"), "client 'anna'.*already", errors.IncompatibleAdapterError),
        (
            (sent, 1, 1.0, "ben"),
            "client 'ben': it started from version 1, the server is at 0",
            errors.IncompatibleAdapterError,
        ),
        ((sent, -1, 1.0, "ben"), "version -1", errors.IncompatibleAdapterError),
        ((sent, True, 1.0, "ben"), "version True", errors.IncompatibleAdapterError),
        ((sent, "0", 1.0, "ben"), "version '0'", errors.IncompatibleAdapterError),
        ((hurt, 0, 1.0, "ben"), "client 'ben'.*NaN", errors.AdapterError),
        ((odd, 0, 1.0, "ben"), "client 'ben', layer 'h.0.up'", errors.IncompatibleAdapterError),
        ((head, 0, 1.0, "ben"), "client 'ben'.*head", errors.IncompatibleAdapterError),
        ((other, 0, 1.0, "ben"), "client 'ben'.*'another'", errors.IncompatibleAdapterError),
        ((sent, 0, -1.0, "ben"), "client 'ben': weight is -1", errors.WeightError),
    ):
        with pytest.raises(kind, match=why):
            server.add(*arguments)
        assert server.buffered == ["anna"] and not server.ready
    assert len(server.refused) == 10 and server.refused[0].client == "anna"
    with pytest.raises(errors.QuorumError, match="1 clients of positive weight of 3"):
        server.step()
    for name in ("ben", "carl"):
        server.add(trained(sent, 1), started_from=0, client=name)
    update = server.step()
    assert len(update.refused) == 10 and server.refused == [] and update.report().refused
    for name in ("anna", "dora", "eve"):
        server.add(server.adapter_for(name, rank=1).adapter, started_from=1, client=name)
    server.step()
    with pytest.raises(errors.IncompatibleAdapterError, match="version 0, 2 steps ago, and max_staleness is 1; send"):
        server.add(trained(sent, 0), started_from=0, client="anna")
    assert server.add(trained(sent, 0), started_from=1, client="anna") == 1


def test_heads_need_a_start_to_be_compared_with():
    server = FedBuff(goal=1, rank=ALL)
    assert server.current is None
    with pytest.raises(errors.EmptyRoundError, match="give initial="):
        server.adapter_for("anna", rank=2)
    server.add(fresh("ben"), started_from=0, client="ben")
    torch.testing.assert_close(server.step().extras[HEAD], fresh("ben").extras[HEAD])
    with pytest.raises(
        errors.IncompatibleAdapterError, match=r"version 0 has no tensor.*head.*give FedBuff an initial="
    ):
        server.add(fresh("anna"), started_from=0, client="anna")
    with pytest.raises(errors.AdapterError, match="client 'carl': it has sent nothing yet"):
        server.adapter_for("carl")
    start = rounds.client("start", rank=2).mapped(lambda layer, A, B: (A, 0 * B))
    start = start.but(extras={"head.weight": torch.ones(3, 7)}).adapter()
    server = FedBuff(goal=1, rank=ALL, initial=start)  # an adapter whose update is zero, and a head
    assert server.current.norm == 0 and torch.equal(server.adapter_for(rank=2).adapter.extras[HEAD], torch.ones(3, 7))


def test_a_policy_stands_at_the_door(tmp_path):
    fresh("ben").save(tmp_path / "reference")
    policy = ff.RoundPolicy.from_adapter(tmp_path / "reference", ranks=(1, 2, 4))
    server = FedBuff(goal=1, policy=policy, rank=4)
    with pytest.raises(errors.RefusedError):
        server.add(fresh("dora"), started_from=0, client="dora")
    fresh("anna").save(tmp_path / "anna")
    server.add((tmp_path / "anna" / "adapter_model.safetensors").read_bytes(), started_from=0, client="anna")
    assert server.step().clients[0].name == "anna" and policy is not None


def test_what_no_server_can_be():
    merged = ff.aggregate([fresh("ben")], method="flora")
    for settings, why in (
        ({"goal": 0}, "goal is 0"),
        ({"goal": True}, "goal is True"),
        ({"goal": 1, "max_staleness": -1}, "max_staleness is -1"),
        ({"goal": 1, "staleness": "linear"}, "staleness 'linear' is none of polynomial, constant"),
        ({"goal": 1, "lr": 0}, "lr is 0"),
        ({"goal": 1, "initial": merged}, "goes into the frozen weight"),
    ):
        with pytest.raises(errors.OptionError, match=why):
            FedBuff(**settings)
    server = FedBuff(1, staleness=lambda tau: math.nan)
    with pytest.raises(errors.OptionError, match=r"staleness\(0\) is nan"):
        server.add(fresh("ben"), started_from=0)
    with pytest.raises(errors.OptionError, match="initial is a str; give an Adapter or a GlobalUpdate"):
        FedBuff(1, initial="update.safetensors")
    for versions in ({2.5: merged}, {-1: merged}, {2: fresh("ben")}, {"a": merged}):
        with pytest.raises(errors.OptionError, match=r"versions has .*; give the GlobalUpdate of each version"):
            FedBuff(1, versions=versions)


def test_a_version_that_is_not_here_is_none_to_subtract():
    update = ff.aggregate([fresh("ben")])
    server = FedBuff(1, versions={5: update})
    for number in (0, 3):
        why = rf"version {number}, which is not here \(versions= had \[5\]\)"
        with pytest.raises(errors.IncompatibleAdapterError, match=why):
            server.add(fresh("anna"), started_from=number)
    assert server.add(fresh("anna"), started_from=5) == 0


def test_clients_without_weight_make_no_step():
    server = FedBuff(2)
    for number in range(3):
        server.add(fresh("ben", number), started_from=0, weight=0.0 if number else 1.0, client=f"c{number}")
    assert not server.ready
    with pytest.raises(errors.QuorumError, match="1 clients of positive weight of 2 are there; wait for more"):
        server.step()
    server.add(fresh("anna", 3), started_from=0, client="anna")
    assert server.ready and len(server.step().clients) == 2
