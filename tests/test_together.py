"""Layers of one shape summed up from pieces and solved together on their dense ΔW, as a GPU's rounds do; on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import memory, planning, together
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank import filtered, plan
from flexlora_fast.staging import aligned
from tests.interpreter import needs_interpreter, run_interpreted
from tests.test_filtered import adapters

CUDA = torch.device("cuda")


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded layers are solved in groups, which the planner does for GPUs alone."""
    planned = planning.plan_layer

    def in_groups(*arguments: Any) -> planning.LayerPlan:
        layer = planned(*arguments)
        return dataclasses.replace(layer, grouped=layer.folded)

    monkeypatch.setattr(planning, "plan_layer", in_groups)


def round_of(clients: Any, **options: Any) -> ff.GlobalUpdate:
    return ff.aggregate(clients, rank=10, solver="dense", **options)


def assert_alike(found: ff.GlobalUpdate, expected: ff.GlobalUpdate) -> None:
    assert found.layers == expected.layers
    for name in expected.layers:
        f, g = found[name].factorization, expected[name].factorization
        assert f.solver == g.solver == "dense" and found[name].total_rank == expected[name].total_rank
        assert torch.allclose(f.energy, g.energy, rtol=1e-6)
        assert torch.allclose(f.S, g.S, rtol=2e-3)
        assert found[name].error(10) <= expected[name].error(10) * (1 + 1e-3)


def test_groups_of_sums_are_the_sums(grouped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two clients each; the layers of a group take the same steps, which single ones do not."""
    monkeypatch.setattr(memory, "PIECE_COLUMNS", 32)
    clients = adapters()
    found = round_of(clients)
    monkeypatch.undo()
    expected = round_of(clients)
    assert_alike(found, expected)
    products = {found[name].factorization.iterations for name in found.layers}
    assert products == {2 + sum(plan.degrees(1e-3)) + 1}
    assert found.adapter(rank=10).layers == expected.adapter(rank=10).layers


def test_what_was_not_proved_is_solved_again_from_its_pieces(grouped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    judged, calls = filtered.judged, list[int]()

    def half(report: torch.Tensor, tol: float) -> tuple[torch.Tensor, torch.Tensor]:
        excess, good = judged(report, tol)
        calls.append(len(good))
        return excess, good & (torch.arange(len(good)) % 2 == 0)

    monkeypatch.setattr(filtered, "judged", half)
    clients = adapters()
    found = round_of(clients)
    assert calls == [3, 1, 3, 1]  # two shapes, three layers each: the middle one is tried again, and then alone
    monkeypatch.undo()
    assert_alike(found, round_of(clients))


def test_a_bad_client_is_named_and_the_round_goes_on(grouped: None, tmp_path: Path) -> None:
    clients = adapters()
    state = clients[3].state_dict()
    state["base_model.model.2.fc.lora_B.weight"][4, 1] = torch.inf
    clients[3] = ff.Adapter.from_state_dict(state, clients[3].config, client="c3")
    agg = ff.Aggregator(rank=10, solver="dense", read="finish")
    for i, client in enumerate(clients):
        client.save(tmp_path / f"c{i}")
        agg.add(tmp_path / f"c{i}", client=f"c{i}")
    with pytest.raises(AdapterError, match="infinite") as caught:
        agg.finish()
    assert (caught.value.client, caught.value.layer) == ("c3", "2.fc")
    assert_alike(agg.finish(), round_of([client for client in clients if client.client != "c3"]))


def test_biases_are_averaged_over_pieces(grouped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PIECE_COLUMNS", 16)
    clients = []
    for i, client in enumerate(adapters(count=4, rank=20)):
        state = client.state_dict() | {
            key.replace("weight", "bias"): torch.full((130 if layer % 2 == 0 else 110,), float(i))
            for layer in range(6)
            for key in [f"base_model.model.{layer}.fc.lora_B.weight"]
        }
        clients.append(ff.Adapter.from_state_dict(state, client.config | {"lora_bias": True}, client=f"c{i}"))
    found = round_of(clients)
    monkeypatch.undo()
    for name, layer in round_of(clients).items():
        bias = found[name].bias
        assert bias is not None and layer.bias is not None and torch.equal(bias, layer.bias)


def test_the_planner_sums_up_on_a_gpu_where_the_stack_is_wider_than_the_layer() -> None:
    c = plan.constants_of(CUDA)
    for R, solver in ((800, "filtered"), (1600, "filtered"), (6400, "dense"), (16000, "dense")):
        shape = plan.Shape(4096, 4096, R, 64, sixteen=True)
        assert plan.choose(shape, c, grouped=True) == solver
        assert plan.choose(shape, c) != "filtered"


def test_room_on_a_gpu_is_what_is_free_and_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda device: 1000 * 1024**2)
    assert memory.room(CUDA, None) == 900 * 1024**2
    assert memory.room(CUDA, "200MiB") == 200 * 1024**2
    assert memory.room(CUDA, "64GiB") == 900 * 1024**2
    assert memory.room(torch.device("cpu"), "64GiB") == 64 * 1024**3
    with pytest.raises(OptionError, match="memory_limit is 'much'"):
        memory.room(CUDA, "much")


def test_a_layer_larger_than_the_gpu_says_so() -> None:
    clients = adapters(count=2)
    agg = ff.Aggregator(rank=10)
    for client in clients:
        agg.add(client)
    skeletons = [(clients[0].skeleton, 2)]
    of = dataclasses.replace(agg._settings(), device=CUDA, room=10_000)
    with pytest.raises(OptionError, match=r"130 outputs.*of cuda are free for it; free more, or compute on the CPU"):
        planning.plan_layer("0.fc", skeletons, of)
    with pytest.raises(OptionError, match=r"memory_limit is 0\.0 MiB; raise it"):
        planning.plan_layer("0.fc", skeletons, dataclasses.replace(of, limit=10_000))


def test_what_a_layer_takes_on_a_gpu_counts_where_its_tensors_begin() -> None:
    """Of rank 1 and a few entries, they take eight times their bytes."""
    clients = adapters(count=5, rank=1, shapes=((4, 4), (4, 4)))
    agg = ff.Aggregator(rank=1, solver="filtered")
    for client in clients:
        agg.add(client)
    skeletons = [(clients[0].skeleton, 5)]
    here = planning.plan_layer("0.fc", skeletons, agg._settings())
    there = planning.plan_layer("0.fc", skeletons, dataclasses.replace(agg._settings(), device=CUDA, room=1 << 30))
    brought = aligned(np.array([16, 16] * 5))
    assert here.held == 5 * 32 and there.held >= brought.sum() > 4 * here.held


def test_as_many_groups_are_begun_as_the_memory_holds() -> None:
    """On dense sums that stay until they are asked for, and on results."""
    spec = LayerSpec("fc", "linear", 100, 50, "A", "B", "fc")
    folded = [planning.LayerPlan(spec, 400, 10, True, 1000, 60_000, True)]
    whole = [dataclasses.replace(folded[0], folded=False)] * 2  # results of 2 · 4 · 150 · 10 bytes
    there: Any = SimpleNamespace(streamed=False, settings=SimpleNamespace(room=360_000))
    assert together.fits(there, [], folded)
    assert together.fits(there, [folded] * 2, folded) and not together.fits(there, [folded] * 3, whole)
    assert together.fits(there, [whole] * 10, whole) and not together.fits(there, [whole] * 11, whole)


def test_what_was_brought_leaves_room_for_what_comes_next() -> None:
    """``staged`` is a quarter of the room, and a third of it fits beside one other."""
    whole = [planning.LayerPlan(LayerSpec("fc", "linear", 10, 5, "A", "B", "fc"), 40, 1, False, 1000, 4000, True)]
    large = [dataclasses.replace(whole[0], held=1001)]
    pieces = [dataclasses.replace(whole[0], folded=True)]
    there: Any = SimpleNamespace(streamed=True, settings=SimpleNamespace(room=12_000))
    assert together.fits(there, [whole], whole)
    assert not together.fits(there, [whole], large) and not together.fits(there, [large], whole)
    assert not together.fits(there, [whole], pieces)
    assert together.fits(there, [pieces], large) and together.fits(there, [], large)


RESIDENT = """
import dataclasses
import torch
import flexlora_fast as ff
from flexlora_fast import planning, work
from flexlora_fast.resident import Resident
from tests.test_filtered import adapters
from tests.test_together import assert_alike

clients = adapters(count=4)
agg, resident = ff.Aggregator(rank=10, solver="dense"), Resident(torch.device("cpu"))
for client in clients:
    agg.add(client)
    resident.take(client.client, client)
usual = agg.finish()
planned = planning.plan_layer
planning.plan_layer = lambda *arguments: dataclasses.replace(planned(*arguments), grouped=True)
there = work.Work(agg._weighted(), agg._settings(), None, resident)
assert list(there.pieces()) == [], "nothing is read"
layers = {update.name: update for update in there.solved(iter(()))}
assert_alike(dataclasses.replace(usual, layer_updates=dict(sorted(layers.items()))), usual)
print("right")
"""


@needs_interpreter
def test_factors_in_gpu_memory_are_summed_up_from_where_they_lie() -> None:
    done = run_interpreted(RESIDENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["right"]
