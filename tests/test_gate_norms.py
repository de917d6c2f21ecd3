"""The quick bound of ‖s·B·A‖_F: never below the norm, close to it, and no number where a factor has none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlora_fast import values
from flexlora_fast.gate import RoundPolicy, norms
from tests import rounds

SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 1, 7),
    (1, 29, 4, 12),
    (1, 3, 16, 5),
    (3, 10, 2, 7),
    (1, 4096, 16, 300),
    (1, 2, 3, 50_000),
]


def exact(A: torch.Tensor, B: torch.Tensor, scale: float) -> float:
    return abs(scale) * float((B.double() @ A.double()).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound_is_above_and_close(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    e, m, r, n = shape
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, -2.5, 0.0, 1e-3):
        A = torch.randn(e, r, n, generator=generator).to(dtype)
        B = torch.randn(e, m, r, generator=generator).to(dtype)
        bound, norm = norms._quick(A, B, scale), exact(A, B, scale)
        assert norm <= bound <= 1.05 * norm + 1e-30


@given(st.integers(-30, 30), st.integers(-30, 30), st.integers(0, 2**31), st.booleans())
def test_it_is_never_below_at_any_magnitude(a: int, b: int, seed: int, cancels: bool) -> None:
    """Also where B·A all but vanishes, and where squares leave float32."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(1, 4, 9, generator=generator, dtype=torch.float64)
    B = torch.randn(1, 7, 4, generator=generator, dtype=torch.float64)
    if cancels:
        A[0, 1], B[0, :, 1] = A[0, 0], -B[0, :, 0]
        A[0, 2:], B[0, :, 2:] = A[0, 2:] * 1e-7, B[0, :, 2:] * 1e-7
    A, B = (A * 10.0**a).float(), (B * 10.0**b).float()
    bound = norms._quick(A, B, 2.0)
    assert not bound < values.SAFE or exact(A, B, 2.0) <= bound


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("which", ["A", "B"])
def test_what_is_no_number_is_no_bound(which: str, bad: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        A, B = torch.ones(1, 2, 5, dtype=dtype), torch.ones(1, 3, 2, dtype=dtype)
        (A if which == "A" else B)[0, 1, 1] = bad
        for other in (1.0, 0.0):
            (B if which == "A" else A).fill_(other)
            assert not norms._quick(A, B, 1.0) < values.SAFE


@pytest.mark.parametrize("model", ["mixed", "weird"])
def test_honest_layers_take_the_quick_way(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = rounds.client("a", model)
    monkeypatch.setattr(norms, "update_norm", lambda _: pytest.fail("the slow way"))
    largest = max(float(c.adapter().delta(layer).norm()) for layer in c.layers)
    policy = RoundPolicy.from_adapter(c.adapter(), ranks=(4,), max_layer_norm=1.01 * largest)
    policy.check(c.adapter(), client="a")
