"""One-sided Jacobi of csrc/cuda, run on the CPU, against LAPACK and against the matrices it takes apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import reference

if _native.extension is None:
    pytest.skip(f"no native extension: {_native.reason}", allow_module_level=True)
E = _native.extension.emulated

SIZES = [1, 2, 7, 8, 31, 33, 80, 127]


def spectra(width: int) -> Tensor:
    j = torch.arange(1.0, width + 1, dtype=torch.float64)
    half = (j <= width / 2).double()
    pairs = 1 / torch.ceil(j / 2)
    centred = 2 * j / width - 1
    return torch.stack(
        [torch.ones_like(j), 1 / j, pairs, torch.exp(-j / 20), 10 ** (-12 * j / width), half, centred, 0 * j]
    )


def symmetric(values: Tensor, generator: torch.Generator) -> Tensor:
    width = values.shape[1]
    Q = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]
    C = (Q * values.unsqueeze(1)) @ Q.mT
    return (C + C.mT) / 2


def assert_eigen(C: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Orthonormal rows that are eigenvectors, ascending, to rounding of ‖C‖_F."""
    width = C.shape[1]
    scale = C.abs().amax(dim=(1, 2)).clamp_min(1e-300)  # squares of C could overflow
    unit, V = C / scale.view(-1, 1, 1), vectors.mT
    limit = 1e-15 * width**0.5 * unit.norm(dim=(1, 2))
    assert (values.diff(dim=1) >= 0).all()
    assert (V.mT @ V - torch.eye(width, dtype=torch.float64)).abs().max() <= 1e-15 * width**0.5 + 1e-15
    residual = unit @ V - V * (values / scale.unsqueeze(1)).unsqueeze(1)
    assert (residual.norm(dim=1).amax(dim=1) <= limit).all()
    expected, _ = reference.eigh_small(C)
    assert ((values.flip(1) - expected).abs().amax(dim=1) / scale <= limit).all()


@pytest.mark.parametrize("width", SIZES)
def test_eigenproblems(width, generator):
    C = symmetric(spectra(width), generator)
    values, vectors, converged = E.jacobi_eigh(C)
    assert converged.all()
    assert_eigen(C, values, vectors)
    for way in ({"threads": 3}, {"workspace": True}):
        again = E.jacobi_eigh(C[:4], **way)
        assert torch.equal(again[0], values[:4]) and torch.equal(again[1], vectors[:4])


@pytest.mark.parametrize("scale", [1e-290, 1e-150, 1e150, 1e290])
def test_eigenvalues_of_any_scale(scale, generator):
    C = symmetric(spectra(33)[:4], generator) * scale
    values, vectors, converged = E.jacobi_eigh(C)
    assert converged.all()
    assert_eigen(C, values, vectors)


def test_the_largest_size_and_half_a_matrix(generator):
    """Only the symmetric part counts."""
    C = symmetric(spectra(256)[1:2], generator)
    skewed = C + torch.triu(C, 1)
    skewed = skewed - torch.tril(C, -1)
    assert torch.allclose((skewed + skewed.mT) / 2, C, atol=1e-15)
    values, vectors, converged = E.jacobi_eigh(skewed)
    assert converged.all()
    assert_eigen((skewed + skewed.mT) / 2, values, vectors)


def test_what_is_not_finite_is_flagged_and_alone(generator):
    C = symmetric(spectra(31)[:4], generator)
    good = E.jacobi_eigh(C)
    C[1, 3, 4], C[2, 5, 5] = math.nan, -math.inf
    values, vectors, converged = E.jacobi_eigh(C)
    assert converged.tolist() == [True, False, False, True]
    assert values[1:3].isnan().all() and vectors[1:3].isnan().all()
    for found, before in zip((values, vectors), good, strict=False):
        assert torch.equal(found[[0, 3]], before[[0, 3]])
    U, S, V, converged = E.jacobi_svd(C)
    assert converged.tolist() == [True, False, False, True]
    assert all(x[1:3].isnan().all() and x[[0, 3]].isfinite().all() for x in (U, S, V))
    assert E.jacobi_eigh(C[:0])[1].shape == (0, 31, 31)


@pytest.mark.parametrize("width", SIZES)
def test_singular_values(width, generator):
    C = symmetric(spectra(width), generator)
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]
    A = C @ turn
    A[2] *= 1e150
    A[3] *= 1e-150
    U, S, V, converged = E.jacobi_svd(A)
    assert converged.all()
    scale = A.abs().amax(dim=(1, 2)).clamp_min(1e-300)
    unit, S1 = A / scale.view(-1, 1, 1), S / scale.unsqueeze(1)
    limit = 2e-15 * width * unit.norm(dim=(1, 2)).clamp_min(1)
    assert (S.diff(dim=1) <= 0).all()
    assert ((U * S1.unsqueeze(1) @ V.mT - unit).abs().amax(dim=(1, 2)) <= limit).all()
    assert ((S1 - torch.linalg.svdvals(unit)).abs().amax(dim=1) <= limit).all()
    assert (V.mT @ V - torch.eye(width, dtype=torch.float64)).abs().max() <= 1e-15 * width + 1e-15
    kept = torch.diag_embed((S > 0).double())
    assert (U.mT @ U - kept).abs().max() <= 1e-15 * width**0.5 + 1e-15
    for way in ({"threads": 3}, {"workspace": True}):
        again = E.jacobi_svd(A[:4], **way)
        assert all(torch.equal(x, y[:4]) for x, y in zip(again, (U, S, V), strict=False))


def test_small_singular_values_keep_their_digits(generator):
    """Of columns scaled by 1e-40 … 1: what QR-based solvers lose, one-sided Jacobi does not."""
    width = 20
    scales = torch.logspace(0, -40, width, dtype=torch.float64)
    B = torch.randn(1, width, width, dtype=torch.float64, generator=generator)
    _, S, _, converged = E.jacobi_svd(B * scales)
    # det(B·D) = Π s, and every s is of the size of its own scale.
    product = S.log().sum()
    assert converged.all()
    assert abs(product - (torch.linalg.slogdet(B)[1] + scales.log().sum())) <= 1e-11
    assert ((S / scales).log10().abs() < 3).all()
