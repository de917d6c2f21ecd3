"""Which paths a round on a GPU takes, and what is said where a fast one is missing; most of it without a GPU."""

from __future__ import annotations

import importlib
import itertools
import threading
import types
import warnings
from typing import Any

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import admission, doctor, values
from flexlora_fast.backends import cusolver, eigen, groups, launcher
from flexlora_fast.backends.group import Packed
from flexlora_fast.errors import BackendError
from flexlora_fast.lowrank import plan
from flexlora_fast.lowrank.calibrate import measure_cuda
from flexlora_fast.lowrank.grouped import How, Stacks, solve_group
from flexlora_fast.lowrank.random import signs, signs_of, stream
from flexlora_fast.precision import full_precision
from tests.test_filtered import K, assert_right, group

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = types.SimpleNamespace(device=torch.device("cuda"), blocks=[object()])


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Nothing remembered of the machine that another test made up."""
    for cached in (eigen.on_cuda, cusolver._library, groups._warn):
        cached.cache_clear()
    yield
    for cached in (eigen.on_cuda, cusolver._library, groups._warn):
        cached.cache_clear()


def test_on_the_cpu_groups_are_packed() -> None:
    stacks, _ = group()
    assert isinstance(groups.of(stacks), Packed)


def test_kernels_on_a_gpu_and_a_warning_once_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(groups.Tabled, "of", lambda stacks: made.append("kernels"))
    monkeypatch.setattr(groups, "Packed", lambda stacks: made.append("packed"))
    monkeypatch.setattr(groups, "obstacle", lambda: None)
    groups.of([CUDA])  # type: ignore[list-item]
    monkeypatch.setattr(groups, "obstacle", lambda: "triton is on holiday")
    with pytest.warns(RuntimeWarning, match="triton is on holiday"):
        groups.of([CUDA])  # type: ignore[list-item]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups.of([CUDA])  # type: ignore[list-item]
    assert made == ["kernels", "packed", "packed"]


def test_a_kernel_that_fails_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stacks: Any) -> None:
        raise BackendError("out of shared memory")

    monkeypatch.setattr(groups.Tabled, "of", broken)
    monkeypatch.setattr(groups, "obstacle", lambda: None)
    with pytest.raises(BackendError, match="shared memory"):
        groups.of([CUDA])  # type: ignore[list-item]


def test_eigensolvers_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusolver, "obstacle", lambda: None)
    assert eigen.on_cuda() == ("cuSOLVER XsyevBatched", cusolver.eigh)
    eigen.on_cuda.cache_clear()
    monkeypatch.setattr(cusolver, "obstacle", lambda: "no library")
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: types if name == "cupy" else real(name))
    assert eigen.on_cuda()[0] == "CuPy syevjBatched"
    eigen.on_cuda.cache_clear()

    def without(name: str) -> Any:
        if name == "cupy":
            raise ImportError("no module named cupy")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(launcher, "obstacle", lambda: None)
    assert eigen.on_cuda()[0] == "Jacobi's method, compiled"
    eigen.on_cuda.cache_clear()
    monkeypatch.setattr(launcher, "obstacle", lambda: "not compiled")
    with pytest.warns(RuntimeWarning, match=r"no library.*no module named cupy.*pip install"):
        name, solver = eigen.on_cuda()
    assert name == "torch, one matrix at a time"
    values, vectors = solver(torch.diag(torch.tensor([3.0, 1.0, 2.0]).double())[None])
    assert values.tolist() == [[1.0, 2.0, 3.0]] and vectors.shape == (1, 3, 3)
    assert eigen.on_cuda()[0] == name  # and no second warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cusolver_says_why_not() -> None:
    assert cusolver.obstacle() == "torch sees no CUDA GPU"
    with pytest.raises(BackendError, match="no CUDA GPU"):
        cusolver.eigh(torch.eye(3).double()[None])


def test_each_stream_has_a_handle_and_recordings_have_theirs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle cannot be made while a CUDA graph is recorded."""
    made, state = itertools.count(1), types.SimpleNamespace(stream="main", recording=False)

    def create(reference: Any) -> int:
        assert not state.recording
        reference._obj.value = next(made)
        return 0

    library: Any = types.SimpleNamespace(cusolverDnCreate=create, cusolverDnCreateParams=create)
    monkeypatch.setattr(cusolver, "_handles", threading.local())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.recording)

    def handle(stream: str, recording: bool = False, device: int = 0) -> int | None:
        state.stream, state.recording = stream, recording
        return cusolver._handle(library, torch.device("cuda", device))[0].value

    found = [handle("main"), handle("x", recording=True), handle("apart"), handle("main", device=1)]
    assert len(set(found)) == 4
    assert found == [handle("main"), handle("y", recording=True), handle("apart"), handle("main", device=1)]


def test_an_unknown_status_names_the_call() -> None:
    cusolver._check("cusolverDnCreate", 0)
    with pytest.raises(BackendError, match=r"cusolverDnCreate returned status 7; .*doctor"):
        cusolver._check("cusolverDnCreate", 7)


@pytest.mark.parametrize("kernels", [None, "triton cannot be imported (x)"])
@pytest.mark.parametrize("solver", [None, "no libcusolver"])
def test_doctor_names_the_paths(monkeypatch: pytest.MonkeyPatch, kernels: str | None, solver: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("flexlora_fast.kernels.obstacle", lambda: kernels)
    monkeypatch.setattr(cusolver, "obstacle", lambda: solver)
    monkeypatch.setattr(eigen, "on_cuda", lambda: ("cuSOLVER" if solver is None else "torch, one by one", None))
    check = doctor._gpu_round("gpu round")
    assert check.status == ("ok" if kernels is solver is None else "broken" if solver else "absent")
    assert ("Triton kernels" in check.detail) == (kernels is None)
    for reason in (kernels, solver):
        assert reason is None or reason in check.detail
    assert bool(check.remedy) == (check.status != "ok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_without_a_gpu() -> None:
    assert doctor._gpu_round("gpu round").status == "absent"


def test_calibration_of_a_device_gives_every_constant() -> None:
    """On the CPU, where it has no use, in sizes that take a moment."""
    constants = measure_cuda(torch.device("cpu"), side=256, layers=2)
    numbers = [x for x in vars(constants).values() if isinstance(x, float)]
    assert len(numbers) == 9 and all(0 < x < float("inf") for x in numbers)
    assert constants.measured_on.startswith("cpu, torch")


def test_the_planner_has_constants_for_gpus() -> None:
    c = plan.constants_of(torch.device("cuda"))
    assert c.gemm16 > c.gemm32 > plan.default_constants().gemm32
    device = plan.Shape(4096, 4096, 1600, 64, sixteen=True)
    assert plan.choose(device, c, grouped=True) == "filtered"
    assert plan.choose(device, c) != "filtered"
    assert plan.choose(plan.Shape(4096, 4096, 1600, 64, tol=0.0), c, grouped=True) in plan.EXACT


def test_one_number_settles_a_client_on_a_gpu() -> None:
    assert values.harmless(1.0, 4096 * 16, 2.0)
    for largest, scale in ((1e12, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, 1e13)):
        assert not values.harmless(largest, 4096, scale)
    adapter = ff.Adapter.from_state_dict(
        {"base_model.model.fc.lora_A.weight": torch.ones(2, 5), "base_model.model.fc.lora_B.weight": torch.ones(4, 2)},
        {"r": 2, "lora_alpha": 2},
    )
    assert not admission._settled_on_device(adapter)  # not on a GPU: looked at tensor by tensor


def test_a_device_is_named_as_its_tensors_name_it() -> None:
    """ "cuda" and "cuda:0" are not equal, and what lies on the one would be taken for elsewhere."""
    assert ff.Aggregator(device="cpu").device == torch.ones(1).device
    if torch.cuda.is_available():
        assert ff.Aggregator(device="cuda").device == torch.ones(1, device="cuda").device


def test_addressed_signs_are_those_of_each_address() -> None:
    key = stream(3, "layer")
    both = signs_of([(key, 0), (key, 1), (key + 1, 0)], 7, 70)
    assert torch.equal(both[:2], signs(7, 70, key, batch=2))
    assert torch.equal(both[2:], signs(7, 70, key + 1))
    assert signs_of([], 3, 4).shape == (0, 3, 4)


# -- on a GPU ---


@gpu
@needs_gpu
def test_signs_on_a_gpu_are_the_cpus() -> None:
    addresses = [(stream(3, "layer"), b) for b in range(5)]
    there = signs_of(addresses, 300, 80, device=torch.device("cuda"))
    assert torch.equal(there.cpu(), signs_of(addresses, 300, 80))


@gpu
@needs_gpu
@pytest.mark.parametrize("size", [1, 2, 33, 80, 200])
def test_batched_eigenproblems_on_a_gpu(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    C = torch.randn(17, size, 2 * size, dtype=torch.float64, generator=generator)
    C = C @ C.mT
    for solver in (eigen.eigh, *([cusolver.eigh] if cusolver.obstacle() is None else [])):
        values, vectors = (x.cpu() for x in solver(C.cuda()))
        assert torch.allclose(values.sort(dim=1).values, torch.linalg.eigvalsh(C), rtol=1e-10, atol=1e-10)
        assert ((vectors * values.unsqueeze(1)) @ vectors.mT - C).abs().max() < 1e-9 * C.abs().max()


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_group_on_a_gpu(dtype: torch.dtype) -> None:
    from flexlora_fast.stack import Block, Stack

    stacks, names = group()
    rounded = [
        Stack([Block(b.B.to(dtype), b.A.to(dtype), b.d) for b in stack.blocks], stack.m, stack.n) for stack in stacks
    ]
    there = [Stack([Block(b.B.cuda(), b.A.cuda(), b.d) for b in stack.blocks], stack.m, stack.n) for stack in rounded]
    with full_precision():
        results = [solve_group(Stacks(there), K, How(1e-3, 0, names)) for _ in range(2)]
    for stack, f, again in zip(rounded, *results, strict=True):
        assert f.U.is_cuda and f.solver == "filtered"
        assert torch.equal(f.U, again.U) and torch.equal(f.S, again.S)
        assert_right(type(f)(f.U.cpu(), f.S, f.V.cpu(), f.energy, f.solver, f.iterations, f.excess), stack, 1e-3)


@gpu
@needs_gpu
def test_adapters_in_gpu_memory_are_solved_from_where_they_lie() -> None:
    from flexlora_fast.work import Work
    from tests.test_filtered import adapters

    agg, here = ff.Aggregator(rank=10, device="cuda"), ff.Aggregator(rank=10, solver="gram")
    for client in adapters():
        here.add(client)
        state = {key: X.cuda() for key, X in client.state_dict().items()}
        agg.add(ff.Adapter.from_state_dict(state, client.config, client=client.client))
    work = Work(agg._weighted(), agg._settings(), None, agg._resident)
    assert work.all_here and list(work.pieces()) == []
    found, exact = agg.finish(), here.finish()
    for name in exact.layers:
        assert found[name].error(10) <= exact[name].error(10) * (1 + 1e-3)
        assert not found[name].factorization.U.is_cuda
