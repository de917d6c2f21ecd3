"""The noise of private rounds: Gaussian, of the right size, independent, addressed; and secret.

Statistics are of a fixed key, so that nothing here fails by chance. Each bound is one that right noise under a key at
random would miss with a probability of 1e-6 or less.
"""

from __future__ import annotations

import math
import os
from statistics import NormalDist

import numpy as np
import pytest
import torch

from flexlora_fast.layouts import LayerSpec
from flexlora_fast.privacy import mechanism, noise, solving
from flexlora_fast.privacy.mechanism import Mechanism
from flexlora_fast.privacy.noise import Noise
from tests import private
from tests.private import KEY, fixed_key

__all__ = ["fixed_key"]  # the fixture

N = 1 << 20
SIGMAS = 5.0  # |z| beyond it: 6e-7


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return np.sort(Noise(KEY, "layer/0/fc").normal(0, N).numpy())


def test_mean_and_variance(sample: np.ndarray) -> None:
    assert abs(sample.mean()) < SIGMAS / math.sqrt(N)
    assert abs(sample.var() - 1) < SIGMAS * math.sqrt(2 / N)  # chi-square of N degrees, near normal
    assert abs((sample**3).mean()) < SIGMAS * math.sqrt(15 / N)
    assert abs((sample**4).mean() - 3) < SIGMAS * math.sqrt(96 / N)


def test_distribution_function(sample: np.ndarray) -> None:
    """Kolmogorov-Smirnov: P(√N·D > 2.7) is 2·exp(−2·2.7²) = 9e-7."""
    expected = torch.special.ndtr(torch.from_numpy(sample)).numpy()
    steps = np.arange(N + 1) / N
    D = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert math.sqrt(N) * D < 2.7


@pytest.mark.parametrize("beyond", [2.0, 3.0, 3.5, 4.0])
def test_tails(sample: np.ndarray, beyond: float) -> None:
    for count in ((sample > beyond).sum(), (sample < -beyond).sum()):
        expected = N * (1 - NormalDist().cdf(beyond))
        assert abs(count - expected) < SIGMAS * math.sqrt(expected) + 1


def test_the_tail_is_cut_where_the_docstring_says(monkeypatch) -> None:
    words = torch.tensor([0, 1, -1, -2, 1 << 62], dtype=torch.int64)
    monkeypatch.setattr(Noise, "_words", lambda self, start, count: words)
    values = Noise(KEY, "x").normal(0, 5)
    least = NormalDist().inv_cdf(2.0**-65)
    assert values[:2].tolist() == pytest.approx([-least, least]) or values[:2].tolist() == pytest.approx(
        [least, -least]
    )
    assert 9.1 < -least < 9.2 and values.abs().max() <= -least + 1e-9
    assert values[2:4].abs().max() < 1e-9  # all ones: the middle, of either sign
    assert 2 * 2.0**-64 < 2e-19  # what a Gaussian has beyond, at the most


def test_independent_of_neighbours_names_and_keys() -> None:
    x = Noise(KEY, "layer/0/fc").normal(0, N).numpy()
    others = [
        np.roll(x, 1),
        np.roll(x, 2),
        np.roll(x, 4096),
        Noise(KEY, "layer/1/fc").normal(0, N).numpy(),
        Noise(KEY, "layer/0/fd").normal(0, N).numpy(),
        Noise(KEY, "bias/fc").normal(0, N).numpy(),
        Noise(bytes(32), "layer/0/fc").normal(0, N).numpy(),
        x[::-1],
    ]
    for other in others:
        for a, b in ((x, other), (x**2 - 1, other**2 - 1)):
            assert abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / math.sqrt(N) * 1.5  # reversed, each pair comes twice


def test_entries_are_addressed() -> None:
    source = Noise(KEY, "x")
    whole = source.normal(0, 200_003)
    for start, count in ((0, 1), (1, 1), (7, 65_536), (65_535, 3), (131_073, 68_930), (5, 0)):
        assert torch.equal(source.normal(start, count), whole[start : start + count])
    far = source.normal(2**40 + 1, 3)
    assert torch.equal(far, source.normal(2**40, 4)[1:]) and far.unique().numel() == 3


def test_keys_are_fresh_and_of_the_operating_system(monkeypatch) -> None:
    assert noise.fresh_key() != noise.fresh_key() and len(noise.fresh_key()) == 32
    monkeypatch.setattr(os, "urandom", lambda count: b"\x01" * count)
    assert noise.fresh_key() == b"\x01" * 32
    with pytest.raises(ValueError, match="4 bytes"):
        Noise(b"abcd", "x")
    assert "01" not in repr(Noise(noise.fresh_key(), "x"))


# -- as it is released ---


def spec(m: int, n: int, experts: int = 1) -> LayerSpec:
    layer = private.policy(model=[private.Layer("fc", m, n)]).specs["fc"]
    return layer if experts == 1 else LayerSpec(**{**vars(layer), "kind": "moe", "experts": experts})


def opened(model: list[private.Layer], **changes: object) -> mechanism.Release:
    return Mechanism(private.privacy(**changes), private.policy(model=model), None).open()


def test_what_is_released_has_the_variance_of_the_formula(fixed_key: None) -> None:
    """σ = z·C/D on every entry, to chi-square bounds; and multiples of a grid of σ·D/512 to σ·D/256, over D."""
    m, n, clip, z, D = 701, 1003, 0.3, 1.7, 7.0
    release = opened([private.Layer("fc", m, n)], clip=clip, noise_multiplier=z, denominator=D)
    X = solving.noised_matrix(release, spec(m, n), [], torch.device("cpu"))[0].double().numpy()
    sigma = z * clip / D
    assert abs(X.mean()) < SIGMAS * sigma / math.sqrt(X.size)
    assert abs(X.var() / sigma**2 - 1) < SIGMAS * math.sqrt(2 / X.size) + 2e-6  # and the grid's
    for side in (X.mean(axis=0), X.mean(axis=1)):  # no row or column is left out
        assert abs(side).max() < 6 * sigma / math.sqrt(X.size / side.size)
    grid = 2.0 ** math.floor(math.log2(z * clip / 256))
    assert sigma * D / 512 < grid <= sigma * D / 256
    np.testing.assert_allclose(X * D / grid, np.rint(X * D / grid), atol=2e-4)


def test_layers_experts_and_rounds_have_noise_of_their_own() -> None:
    model = [private.Layer("a", 200, 300), private.Layer("b", 200, 300)]
    one, two = opened(model), opened(model)
    shape = spec(200, 300, experts=2)
    named = [LayerSpec(**{**vars(shape), "name": name}) for name in "ab"]
    matrices = [solving.noised_matrix(r, s, [], torch.device("cpu")) for r in (one, two) for s in named]
    rows = torch.cat(matrices).flatten(1).double()  # (8, 60,000)
    off = (torch.corrcoef(rows) - torch.eye(8, dtype=torch.float64)).abs().max()
    assert off < 6 / math.sqrt(rows.shape[1])  # of 28 pairs; keys are fresh here: 6e-8 of failing by chance


@pytest.mark.parametrize("tile", [1, 3 * 64 * 31, 10**9])
def test_the_order_and_size_of_tiles_change_nothing(fixed_key: None, monkeypatch, tile: int) -> None:
    """Of a matrix with an odd number of columns, whose rows begin inside blocks."""
    clients = private.members(3, [private.Layer("fc", 17, 31)])
    whole = private.aggregate(clients, model=[private.Layer("fc", 17, 31)])
    monkeypatch.setattr(solving, "TILE", tile)
    for solver in ("dense", "factored"):
        again = private.aggregate(clients, model=[private.Layer("fc", 17, 31)], solver=solver)
        torch.testing.assert_close(again.delta("fc"), whole.delta("fc"), atol=1e-5, rtol=0)


def test_products_by_tiles_are_those_of_the_matrix(fixed_key: None, monkeypatch) -> None:
    monkeypatch.setattr(solving, "TILE", 64 * 29 * 5)
    shape, cpu = spec(23, 29, experts=2), torch.device("cpu")
    release = opened([private.Layer("fc", 23, 29)])
    D = solving.noised_matrix(release, shape, [], cpu)
    tiles = solving.Tiles(release, shape, [], cpu)
    assert torch.equal(torch.cat([W for _, _, W in tiles]).view_as(D), D)
    X, Y = torch.randn(2, 29, 4), torch.randn(2, 23, 4)
    torch.testing.assert_close(tiles.apply(X), D @ X, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiles.apply_t(Y), D.mT @ Y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiles.energy(), D.double().square().sum(dim=(1, 2)))
