"""Each method against a dense float64 statement of its published formula, and its traits against what it does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.errors import OptionError
from flexlora_fast.methods import METHODS, Contribution, Method, get
from flexlora_fast.methods.averages import update_norm
from flexlora_fast.stack import Block, Stack
from tests import oracle, rounds
from tests.rounds import Client, Layer

FC = [Layer("fc", 14, 9)]


def contributions(ranks: Sequence[int], seed: int = 0, batch: int = 1) -> list[Contribution]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(ranks), generator=generator, dtype=torch.float64)
    return [
        Contribution(
            f"c{i}",
            torch.randn(batch, r, 9, generator=generator),
            torch.randn(batch, 14, r, generator=generator),
            scale=float(i + 0.5) * (-1) ** i,
            weight=float(w),
        )
        for i, (r, w) in enumerate(zip(ranks, weights / weights.sum(), strict=True))
    ]


def dense(blocks: Sequence[Block]) -> np.ndarray:
    return sum(((b.B.double() * b.d) @ b.A.double()).numpy() for b in blocks)


def delta(c: Contribution) -> np.ndarray:
    return c.scale * (c.B.double() @ c.A.double()).numpy()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ranks", [(1,), (2, 2), (1, 4, 2), (8, 1, 16, 3)])
class TestFormulas:
    def test_flexlora(self, ranks: tuple[int, ...], batch: int) -> None:
        """Bai et al. 2024, equation 2: ΔW = Σ w·s·B·A."""
        given = contributions(ranks, batch=batch)
        np.testing.assert_allclose(
            dense(get("flexlora").blocks(given)), sum(c.weight * delta(c) for c in given), atol=1e-12
        )

    def test_fedit(self, ranks: tuple[int, ...], batch: int) -> None:
        """Zhang et al. 2023 with zero padding: column j of B̄ and row j of Ā average those that the clients have."""
        given = contributions(ranks, batch=batch)
        expected = np.zeros((batch, 14, 9))
        for j in range(max(ranks)):
            having = [c for c in given if j < c.rank]
            B = sum(c.weight * abs(c.scale) ** 0.5 * np.sign(c.scale) * c.B[:, :, j].double().numpy() for c in having)
            A = sum(c.weight * abs(c.scale) ** 0.5 * c.A[:, j].double().numpy() for c in having)
            expected += B[:, :, None] * A[:, None]
        (block,) = get("fedit").blocks(given)
        np.testing.assert_allclose(dense([block]), expected, atol=1e-6 * np.linalg.norm(expected))
        assert block.B.dtype == torch.float32 and torch.equal(block.d, torch.ones_like(block.d))

    def test_hetlora(self, ranks: tuple[int, ...], batch: int) -> None:
        """Cho et al. 2024: FedIT's average with weights ∝ w·‖ΔW‖_F (for equal w, theirs)."""
        given = contributions(ranks, batch=batch)
        norms = np.array([c.weight * np.linalg.norm(delta(c)) for c in given])
        moved = [
            Contribution(c.client, c.A, c.B, c.scale, float(w)) for c, w in zip(given, norms / norms.sum(), strict=True)
        ]
        expected = dense(get("fedit").blocks(moved))
        got = dense(get("hetlora").blocks(given))
        np.testing.assert_allclose(got, expected, atol=1e-6 * np.linalg.norm(expected))


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_registered_as_it_says(self, method: str) -> None:
        made = get(method)
        assert made.name == method and len(made.summary) > 20 and made.output in ("svd", "slice")
        assert get(made) is made

    def test_blocks_fit_a_stack_and_inputs_stay(self, method: str) -> None:
        given = contributions((1, 4, 2), batch=2)
        before = [(c.A.clone(), c.B.clone()) for c in given]
        blocks = get(method).blocks(given)
        stack = Stack(blocks, 14, 9, 2)
        assert stack.d.dtype == torch.float64 and (len(blocks) == 1 or get(method).output == "svd")
        assert all(torch.equal(c.A, a) and torch.equal(c.B, b) for c, (a, b) in zip(given, before, strict=True))

    def test_one_client_gets_its_own_update(self, method: str) -> None:
        (c,) = contributions((3,))
        np.testing.assert_allclose(dense(get(method).blocks([c])), delta(c), rtol=1e-5, atol=1e-5)

    def test_zero_updates_are_no_division_by_zero(self, method: str) -> None:
        given = [Contribution(c.client, c.A, c.B * 0, c.scale, c.weight) for c in contributions((2, 3))]
        assert not dense(get(method).blocks(given)).any()

    def test_the_oracle_agrees(self, method: str) -> None:
        """The statement that the whole contract suite is checked against is the one checked here."""
        clients: list[Client] = [rounds.client(f"c{i}", FC, rank=1 + i, alpha=i - 2.5, weight=1 + i) for i in range(3)]
        shares = oracle.shares(clients)
        given = [
            Contribution(c.name, *c.factors["fc"], c.scales["fc"], w) for c, w in zip(clients, shares, strict=True)
        ]
        truth = oracle.truth(method, clients, "fc").whole
        np.testing.assert_allclose(dense(get(method).blocks(given)), truth, atol=1e-6 * np.linalg.norm(truth))


def test_fedit_of_equal_clients_is_exact_and_of_others_is_biased() -> None:
    """What FlexLoRA was proposed against: cross terms B_i·A_j, which vanish for equal clients only."""
    same = [rounds.client("a", FC, rank=2)] * 3
    np.testing.assert_allclose(
        oracle.truth("fedit", same, "fc").whole, oracle.truth("flexlora", same, "fc").whole, atol=1e-12
    )
    other = [rounds.client(x, FC, rank=2) for x in "abc"]
    biased, exact = (oracle.truth(x, other, "fc").whole for x in ("fedit", "flexlora"))
    assert np.linalg.norm(biased - exact) > 0.1 * np.linalg.norm(exact)


def test_norms_of_updates() -> None:
    for c in contributions((1, 5, 12), batch=3):
        assert update_norm(c) == pytest.approx(float(np.linalg.norm(delta(c))), rel=1e-6)
    c = contributions((2,))[0]
    assert update_norm(Contribution("", c.A * 1e30, c.B * 1e-30, 1.0, 1.0)) == pytest.approx(
        float((c.B.double() @ c.A.double()).norm()), rel=1e-5
    )


def test_a_method_of_ones_own() -> None:
    """A subclass is all that a new method takes: here one that trusts the first client only."""

    class First(Method):
        name, summary = "first", "the first client's update, whatever the others say"

        def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
            c = contributions[0]
            return [Block(c.B, c.A, torch.full((c.rank,), c.scale, dtype=torch.float64))]

    clients = [rounds.client(f"c{i}", FC, rank=2 + i) for i in range(2)]
    update = ff.aggregate([c.adapter() for c in clients], method=First())
    assert update.method == "first"
    torch.testing.assert_close(update.delta("fc"), clients[0].adapter().delta("fc"), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Method must implement blocks"):
        Method().blocks([])
    with pytest.raises(OptionError, match="'first' is not one of flexlora, fedit, hetlora"):
        get("first")
