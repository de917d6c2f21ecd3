"""certificate="estimate": what the subspace leaves is measured by probes, with an honest standard error."""

from __future__ import annotations

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.lowrank import plan
from flexlora_fast.stack import Block, Stack
from tests.where import solve


def stack(m, n, ranks, *, decay=0.0, seed=0, batch=1, dtype=torch.float32) -> Stack:
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for r in ranks:
        B, A = torch.randn(batch, m, r, generator=generator), torch.randn(batch, r, n, generator=generator)
        d = torch.arange(1, r + 1, dtype=torch.float64) ** -decay / len(ranks)
        blocks.append(Block(B.to(dtype), A.to(dtype), d))
    return Stack(blocks, m, n, batch)


def energy64(s: Stack) -> torch.Tensor:
    delta = (s.packed_P(torch.float64) * s.d) @ s.packed_Q(torch.float64)
    return delta.square().sum(dim=(1, 2))


@pytest.mark.parametrize("solver", ["factored", "subspace"])
@pytest.mark.parametrize(("m", "n"), [(300, 260), (123, 450), (450, 123)])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_the_energy_is_within_its_standard_error(solver, m, n, decay):
    misses = []
    for seed in range(8):
        s = stack(m, n, (16,) * 12, decay=decay, seed=seed)
        f = solve(s, 8, solver=solver, certificate="estimate", seed=seed)
        assert f.energy_error is not None and f.energy_error.shape == f.energy.shape
        exact = energy64(s)
        misses.append(float((f.energy - exact).abs() / f.energy_error))
        assert float(f.energy_error) < 0.05 * float(exact)
    assert max(misses) < 5 and sum(miss < 2 for miss in misses) >= 5


def test_the_rest_is_estimated_relative_to_itself():
    """With nearly all energy in a few directions, the error at rank k is still good to a few percent."""
    s = stack(400, 300, (16,) * 12, decay=3.0)
    f = solve(s, 24, solver="factored", certificate="estimate")
    delta = (s.packed_P(torch.float64) * s.d) @ s.packed_Q(torch.float64)
    rest = float(torch.linalg.svdvals(delta[0])[24:].square().sum())
    assert rest < 2e-3 * float(f.energy)
    assert abs(float(f.energy - f.S.square().sum()) / rest - 1) < 0.1


def test_triplets_do_not_depend_on_the_certificate_beyond_tol():
    s = stack(300, 260, (16,) * 12)
    one, two = (solve(s, 8, solver="factored", certificate=c) for c in ("exact", "estimate"))
    assert one.energy_error is None
    assert torch.allclose(one.S, two.S, rtol=1e-2)


def test_every_matrix_of_a_batch_has_its_own():
    s = stack(90, 80, (8,) * 10, batch=3)
    f = solve(s, 6, solver="factored", certificate="estimate")
    assert f.energy_error is not None
    assert f.energy.shape == f.energy_error.shape == (3,)
    assert bool(((f.energy - energy64(s)).abs() < 5 * f.energy_error).all())


def test_a_full_basis_leaves_nothing_to_estimate():
    s = stack(30, 20, (8,) * 10)
    f = solve(s, 15, solver="factored", certificate="estimate")
    assert f.energy_error is None
    assert float(f.energy) == pytest.approx(float(energy64(s)), rel=1e-5)


@pytest.mark.parametrize("solver", ["gram", "krylov", "dense", "svd"])
def test_solvers_that_know_the_energy_say_so(solver):
    s = stack(120, 90, (8,) * 5)
    assert solve(s, 6, solver=solver, certificate="estimate").energy_error is None


def test_the_planner_counts_what_an_estimate_saves():
    exact, estimate = (plan.Shape(4096, 11008, 8000, 64, certificate=c) for c in plan.CERTIFICATES)
    constants = plan.default_constants()
    assert plan.choose(estimate) == "factored"
    assert plan.seconds(estimate, constants)["factored"] < plan.seconds(exact, constants)["factored"] / 3


def test_through_the_public_face_and_a_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    adapters = []
    for _ in range(20):
        state = {
            "base_model.model.fc.lora_A.weight": torch.randn(8, 260, generator=generator),
            "base_model.model.fc.lora_B.weight": torch.randn(300, 8, generator=generator),
        }
        adapters.append(ff.Adapter.from_state_dict(state, {"r": 8, "lora_alpha": 16}))
    options = {"rank": 6, "solver": "factored"}
    exact = ff.aggregate(adapters, **options)
    update = ff.aggregate(adapters, certificate="estimate", **options)
    assert exact["fc"].energy_error == 0 < update["fc"].energy_error
    assert abs(update["fc"].energy - exact["fc"].energy) < 5 * update["fc"].energy_error
    assert update.report().rows[0]["energy_error"] == update["fc"].energy_error
    loaded = ff.GlobalUpdate.load(update.save(tmp_path / "update.safetensors"))
    assert loaded["fc"].energy_error == update["fc"].energy_error
    streamed = ff.aggregate(adapters, certificate="estimate", out=tmp_path / "out.safetensors", **options)
    assert streamed["fc"].energy == update["fc"].energy


def test_an_unknown_certificate_is_named():
    with pytest.raises(ff.errors.OptionError, match="'sworn' is neither 'exact' nor 'estimate'"):
        ff.Aggregator(certificate="sworn")
    with pytest.raises(ff.errors.OptionError, match="'sworn'"):
        solve(stack(5, 4, (2,)), 1, certificate="sworn")
