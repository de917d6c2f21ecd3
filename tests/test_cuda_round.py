"""Groups of layers solved by the code of the CUDA kernels, emulated on the CPU: what a GPU computes, start to end."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from flexlora_fast import _native
from flexlora_fast.backends import cuda, launcher, small
from flexlora_fast.errors import AdapterError
from flexlora_fast.lowrank.random import signs_of, stream
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.stack import Block, Stack
from tests.test_filtered import SPECTRA, K, assert_right, group, kinds, solved
from tests.test_solvers import stack_of

if _native.extension is None:
    pytest.skip(f"no native extension: {_native.reason}", allow_module_level=True)

from tests.test_cuda_host import Emulated, emulated  # the fixture

__all__ = ["emulated"]


@pytest.fixture
def kernels(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """All small problems go to the kernels."""
    monkeypatch.setattr(launcher, "usable", lambda device: True)
    return emulated


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("m", "n"), [(210, 170), (170, 400)])
@kinds
def test_all_spectra(kernels: Emulated, tol: float, m: int, n: int, kind: str) -> None:
    stacks, names = group(m=m, n=n)
    for name, stack, f in zip(names, stacks, solved(stacks, names, tol, kind), strict=True):
        assert_right(f, stack, tol)
        assert f.solver == kind or (name == "nearly flat" and tol < 1e-3), name
    used = {"signs", "gram64", "condition", "ritz", "rotate", "whiten", "chebyshev"}
    used |= {"norms", "scale", "energy"} if kind == "filtered" else set()
    assert used <= {name.removeprefix("flexlora_") for name in kernels.geometry}


@kinds
def test_a_layer_with_nan_is_named_and_others_do_not_notice(kernels: Emulated, kind: str) -> None:
    stacks, names = group()
    good = solved(stacks[:4] + stacks[5:], names[:4] + names[5:], kind=kind)
    bad = Stack([Block(b.B.clone().index_fill_(1, torch.tensor([3]), torch.nan), b.A, b.d) for b in stacks[4].blocks],
                210, 170)  # fmt: skip
    with pytest.raises(AdapterError, match="NaN") as caught:
        solved([*stacks[:4], bad, *stacks[5:]], names, kind=kind)
    assert caught.value.layer == names[4]
    for stack, f in zip(stacks[:4] + stacks[5:], good, strict=True):
        assert_right(f, stack, 1e-3)


def test_single_layers_orthonormalise_by_the_kernels(kernels: Emulated) -> None:
    stack = stack_of(SPECTRA["root"], 210, 170)
    for solver in ("dense", "factored", "subspace"):
        assert_right(solve(stack, K, solver=solver), stack, 1e-3)
        assert "flexlora_root" in kernels.geometry and "flexlora_apply_right" in kernels.geometry
        kernels.geometry.clear()


def test_wide_problems_are_left_to_torch(kernels: Emulated) -> None:
    gram = torch.eye(257, dtype=torch.float64)[None]
    small.whiten(gram), small.condition(gram), small.ritz(gram, gram), small.singular(gram, gram, 5)
    small.orthonormalize(torch.eye(300)[None, :, :257].contiguous())
    assert not kernels.geometry
    small.whiten(gram[:, :256, :256].contiguous())
    assert "flexlora_whiten" in kernels.geometry


def test_random_starts_are_the_same_bits(kernels: Emulated) -> None:
    addresses = [(stream(3, "layer"), b) for b in range(3)]
    there = signs_of(addresses, 70, 33, device=torch.device("cpu"))
    assert "flexlora_signs" in kernels.geometry
    assert torch.equal(there, signs_of(addresses, 70, 33))


def test_twins_take_what_the_kernels_take() -> None:
    """Every function that hands over has the parameters of the one that it hands over to."""
    names = ["gram64", "orthonormalize", "whiten", "condition", "ritz", "singular", "chebyshev", "scale_grams"]
    for name in names:
        twin, there = (list(inspect.signature(getattr(x, name)).parameters) for x in (small, cuda))
        shared = [parameter for parameter in twin if parameter != "entries"]
        assert there[: len(shared)] == shared, name
    source = inspect.getsource(small)
    assert sorted(names) == sorted({part.split("(")[0] for part in source.split("cuda.")[1:] if "(" in part[:20]})


def test_without_kernels_the_twins_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("launched on the CPU")

    monkeypatch.setattr(cuda, "launch", never)
    stacks, names = group()
    for stack, f in zip(stacks, solved(stacks, names), strict=True):
        assert_right(f, stack, 1e-3)
