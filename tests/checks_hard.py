"""Aggregator checks on hard inputs: first rounds, odd shapes, bad conditioning, extreme sizes, bad clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast.errors import AdapterError, FlexLoRAError
from tests import checks, oracle, rounds
from tests.checks import Case, assert_best, assert_identical, assert_right
from tests.rounds import Client, Layer

SPLITS = ("B", "balanced", "A")
FC = [Layer("fc", 29, 17)]


def zero_b(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A, torch.zeros_like(B)


def check_first_round(case: Case) -> None:
    """B = 0 everywhere, as LoRA starts: everything finite, S = 0, and every adapter can still learn."""
    clients = [c.mapped(zero_b) for c in case.round()]
    update = case.aggregate(clients, rank=1000)
    for layer in update.layers:
        about = update[layer]
        assert about.norm == 0 and about.error(1) == 0 and about.energy_kept(1) == 1
        assert not about.S.any() and not update.delta(layer).any()
    for split in SPLITS:
        assert_trainable(update.adapter(client="c0", split=split))
        assert_trainable(update.adapter(rank=40, split=split))


def assert_trainable(adapter: ff.Adapter) -> None:
    """No column has zeros in both factors: such a pair has no gradient."""
    for layer in adapter.layers:
        A, B = adapter.factors(layer)
        assert torch.isfinite(A).all() and torch.isfinite(B).all()
        dead = (A.float().norm(dim=2) < 1e-6) & (B.float().norm(dim=1) < 1e-6)
        assert not dead.any(), f"{layer}: columns {dead.nonzero().tolist()} can never learn"


def check_one_zero_client(case: Case) -> None:
    clients = case.round()
    clients[2] = clients[2].mapped(zero_b)
    update = case.aggregate(clients, rank=1000)
    assert_right(case, update, clients)
    for split in SPLITS:
        assert_trainable(update.adapter(rank=40, split=split))


def check_one_client(case: Case) -> None:
    clients = case.round()[2:3]
    update = case.aggregate(clients)
    assert_right(case, update, clients)
    adapter = update.adapter(client="c2")
    for layer in adapter.layers:
        truth = case.truth(clients, layer)
        off = np.linalg.norm(checks.effect(update, adapter, layer) - truth.at(adapter.rank(layer)))
        assert off <= checks.FLOAT32_FLOOR * truth.norm


def check_duplicated_clients(case: Case) -> None:
    """The same factors again and again: both Grams are singular."""
    one = case.round()[2]
    clients = [one.but(name=f"twin-{i}") for i in range(6)]
    update = case.aggregate(clients, rank=1000)
    assert_right(case, update, clients)
    checks_of_vectors(update)


def checks_of_vectors(update: ff.GlobalUpdate) -> None:
    """Orthonormal, also the columns that carry nothing."""
    for layer in update.layers:
        for X in (update[layer].factorization.U.double(), update[layer].factorization.V.double()):
            off = float((X.mT @ X - torch.eye(X.shape[2], device=X.device)).abs().max())
            assert off <= checks.EXACT, f"{layer} by {update[layer].solver}: {off:.1e}"


def check_rank_deficient(case: Case) -> None:
    """Clients share their column space, so ΔW has a rank far below R and most columns hold nothing."""
    basis = torch.randn(29, 2, generator=torch.Generator().manual_seed(3))

    def flatten(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A, (basis @ B[0, :2]).unsqueeze(0)

    clients = [c.mapped(flatten) for c in (rounds.client(f"c{i}", FC, rank=4, weight=i + 1) for i in range(3))]
    update = case.aggregate(clients, rank=12)
    assert_right(case, update, clients)
    checks_of_vectors(update)
    for split in SPLITS:
        assert_trainable(update.adapter(rank=12, split=split))


def check_ill_conditioned(case: Case) -> None:
    """Nearly dependent columns (condition 1e8) in every factor."""

    def squeeze(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        tilt = torch.logspace(0, -8, A.shape[1], dtype=torch.float64)
        B = B.double()
        B = B[:, :, :1] + B * tilt
        return (A.double() * tilt.unsqueeze(1)).float(), B.float()

    clients = [c.mapped(squeeze) for c in (rounds.client(f"c{i}", FC, rank=4 + i) for i in range(3))]
    update = case.aggregate(clients, rank=1000)
    assert_right(case, update, clients)
    checks_of_vectors(update)


def check_badly_scaled_gauge(case: Case) -> None:
    """1e6·B with 1e-6·A and the other way round, in one round; column by column too."""
    clients = case.round()
    sides = [1e6, 1e-6, 1.0, 1e3, 1e-3]
    clients = [c.mapped(lambda _, A, B, g=g: (A / g, B * g)) for c, g in zip(clients, sides, strict=True)]
    uneven = torch.tensor([1e6, 1e-6, 1e4, 1e-4])
    clients[2] = clients[2].mapped(lambda _, A, B: (A / uneven.unsqueeze(1), B * uneven))
    assert_right(case, case.aggregate(clients), clients)


def check_updates_that_cancel(case: Case) -> None:
    """One client sends B, another −B: what is left is zero, to the rounding of the parts."""
    one = rounds.client("plus", FC, rank=4)
    other = one.mapped(lambda _, A, B: (A, -B)).but(name="minus")
    update = case.aggregate([one, other], rank=1000)
    mass = case.truth([one, other], "fc").mass
    assert update["fc"].norm <= 1e-6 * mass
    assert update.delta("fc").norm() <= 1e-6 * mass
    small = rounds.client("small", FC, rank=2)
    clients = [one, other, small]
    update = case.aggregate(clients)
    assert_right(case, update, clients)


def check_ranks_above_the_shape(case: Case) -> None:
    """r > min(m, n) in one client, and R far above it, down to 1×1."""
    layers = [Layer("small", 6, 4), Layer("one", 1, 1), Layer("row", 1, 9), Layer("col", 9, 1)]
    clients = case.fitted([rounds.client(f"c{i}", layers, rank=3 + 4 * i, weight=i + 1) for i in range(3)])
    update = case.aggregate(clients)
    assert_right(case, update, clients)
    for c in clients:
        adapter = update.adapter(client=c.name)
        assert_trainable(adapter)
        for layer in adapter.layers:
            assert_best(update, layer, case.truth(clients, layer), c.rank(layer), checks.effect(update, adapter, layer))


def check_rank_one(case: Case) -> None:
    clients = [rounds.client(f"c{i}", case.model, rank=1, weight=i + 1) for i in range(4)]
    update = case.aggregate(clients)
    assert all(update[layer].rank == 1 for layer in update.layers)
    assert_right(case, update, clients)


def check_magnitudes(case: Case) -> None:
    """‖ΔW‖ from 1e-20 to 1e30, spread evenly or all in one factor, and clients of both in one round."""
    for b, a in ((1e-10, 1e-10), (1e-20, 1.0), (1.0, 1e-20), (1e15, 1.0), (1e15, 1e15), (1e-25, 1e25)):
        clients = [c.mapped(lambda _, A, B, a=a, b=b: (A * a, B * b)) for c in case.round()]
        update = case.aggregate(clients)
        assert_right(case, update, clients)
        for split in SPLITS:
            assert_trainable_or_scaled(update.adapter(rank=3, split=split), update)
    clients[0] = clients[0].mapped(lambda _, A, B: (A / 1e25, B * 1e40**0.5))
    assert_right(case, case.aggregate(clients), clients)


def assert_trainable_or_scaled(adapter: ff.Adapter, update: ff.GlobalUpdate) -> None:
    """Finite, and the product survives float32 in every split."""
    for layer in adapter.layers:
        whole = update.delta(layer, 3)
        base = update.base_delta(layer)
        assert (adapter.delta(layer) + (0 if base is None else base) - whole).norm() <= 1e-5 * whole.norm()


def check_products_below_float32(case: Case) -> None:
    """Factors of 1e-20 on both sides: ΔW ≈ 1e-40 has no float32 entries, but its balanced factors have."""
    clients = [c.mapped(lambda _, A, B: (A * 1e-20, B * 1e-20)) for c in case.round()]
    update = case.aggregate(clients, rank=3)
    if case.traits.merges:  # the frozen weight has no factors
        return
    for layer in update.layers:
        truth = case.truth(clients, layer)
        assert abs(update[layer].norm / truth.norm - 1) <= 1e-5
        A, B = update.adapter(rank=3, alpha=3, split="balanced").factors(layer)
        assert_best(update, layer, truth, 3, oracle.array(B) @ oracle.array(A))


def check_global_torch_settings(case: Case) -> None:
    """Default dtype, gradients and autocast of the caller change nothing."""
    clients = case.round()
    plain = case.aggregate(clients)
    for dtype in (torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(dtype)
            assert_identical(plain, case.aggregate(clients))
            assert plain.adapter(rank=3).factors(plain.layers[0])[0].dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(plain, case.aggregate(clients))
        inside = plain.delta(plain.layers[0])
    assert torch.equal(inside, plain.delta(plain.layers[0]))
    trained = [c.mapped(lambda _, A, B: (A.requires_grad_(), B.requires_grad_())) for c in case.round()]
    update = case.aggregate(trained)
    assert_identical(plain, update)
    assert not update.delta(update.layers[0]).requires_grad


def check_strided_inputs(case: Case) -> None:
    """Transposed and sliced views mean what they show."""

    def view(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A2 = torch.stack([A, -A], dim=-1)[..., 0]
        return A2, B.mT.contiguous().mT

    clients = case.round()
    assert_identical(case.aggregate(clients), case.aggregate([c.mapped(view) for c in clients]))


def check_a_split_client_is_the_same(case: Case) -> None:
    """Half of a client's columns from each of two clients: only the sum of products counts, for exact methods."""
    if not case.traits.gauge_invariant:  # averaging factors adds cross terms: the halves differ from the whole
        whole = rounds.client("w", FC, rank=4, alpha=4)
        halves = halved(whole)
        before, after = (case.truth(x, "fc") for x in ([whole], halves))
        if case.method != "raflora":  # which counts both halves' columns for the first ones
            assert np.linalg.norm(before.at(1) - after.at(1)) > 1e-3 * before.norm
        assert_right(case, case.aggregate(halves), halves)
        return
    clients = [rounds.client("w", FC, rank=4, alpha=4), rounds.client("x", FC, rank=3, weight=2.0)]
    parts = [*halved(clients[0]), clients[1]]
    assert_right(case, case.aggregate(parts, rank=4), clients)


def halved(client: Client) -> Sequence[Client]:
    """Two clients of half the rank, each of half the weight and twice the scale."""
    parts = []
    for i, cut in enumerate((slice(None, 2), slice(2, None))):
        factors = {x: (A[:, cut], B[:, :, cut]) for x, (A, B) in client.factors.items()}
        half = {x: 2 * s for x, s in client.scales.items()}
        config = client.config | {"r": 2, "lora_alpha": client.config["lora_alpha"]}
        parts.append(client.but(name=f"{client.name}{i}", factors=factors, scales=half, weight=0.5, config=config))
    return parts


def check_refused_clients_leave_no_trace(case: Case) -> None:
    """Each bad client is refused by name, and the round is bit for bit the one without it."""
    clients = case.round()
    plain = case.aggregate(clients)
    agg = ff.Aggregator(**case.options)
    spoilers = bad_clients(clients[0])
    for i, c in enumerate(clients):
        for bad in spoilers[i :: len(clients)] if i else []:
            with pytest.raises(AdapterError) as caught:
                agg.add(bad.adapter(), 5.0, client=bad.name)
            assert caught.value.client == bad.name
        agg.add(c.adapter(), c.weight, client=c.name)
    for bad in spoilers[:: len(clients)]:
        with pytest.raises(FlexLoRAError):
            agg.add(bad.adapter(), 5.0, client=bad.name)
    update = agg.finish()
    assert sorted(r.client for r in update.refused) == sorted(bad.name for bad in spoilers)
    assert all(repr(r.client) in r.reason for r in update.refused)
    assert_identical(plain, update)


def bad_clients(good: Client) -> list[Client]:
    """Variants of a good client that must not enter a round; all of them can be read as adapters."""
    layer = sorted(good.factors)[0]

    def spoil(value: float, where: int) -> dict[str, tuple[Tensor, Tensor]]:
        A, B = (X.clone() for X in good.factors[layer])
        (A, B)[where].view(-1)[-1] = value
        return good.factors | {layer: (A, B)}

    def huge(a: float, b: float) -> dict[str, tuple[Tensor, Tensor]]:
        A, B = (torch.ones_like(X, dtype=torch.float32) for X in good.factors[layer])
        return good.factors | {layer: (A * a, B * b)}

    shape = good.layers[layer]
    wider = rounds.client("wider", [Layer(layer, shape.m + 1, shape.n)], seed=1)
    return [
        good.but(name="nan", factors=spoil(float("nan"), 0)),
        good.but(name="inf", factors=spoil(float("inf"), 1)),
        good.but(name="minus-inf", factors=spoil(float("-inf"), 1)),
        good.but(name="overflow", factors=huge(1e30, 1e30)),
        good.but(name="alpha", factors=huge(1e15, 1e15), config=good.config | {"lora_alpha": 1e30}),
        good.but(name="nan-head", extras={"head.weight": torch.tensor([1.0, float("nan")])}),
        wider,
        good.but(name="other-base", config=good.config | {"base_model_name_or_path": "another"}),
    ]


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
