"""Securely aggregated rounds against float64: every protocol and kind of layer, weights, dropouts, certificates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.secure import Plan, Server, add, matrices, message, sketch
from flexlora_fast.secure.encoding import decode, split
from tests import oracle, rounds, secure
from tests.rounds import DTYPES, MODELS, Layer
from tests.secure import ROUNDS, WIDE, mixed, off, plan_for, run

LARGE_KINDS = {
    "moe": rounds.experts("experts", 2, 120, 110),
    "conv": (rounds.conv("c", 90, 12, 3, 3),),
    "embedding": (Layer("embed", 80, 400, "embedding"),),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [1, 2])
def test_every_kind_of_small_layer_is_sent_whole_and_exact(model: str, count: int) -> None:
    clients = rounds.typical(model)
    plan = plan_for(clients, rounds=count)
    assert all(plan.dense(spec) for spec in plan.layers) and len(plan.stages) == 1
    update = run(plan, clients)
    for layer in clients[0].layers:
        truth = oracle.truth("flexlora", clients, layer)
        best = truth.error(4)
        assert off(update, clients, layer, min(4, update[layer].rank)) <= best * 1.00001 + 1e-5 * truth.mass
        assert update[layer].error(update[layer].rank) == pytest.approx(best, rel=1e-3, abs=1e-4 * truth.mass)
        assert update[layer].solver == "sum" and update[layer].excess == 0


@pytest.mark.parametrize("count", ROUNDS)
@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_every_kind_of_large_layer_is_sketched(kind: str, count: int) -> None:
    clients = [rounds.client(f"c{i}", LARGE_KINDS[kind], rank=r, alpha=2 * r) for i, r in enumerate((1, 2, 1))]
    plan = plan_for(clients, rank=4, rounds=count, bits=64)
    update = run(plan, clients)
    for layer in clients[0].layers:  # rank 4 holds all of it
        assert update[layer].solver == "sketch"
        assert off(update, clients, layer) <= 1e-6 * oracle.truth("flexlora", clients, layer).norm
        alpha = 3.0
        assert torch.allclose(
            update.adapter(rank=4, alpha=alpha).delta(layer), update.delta(layer), atol=1e-5 * update[layer].norm
        )


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("count", ROUNDS)
def test_a_rank_of_all_clients_together_reproduces_the_mean(count: int, bits: int) -> None:
    clients = mixed()
    update = run(plan_for(clients, rank=14, oversample=None, rounds=count, bits=bits), clients)
    for layer in clients[0].layers:
        truth = oracle.truth("flexlora", clients, layer)
        bound = 1e-6 if bits == 64 else 2e-4
        assert off(update, clients, layer) <= bound * truth.norm
        assert update[layer].norm == pytest.approx(truth.norm, rel=1e-3)
        assert update[layer].error(14) <= 10 * bound * truth.norm


# ‖ΔW − X‖_F over that of the best, for σ_j = 1/j and the protocol's default sketch.
@pytest.mark.parametrize(("count", "bound"), [(1, 1.6), (2, 1.5), (3, 1.05), (4, 1.01)])
def test_excess_on_a_decaying_spectrum(count: int, bound: float) -> None:
    clients = rounds.with_spectrum(1 / torch.arange(1, 65, dtype=torch.float64), 180, 240, 4)
    update = run(plan_for(clients, rank=8, rounds=count, oversample=None), clients)
    best = oracle.truth("flexlora", clients, "fc").error(8)
    assert best * (1 - 1e-9) <= off(update, clients, "fc", 8) <= bound * best


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    clients = [c.but(weight=0.5) for c in rounds.typical(WIDE, dtype)]  # type: ignore[arg-type]
    update = run(plan_for(clients, rank=14), clients)
    for layer in clients[0].layers:
        assert off(update, clients, layer) <= 2e-4 * oracle.truth("flexlora", clients, layer).norm


@pytest.mark.parametrize("count", [1, 3])
def test_the_result_is_that_of_a_round_in_the_clear(count: int) -> None:
    """Down to adapters: FlexLoRA's adapter of every rank, within the protocol's excess."""
    clients = rounds.with_spectrum(2.0 ** -torch.arange(16, dtype=torch.float64), 150, 170, 4)
    plain = ff.aggregate([c.adapter() for c in clients], rank=6)
    update = run(plan_for(clients, rank=6, rounds=count, oversample=12), clients)
    for rank in (1, 3, 6):
        gap = update.adapter(rank=rank).delta("fc") - plain.adapter(rank=rank).delta("fc")
        assert float(gap.norm()) <= 1.5 * plain["fc"].error(rank)
    assert update["fc"].error(6) == pytest.approx(plain["fc"].error(6), rel=0.2)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["fc"], "use_rslora": True}
    assert update.adapter(config=config).rank("fc") == 3


@pytest.mark.parametrize("count", ROUNDS)
def test_layers_of_zeros(count: int) -> None:
    clients = [c.mapped(lambda name, A, B: (A, 0 * B)) for c in mixed()]
    plan = plan_for(clients, clip=1.0, rounds=count)
    update = run(plan, clients)
    for layer in update:
        assert float(update.delta(layer).abs().max()) == 0 and update[layer].norm == 0
        assert torch.isfinite(update[layer].factorization.U).all()
        A, _ = update.adapter(rank=4).factors(layer)
        assert float(A.norm()) > 0  # it can still learn


# -- weights, missing parts, dropouts ---


def test_weights() -> None:
    """Weight k equals k copies, and weight 0 equals absent, up to what rounding to integers leaves."""
    one, two, three = mixed()[:3]
    plan = plan_for([one, two, three], bits=64, max_weight=2.0, clip=1000.0, rank=10)
    twice = run(plan, [one.but(weight=0.5), two.but(weight=1.5)])
    copies = run(plan, [one.but(weight=0.5), *(two.but(weight=0.5) for _ in range(3))])
    absent = run(plan, [one.but(weight=0.5), two.but(weight=1.5), three.but(weight=0)])
    for layer in twice:
        assert torch.allclose(twice.delta(layer), copies.delta(layer), atol=1e-5)
    assert secure.same(twice, absent)


def test_a_client_may_lack_layers_and_tensors() -> None:
    layer = WIDE[0].name
    whole = [c.but(extras={"head.weight": torch.full((3, 2), float(i))}) for i, c in enumerate(mixed())]
    partial = [whole[0], whole[1].without(layer).but(extras={}), *whole[2:]]
    plan = plan_for(whole, rank=14, extra_bound=3.0, rounds=2)
    assert secure.first(plan, partial[1]).shape == secure.first(plan, whole[1]).shape
    update = run(plan, partial)
    assert off(update, partial, layer) <= 2e-4 * oracle.truth("flexlora", partial, layer).norm
    mean = sum(c.weight * c.extras["head.weight"] for c in partial if c.extras) / (1 + 0.75 + 0.5)
    assert torch.allclose(update.extras["base_model.model.head.weight"], mean, atol=1e-5)
    nobody = run(plan, [c.but(extras={}) for c in partial])
    assert not nobody.extras and off(nobody, partial, layer) == off(update, partial, layer)


def test_lora_bias_and_integer_tensors() -> None:
    clients = []
    for i, c in enumerate(mixed()):
        bias = {layer.name: torch.linspace(-1, i, layer.m) for layer in WIDE}
        extras = {"norm.count": torch.tensor([i, 7]), "norm.steps": torch.tensor(i), "none": torch.zeros(0, 3)}
        clients.append(c.but(bias=bias, extras=extras, config=c.config | {"lora_bias": True}))
    plan = plan_for(clients, rank=14, extra_bound=7, bits=64)
    update = run(plan, clients)
    plain = ff.aggregate([c.adapter() for c in clients], [c.weight for c in clients])
    for layer in update:
        assert torch.allclose(update[layer].bias, plain[layer].bias, atol=1e-6)  # type: ignore[arg-type]
    assert list(update.extras) == list(plain.extras) and len(plain.extras) == 3
    assert all(torch.equal(update.extras[key], plain.extras[key]) for key in plain.extras)
    assert Plan.from_json(plan.to_json()) == plan
    assert torch.allclose(
        update.adapter(rank=3).lora_bias(WIDE[0].name), plain.adapter(rank=3).lora_bias(WIDE[0].name), atol=1e-6
    )


def test_clients_that_drop_out_between_rounds_only_shaped_the_subspace() -> None:
    clients = rounds.with_spectrum(2.0 ** -torch.arange(12, dtype=torch.float64), 140, 160, 4)
    plan = plan_for(clients, rank=12, rounds=4, bits=64)
    server, there = Server(plan), list(clients)
    while not server.done:
        server.receive(add(sketch(c.adapter(), plan, server.message) for c in there))
        there = there[: max(2, len(there) - 1)]
    update = server.finish()
    assert off(update, there, "fc") <= 1e-6 * oracle.truth("flexlora", there, "fc").norm
    assert "of 2 clients in 4 rounds" in update.method


# -- bits ---


def test_the_result_does_not_depend_on_the_order_of_clients() -> None:
    clients = mixed()
    plan = plan_for(clients, rounds=2)
    assert secure.same(run(plan, clients), run(plan, clients[::-1]))


def test_a_sum_of_sketches_is_the_sketch_of_the_sum() -> None:
    """Up to rounding each summand to an integer; the sum itself is exact."""
    one, two = mixed()[1:3]
    joined = rounds.client("both", WIDE, rank=9, alpha=9)
    factors = {}
    for name in joined.factors:
        (A, B), (A2, B2) = one.factors[name], two.factors[name]
        scaled = [c.weight * c.scales[name] * X for c, X in ((one, B), (two, B2))]
        factors[name] = (torch.cat([A, A2], dim=1), torch.cat(scaled, dim=2))
    joined = joined.but(factors=factors)
    plan = plan_for([one, two, joined], rounds=2, clip=500.0)
    parts = [secure.first(plan, c) for c in (one, two)]
    total, whole = secure.signed(add(parts)), secure.signed(secure.first(plan, joined))
    assert np.array_equal(total[2:].astype(np.int64), sum(secure.signed(x)[2:].astype(np.int64) for x in parts))
    # float32 factors of the joined client round its B once more, by at most 2^-24 of an entry
    assert np.abs(total[2:].astype(np.int64) - whole[2:]).max() <= 2 + 2**-20 * plan.levels
    assert total[0] == 2 and whole[0] == 1


def test_vectors_of_any_rank_are_equally_long() -> None:
    clients = mixed()
    for count in ROUNDS:
        plan = plan_for(clients, rounds=count)
        server = Server(plan)
        while not server.done:
            vectors = [sketch(c.adapter(), plan, server.message, weight=c.weight) for c in clients]
            assert {(v.shape, v.dtype) for v in vectors} == {((plan.length(server.stage),), plan.dtype)}
            server.receive(add(vectors))
        assert server.stage == count


def test_inputs_are_not_modified_and_sketches_do_not_vary() -> None:
    client = mixed()[1]
    plan, adapter = plan_for([client]), client.adapter()
    before = {key: X.clone() for key, X in adapter.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        mixed_precision = sketch(adapter, plan, weight=0.25)
    assert np.array_equal(mixed_precision, sketch(adapter, plan, weight=0.25))
    assert all(torch.equal(before[key], X) for key, X in adapter.state_dict().items())


def test_another_seed_gives_other_vectors() -> None:
    client = mixed()[1]
    plan = plan_for([client])
    other = secure.resized(plan, seed=1)
    assert not np.array_equal(secure.first(plan, client), secure.first(other, client))


# -- what the server knows ---


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_certificate_covers_the_truth(count: int) -> None:
    """The estimated error is within two standard errors of the true one in most of 40 rounds, and unbiased."""
    clients = rounds.with_spectrum(1 / torch.arange(1, 41, dtype=torch.float64), 110, 130, 2)
    deviations, ratios = [], []
    for seed in range(40):
        plan = plan_for(clients, rank=3, rounds=count, seed=seed)
        update = run(plan, clients)["fc"]
        X = oracle.array(update.factorization.U[0] * update.S.float()) @ oracle.array(update.factorization.V[0]).T
        true = float(np.linalg.norm(oracle.truth("flexlora", clients, "fc").whole[0] - X)) ** 2
        deviations.append((update.error(3) ** 2 - true) / update.energy_error)
        ratios.append(update.error(3) ** 2 / true)
    assert sum(abs(d) <= 2 for d in deviations) >= 35 and max(map(abs, deviations)) < 6
    assert np.mean(ratios) == pytest.approx(1, abs=0.08)


def test_the_certificate_of_rounded_sums_is_not_inflated() -> None:
    """A clip a thousand times too large leaves rounding in the probes, whose expected share is taken out."""
    clients = rounds.with_spectrum(1 / torch.arange(1, 41, dtype=torch.float64), 110, 130, 2)
    plan = plan_for(clients, rank=3, clients=3000, clip=1e4)
    update = run(plan, clients)["fc"]
    assert update.error(3) == pytest.approx(run(plan_for(clients, rank=3), clients)["fc"].error(3), rel=0.1)


def test_the_update_behaves_as_any_other(tmp_path: Path) -> None:
    clients = mixed()
    update = run(plan_for(clients), clients)
    loaded = ff.GlobalUpdate.load(update.save(tmp_path / "update.safetensors"))
    assert secure.same(update, loaded) and loaded.method == update.method
    for layer in update:
        assert loaded[layer].energy_error == update[layer].energy_error > 0
        assert np.isnan(loaded[layer].excess)
        largest = update[layer].factorization.U.abs().argmax(dim=1, keepdim=True)
        assert (update[layer].factorization.U.gather(1, largest) > 0).all()  # canonical signs
    report = update.report()
    text = str(report)
    assert "by secure aggregation of 4 clients in 4 rounds" in text and "excess not known" in text
    assert "0 clients" not in text and "exact" not in text
    assert report.to_dict()["layers"][0]["excess"] is None
    with pytest.raises(ff.errors.AdapterError, match=r"client 'c1': this update knows no clients .*give rank= or"):
        update.adapter(client="c1")
    with pytest.raises(ff.errors.RankError, match="rank 5 is more than the 4 triplets"):
        update.adapter(rank=5)
    update.adapter(rank=4).save(tmp_path / "adapter")
    assert ff.Adapter.load(tmp_path / "adapter").layers == sorted(layer.name for layer in WIDE)


def test_a_plan_of_a_policy() -> None:
    clients = mixed()
    policy = ff.RoundPolicy.from_adapter(clients[0].adapter(), ranks=range(1, 9))
    options = {"rank": 4, "clients": 20, "clip": 50.0}
    assert Plan.from_policy(policy, **options) == Plan.from_adapter(clients[0].adapter(), **options)


def test_what_a_single_dropout_between_rounds_tells_the_server() -> None:
    """The documented gap: of a client that alone drops out after round 1 the server knows Qᵀ·ΔW·Ω."""
    clients = [c.but(weight=1.0) for c in mixed()]
    plan = plan_for(clients, rounds=2, bits=64)
    server, name = Server(plan), WIDE[0].name
    first = add(sketch(c.adapter(), plan) for c in clients)
    server.receive(first)
    _, bases = message.unpack(plan, server.message)
    second = add(sketch(c.adapter(), plan, server.message) for c in clients[1:])
    Q, omega = bases[name][0].double(), matrices.right(plan, next(s for s in plan.layers if s.name == name))[0]
    known = Q.T @ part(plan, 1, first, name) - part(plan, 2, second, name).T @ omega
    gone = Q.T @ torch.from_numpy(oracle.product(clients[0], name)[0]) @ omega
    assert torch.allclose(known, gone, atol=1e-9 * float(gone.norm()))


def part(plan: Plan, stage: int, total: np.ndarray, layer: str) -> torch.Tensor:
    """A layer's product in a summed vector."""
    for segment, run_of_it in split(total, plan.stages[stage - 1]):
        if (segment.kind, segment.name) == (("right", "left")[stage - 1], layer):
            return decode(run_of_it, segment)[0]
    raise AssertionError(f"round {stage} has nothing of {layer!r}")
