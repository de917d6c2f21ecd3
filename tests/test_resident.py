"""Factors that lie in a device's memory when their round ends: tables made from notes, on the CPU as on a GPU."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.backends.group import coefficients
from flexlora_fast.resident import Resident
from flexlora_fast.work import Work
from tests.interpreter import needs_interpreter, run_interpreted

pytest.importorskip("triton", reason="tables are Triton's")
CPU = torch.device("cpu")


def adapter(name: str, ranks: dict[str, int], *, dtype: torch.dtype = torch.float32, alpha: int = 4) -> ff.Adapter:
    """One client with some of the layers a (30, 20), b (30, 20), c (20, 50)."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    shapes = {"a": (30, 20), "b": (30, 20), "c": (20, 50)}
    state = {}
    for layer, rank in ranks.items():
        m, n = shapes[layer]
        state[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, n, generator=generator).to(dtype)
        state[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(m, rank, generator=generator).to(dtype)
    top = max(ranks.values())
    config = {"r": top, "lora_alpha": alpha, "rank_pattern": {k: r for k, r in ranks.items() if r != top}}
    return ff.Adapter.from_state_dict(state, config, client=name)


CLIENTS = {
    "hospital": {"a": 4, "b": 4, "c": 4},
    "school": {"a": 2, "b": 7},
    "city": {"b": 1, "c": 3},
    "absent": {"a": 5, "b": 5, "c": 5},
}


def prepared(missing: str, **options: Any) -> tuple[Work, Resident]:
    agg = ff.Aggregator(rank=3, solver="filtered", missing=missing)  # type: ignore[arg-type]
    resident = Resident(CPU)
    for i, (name, ranks) in enumerate(CLIENTS.items()):
        agg.add(adapter(name, ranks, alpha=3 + i, **options), weight=0.0 if name == "absent" else 1.0 + i)
        resident.take(name, agg._clients[name].adapter)
    return Work(agg._weighted(), agg._settings()), resident


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", ["zero", "renormalize"])
@pytest.mark.parametrize("layers", [["a", "b"], ["b", "a"], ["c"]])
def test_the_table_is_that_of_the_stacks(missing: str, layers: list[str], dtype: torch.dtype) -> None:
    from flexlora_fast.kernels.table import Table

    work, resident = prepared(missing, dtype=dtype)
    plans = {plan.spec.name.removeprefix("base_model.model."): plan for plan in work.plans}
    chosen = [plans[layer] for layer in layers]
    stacks = []
    for plan in chosen:
        ((_, read),) = work.pieces_of(plan)
        stacks.append(work.stack_of(plan.spec, read())[0])
    expected = Table(stacks)
    names = [client.name for client in work.clients]
    assert "absent" not in names and resident.has(names)
    shares = [client.share for client in work.clients]
    found, d = resident.table(
        (stacks[0].m, stacks[0].n), [plan.spec.name for plan in chosen], names, shares, missing == "renormalize"
    )
    assert found.ranks == expected.ranks and found.W == expected.W and found.offsets.equal(expected.offsets)
    assert found.d.equal(expected.d)
    for side in "PQ":
        mine, theirs = found.side(side), expected.side(side)  # type: ignore[arg-type]
        assert mine.address.equal(theirs.address) and mine.stride.equal(theirs.stride)
        assert (mine.length, mine.dtype, mine.run, mine.bytes) == (
            theirs.length,
            theirs.dtype,
            theirs.run,
            theirs.bytes,
        )
    assert torch.allclose(torch.from_numpy(d), coefficients(stacks, found.W, CPU), rtol=1e-15)


def test_what_is_unusual_is_left_to_the_usual_way(tmp_path: Any) -> None:
    resident = Resident(CPU)
    plain = adapter("plain", {"a": 2})
    plain.save(tmp_path / "saved")
    unusual = {
        "on disk": ff.Adapter.load(tmp_path / "saved"),
        "float64": adapter("float64", {"a": 2}, dtype=torch.float64),
        "elsewhere": ff.Adapter.from_state_dict(plain.state_dict(), plain.config),
    }
    for name, client in unusual.items():
        (Resident(torch.device("cuda")) if name == "elsewhere" else resident).take(name, client)
        assert not resident.has([name])
    resident.take("plain", plain)
    assert resident.has(["plain"]) and not resident.has(["plain", "float64"])
    resident.take("other dtype", adapter("other dtype", {"a": 2}, dtype=torch.bfloat16))
    assert resident.has(["other dtype"]) and not resident.has(["plain", "other dtype"])
    resident.drop("plain")
    resident.drop("never came")
    assert not resident.has(["plain"])


def test_making_a_table_takes_no_time_per_factor() -> None:
    """22,400 pairs of factors: half a second as stacks; noted on arrival, they take a few operations on arrays."""
    state = {}
    for layer in range(224):
        state[f"base_model.model.{layer}.fc.lora_A.weight"] = torch.ones(4, 8)
        state[f"base_model.model.{layer}.fc.lora_B.weight"] = torch.ones(8, 4)
    client = ff.Adapter.from_state_dict(state, {"r": 4, "lora_alpha": 8})
    resident, names = Resident(CPU), [f"client-{i}" for i in range(100)]
    for name in names:
        resident.take(name, client)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        table, d = resident.table((8, 8), client.layers, names, np.full(100, 0.01), False)
        seconds.append(time.perf_counter() - start)
    assert table.layers == 224 and d.shape == (224, 400)
    assert min(seconds) < 0.15


ROUND = """
import torch
import flexlora_fast as ff
from flexlora_fast.precision import full_precision
from flexlora_fast.resident import Resident
from flexlora_fast.work import Work

clients = []
for i in range(5):
    g = torch.Generator().manual_seed(i)
    state = {}
    for layer, (m, n) in {"x": (70, 50), "y": (70, 50), "z": (50, 70)}.items():
        state[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(10, n, generator=g)
        state[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(m, 10, generator=g)
    clients.append(ff.Adapter.from_state_dict(state, {"r": 10, "lora_alpha": 8}, client=f"c{i}"))
agg, resident = ff.Aggregator(rank=4, solver="filtered"), Resident(torch.device("cpu"))
for client in clients:
    agg.add(client)
    resident.take(client.client, client)
usual = agg.finish()
work = Work(agg._weighted(), agg._settings(), None, resident)
assert list(work.pieces()) == [], "nothing is read"
updates = {update.name: update for update in work.solved(iter(()))}
assert sorted(updates) == usual.layers
for name in usual.layers:
    a, b = updates[name], usual[name]
    assert a.solver == b.solver == "filtered", (a.solver, b.solver)
    assert torch.allclose(a.S, b.S, rtol=1e-5), (a.S, b.S)
    assert abs(a.energy / b.energy - 1) < 1e-6 and a.total_rank == b.total_rank == 50
    best = b.error(4)
    A, B = a.factors(4, "B")
    C, D = b.factors(4, "B")
    assert float((B @ A - D @ C).norm()) < 0.05 * best
print("right")
"""


@needs_interpreter
def test_a_round_from_the_notes_is_the_round_from_the_stacks() -> None:
    done = run_interpreted(ROUND)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["right"]
