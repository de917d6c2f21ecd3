"""Each solver against the float64 oracle on spectra that are easy, hard and degenerate, and the planner's promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.lowrank import plan
from flexlora_fast.lowrank import solve as solving
from flexlora_fast.lowrank.core import Unresolved
from flexlora_fast.lowrank.factorization import Factorization, complete, finish
from flexlora_fast.lowrank.plan import EXACT, SOLVERS
from flexlora_fast.stack import Block, Stack
from tests.checks import CERTIFIED, FLOAT32_FLOOR, SMALL
from tests.oracle import Truth, excess
from tests.where import solve

SPECTRA = {
    "decaying": 0.9 ** torch.arange(120.0),
    "fast": 0.5 ** torch.arange(120.0),
    "harmonic": 1 / torch.arange(1.0, 121.0),
    "stepped": torch.cat([torch.full((10,), 1.0), torch.full((40,), 0.1), torch.full((70,), 0.01)]),
    "one step, late": torch.cat([torch.full((20,), 1.0), torch.full((100,), 0.3)]),
    "flat": torch.ones(120),
    "nearly flat": torch.linspace(1.0, 0.9, 120),
    "low rank": torch.cat([torch.ones(5), torch.zeros(115)]),
}


NARROW = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (8, 9), (9, 8), (11, 10), (12, 12), (10, 30)]


def stack_of(sigma: torch.Tensor, m: int, n: int, seed: int = 0, batch: int = 1) -> Stack:
    """A stack of four blocks with these singular values (j in block j mod 4), mixed over the columns of each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = len(sigma)
    U = torch.linalg.qr(normal(batch, m, rank))[0]
    V = torch.linalg.qr(normal(batch, n, rank))[0]
    blocks = []
    for i in range(4):
        mine = slice(i, None, 4)
        M = torch.linalg.qr(normal(len(sigma[mine]), len(sigma[mine])))[0]
        B, A = U[:, :, mine] * sigma[mine] @ M, M.T @ V[:, :, mine].mT
        d = 0.5 + torch.rand(1, generator=generator, dtype=torch.float64).expand(B.shape[2])
        blocks.append(Block((B / d).float(), A.float(), d))
    return Stack(blocks, m, n, batch)


def truth_of(stack: Stack) -> Truth:
    return Truth(sum(((b.B.double() * b.d) @ b.A.double()).numpy() for b in stack.blocks))


def dense(f: Factorization) -> np.ndarray:
    return ((f.U.double() * f.S.unsqueeze(1)) @ f.V.double().mT).numpy()


def assert_good(f: Factorization, truth: Truth, k: int, tol: float = 1e-3) -> None:
    """The promise of the solver that made ``f``, its certificate, and its vectors."""
    best, norm = truth.error(k), truth.norm
    error = float(np.linalg.norm(truth.whole - dense(f)))
    if f.solver in EXACT:
        assert error <= best + 1e-6 * norm
    elif best < SMALL * norm:
        assert error <= best + FLOAT32_FLOOR * norm
    else:
        got = excess(truth, dense(f), k)
        assert got <= tol, f"{f.solver}: excess {got:.2e} in {f.iterations} steps"
    certified = float(f.energy.sum() - f.S.square().sum())
    assert abs(certified - error**2) <= (CERTIFIED * norm) ** 2
    for X in (f.U.double(), f.V.double()):
        assert (X.mT @ X - torch.eye(X.shape[2])).abs().max() <= 1e-5
    assert (f.S.diff(dim=1) <= 0).all() and (f.S >= 0).all()


@pytest.mark.parametrize("k", [1, 8, 30])
@pytest.mark.parametrize(("m", "n"), [(200, 150), (130, 190)], ids=["tall", "wide"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_keeps_its_promise(solver: str, spectrum: str, m: int, n: int, k: int) -> None:
    stack = stack_of(SPECTRA[spectrum], m, n)
    assert_good(solve(stack, k, solver=solver, name=spectrum), truth_of(stack), k)


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - EXACT))
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_tol_is_a_promise(solver: str, tol: float) -> None:
    for spectrum in ("harmonic", "nearly flat", "stepped"):
        stack = stack_of(SPECTRA[spectrum], 200, 150)
        for k in (5, 20):
            f = solve(stack, k, solver=solver, tol=tol, name=spectrum)
            assert excess(truth_of(stack), dense(f), k) <= tol
            assert f.excess <= tol


@pytest.mark.parametrize("solver", SOLVERS)
def test_wide_stacks(solver: str) -> None:
    """R far above both sides, from many clients: the paper's own regime."""
    generator = torch.Generator().manual_seed(5)
    blocks = [
        Block(
            torch.randn(1, 60, 8, generator=generator),
            torch.randn(1, 8, 45, generator=generator),
            torch.full((8,), 1 / 40, dtype=torch.float64),
        )
        for _ in range(40)
    ]
    stack = Stack(blocks, 60, 45)
    assert_good(solve(stack, 8, solver=solver), truth_of(stack), 8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("m", "n"), NARROW)
def test_narrow_layers_under_many_names(solver: str, m: int, n: int) -> None:
    """Random signs of so few rows are often dependent; none of the addressed starts may lose a direction by it."""
    stack = stack_of(1 / torch.arange(1.0, min(m, n) + 1), m, n)
    truth = truth_of(stack)
    for name in range(20):
        for k in {1, max(1, min(m, n) // 2), min(m, n)}:
            f = solve(stack, k, solver=solver, name=str(name))
            error, best = float(np.linalg.norm(truth.whole - dense(f))), truth.error(k)
            assert error <= 1.001 * best + 1e-6 * truth.norm, f"name {name}, k = {k}: {error:.2e}, best {best:.2e}"


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_energy_on_a_few_coordinates(solver: str) -> None:
    """Two inputs of twelve: where a start's signs agree on both, products vanish and must not count as searched.

    The core of a stack wider than its layer looks like this to the solver, whatever the layer.
    """
    for n, r, alone in ((12, 4, True), (2, 8, False), (3, 11, False)):
        generator = torch.Generator().manual_seed(n)
        A, B = torch.randn(1, r, n, generator=generator), torch.randn(1, n, r, generator=generator)
        A[:, :, 2:] = 0 if alone else A[:, :, 2:]
        stack = Stack([Block(B, A, torch.ones(r, dtype=torch.float64))], n, n)
        truth = truth_of(stack)
        for name in range(60):
            f = solve(stack, 2, solver=solver, name=str(name))
            error = float(np.linalg.norm(truth.whole - dense(f)))
            assert error <= 1.001 * truth.error(2) + 1e-6 * truth.norm, f"{n}×{n} of R = {r}, name {name}"


@pytest.mark.parametrize("solver", SOLVERS)
def test_exactly_repeated_singular_values(solver: str) -> None:
    """ΔW = the identity: an invariant subspace at every step, and no gain to tell that anything is missing."""
    eye = torch.eye(64)[None]
    stack = Stack([Block(eye, eye, torch.ones(64, dtype=torch.float64))], 64, 64)
    f = solve(stack, 20, solver=solver)
    torch.testing.assert_close(f.S, torch.ones(1, 20, dtype=torch.float64), rtol=1e-5, atol=0)
    assert float(f.energy) == pytest.approx(64, rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_are_solved_one_by_one(solver: str) -> None:
    """Experts of very different size: each is as good as if it were alone."""
    stack = stack_of(SPECTRA["harmonic"][:40], 50, 44, batch=3)
    sizes = torch.tensor([1.0, 1e-4, 0.0])[:, None, None]
    stack = Stack([Block(b.B * sizes, b.A, b.d) for b in stack.blocks], 50, 44, 3)
    f, truth = solve(stack, 6, solver=solver), truth_of(stack)
    for i in range(2):
        one = Truth(truth.whole[i : i + 1])
        assert excess(one, dense(f)[i : i + 1], 6) <= 1e-3
    assert not f.S[2].any() and torch.isfinite(f.U).all() and torch.isfinite(f.V).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_factors_beyond_float32_do_not_hang(solver: str) -> None:
    """Finite factors whose product is not end in an error, not in an endless iteration."""
    huge = Block(torch.full((1, 30, 4), 1e30), torch.full((1, 4, 20), 1e30), torch.ones(4, dtype=torch.float64))
    with pytest.raises(AdapterError, match="beyond what float32"):
        solve(Stack([huge], 30, 20), 2, solver=solver, name="fc")
    for value in (float("nan"), float("inf"), 1e300):
        bad = Block(torch.full_like(huge.B, value, dtype=torch.float64), huge.A, huge.d)
        with pytest.raises(AdapterError, match="'fc': a factor holds NaN, Inf"):
            solve(Stack([bad], 30, 20), 2, solver=solver, name="fc")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [(1.0, 1e-22), (1e-8, 1e-8), (1.0, 1e20), (1e8, 1e8)], ids=str)
def test_coefficients_beyond_float32_squares(solver: str, scale: tuple[float, float]) -> None:
    """Factors that are harmless one by one, with a ΔW whose squares float32 cannot hold."""
    plain = stack_of(SPECTRA["harmonic"], 200, 150)
    factor, d = scale
    blocks = [Block(block.B * factor, block.A * factor, block.d * d) for block in plain.blocks]
    f = solve(Stack(blocks, 200, 150), 8, solver=solver)
    best = solve(plain, 8, solver="svd")
    assert torch.allclose(f.S / (factor * factor * d), best.S, rtol=1e-3)
    assert torch.allclose(f.energy / (factor * factor * d) ** 2, best.energy, rtol=1e-6)


def test_bad_options() -> None:
    stack = stack_of(torch.ones(4), 6, 5)
    with pytest.raises(OptionError, match="'qr' is not one of auto, gram"):
        solve(stack, 2, solver="qr")
    for tol in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="tol"):
            solve(stack, 2, tol=tol)


def test_blocks_and_stacks_check_their_shapes() -> None:
    B, A, d = torch.ones(1, 5, 2), torch.ones(1, 2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="block shapes disagree"):
        Block(B, A, d[:1])
    with pytest.raises(ValueError, match=r"\(1, 5, 3\) in a stack of \(1, 5, 4\)"):
        Stack([Block(B, A, d)], 5, 4)
    empty = solve(Stack([], 5, 4), 3)
    assert empty.S.shape == (1, 0) and float(empty.energy) == 0


@pytest.mark.parametrize("tol", [0.0, 1e-9])
def test_small_tolerances_ask_for_exact_solvers(tol: float) -> None:
    assert plan.choose(plan.Shape(4096, 4096, 1600, 16, tol)) in EXACT
    stack = stack_of(SPECTRA["harmonic"], 200, 150)
    f = solve(stack, 10, tol=tol)
    assert f.solver in EXACT and f.excess == 0
    assert_good(f, truth_of(stack), 10)


def test_the_planner_takes_the_cheapest() -> None:
    constants = plan.default_constants()
    for shape in (plan.Shape(64, 64, 8, 2), plan.Shape(4096, 4096, 13000, 30), plan.Shape(4096, 1024, 200, 8)):
        costs = plan.seconds(shape, constants)
        assert costs.keys() == set(SOLVERS) and all(0 < c < float("inf") for c in costs.values())
        grouped, alone = plan.choose(shape, constants, grouped=True), plan.choose(shape, constants)
        assert costs[grouped] == min(costs.values()) or grouped in EXACT
        del costs["filtered"]  # only for layers of one shape together
        assert costs[alone] == min(costs.values()) or alone in EXACT


@pytest.mark.parametrize(("m", "have", "count"), [(5, 0, 5), (5, 3, 5), (1, 0, 1), (12, 2, 9), (7, 7, 7), (4, 1, 4)])
def test_complete_is_orthonormal_for_any_key(m: int, have: int, count: int) -> None:
    X = torch.linalg.qr(torch.randn(m, m, generator=torch.Generator().manual_seed(0)))[0][:, :have]
    for key in range(50):
        Y = complete(X, count, key)
        assert torch.equal(Y[:, :have], X)
        assert (Y.T @ Y - torch.eye(count)).abs().max() <= 1e-6
    wide = complete(X, m + 3, 0)
    torch.testing.assert_close(wide.norm(dim=0), torch.ones(m + 3))


def test_finish_repairs_vectors_that_are_none() -> None:
    """Noise, zeros and copies behind the leading columns become orthonormal; the leading ones stay."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(1, side, 5, generator=generator))[0] for side in (9, 6))
    S = torch.tensor([[3.0, 1.0, 2e-8, 1e-8, 0.0]], dtype=torch.float64)
    spoilt = U.clone()
    spoilt[:, :, 2] = spoilt[:, :, 0] * 0.8 + 0.6 * spoilt[:, :, 2]
    spoilt[:, :, 3] = 0
    spoilt[:, :, 4] = float("inf")
    u, s, v = finish(spoilt, S, V, key=3)
    assert s.tolist() == [[3.0, 1.0, 2e-8, 0.0, 0.0]]
    for X, before in ((u, U), (v, V)):
        assert (X.mT @ X - torch.eye(5)).abs().max() <= 1e-6
        assert (X[:, :, :2].abs() - before[:, :, :2].abs()).abs().max() <= 1e-6


def test_grams_too_coarse_for_what_cancels_give_way_to_the_exact_solver():
    """Two clients that undo each other to five digits: float32 Grams hold nothing of what is left."""
    generator = torch.Generator().manual_seed(0)
    m, n, r = 90, 70, 12
    B, A, noise = (torch.randn(1, *shape, generator=generator) for shape in ((m, r), (r, n), (m, r)))
    d = torch.ones(r, dtype=torch.float64)
    stack = Stack([Block(B, A, d), Block(B + 1e-5 * noise, -A, d)], m, n)
    delta = (stack.packed_P(torch.float64) * stack.d) @ stack.packed_Q(torch.float64)
    f = solve(stack, 4, solver="krylov")
    assert f.solver == "gram"
    S = torch.linalg.svdvals(delta)[:, :4]
    assert torch.allclose(f.S, S, rtol=1e-3)


@pytest.mark.parametrize(("share", "takes_over"), [(1.2e-7, {"factored", "dense"}), (2e-6, {"gram"})])
def test_where_rounding_alone_stands_in_the_way_of_grams_the_fastest_solver_takes_over(monkeypatch, share, takes_over):
    def unresolved(*_: object) -> Factorization:
        raise Unresolved(1 + share, 1.0, 1.0)

    monkeypatch.setattr(solving, "solve_krylov", unresolved)
    sigma = torch.cat([torch.ones(6), torch.full((594,), 1e-3)])
    stack = stack_of(sigma, 620, 700)
    f = solving.solve(stack, 6, solver="krylov", tol=1e-3)
    assert f.solver in takes_over
    delta = ((stack.packed_P(torch.float64) * stack.d) @ stack.packed_Q(torch.float64))[0]
    truth = torch.linalg.svdvals(delta)
    assert torch.allclose(f.S[0], truth[:6], rtol=1e-6)
    X = (f.U[0].double() * f.S[0]) @ f.V[0].double().mT
    rest = float(truth[6:].square().sum()) ** 0.5
    assert float(torch.linalg.norm(delta - X)) <= rest * (1 + 1e-3)
