"""Server optimizers against dense float64 statements over rounds, certified where they are cut, and resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import errors
from flexlora_fast.methods.fedopt import FedAdam, FedAvgM
from tests import checks, rounds

ALL = 64
HEAD = "base_model.model.head.weight"


def clients_of(number, model="linear", dtype="float32"):
    """Five clients of mixed ranks with heads, one of them with a bias of B; others in every round."""
    made = []
    for i, c in enumerate(rounds.typical(model, dtype, seed=number)):
        generator = torch.Generator().manual_seed(100 * number + i)
        layer = next(name for name, spec in c.layers.items() if spec.kind == "linear")
        bias = {layer: torch.randn(c.layers[layer].m, generator=generator)} if i == 1 else {}
        config = c.config | {"lora_bias": bool(bias), "modules_to_save": ["head"]}
        head = torch.randn(3, 7, generator=generator)
        made.append(c.but(extras={"head.weight": head}, bias=bias, config=config))
    return made


def aggregate(number, rank=ALL, without=(), **options):
    clients = [c.without(*without) if without else c for c in clients_of(number, **options)]
    return ff.aggregate([c.adapter() for c in clients], [c.weight for c in clients], rank=rank, tol=0)


class Dense:
    """The published rules on dense float64 arrays: by layer with one v each, or entry by entry (heads)."""

    def __init__(self, lr, momentum=None, beta1=None, beta2=None, tau=None):
        self.lr, self.beta2, self.tau = lr, beta2, tau
        self.decay, self.gain = (momentum, 1.0) if beta1 is None else (beta1, 1 - beta1)
        self.m, self.v = {}, {}

    def step(self, x, g, key, entrywise=False):
        delta = np.zeros_like(x) if g is None else g - x
        self.m[key] = self.decay * self.m.get(key, 0.0) + self.gain * delta
        if self.tau is None:
            return x + self.lr * self.m[key]
        square = delta**2 if entrywise else (delta**2).mean()
        self.v[key] = self.beta2 * self.v.get(key, self.tau**2) + (1 - self.beta2) * square
        return x + self.lr * self.m[key] / (np.sqrt(self.v[key]) + self.tau)


RULES = {
    "fedavgm": (FedAvgM, {"lr": 0.7, "momentum": 0.9}),
    "fedavgm, no momentum": (FedAvgM, {"lr": 0.7, "momentum": 0.0}),
    "fedadam": (FedAdam, {"lr": 0.05, "beta1": 0.9, "beta2": 0.95, "tau": 0.01}),
    "fedadam, no momentum": (FedAdam, {"lr": 0.05, "beta1": 0.0, "beta2": 0.5, "tau": 1.0}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model,dtype", [("linear", "float32"), ("mixed", "mixed"), ("weird", "float32")])
def test_steps_at_full_rank_are_the_dense_ones(rule, model, dtype):
    """Five rounds, in one of which nobody has one of the layers."""
    if model == "weird":
        model = list(rounds.MODELS["weird"])
    make, settings = RULES[rule]
    opt, dense, update = make(**settings, rank=ALL, tol=0), Dense(**settings), None
    X, H = {}, None
    for number in range(5):
        gone = ("h.0.down",) if number == 3 and model == "linear" else ()
        received = aggregate(number, model=model, dtype=dtype, without=gone)
        update = opt.step(update, received)
        for layer in update.layers:
            g = checks.batched(received.delta(layer)).astype(float) if layer in received else None
            X[layer] = dense.step(X.get(layer, 0.0 if g is None else np.zeros_like(g)), g, layer)
            assert np.linalg.norm(checks.batched(update.delta(layer)) - X[layer]) < 2e-5 * max(
                np.linalg.norm(X[layer]), 1
            )
            assert update[layer].norm == pytest.approx(np.linalg.norm(X[layer]), rel=1e-5, abs=1e-6)
        head = received.extras[HEAD].double().numpy()
        H = head if H is None else dense.step(H, head, "head", entrywise=True)
        np.testing.assert_allclose(update.extras[HEAD].double().numpy(), H, rtol=1e-5, atol=1e-6)
        H = update.extras[HEAD].double().numpy()
        assert [c.name for c in update.clients] == [c.name for c in received.clients]
    assert opt.steps == 5 and update.method == f"flexlora+{opt.name}"
    client = update.adapter(client="c2")
    assert client.rank(client.layers[0]) == 4 and set(client.extras) == {HEAD}
    if "fedadam" in rule:
        for layer, v in opt.second_moments.items():
            assert v == pytest.approx(dense.v[layer], rel=1e-5)
    assert (opt.momentum is None) == ("no momentum" in rule)
    assert opt.name in update.report().summary()


def test_biases_go_with_their_layers():
    opt, update = FedAvgM(lr=0.5, momentum=0.5, rank=ALL), None
    got = []
    for number in range(3):
        received = aggregate(number)
        update = opt.step(update, received)
        got.append((received["h.0.up"].bias.double(), update["h.0.up"].bias.double()))
    x, m = torch.zeros(29).double(), torch.zeros(29).double()
    for g, after in got:
        m = 0.5 * m + g - x
        x = x + 0.5 * m
        torch.testing.assert_close(after, x, rtol=1e-5, atol=1e-6)


def test_without_momentum_at_rate_1_it_is_the_rounds_update_itself():
    opt, update = FedAvgM(lr=1.0, momentum=0.0), None
    for number in range(3):
        received = aggregate(number, rank=None)
        update = opt.step(update, received)
        for layer in received.layers:
            assert update[layer] is received[layer]
        assert torch.equal(update.extras[HEAD], received.extras[HEAD])
    assert opt.momentum is None and opt.recompression == {}
    cut = FedAvgM(lr=1.0, momentum=0.0, rank=2).step(update, received)
    for layer in received.layers:
        torch.testing.assert_close(cut.delta(layer), received.delta(layer, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["fedavgm", "fedadam"])
def test_steps_that_are_cut_say_by_how_much(rule):
    """Against the exact step from the state that was kept, whatever the rounds' own updates had left out."""
    make, settings = RULES[rule]
    opt, update = make(**settings, rank=3, tol=0), None
    for number in range(4):
        whole, received = aggregate(number), aggregate(number, rank=4)
        old, momentum = update, opt.momentum
        update = opt.step(update, received)
        for layer in update.layers:
            x = 0.0 if old is None else checks.batched(old.delta(layer)).astype(float)
            m = 0.0 if momentum is None else checks.batched(momentum.delta(layer)).astype(float)
            g = checks.batched(whole.delta(layer)).astype(float)
            exact_m = opt.decay * m + opt.gain * (g - x)
            rate = opt._rate(opt._second.get(layer))
            exact = x + rate * exact_m
            for rank in (1, 3):
                error = np.linalg.norm(checks.batched(update.delta(layer, rank)) - exact)
                assert error <= update[layer].error(rank) + 1e-5 * np.linalg.norm(exact)
                assert update[layer].error(rank) <= error + 2 * update[layer].inherited + 1e-4 * np.linalg.norm(exact)
            assert update[layer].rank == min(3, update[layer].spec.m, update[layer].spec.n)
            left = np.linalg.norm(checks.batched(opt.momentum.delta(layer)) - exact_m)
            assert left <= opt.momentum[layer].error(3) + 1e-5 * np.linalg.norm(exact_m)
            assert opt.recompression[layer] == opt.momentum[layer].cut_off(3) > 0


@pytest.mark.parametrize("rule", RULES)
def test_it_goes_on_from_disk_bit_for_bit(rule, tmp_path):
    make, settings = RULES[rule]
    opt, update = make(**settings, rank=5, seed=3), None
    for number in range(2):
        update = opt.step(update, aggregate(number))
        opt.save(tmp_path / "opt")
    assert len(list((tmp_path / "opt").iterdir())) == (2 if "no momentum" in rule else 3)
    update.save(tmp_path / "update")
    again, there = make.load(tmp_path / "opt"), ff.GlobalUpdate.load(tmp_path / "update")
    assert again.steps == 2
    for number in (2, 3):
        update, there = opt.step(update, aggregate(number)), again.step(there, aggregate(number))
        checks.assert_identical(there, update)
        again.save(tmp_path / "opt")
        again = make.load(tmp_path / "opt")


def test_a_step_that_fails_changes_nothing(tmp_path):
    opt = FedAdam(0.1, rank=4)
    first = opt.step(None, aggregate(0))
    before = opt.save(tmp_path / "before")
    other = ff.aggregate([rounds.client("x", [rounds.Layer("h.0.up", 31, 12)]).adapter()])
    with pytest.raises(errors.IncompatibleAdapterError, match=r"layer 'h\.0\.up'"):
        opt.step(first, other)
    with pytest.raises(errors.OptionError, match="this is step 2; give previous="):
        opt.step(None, aggregate(1))
    odd = ff.aggregate([clients_of(0)[0].but(extras={"head.weight": torch.ones(2, 2)}).adapter()])
    with pytest.raises(errors.AdapterError, match="head"):
        opt.step(first, odd)
    after = opt.save(tmp_path / "after")
    assert {p.name: p.read_bytes() for p in before.iterdir()} == {p.name: p.read_bytes() for p in after.iterdir()}
    merged = ff.aggregate([c.adapter() for c in clients_of(0)], method="flora")
    with pytest.raises(errors.OptionError, match="'flora' freeze A or go into the frozen weight"):
        opt.step(first, merged)


def test_what_no_optimizer_can_be(tmp_path):
    for make, settings, why in (
        (FedAvgM, {"lr": 0}, "lr is 0; give a finite number > 0"),
        (FedAvgM, {"lr": float("nan")}, "lr is nan"),
        (FedAvgM, {"momentum": 1.0}, "momentum is 1.0; give a finite number from 0 to 1"),
        (FedAvgM, {"momentum": -0.1}, "momentum is -0.1"),
        (FedAdam, {"lr": 0.1, "beta1": 1}, "beta1 is 1"),
        (FedAdam, {"lr": 0.1, "beta2": True}, "beta2 is True"),
        (FedAdam, {"lr": 0.1, "tau": 0}, "tau is 0"),
        (FedAvgM, {"solver": "none"}, "none"),
    ):
        with pytest.raises(errors.OptionError, match=why):
            make(**settings)
    with pytest.raises(errors.RankError):
        FedAvgM(rank=0)
    with pytest.raises(errors.AdapterError, match="no server optimizer"):
        FedAvgM.load(tmp_path)
    FedAvgM(momentum=0.5).save(tmp_path)
    assert FedAvgM.load(tmp_path).decay == 0.5
    with pytest.raises(errors.AdapterError, match="holds a fedavgm"):
        FedAdam.load(tmp_path)
    state = json.loads((tmp_path / "optimizer.json").read_text())
    (tmp_path / "optimizer.json").write_text(json.dumps(state | {"heads": "gone"}))
    with pytest.raises(errors.AdapterError):
        FedAvgM.load(tmp_path)
