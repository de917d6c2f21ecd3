"""Random numbers have addresses: the same entry is the same sign wherever, whenever and beside whatever it is drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlora_fast.lowrank.random import signs, stream

KEYS = st.integers(-(2**63), 2**63 - 1)


@given(KEYS, st.integers(1, 70), st.integers(1, 140), st.integers(1, 3))
def test_an_entry_depends_on_its_address_alone(key: int, rows: int, cols: int, batch: int) -> None:
    whole = signs(80, 150, key, batch=4)
    part = signs(rows, cols, key, batch=batch)
    assert part.shape == (batch, rows, cols) and part.dtype == torch.float32
    assert torch.equal(part, whole[:batch, :rows, :cols])


@given(KEYS)
def test_only_signs(key: int) -> None:
    X = signs(3, 67, key, dtype=torch.float64)
    assert X.dtype == torch.float64 and torch.equal(X.abs(), torch.ones_like(X))


def test_threads_and_default_dtype_do_not_show() -> None:
    expected, threads = signs(100, 100, 7), torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        torch.set_default_dtype(torch.float64)
        assert torch.equal(signs(100, 100, 7), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)


def test_known_values() -> None:
    """Saved rounds must be reproducible by later versions: neither keys nor signs may change."""
    key = -9015832379275408006
    assert stream(0, "layer") == key
    known = [[1, 1, -1, -1, -1, -1], [1, 1, 1, -1, 1, 1], [-1, 1, -1, 1, -1, -1]]
    assert signs(3, 6, key)[0].int().tolist() == known


def test_streams_differ_by_seed_and_name() -> None:
    keys = {stream(seed, name) for seed in range(20) for name in ("", "a", "b", "0:a", "model.layers.0.q_proj")}
    assert len(keys) == 100
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert stream(1, "1:x") != stream(11, ":x")


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), stream(0, "fc")])
def test_they_look_independent(key: int) -> None:
    """Means, and the inner products of rows, columns and neighbouring streams, within five standard deviations."""
    n = 512
    X = signs(n, n, key)[0]
    assert X.mean().abs() <= 5 / n
    for M in (X, X.T, X[:, ::2]):
        inner = M @ M.T / M.shape[1] ** 0.5
        inner.fill_diagonal_(0)
        assert inner.abs().max() <= 6 and abs(float(inner.square().mean()) - 1) <= 0.05
    for other in (key ^ 1, key ^ 2**40, (key + 1) % 2**63):
        rows = (X * signs(n, n, other)[0]).sum(dim=1) / n**0.5
        assert rows.abs().max() <= 6
