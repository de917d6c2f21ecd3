"""The device code of csrc/cuda for tall panels and large Grams, run on the CPU: products, Cholesky QR, scaling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import reference
from flexlora_fast.backends import small as twins
from tests.test_cuda_numerics import SIZES, panels

if _native.extension is None:
    pytest.skip(f"no native extension: {_native.reason}", allow_module_level=True)
E = _native.extension.emulated

# (m, w, v): empty, tiny, odd, one tile, one more than a tile, several tiles, many rows.
SHAPES = [
    (0, 3, 2),
    (1, 1, 1),
    (5, 7, 2),
    (31, 33, 8),
    (97, 80, 80),
    (64, 81, 79),
    (33, 160, 31),
    (7, 256, 200),
    (3001, 9, 12),
]


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


@pytest.mark.parametrize(("m", "w", "v"), SHAPES)
@pytest.mark.parametrize("rows", [1 << 30, 64])
def test_products_in_float64(m, w, v, rows, generator):
    X, Y = randn(2, m, w, generator=generator), randn(2, m, v, generator=generator)
    Y[0] *= 1e-20
    expected, bound = (twins.gram64(x, y) for x, y in ((X, Y), (X.abs(), Y.abs())))
    Z = E.gram64(X, Y, rows=rows)
    assert ((Z - expected).abs() <= 1e-15 * max(m, 1) ** 0.5 * bound).all()
    assert torch.equal(Z, E.gram64(X, Y, rows=rows, threads=3))
    gram = E.gram64(X, X, symmetric=True, rows=rows)
    assert torch.equal(gram, gram.mT)
    assert torch.equal(gram, E.gram64(X, X.clone(), rows=rows))  # which computes both triangles
    assert torch.equal(gram, E.gram64(X, X.clone(), symmetric=True, rows=rows, threads=5))


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_panels_that_are_parts_of_others(offset, generator):
    """Rows further apart than they are long, and addresses that are not multiples of 16."""
    whole = randn(3, 50, 100, generator=generator)
    for width in (1, 37, 90):
        X = whole[1:, 3:, offset : offset + width]
        assert torch.equal(E.gram64(X, X), E.gram64(X.contiguous(), X.contiguous()))


def test_one_bad_layer_and_layers_left_out(generator):
    X = randn(4, 70, 33, generator=generator)
    good = E.gram64(X, X)
    X[1, 5, 7], X[2, 6, 8] = math.nan, math.inf
    found = E.gram64(X, X)
    assert torch.equal(found[[0, 3]], good[[0, 3]])
    assert found[1, 7].isnan().all() and not found[2].isfinite().all()
    only = torch.tensor([True, False, False, True])
    part = E.gram64(X, X, only=only, rows=32)
    assert torch.allclose(part[[0, 3]], good[[0, 3]]) and not part[1:3].any()
    assert E.gram64(X[:0], X[:0]).shape == (0, 33, 33)


def orthonormalized(Y: Tensor, threads: int = 1, workspace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky QR twice, and once more for the layers that ask for it: Q, the rank of each, and who did."""
    how = {"threads": threads, "workspace": workspace}
    T, rank, again = E.root(E.gram64(Y, Y, symmetric=True), **how)
    Q = torch.empty_like(Y)
    E.apply_right(Y, T, Q, threads=threads)
    for only in (None, again):
        T, _, _ = E.root(E.gram64(Q, Q, symmetric=True, only=only), only, **how)
        E.apply_right(Q, T, Q, only, threads=threads)
    return Q, rank, again


def skew(Q: Tensor) -> float:
    """‖QᵀQ − I‖ where I is 1 for the columns that are not zero."""
    gram = Q.double().mT @ Q.double()
    kept = (Q != 0).any(dim=1).double()
    return float(torch.linalg.matrix_norm(gram - torch.diag_embed(kept), ord=2).max())


@pytest.mark.parametrize("width", SIZES)
def test_cholesky_qr(width, generator):
    m = max(4 * width, 300) if width < 200 else width + 1
    conditions = (1.0, 1e3, 1e6, 1e7, 1e10)
    Y = torch.cat([panels(width, m, c, generator) for c in conditions]).float()
    Q, rank, again = orthonormalized(Y)
    assert skew(Q) <= 1e-6
    assert rank[:2].tolist() == [width, width] and not again[:2].any()
    # Where unit columns are dependent to 1e-6, something is dropped, and no more than has to be.
    values = torch.linalg.svdvals(Y.double())
    assert (rank >= (values > 3e-6 * width**0.5).sum(dim=1)).all()
    assert (rank <= (values > 1e-6 / width).sum(dim=1)).all()
    # What Y is, Q spans, but for what was dropped.
    Y64, Q64 = Y.double(), Q.double()
    outside = (Y64 - Q64 @ (Q64.mT @ Y64)).norm(dim=1).amax(dim=1)
    assert (outside <= 1e-6 * width**0.5 + 1e-6).all()
    # As the twin does: the same subspace, where it is one.
    twin = reference.orthonormalize(Y[:2])
    assert skew(twin) <= 1e-5
    assert (Q[:2] - twin @ (twin.mT @ Q[:2])).abs().max() <= 1e-5


def test_square_single_and_deficient_panels(generator):
    width = 33
    square = randn(1, width, width, generator=generator)
    assert skew(orthonormalized(square)[0]) <= 1e-6
    single = randn(1, 500, 1, generator=generator) * 1e-30
    Q, rank, _ = orthonormalized(single)
    assert torch.allclose(Q.double(), single.double() / single.double().norm(), atol=1e-7) and rank.item() == 1
    low = randn(1, 200, 5, generator=generator) @ randn(1, 5, width, generator=generator)
    Q, rank, _ = orthonormalized(low)
    assert rank.item() == 5 and skew(Q) <= 1e-6
    assert int((Q != 0).any(dim=1).sum()) == 5
    holes = randn(1, 200, width, generator=generator)
    holes[:, :, ::3] = 0
    holes[:, :, 4] = holes[:, :, 7]
    Q, rank, _ = orthonormalized(holes)
    assert rank.item() == 21 and skew(Q) <= 1e-6
    assert not Q[:, :, ::3].any() and Q.isfinite().all()
    nothing, rank, _ = orthonormalized(torch.zeros(1, 40, width))
    assert rank.item() == 0 and not nothing.any()
    assert orthonormalized(torch.empty(0, 40, width))[0].shape == (0, 40, width)
    assert orthonormalized(torch.empty(1, 0, width))[0].shape == (1, 0, width)


def test_columns_of_any_scale(generator):
    Y = randn(1, 100, 20, generator=generator)
    scaled = Y * torch.logspace(-36, 36, 20)
    Q, rank, _ = orthonormalized(scaled)
    assert rank.item() == 20 and skew(Q) <= 1e-6
    other = orthonormalized(Y)[0]
    assert (Q - other @ (other.mT @ Q)).abs().max() <= 1e-5


def test_a_third_pass_is_for_those_that_need_it(generator):
    """Parts of 3e-6 ask for one, and layers beside them keep their bits."""
    base = torch.linalg.qr(torch.randn(3, 400, 12, dtype=torch.float64, generator=generator))[0]
    base[1, :, 11] = base[1, :, 0] + 3e-6 * base[1, :, 11]
    base[2, :, 11] = base[2, :, 0] + 3e-7 * base[2, :, 11]
    Y = base.float().contiguous()
    Q, rank, again = orthonormalized(Y)
    assert again.tolist() == [False, True, False] and rank.tolist() == [12, 12, 11]
    assert skew(Q) <= 1e-6
    for i in range(3):
        assert torch.equal(Q[i], orthonormalized(Y[i : i + 1])[0][0])


def test_threads_and_memory_make_no_difference(generator):
    Y = torch.cat([panels(40, 130, c, generator) for c in (3.0, 1e6, 1e10)]).float()
    assert torch.equal(orthonormalized(Y)[0], orthonormalized(Y, threads=3, workspace=True)[0])


def test_a_bad_panel_is_its_own_problem(generator):
    Y = randn(3, 90, 17, generator=generator)
    good = orthonormalized(Y)[0]
    Y[1, 4, 5] = math.nan
    Q, rank, again = orthonormalized(Y)
    assert torch.equal(Q[[0, 2]], good[[0, 2]])
    assert rank.tolist() == [17, -1, 17] and not again.any()


@pytest.mark.parametrize("width", [1, 31, 100])
def test_rows_of_a_larger_panel_may_be_overwritten(width, generator):
    whole = randn(2, 70, 103, generator=generator)
    T = torch.randn(2, width, width, dtype=torch.float64, generator=generator)
    Y = whole[:, 1:, 2 : 2 + width]
    expected = (Y.double() @ T).float()
    before = whole.clone()
    E.apply_right(Y, T, Y)
    assert torch.allclose(Y, expected, rtol=1e-6, atol=1e-30)
    assert torch.equal(whole[:, 0], before[:, 0]) and torch.equal(whole[:, :, :2], before[:, :, :2])
    assert torch.equal(whole[:, :, 2 + width :], before[:, :, 2 + width :])


@pytest.mark.parametrize(("layers", "size"), [(0, 5), (1, 1), (3, 7), (2, 64), (2, 301)])
def test_scaled_grams_and_their_energy(layers, size, generator):
    P, Q = randn(layers, size + 3, size, generator=generator), randn(layers, size, size + 2, generator=generator)
    P[:, :, size // 2] = 0
    if layers == 3:
        P[1, :, 0] *= 1e-15
        P[2, 0, 0] = math.nan
    d = torch.randn(layers, size, dtype=torch.float64, generator=generator)
    G, M = P.mT @ P, Q @ Q.mT
    expected = [G.clone(), M.clone()]
    norms, there, total = twins.scale_grams(*expected, d)
    G2, M2 = G.clone(), M.clone()
    p, _, bad, energy = E.scale_grams(G2, M2, d)
    for found, want in zip((G2, M2, p, bad), (*expected, norms, there), strict=True):
        assert torch.equal(found.double().nan_to_num(-7), want.double().nan_to_num(-7))
    truth = (expected[0].double() * expected[1].double()).sum(dim=(1, 2))
    scale = (expected[0].double() * expected[1].double()).abs().sum(dim=(1, 2))
    finite = truth.isfinite()
    assert ((energy - total).abs() <= 1e-6 * scale)[finite].all()  # whose products are rounded to float32
    assert ((energy - truth).abs() <= 1e-14 * scale)[finite].all() and energy[~finite].isnan().all()
    if layers == 3:
        assert bad.tolist() == [False, True, True]
    again = E.scale_grams(G, M, d, threads=3)
    assert torch.equal(again[3][finite], energy[finite]) and torch.equal(M.nan_to_num(-7), M2.nan_to_num(-7))


@pytest.mark.parametrize(("layers", "size", "width"), [(0, 4, 3), (1, 1, 1), (3, 77, 33), (2, 1024, 2)])
def test_the_recurrence(layers, size, width, generator):
    product, now, before = randn(3, layers, size, width, generator=generator).unbind()
    a, b, c = randn(3, layers, width, generator=generator).unbind()
    first = a.unsqueeze(1).double() * product + b.unsqueeze(1).double() * now
    second = first + c.unsqueeze(1).double() * before
    assert torch.allclose(E.chebyshev(product, now, None, a, b, None).double(), first, rtol=1e-5, atol=1e-6)
    found = E.chebyshev(product, now, before, a, b, c)
    assert torch.allclose(found.double(), second, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, E.chebyshev(product, now, before, a, b, c, threads=3))
