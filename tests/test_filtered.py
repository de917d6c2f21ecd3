"""Layers of one shape solved together: against the float64 oracle, against each other, and without waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flexlora_fast as ff
from flexlora_fast.backends.group import Packed
from flexlora_fast.errors import AdapterError
from flexlora_fast.lowrank import filtered, plan
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.grouped import How, Stacks, solve_group
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.precision import full_precision
from flexlora_fast.stack import Block, Stack
from flexlora_fast.work import Work
from tests.oracle import Truth, excess
from tests.test_solvers import dense, stack_of

J = torch.arange(1.0, 161.0)
SPECTRA = {
    "harmonic": 1 / J,
    "root": J.rsqrt(),
    "decaying": torch.exp(-J / 20),
    "flat": torch.ones(160),
    "nearly flat": torch.linspace(1.0, 0.9, 160),
    "pairs": 1 / ((J + 1) // 2),
    "staircase": torch.floor((160 - J) / 20) + 1,
    "step behind k": torch.where(J <= 12, 1.0, 0.1),
    "steep, then slow": torch.where(J <= 8, 20.0, 1 - J / 800),
}
K = 12


def group(batch: int = 1, m: int = 210, n: int = 170) -> tuple[list[Stack], list[str]]:
    return [stack_of(sigma, m, n, i, batch) for i, sigma in enumerate(SPECTRA.values())], list(SPECTRA)


class Summed(Stacks):
    """The same layers, solved on their dense ΔW."""

    def operand(self, places: Sequence[int]) -> torch.Tensor:
        return Packed([self.stacks[i] for i in places]).materialize()


KINDS = {"filtered": Stacks, "dense": Summed}
kinds = pytest.mark.parametrize("kind", KINDS)


def solved(stacks: list[Stack], names: list[str], tol: float = 1e-3, kind: str = "filtered") -> list[Factorization]:
    with full_precision():
        return solve_group(KINDS[kind](stacks), K, How(tol, 0, names))


def assert_right(f: Factorization, stack: Stack, tol: float) -> None:
    exact = sum(((b.B.double() * b.d) @ b.A.double()).numpy() for b in stack.blocks)
    for i, approximation in enumerate(dense(f)):
        truth = Truth(exact[i : i + 1])
        assert excess(truth, approximation[None], K) <= tol
        assert abs(float(f.energy[i]) / truth.norm**2 - 1) < 1e-6
    for X in (f.U, f.V):
        assert X.dtype == torch.float32
        assert (X.mT @ X - torch.eye(K)).abs().max() < 2e-6
    largest = f.U.gather(1, f.U.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())
    assert bool((f.S.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("m", "n"), [(210, 170), (170, 400)])
@kinds
def test_all_spectra_in_one_group(tol: float, m: int, n: int, kind: str) -> None:
    stacks, names = group(m=m, n=n)
    results = solved(stacks, names, tol, kind)
    for name, stack, f in zip(names, stacks, results, strict=True):
        assert_right(f, stack, tol)
        assert f.solver == kind or (name == "nearly flat" and tol < 1e-3), name
        assert f.excess <= tol


@kinds
def test_experts_count_as_layers(kind: str) -> None:
    stacks, names = group(batch=3)
    for stack, f in zip(stacks, solved(stacks, names, kind=kind), strict=True):
        assert f.solver == kind and f.U.shape == (3, 210, K)
        assert_right(f, stack, 1e-3)


def test_ranks_may_differ_and_layers_may_be_empty() -> None:
    """Wide and narrow layers, one whose clients are too few for the iteration, and one that nobody has."""
    widths = [160, 45, 44, 43, 20, 3]
    stacks = [stack_of(1 / J[:width], 210, 170, width) for width in widths]
    stacks.append(Stack([], 210, 170))
    results = solved(stacks, [f"layer {i}" for i in range(len(stacks))])
    for width, stack, f in zip(widths, stacks, results, strict=False):
        assert (f.solver == "filtered") == (width >= K + 32)
        assert f.U.shape[2] == min(K, width)
        if width >= K:
            assert_right(f, stack, 1e-3)
    assert results[-1].solver == "empty" and results[-1].S.shape == (1, 0)


def test_a_layer_does_not_depend_on_its_company() -> None:
    stacks, names = group()
    together = solved(stacks, names)
    backwards = solved(stacks[::-1], names[::-1])[::-1]
    for stack, name, f, g in zip(stacks, names, together, backwards, strict=True):
        (alone,) = solved([stack], [name])
        for other in (g, alone):
            assert torch.allclose(f.S, other.S, rtol=1e-5)
            assert abs(f.excess - other.excess) < 1e-4
            assert_right(other, stack, 1e-3)


def test_two_runs_are_the_same_bit_for_bit() -> None:
    stacks, names = group()
    for f, g in zip(solved(stacks, names), solved(stacks, names), strict=True):
        assert all(torch.equal(x, y) for x, y in ((f.U, g.U), (f.S, g.S), (f.V, g.V), (f.energy, g.energy)))


@pytest.mark.parametrize(
    "scale", [(1e20, 1e-20), (1e-20, 1e20), (1e15, 1e15)], ids=["large B", "large A", "both large"]
)
def test_numbers_beyond_float32_grams_go_to_a_solver_that_rescales(scale: tuple[float, float]) -> None:
    stacks, names = group()
    B, A = scale
    blocks = [Block(block.B * B, block.A * A, block.d) for block in stacks[2].blocks]
    scaled = Stack(blocks, stacks[2].m, stacks[2].n)
    results = solved([*stacks[:2], scaled, *stacks[3:]], names)
    assert results[2].solver != "filtered"
    assert_right(results[2], scaled, 1e-3)
    assert [f.solver for f in results[:2] + results[3:]] == ["filtered"] * (len(names) - 1)


def test_what_float32_cannot_tell_is_not_claimed() -> None:
    """With 1e-7 of the norm beyond k no float32 iteration can prove an excess of 1e-3."""
    sigma = torch.where(J <= K, 1.0, 1e-8 * torch.rand(160, generator=torch.Generator().manual_seed(0)))
    stacks, names = group()
    results = solved([stack_of(sigma, 210, 170), *stacks[1:]], names)
    assert results[0].solver != "filtered"
    assert [f.solver for f in results[1:]] == ["filtered"] * (len(names) - 1)


def test_zero_columns_and_a_zero_layer() -> None:
    stack = stack_of(1 / J, 210, 170)
    zeros = [Block(torch.zeros(1, 210, 8), torch.randn(1, 8, 170), torch.ones(8, dtype=torch.float64))]
    padded = Stack([*zeros, *stack.blocks], 210, 170)
    nothing = Stack([Block(torch.zeros(1, 210, 80), torch.randn(1, 80, 170), torch.ones(80).double())], 210, 170)
    first, second = solved([padded, nothing], ["padded", "nothing"])
    assert first.solver == "filtered"
    assert_right(first, padded, 1e-3)
    assert float(second.energy) == 0 and not second.S.any() and second.solver != "filtered"


@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e14, 1e30])
def test_a_dense_sum_beyond_the_range_of_its_squares_goes_to_a_solver_that_rescales(scale: float) -> None:
    stacks, names = group()
    blocks = [Block(block.B, block.A, block.d * scale) for block in stacks[2].blocks]
    scaled = Stack(blocks, stacks[2].m, stacks[2].n)
    results = solved([*stacks[:2], scaled, *stacks[3:]], names, kind="dense")
    assert results[2].solver != "dense"
    assert_right(results[2], scaled, 1e-3)
    assert [f.solver for f in results[:2] + results[3:]] == ["dense"] * (len(names) - 1)


def test_sums_come_in_pieces_and_an_empty_one_changes_nothing() -> None:
    stacks, _ = group(m=170, n=190)
    whole = Packed(stacks).materialize()
    pieces = [Stack(stack.blocks[i::2], 170, 190) for i in range(2) for stack in stacks]
    total = torch.zeros_like(whole)
    for i in range(2):
        assert Packed(pieces[i * len(stacks) : (i + 1) * len(stacks)]).materialize(total) is total
    assert torch.allclose(total, whole, atol=1e-5)
    assert torch.equal(Packed([Stack([], 170, 190)] * len(stacks)).materialize(total.clone()), total)
    assert not Packed([Stack([], 170, 190)]).materialize().any()


@kinds
def test_nan_is_refused_by_layer(kind: str) -> None:
    stacks, names = group()
    bad = stacks[4].blocks[1].B.clone()
    bad[0, 3, 2] = torch.nan
    blocks = [*stacks[4].blocks[:1], Block(bad, *(getattr(stacks[4].blocks[1], x) for x in "Ad"))]
    stacks[4] = Stack([*blocks, *stacks[4].blocks[2:]], 210, 170)
    with pytest.raises(AdapterError, match="NaN") as caught:
        solved(stacks, names, kind=kind)
    assert caught.value.layer == names[4]


class _Waits(TorchDispatchMode):
    """Fails on what makes a GPU's host wait: a value that Python reads, a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operand", [lambda packed: packed, Packed.materialize], ids=["filtered", "dense"])
def test_nothing_is_waited_for_before_the_end(operand: Callable[[Packed], Any]) -> None:
    stacks, _ = group()
    with full_precision():
        packed = Packed(stacks)
        with _Waits():
            found = filtered.launch(operand(packed), [(i, 0) for i in range(len(stacks))], K, 1e-3)
        with pytest.raises(AssertionError, match="_local_scalar_dense"), _Waits():
            float(found.report[0, 0])
    assert bool(filtered.judged(found.report, 1e-3)[1].any())


def test_judged_believes_no_nan_and_no_shortfall() -> None:
    #                       energy  captured at three steps     held   poor  skew
    good = torch.tensor([[1.0, 0.899, 0.8999, 0.9, 0.9, 0.0, 1e-7]], dtype=torch.float64)
    assert filtered.judged(good, 1e-3)[1].tolist() == [True]
    changes = {0: torch.nan, 1: 0.5, 3: torch.inf, 4: 0.8, 5: 1.0, 6: 1e-3}
    for column, value in changes.items():
        report = good.clone()
        report[0, column] = value
        if column == 1:  # gains that have only begun to shrink
            report[0, 2] = 0.7
        assert filtered.judged(report, 1e-3)[1].tolist() == [False], column


def test_looser_tolerances_take_fewer_products() -> None:
    lengths = [sum(plan.degrees(tol)) for tol in (1e-1, 1e-2, 1e-3, 1e-4, 1e-9)]
    assert lengths == sorted(lengths) and lengths[0] >= 5
    assert plan.degrees(1e-3, more=2) == (*plan.degrees(1e-3), 3, 3)


# -- whole rounds ---


def adapters(count: int = 8, rank: int = 16, shapes: tuple[tuple[int, int], ...] = ((130, 110), (110, 130))) -> Any:
    result = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        state = {}
        for layer in range(6):
            m, n = shapes[layer % len(shapes)]
            decay = torch.arange(1, rank + 1).rsqrt()
            state[f"base_model.model.{layer}.fc.lora_A.weight"] = torch.randn(rank, n, generator=g)
            state[f"base_model.model.{layer}.fc.lora_B.weight"] = torch.randn(m, rank, generator=g) * decay
        result.append(ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 8}, client=f"c{i}"))
    return result


def test_a_round_groups_layers_by_shape_and_returns_them_by_name() -> None:
    clients = adapters()
    together = ff.aggregate(clients, rank=10, solver="filtered")
    single = ff.aggregate(clients, rank=10, solver="gram")
    assert together.layers == single.layers == sorted(together.layers)
    for name in single.layers:
        assert together[name].solver == "filtered"
        got, best = together[name].error(10), single[name].error(10)
        assert best * (1 - 1e-6) <= got <= best * (1 + 1e-3)
        assert (together.delta(name) - single.delta(name)).norm() < 0.1 * best


def test_groups_are_of_one_shape_and_fit_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[str]]] = []
    solve_one = Work.solved

    def spy(self: Work, pieces: Any) -> Any:
        seen.append([[layer.spec.name for layer in run] for run in self.groups])
        return solve_one(self, pieces)

    monkeypatch.setattr(Work, "solved", spy)
    clients = adapters()
    whole = ff.aggregate(clients, rank=10, solver="filtered")
    need = max(run.scratch for run in Work_of(clients).plans)
    tight = ff.Aggregator(rank=10, solver="filtered", memory_limit=5 * need)
    for client in clients:
        tight.add(client)
    update = tight.finish()
    assert [len(run) for run in seen[0]] == [3, 3]
    assert max(len(run) for run in seen[1]) < 3 and sum(len(run) for run in seen[1]) == 6
    for name in whole.layers:
        assert torch.allclose(whole[name].S, update[name].S, rtol=1e-6)


def Work_of(clients: Any) -> Work:
    agg = ff.Aggregator(rank=10, solver="filtered")
    for client in clients:
        agg.add(client)
    return Work(agg._weighted(), agg._settings())


def test_from_files_to_a_file_it_is_the_same_bit_for_bit(tmp_path: Any) -> None:
    clients = adapters()
    paths = [client.save(tmp_path / f"c{i}") or tmp_path / f"c{i}" for i, client in enumerate(clients)]
    memory = ff.aggregate(clients, rank=10, solver="filtered")
    agg = ff.Aggregator(rank=10, solver="filtered", read="finish")
    for i, path in enumerate(paths):
        agg.add(path, client=f"c{i}")
    file = agg.finish(tmp_path / "update.safetensors")
    assert file.layers == memory.layers
    for name in memory.layers:
        for part in ("U", "S", "V", "energy"):
            assert torch.equal(getattr(memory[name].factorization, part), getattr(file[name].factorization, part))


def test_one_layer_by_itself() -> None:
    stack = stack_of(SPECTRA["root"], 210, 170)
    f = solve(stack, K, solver="filtered")
    assert f.solver == "filtered"
    assert_right(f, stack, 1e-3)
    few = stack_of(SPECTRA["root"][:20], 210, 170)
    assert solve(few, K, solver="filtered").solver in ("krylov", "gram")
