"""The device code of csrc/cuda, run on the CPU, against its torch twins and against float64 truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import small as twins

if _native.extension is None:
    pytest.skip(f"no native extension: {_native.reason}", allow_module_level=True)
E = _native.extension.emulated

SIZES = [1, 2, 7, 8, 31, 33, 64, 80, 127, 160, 200, 256]
each_size = pytest.mark.parametrize("width", SIZES)
# Ways of running: one thread in shared memory, and several with the matrices in global memory, as the largest are.
WAYS = ({}, {"threads": 4, "workspace": True})


def eye(width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64)


def panels(width: int, m: int, condition: float, generator: torch.Generator, batch: int = 1) -> Tensor:
    """(batch, m, width) float64 with unit columns of so large a condition number, roughly."""
    X = torch.linalg.qr(torch.randn(batch, m, width, dtype=torch.float64, generator=generator))[0]
    Z = torch.linalg.qr(torch.randn(batch, width, width, dtype=torch.float64, generator=generator))[0]
    values = torch.logspace(0, -math.log10(condition), width, dtype=torch.float64)
    X = (X * values) @ Z
    return X / X.norm(dim=1, keepdim=True)


def grams(width: int, generator: torch.Generator) -> Tensor:
    """(10, width, width): harmless, ill-conditioned, deficient, scaled beyond reason, zero and not finite."""
    good, worse, worst = (panels(width, 2 * width + 3, c, generator)[0] for c in (3.0, 1e6, 1e10))
    deficient, holes, zeros = good.clone(), good.clone(), torch.zeros_like(good)
    deficient[:, width // 2] = good[:, 0]
    holes[:, :: max(1, width // 3)] = 0
    balance = torch.logspace(-3, 3, width, dtype=torch.float64)
    X = torch.stack([good, good * balance, worse, worst, deficient, holes, zeros, good * 1e75, good * 1e-75, good])
    G = X.mT @ X
    G[9, width // 2, width // 3] = math.nan
    return G


def assert_whitens(T: Tensor, gram: Tensor, shift: float, tolerance: float) -> None:
    """Tᵀ·(gram + shift·diag(gram))·T = I for columns that do not vanish."""
    T = T.double()
    assert torch.equal(T, T.triu())
    scale = gram.diagonal().sqrt()
    unit = gram / scale / scale.unsqueeze(1)
    T = scale.unsqueeze(1) * T
    error = T.mT @ (unit + shift * eye(len(unit))) @ T - eye(len(unit))
    assert error.abs().max() <= tolerance


@each_size
def test_whitening(width, generator):
    G = grams(width, generator)
    expected, shifted_there = twins.whiten(G)
    T, T32, shifted = E.whiten(G)
    assert torch.equal(shifted, shifted_there)
    assert torch.equal(T32, T.float())
    if width > 2:
        assert shifted.tolist() == [False, False, True, True, True, True, True, False, True, True]
    for i in (0, 1, 7):
        assert_whitens(T[i], G[i], 0.0, 1e-12)
    if width > 2:
        for i in (2, 3, 4):
            assert_whitens(T[i], G[i], 1e-5, 1e-9)
    for got, want in zip(T, expected, strict=True):
        # Condition numbers of the shifted matrices are width / 1e-5, to whose root the inverse is sensitive.
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()


@each_size
def test_conditioning(width, generator):
    G = grams(width, generator)
    expected = twins.condition(G).float()
    T = E.condition(G)
    for got, want in zip(T, expected, strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    for i in (0, 1, 2, 3, 4):  # not 7, of which float32 holds nothing
        assert_whitens(T[i], G[i], 1e-5, 1e-4)


@each_size
def test_the_small_eigenproblem(width, generator):
    G = grams(width, generator)
    C = torch.randn(len(G), width, width, dtype=torch.float64, generator=generator)
    C[7], C[8] = C[7] * 1e150, C[8] * 1e-150
    C[2, width - 1, 0] = math.inf
    T, small, shifted, spoiled = E.ritz(G, C)
    alone = E.whiten(G)
    assert torch.equal(T, alone[0]) and torch.equal(shifted, alone[2])
    assert spoiled.tolist() == [i == 2 for i in range(len(G))]
    assert not small[2].any()
    assert torch.equal(small, small.mT)
    for i in range(len(G)):
        if i != 2:
            expected = T[i].mT @ C[i] @ T[i]
            expected = (expected + expected.mT) / 2
            assert (small[i] - expected).abs().max() <= 1e-13 * width * (T[i].abs().mT @ C[i].abs() @ T[i].abs()).max()


@each_size
@pytest.mark.parametrize("last", [False, True])
def test_rotation_to_the_ritz_vectors(width, last, generator):
    T = torch.randn(4, width, width, dtype=torch.float64, generator=generator).triu()
    small = torch.randn(4, width, width, dtype=torch.float64, generator=generator)
    small = small + small.mT
    small[1] = small[1] @ small[1]
    small[2] = 0
    values, vectors = torch.linalg.eigh(small)
    k = -(-width // 3)
    spoiled = torch.tensor([False, False, True, False])
    rotation, scaled, found = E.rotate(T, vectors.mT.contiguous(), values, spoiled, k, last)
    values, vectors = values.flip(1)[:, :k].clamp_min(0), vectors.flip(2)[:, :, :k]
    values[2] = math.nan
    assert (rotation - (T @ vectors).float()).abs().max() <= 1e-6 * T.norm()
    if not last:
        assert scaled is None and torch.equal(found.nan_to_num(-1), values.nan_to_num(-1))
        return
    S = values.sqrt()
    assert torch.allclose(found, S, rtol=1e-15, atol=0, equal_nan=True)
    inverse = torch.where(1e-7 * S[:, :1] < S, 1 / S.clamp_min(1e-300), torch.zeros_like(S))
    expected = (T @ vectors) * inverse.unsqueeze(1)
    assert (scaled - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not scaled[2].any()


def test_a_step_of_rayleigh_ritz(generator):
    """From the Grams to the Ritz values and the rotation, as the twin has them."""
    X = panels(40, 200, 30.0, generator, batch=2)
    weights = torch.linspace(1, 5, 200, dtype=torch.float64).unsqueeze(1)
    gram, core = X.mT @ X, X.mT @ (weights * X)
    expected, turn, shifted_there = twins.ritz(gram, core)
    T, small, shifted, spoiled = E.ritz(gram, core)
    values, vectors = torch.linalg.eigh(small)
    rotation, _, found = E.rotate(T, vectors.mT.contiguous(), values, spoiled, 40, False)
    assert torch.equal(shifted, shifted_there)
    assert torch.allclose(found, expected, rtol=1e-12)
    # Vectors have no sign.
    both = (X.float() @ turn).double().mT @ (X.float() @ rotation).double()
    assert (both.abs() - eye(40)).abs().max() < 1e-4


def test_a_matrix_without_a_factor_is_only_scaled(generator):
    """Where not even the shift makes it positive: two columns whose product is larger than their norms allow."""
    G = grams(12, generator)[:2]
    G[1, 11, 0] = G[1, 0, 11] = 3 * G[1].diagonal().max()
    expected, _ = twins.whiten(G)
    T, _, shifted = E.whiten(G)
    assert shifted.tolist() == [False, True]
    assert torch.allclose(T, expected, rtol=1e-12)
    assert torch.equal(E.condition(G)[1], T[1].float())
    assert torch.equal(T[1], T[1].diagonal().diag())


@each_size
def test_threads_and_memory_make_no_difference(width, generator):
    G = grams(width, generator)
    C = torch.randn(len(G), width, width, dtype=torch.float64, generator=generator)
    for op, arguments in ((E.whiten, (G,)), (E.condition, (G,)), (E.ritz, (G, C))):
        first, second = (op(*arguments, **way) for way in WAYS)
        pairs = [(first, second)] if isinstance(first, Tensor) else zip(first, second, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_layer_is_nobody_elses_business(generator):
    """Every layer alone gives the bits it gives beside one that is not finite."""
    G = grams(33, generator)
    C = torch.randn(len(G), 33, 33, dtype=torch.float64, generator=generator)
    C[4, 3, 3] = math.nan
    together = E.ritz(G, C)
    for i in range(len(G)):
        alone = E.ritz(G[i : i + 1], C[i : i + 1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))


@each_size
def test_shared_memory_is_what_the_kernels_say(width):
    """The formulas at the top of their files, which launches repeat; the code asks for what these functions give."""
    packed, odd = width * (width + 1) // 2, width | 1
    most = {
        "flexlora_whiten": (10 * width + 8, packed),
        "flexlora_condition": (10 * width + 8, packed),
        "flexlora_ritz": (26 * width + 8, 2 * packed),
        "flexlora_rotate": (64 * odd, 0),
        "flexlora_root": (12 * width + 16, packed),
        "flexlora_gram64": (5632, 0),
        "flexlora_apply_right": (32 * ((width + 3) // 8 * 8 + 4) + 2688, 0),
        "flexlora_scale": (288, 0),
        "flexlora_energy": (288, 0),
        "flexlora_jacobi_eigh": (3 * width, width * odd),
        "flexlora_jacobi_svd": (3 * width, 2 * width * odd),
    }
    assert E.shared_bytes(width, workspace=True) == {name: 8 * fixed for name, (fixed, _) in most.items()}
    assert E.shared_bytes(width, workspace=False) == {name: 8 * sum(parts) for name, parts in most.items()}


def test_no_layers():
    nothing = torch.empty(0, 5, 5, dtype=torch.float64)
    assert [x.shape for x in E.whiten(nothing)] == [(0, 5, 5), (0, 5, 5), (0,)]
    assert E.condition(nothing).shape == (0, 5, 5)
    assert E.ritz(nothing, nothing)[1].shape == (0, 5, 5)


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (torch.zeros(1, 3, 4, dtype=torch.float64), r"\[1, 3, 4\]"),
        (torch.zeros(1, 257, 257, dtype=torch.float64), "257"),
        (torch.zeros(1, 3, 3), "Float"),
        (torch.zeros(1, 3, 3, dtype=torch.float64).expand(2, 3, 3), "contiguous"),
    ],
)
def test_what_does_not_fit_is_named(gram, words):
    with pytest.raises(ValueError, match=words):
        E.whiten(gram)
