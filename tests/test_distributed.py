"""Rounds on several ranks: the same result as one process, whatever is shared out, and the same error on all."""

from __future__ import annotations

import itertools
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexlora_fast as ff
from flexlora_fast import distributed, errors
from flexlora_fast.distributed import sharding
from tests import checks, command, oracle, ranks, rounds


def sent(clients, **options):
    """The arguments of a round of these clients."""
    return {"adapters": [c.adapter() for c in clients], "weights": [c.weight for c in clients], **options}


def with_heads(clients):
    """The same clients with a head, a bias of B in one layer, and an integer table that only some have."""
    made = []
    for i, c in enumerate(clients):
        generator = torch.Generator().manual_seed(i)
        extras = {"head.weight": torch.randn(3, 7, generator=generator)}
        extras |= {"head.bias": torch.randn(3, generator=generator).half()} if i % 2 else {}
        made.append(c.but(extras=extras))
    return made


# -- jobs of a rank; each says what only it can see ---


def same_as_alone(rank, model, dtype, options):
    """Assert bit for bit the result of one process, on the first rank."""
    clients = with_heads(rounds.typical(model, dtype))
    update = distributed.aggregate(**sent(clients, **options))
    assert (update is None) == (rank > 0)
    if rank == 0:
        alone = ff.aggregate(**sent(clients, **{k: v for k, v in options.items() if k not in ("shard", "out")}))
        checks.assert_identical(alone, update)
        assert [vars(a) for a in alone.clients] == [vars(b) for b in update.clients]
        assert alone.verdicts == update.verdicts and alone.defence == update.defence
        return {layer: update[layer].solver for layer in update.layers}
    return None


def largest_difference(rank, model, options):
    """How far the summed update is from that of float64, by layer as a share of its norm, and its certificate."""
    clients = rounds.typical(model)
    update = distributed.aggregate(**sent(clients, rank=40, **options))
    found = {}
    for layer in update.layers if update is not None else ():
        truth = oracle.truth("flexlora", clients, layer, options.get("missing", "zero"))
        got = checks.batched(update.delta(layer))
        found[layer] = (float(abs(got - truth.whole).max()) / truth.norm, update[layer].norm / truth.norm - 1)
    return found, (None if update is None else sorted(update.solvers()))


# -- equal results ---


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_layers_shared_out_give_the_result_of_one_process_bit_for_bit(world):
    """Four ranks have more of them than some of these models have layers."""
    for model, dtype in (("mixed", "mixed"), ("weird", "float32"), ("mha", "bfloat16")):
        ranks.values(world, same_as_alone, model, dtype, {})


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "krylov", "rank": 2},
        {"method": "fedit"},
        {"method": "hetlora"},
        {"method": "flora"},
        {"method": "florist:tau=0.6"},
        {"missing": "renormalize", "tol": 0},
    ],
    ids=str,
)
def test_other_ways_through_a_round(options):
    ranks.values(2, same_as_alone, "linear", "float32", options)


def limited(rank):
    clients = rounds.typical("mixed")
    update = distributed.aggregate(**sent(clients, method="florist:tau=0.6", shard="clients", rank=8, tol=0))
    alone = ff.aggregate(**sent(clients, method="florist:tau=0.6", rank=8, tol=0)) if rank == 0 else None
    for layer in update.layers if rank == 0 else ():
        assert update[layer].limit == alone[layer].limit == update[layer].rank


def test_a_rank_that_the_spectrum_chooses():
    """Layers that all ranks solve together are cut as those of one are."""
    ranks.values(2, limited)


def judged(rank, defence):
    clients = with_heads(rounds.typical("mixed"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heads are averaged as they come
        update = distributed.aggregate(**sent(clients, defence=defence))
        alone = ff.aggregate(**sent(clients, defence=defence)) if rank == 0 else None
    for one, two in zip(alone.verdicts, update.verdicts, strict=True) if rank == 0 else ():
        assert (one.client, one.status) == (two.client, two.status)
        assert (two.share, two.factor, two.norm) == pytest.approx((one.share, one.factor, one.norm), rel=1e-9)
    for layer in update.layers if rank == 0 else ():
        assert (update.delta(layer) - alone.delta(layer)).norm() <= 1e-5 * alone[layer].norm


@pytest.mark.parametrize("defence", ["clip", "krum:byzantine=1"])
def test_defended_rounds(defence):
    """The Gram matrix of the clients is a sum over layers, so over ranks."""
    ranks.values(2, judged, defence)


def test_medians_stay_with_their_layer():
    ranks.values(2, same_as_alone, "mixed", "float32", {"defence": "median"})


def to_a_file(rank, folder, out):
    paths = sorted(folder.iterdir())
    update = distributed.aggregate(paths, [3, 2, 1], clients=["a", "b", "c"], out=out)
    if rank == 0:
        alone = ff.aggregate(paths, [3, 2, 1], clients=["a", "b", "c"], out=out.with_name("alone"))
        checks.assert_identical(alone, update)
        assert update.seconds["layers"] > 0


def test_a_file_is_written_by_the_first_rank_alone(tmp_path):
    folder = command.three_clients(tmp_path / "clients")
    ranks.values(2, to_a_file, folder, tmp_path / "new" / "update.safetensors")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["alone", "update.safetensors"]


@pytest.mark.parametrize(
    "options", [{}, {"solver": "factored", "certificate": "estimate"}, {"solver": "subspace"}], ids=str
)
def test_clients_shared_out_give_the_same_to_rounding(options):
    for world in (1, 2) if options else (1, 4):
        found = ranks.values(world, largest_difference, "mixed", {"shard": "clients", **options})
        (differences, solvers), others = found[0], found[1:]
        assert solvers == [options.get("solver", "dense")] and all(other == ({}, None) for other in others)
        for layer, (off, norm) in differences.items():
            assert off < 2e-6 and abs(norm) < 1e-6, (world, layer, off, norm)


def renormalized(rank):
    clients = rounds.typical("linear")
    clients[0], clients[3] = clients[0].without("h.0.up"), clients[3].without("h.0.up", "h.1.down")
    update = distributed.aggregate(**sent(clients, rank=40, shard="clients", missing="renormalize"))
    for layer in update.layers if rank == 0 else ():
        truth = oracle.truth("flexlora", clients, layer, "renormalize")
        assert abs(checks.batched(update.delta(layer)) - truth.whole).max() < 2e-6 * truth.norm


def test_clients_shared_out_without_some_of_their_layers():
    ranks.values(2, renormalized)


def huge(rank, scale, options):
    clients = rounds.typical("linear")
    clients[1] = clients[1].mapped(lambda _, A, B: (A * scale, B * scale))
    update = distributed.aggregate(**sent(clients, rank=40, shard="clients", **options))
    for layer in update.layers if rank == 0 else ():
        truth = oracle.truth("flexlora", clients, layer)
        assert abs(checks.batched(update.delta(layer)) - truth.whole).max() < 1e-5 * truth.norm


@pytest.mark.parametrize("solver", ["dense", "factored"])
def test_factors_beyond_the_range_of_float32_products(solver):
    for scale in (1e10, 1e-12):
        ranks.values(2, huge, scale, {"solver": solver})


def too_large(rank, folder, options):
    update = distributed.aggregate(sorted(folder.iterdir()), **options)
    return update and {layer: (update[layer].solver, update[layer].norm) for layer in update.layers}


def test_a_layer_too_large_for_one_rank_is_solved_by_all(tmp_path):
    """ "auto" leaves the small layer to one of them."""
    large, small = rounds.Layer("large", 900, 1100), rounds.Layer("small", 20, 30)
    for i in range(6):
        rounds.client(f"c{i}", [large, small], rank=60, seed=i).adapter().save(tmp_path / f"c{i}")
    paths, options = sorted(tmp_path.iterdir()), {"rank": 4, "memory_limit": 8_000_000}
    with pytest.raises(errors.OptionError, match=r"memory_limit is 7\.6 MiB; raise it"):
        ff.aggregate(paths, **options)
    found = ranks.values(3, too_large, tmp_path, options)
    alone = ff.aggregate(paths, rank=4)
    assert {layer: solver for layer, (solver, _) in found[0].items()} == {
        "large": "factored",
        "small": alone["small"].solver,
    }
    assert all(norm == pytest.approx(alone[layer].norm, rel=1e-5) for layer, (_, norm) in found[0].items())
    assert found[1:] == [None, None]
    for shard, why in (("layers", "raise it$"), ("auto", "on each of 1 ranks.*start more ranks")):
        (outcome,) = ranks.run(1, too_large, tmp_path, options | {"shard": shard})
        assert outcome.kind == "OptionError" and re.search(why, outcome.text), outcome


# -- who does what ---


@given(st.lists(st.floats(0, 1e3), max_size=40), st.integers(1, 8))
def test_shares_are_balanced_and_the_same_in_any_order(costs, world):
    named = {f"l{i}": cost for i, cost in enumerate(costs)}
    owners = sharding.balanced(named, world)
    assert owners == sharding.balanced(dict(reversed(named.items())), world)
    loads = [sum(named[name] for name, rank in owners.items() if rank == r) for r in range(world)]
    # Graham's bound for any list order; the best makespan is at least the mean and the largest item.
    assert max(loads) <= sum(costs) / world + max(costs, default=0.0) + 1e-9


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 8))
def test_runs_of_clients_cover_them_all_in_order(columns, world):
    found = sharding.runs(columns, world)
    assert len(found) == world and list(itertools.chain(*found)) == list(range(len(columns)))
    most = max((sum(columns[i] for i in part) for part in found), default=0)
    assert most <= sum(columns) / world + max(columns, default=0)


# -- the same error everywhere ---


def with_bad_values(rank, folder):
    with distributed.Team() as team:
        round_ = distributed.Aggregator(team, rank=4)
        for path in sorted(folder.iterdir()):
            round_.add(path, client=path.name)
        refused = None
        try:
            round_.finish()
        except errors.AdapterError as error:
            refused = str(error), error.client, error.layer
        update = round_.finish()
        if rank == 0:
            good = [path for path in sorted(folder.iterdir()) if path.name not in ("bad", "worse")]
            checks.assert_identical(update, ff.aggregate(good, rank=4, clients=[path.name for path in good]))
        return refused, [refusal.client for refusal in round_.refused], round_.clients


def test_bad_values_that_one_rank_sees_refuse_the_client_on_all(tmp_path):
    command.three_clients(tmp_path)
    command.adapter(4, 3, bad=True).save(tmp_path / "bad")
    command.adapter(4, 4, bad=True).save(tmp_path / "worse")
    found = ranks.values(3, with_bad_values, tmp_path)
    assert found[0] == found[1] == found[2]
    (text, client, layer), refused, clients = found[0]
    assert client == "bad" and layer == command.LAYERS[0] and "NaN" in text
    assert refused == ["bad", "worse"] and clients == ["anna", "ben", "carl"]


def other_rounds(rank, what):
    clients, options = rounds.typical("weird"), {}
    if rank == 1 and what == "clients":
        clients = clients[1:]
    if rank == 1 and what == "weights":
        clients[2] = clients[2].but(weight=7.0)
    if rank == 1 and what == "adapters":
        clients[2] = clients[2].but(config=clients[2].config | {"lora_alpha": 3})
    if rank == 1 and what == "options":
        options["seed"] = 1
    return distributed.aggregate(**sent(clients, **options))


@pytest.mark.parametrize("what", ["clients", "weights", "adapters", "options"])
def test_ranks_with_other_rounds_say_what_differs(what):
    for outcome in ranks.run(2, other_rounds, what):
        assert outcome.kind == "DistributedError" and f"{what} of rank 0 are" in outcome.text, outcome


def missing_folder(rank, folder):
    return distributed.aggregate([folder / "anna", folder / ("ben" if rank == 0 else "nowhere")])


def test_a_file_that_one_rank_does_not_see(tmp_path):
    command.three_clients(tmp_path)
    one, two = ranks.run(2, missing_folder, tmp_path)
    assert one.error == two.error and one.kind == "AdapterError" and "nowhere" in one.text


@pytest.mark.parametrize("option", ["policy", "spool", "results", "privacy"])
def test_options_of_one_process_are_refused_by_name(option):
    (outcome,) = ranks.run(1, refused_option, {option: "something"})
    assert outcome.kind == "OptionError" and f"{option}= is not for rounds on several ranks" in outcome.text


def refused_option(rank, options):
    return distributed.aggregate(**sent(rounds.typical("weird"), **options))


def test_options_that_do_not_go_together():
    for options, why in (({"shard": "rows"}, "'auto', 'layers', 'clients'"), ({"timeout": 0}, "seconds > 0")):
        for outcome in ranks.run(2, refused_option, options):
            assert outcome.kind == "OptionError" and why in outcome.text
    for outcome in ranks.run(2, refused_option, {"shard": "clients", "method": "fedit"}):
        assert outcome.kind == "OptionError" and "takes all clients of a layer at once" in outcome.text


def test_without_a_process_group():
    with pytest.raises(errors.DistributedError, match=r"init_process_group.*torchrun"):
        distributed.aggregate([command.adapter(2, 0)])


def test_every_error_can_be_told_to_other_ranks():
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.FlexLoRAError):
            error = kind("what", client="c", layer="l")
            told = pickle.loads(pickle.dumps(error))
            assert type(told) is kind and str(told) == str(error)
            assert vars(told) == vars(error)
