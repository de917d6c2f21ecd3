"""Each method against a dense float64 statement of its published formula, and its traits against what it does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, OptionError
from flexlora_fast.factors import SPLITS
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.methods import METHODS, Base, Contribution, Method, get
from flexlora_fast.methods.averages import update_norm
from flexlora_fast.methods.florist import FLoRIST
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


def solved(stack: Stack, rank: int) -> Factorization:
    return solve(stack, rank, solver="svd")


def product(base: Base) -> np.ndarray:
    return functools.reduce(torch.matmul, [X.double() for X in base.factors]).numpy()


def over_one_A(given: Sequence[Contribution]) -> list[Contribution]:
    A = torch.randn(given[0].A.shape[0], 20, 9, generator=torch.Generator().manual_seed(7))
    return [dataclasses.replace(c, A=A[:, : c.rank]) for c in given]


def fitted(method: str, given: list[Contribution]) -> list[Contribution]:
    """As the method takes them: with one A, of equal ranks."""
    if method == "ffa-lora":
        return over_one_A(given)
    return given if get(method).mixed else contributions([3] * len(given), batch=given[0].A.shape[0])


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

    def test_flora(self, ranks: tuple[int, ...], batch: int) -> None:
        """Wang et al. 2024: the stack [w·s·B]·[A], all of which goes into the frozen weight."""
        given = contributions(ranks, batch=batch)
        expected = sum(c.weight * delta(c) for c in given)
        stack = Stack(get("flora").blocks(given), 14, 9, batch)
        base = get("flora").base(given, stack, solved)
        assert base is not None and base.error == 0
        assert len(base.factors) == (2 if sum(ranks) * (14 + 9) < 14 * 9 else 1)
        np.testing.assert_allclose(product(base), expected, atol=1e-6 * np.linalg.norm(expected))

    def test_ffa_lora(self, ranks: tuple[int, ...], batch: int) -> None:
        """Sun et al. 2024: ΔW = (Σ w·s·B)·A, where all have slices of one A."""
        given = over_one_A(contributions(ranks, batch=batch))
        (block,) = get("ffa-lora").blocks(given)
        expected = sum(c.weight * delta(c) for c in given)
        np.testing.assert_allclose(dense([block]), expected, atol=1e-6 * np.linalg.norm(expected))
        widest = max(given, key=lambda c: c.rank)
        assert torch.equal(block.A, widest.A)

    def test_fedex_lora(self, ranks: tuple[int, ...], batch: int) -> None:
        """Singhal et al. 2025: B̄·Ā of the adapters, and Σ w·s·B·A − B̄·Ā into the frozen weight."""
        given = contributions((max(ranks),) * len(ranks), batch=batch)
        whole = sum(c.weight * delta(c) for c in given)
        averaged = dense(get("fedit").blocks(given))
        stack = Stack(get("fedex-lora").blocks(given), 14, 9, batch)
        B, A = get("fedex-lora").averages(given, stack)
        base = get("fedex-lora").base(given, stack, solved)
        assert base is not None
        norm = np.linalg.norm(whole)
        np.testing.assert_allclose((B.double() @ A.double()).numpy(), averaged, atol=1e-6 * norm)
        np.testing.assert_allclose(product(base), whole - averaged, atol=1e-5 * norm)
        np.testing.assert_allclose(dense(stack.blocks), whole, atol=1e-6 * norm)
        cut = get("fedex-lora:residual=2").base(given, stack, solved)
        assert cut is not None
        S = np.linalg.svd(whole - averaged, compute_uv=False)
        assert cut.error == pytest.approx(np.sqrt((S[:, 2:] ** 2).sum()), rel=1e-4, abs=1e-5 * norm)
        assert np.linalg.norm(product(cut) - (whole - averaged)) == pytest.approx(cut.error, rel=1e-4, abs=1e-5 * norm)

    def test_raflora(self, ranks: tuple[int, ...], batch: int) -> None:
        """arXiv 2602.13486: rank slice [l, h) averaged over the clients with r ≥ h."""
        given = contributions(ranks, batch=batch)
        expected, low = np.zeros((batch, 14, 9)), 0
        for high in sorted(set(ranks)):
            having = [c for c in given if c.rank >= high]
            for c in having:
                part = c.B[:, :, low:high].double() @ c.A[:, low:high].double()
                expected += c.weight / sum(x.weight for x in having) * c.scale * part.numpy()
            low = high
        np.testing.assert_allclose(dense(get("raflora").blocks(given)), expected, atol=1e-12)

    @pytest.mark.parametrize("tau", [0.3, 0.9, 1.0])
    def test_florist(self, ranks: tuple[int, ...], batch: int, tau: float) -> None:
        """Ramesh et al. 2026: FlexLoRA's ΔW, and the fewest columns that hold τ of its energy."""
        given, method = contributions(ranks, batch=batch), FLoRIST(tau)
        whole = sum(c.weight * delta(c) for c in given)
        np.testing.assert_allclose(dense(method.blocks(given)), whole, atol=1e-12)
        held = np.cumsum((np.linalg.svd(whole, compute_uv=False) ** 2).sum(axis=0)) / (whole**2).sum()
        f = solved(Stack(method.blocks(given), 14, 9, batch), 9)
        limit = method.limit(f)
        if tau == 1:  # of a sum's last columns, rounding decides
            assert limit is None or held[limit - 1] >= 1 - 1e-9
            return
        assert limit == int(np.argmax(held >= tau)) + 1
        assert method.limit(dataclasses.replace(f, S=f.S[:, :1])) == (1 if held[0] >= tau else None)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_registered_as_it_says(self, method: str) -> None:
        made = get(method)
        assert made.name == method == str(made) and len(made.summary) > 20
        assert len(made.use) > 20 and "20" in made.source
        assert made.output in ("svd", "slice", "fresh") and set(made.trains) <= {"A", "B"}
        assert get(made) is made
        assert not made.merges or "merge_into" in made.clients
        assert made.merges or made.output != "fresh"

    def test_blocks_fit_a_stack_and_inputs_stay(self, method: str) -> None:
        given = fitted(method, contributions((1, 4, 2), batch=2))
        before = [(c.A.clone(), c.B.clone()) for c in given]
        blocks = get(method).blocks(given)
        stack = Stack(blocks, 14, 9, 2)
        assert stack.d.dtype == torch.float64 and (len(blocks) == 1) == (not get(method).stacked)
        assert all(torch.equal(c.A, a) and torch.equal(c.B, b) for c, (a, b) in zip(given, before, strict=True))

    def test_one_client_gets_its_own_update(self, method: str) -> None:
        (c,) = contributions((3,))
        np.testing.assert_allclose(dense(get(method).blocks([c])), delta(c), rtol=1e-5, atol=1e-5)

    def test_zero_updates_are_no_division_by_zero(self, method: str) -> None:
        given = fitted(method, contributions((2, 3)))
        given = [Contribution(c.client, c.A, c.B * 0, c.scale, c.weight) for c in given]
        assert not dense(get(method).blocks(given)).any()

    def test_the_oracle_agrees(self, method: str) -> None:
        """The statement that the whole contract suite is checked against is the one checked here."""
        clients: list[Client] = [rounds.client(f"c{i}", FC, rank=1 + i, alpha=i - 2.5, weight=1 + i) for i in range(3)]
        clients = rounds.fitted(method, clients)
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


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("florist:tau=0", "florist: tau is 0; give a number > 0 and ≤ 1"),
        ("florist:tau=1.5", "tau is 1.5"),
        ("florist:tau=half", "tau is 'half'"),
        ("florist:tau=nan", "tau is nan"),
        ("florist:gamma=1", "method 'florist' has no setting 'gamma=1'; it has tau"),
        ("fedex-lora:residual=0", "fedex-lora: residual is 0; give an integer ≥ 1, or None"),
        ("fedex-lora:residual=2.5", "residual is 2.5"),
        ("flexlora:tau=1", "method 'flexlora' has no setting 'tau=1'; it has none"),
    ],
)
def test_bad_settings(name: str, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        get(name)


@pytest.mark.parametrize("name", ["florist:tau=0.95", "fedex-lora:residual=3"])
def test_settings_have_a_name(name: str) -> None:
    made = get(name)
    assert str(made) == name and get(str(made)) == made
    clients = [rounds.client(f"c{i}", FC, rank=2) for i in range(2)]
    assert ff.aggregate([c.adapter() for c in clients], method=name).method == name


def test_ffa_lora_refuses_another_A_by_client_and_layer() -> None:
    """The one who differs from most, whatever its rank; the round goes on without it."""
    clients = rounds.fitted("ffa-lora", [rounds.client(f"c{i}", FC, rank=2 + i) for i in range(4)])
    for i in (0, 3):
        off = clients[i].mapped(lambda _, A, B: (A + torch.eye(*A.shape[1:]) * 1e-4, B))
        agg = ff.Aggregator(method="ffa-lora")
        for c in [*clients[:i], off, *clients[i + 1 :]]:
            agg.add(c.adapter(), client=c.name)
        message = f"client 'c{i}', layer 'fc': ffa-lora averages B over one frozen A, and this one's "
        with pytest.raises(IncompatibleAdapterError, match=message) as caught:
            agg.finish()
        assert caught.value.client == f"c{i}" and "differs from those of 3 of 3 others" in str(caught.value)
        assert [record.name for record in agg.finish().clients] == [c.name for c in clients if c.name != f"c{i}"]


def test_ffa_lora_hands_out_the_A_that_it_got() -> None:
    clients = rounds.fitted("ffa-lora", [rounds.client(f"c{i}", FC, rank=2 + i) for i in range(3)])
    clients[0] = clients[0].mapped(lambda _, A, B: (A.bfloat16(), B.bfloat16()))  # its rounding is no other A
    update = ff.aggregate([c.adapter() for c in clients], method="ffa-lora")
    for split in SPLITS:
        for c in clients:
            assert torch.equal(update.adapter(client=c.name, split=split).factors("fc")[0], c.factors["fc"][0])


def test_fedex_lora_refuses_unequal_ranks_by_layer() -> None:
    clients = [rounds.client(f"c{i}", FC, rank=2 + i) for i in range(2)]
    with pytest.raises(OptionError, match=r"layer 'fc': fedex-lora averages factors of equal ranks, and 'c1' has 3"):
        ff.aggregate([c.adapter() for c in clients], method="fedex-lora")


def test_florist_gives_the_smaller_of_two_ranks() -> None:
    S = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.1], dtype=torch.float64)
    clients = rounds.with_spectrum(S, 14, 9, 2)
    update = ff.aggregate([c.adapter() for c in clients], method="florist", rank=6, tol=0)
    assert update["fc"].limit == 2 and update["fc"].rank == 2  # 20 of 21.3
    assert update.adapter(client="s0").rank("fc") == 2 and update.adapter(rank=1).rank("fc") == 1
    assert update["fc"].error(6) == pytest.approx(float(S[2:].norm()), rel=1e-4)
    thorough = ff.aggregate([c.adapter() for c in clients], method="florist:tau=0.999", rank=6, tol=0)
    assert thorough["fc"].limit == 5 and thorough.adapter(client="s0").rank("fc") == 3
    first = [c.mapped(lambda _, A, B: (A, 0 * B)) for c in clients]
    assert ff.aggregate([c.adapter() for c in first], method="florist")["fc"].limit is None


def test_flora_begins_anew_by_seed_client_and_layer() -> None:
    clients = [rounds.client(f"c{i}", FC, rank=2 + i) for i in range(3)]
    given: list[Any] = [c.adapter() for c in clients]
    update, other = (ff.aggregate(given, method="flora", seed=seed) for seed in (0, 1))
    A, B = update.adapter(client="c2").factors("fc")
    assert not B.any() and float(A.std()) == pytest.approx((3 * 9) ** -0.5, rel=0.2)
    assert torch.equal(A, update.adapter(client="c2").factors("fc")[0])
    assert not torch.equal(A, other.adapter(client="c2").factors("fc")[0])
    assert not torch.equal(A[:, :2], update.adapter(client="c0").factors("fc")[0])
    exact = ff.aggregate(given, rank=9, tol=0)
    torch.testing.assert_close(update.base_delta("fc"), exact.delta("fc"), rtol=1e-5, atol=1e-5)
    assert exact.base_delta("fc") is None


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
    with pytest.raises(OptionError, match="method 'first' is not one of flexlora, fedit, hetlora"):
        get("first")


def test_florist_merged_from_edges_cuts_as_the_flat_round_does() -> None:
    """Edges keep few columns each; of one round of all, tau asks for more than any of them has."""
    S = torch.tensor([4.0, 4.0, 0.1, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    clients = []
    for name in ("a", "b", "c"):
        U, V = (torch.linalg.qr(torch.randn(side, 4, generator=generator, dtype=torch.float64))[0] for side in (40, 30))
        state = {
            "base_model.model.fc.lora_A.weight": V.mT.float().contiguous(),
            "base_model.model.fc.lora_B.weight": (U * S).float(),
        }
        config = {"r": 4, "lora_alpha": 4, "target_modules": ["fc"]}
        clients.append(ff.Adapter.from_state_dict(state, config, client=name))
    edges = [ff.aggregate([c], method="florist") for c in clients]
    assert [edge["fc"].limit for edge in edges] == [2, 2, 2]
    merged = ff.merge(edges)
    flat = ff.aggregate(clients, method="florist")
    for client in "abc":
        assert merged.adapter(client=client).rank("fc") == flat.adapter(client=client).rank("fc") == 4
    every, flat = ff.merge(edges, rank=12), ff.aggregate(clients, method="florist", rank=12)
    assert every["fc"].limit == flat["fc"].limit == 5


@pytest.mark.parametrize("method", [None, FLoRIST, 3])
def test_what_is_no_method_is_told(method: object) -> None:
    with pytest.raises(OptionError, match=r"method is .*; give a name \(flexlora, "):
        ff.aggregate([rounds.client("c", FC, rank=2).adapter()], method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", ['"x"', "-3", "0", "1.5", "true", "1e999", "[" * 100_000])
def test_a_limit_that_is_none_is_damage(limit: str, tmp_path: Path) -> None:
    update = ff.aggregate([rounds.client("c", FC, rank=3).adapter()], method="florist:tau=0.5")
    path = update.save(tmp_path / "update")
    with safe_open(path, "pt") as file:
        about = file.metadata()
    told = about["update"].replace(f'"limit": {update["fc"].limit}', f'"limit": {limit}')
    assert told != about["update"]
    save_file(load_file(path), path, about | {"update": told})
    with pytest.raises(AdapterError, match="is damaged"):
        ff.GlobalUpdate.load(path)


@pytest.mark.parametrize("method", ["flora", "fedex-lora", "ffa-lora", "florist:tau=0.5"])
def test_a_sum_of_one_update_is_all_of_it_in_an_adapter(method: str) -> None:
    clients = rounds.fitted(method.partition(":")[0], [rounds.client(f"c{i}", FC, rank=3) for i in range(2)])
    update = ff.aggregate([c.adapter() for c in clients], method=method)
    whole = ff.combine([(1.0, update)], rank=9)
    assert not whole["fc"].merges and whole["fc"].limit is None and not whole["fc"].frozen
    assert torch.allclose(whole.adapter(rank=9).delta("fc"), update.delta("fc"), atol=1e-5)
    assert torch.allclose(2 * whole.delta("fc"), ff.combine([(2.0, update)], rank=9).delta("fc"), atol=1e-5)


def test_ffa_lora_takes_one_A_in_both_half_precisions() -> None:
    generator = torch.Generator().manual_seed(0)
    A = (torch.rand(1, 4, 9, generator=generator) - 0.5) / 32
    clients = [rounds.client(f"c{i}", FC, rank=4) for i in range(2)]
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        clients[i] = clients[i].mapped(lambda _, _A, B, dtype=dtype: (A.to(dtype), B.to(dtype)))
    assert ff.aggregate([c.adapter() for c in clients], method="ffa-lora")["fc"].frozen


def test_a_setting_given_twice_is_told() -> None:
    with pytest.raises(OptionError, match="'florist' is given 'tau' twice; give it once"):
        get("florist:tau=0.5,tau=0.9")


@pytest.mark.parametrize("method", ["raflora", "hetlora", "flexlora", "fedit"])
@pytest.mark.parametrize("tiny", [1e-310, 1e-30])
def test_the_tiniest_weights_are_weights(method: str, tiny: float) -> None:
    clients = [rounds.client(f"c{i}", FC, rank=2 + 2 * i).adapter() for i in range(2)]
    update = ff.aggregate(clients, [1.0, tiny], method=method)
    alone = ff.aggregate(clients[:1], method=method)
    first = update.delta("fc") if method != "raflora" else ff.aggregate(clients, [1.0, 1e-9], method=method).delta("fc")
    assert torch.allclose(update.delta("fc"), first, atol=1e-5)
    if method != "raflora":  # which gives columns that one client alone has in full
        assert torch.allclose(first, alone.delta("fc"), atol=1e-5)


def test_what_fedex_lora_cuts_off_is_bounded_where_it_is_estimated() -> None:
    generator = torch.Generator().manual_seed(0)
    clients = []
    for i in range(12):
        state = {
            "base_model.model.fc.lora_A.weight": torch.randn(8, 160, generator=generator),
            "base_model.model.fc.lora_B.weight": torch.randn(160, 8, generator=generator),
        }
        config = {"r": 8, "lora_alpha": 8, "target_modules": ["fc"]}
        clients.append(ff.Adapter.from_state_dict(state, config, client=f"c{i}"))
    exact = sum(c.delta("fc").double() for c in clients) / len(clients)
    for seed in range(4):
        update = ff.aggregate(
            clients, method="fedex-lora:residual=8", solver="factored", certificate="estimate", seed=seed
        )
        off = float((update.delta("fc").double() - exact).norm())
        assert off <= update["fc"].error(8) <= 1.5 * off


def test_ffa_lora_takes_back_what_it_handed_out_of_float64() -> None:
    clients = [rounds.client(f"c{i}", FC, rank=3) for i in range(2)]
    clients = rounds.fitted("ffa-lora", [c.mapped(lambda _, A, B: (A.double() / 3, B.double())) for c in clients])
    update = ff.aggregate([c.adapter() for c in clients], method="ffa-lora")
    assert ff.aggregate([update.adapter(client="c0"), clients[1].adapter()], method="ffa-lora")["fc"].frozen
