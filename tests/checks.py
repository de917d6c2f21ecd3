"""The aggregator checks: one function for each clause of the contract, run on every method, solver, layout and dtype.

After scikit-learn's estimator checks. A check takes a ``Case`` and reads the method's traits (``gauge_invariant``,
``output``) where the contract depends on them. Hard inputs have checks of their own in ``checks_hard.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast import config as configs
from tests import oracle, rounds, where
from tests.oracle import Truth
from tests.rounds import Client

EXACT_SOLVERS = ("gram", "svd", "empty")
EXACT = 1e-5  # of ‖ΔW‖, for exact solvers: float32 factors out
EXCESS = 1e-3  # the default tol of the iterative ones
# Iterative solvers multiply in float32: each product rounds at 6e-8 of ‖ΔW‖, so σ² is known to about 3e-8 of ‖ΔW‖² and
# an error below √3e-8 = 1.7e-4 of ‖ΔW‖ not at all. Where the best error is that small, excess says nothing.
FLOAT32_FLOOR = 2e-4
SMALL = 1e-4
# The certificate of an iterative solver subtracts two energies, each of float32 products with two factors, good to
# 2·eps each. It does not average out in larger layers: on a flat spectrum the k best of n equal values are the k whose
# rounding is largest.
CERTIFIED = (4 * torch.finfo(torch.float32).eps) ** 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """One way through the package: a method, a solver, the layers of a model, the dtypes the clients send."""

    method: str
    solver: str
    model: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.method}-{self.solver}-{self.model}-{self.dtype}"

    @property
    def traits(self) -> type[ff.methods.Method]:
        return ff.methods.METHODS[self.method]

    @property
    def sliced(self) -> bool:
        """Whether adapters are no truncated SVDs."""
        return self.traits.output != "svd"

    def round(self, seed: int = 0) -> list[Client]:
        return self.fitted(rounds.typical(self.model, self.dtype, seed))

    def fitted(self, clients: Sequence[Client]) -> list[Client]:
        return rounds.fitted(self.method, clients)

    def aggregate(self, clients: Sequence[Client], **options: Any) -> ff.GlobalUpdate:
        clients = self.fitted(clients)
        given = self.options | {"weights": [c.weight for c in clients]} | options
        return ff.aggregate([c.adapter() for c in clients], **given)

    @property
    def options(self) -> dict[str, Any]:
        """What makes a round one of this case."""
        return {"method": self.method, "solver": self.solver, "device": where.DEVICE}

    def truth(self, clients: Sequence[Client], layer: str, missing: str = "zero") -> Truth:
        return oracle.truth(self.method, self.fitted(clients), layer, missing)


# -- what "right" and "the same" mean ---


def batched(delta: Tensor) -> np.ndarray:
    """A dense update as (E, m, n) float64."""
    X = oracle.array(delta)
    return X if X.ndim == 3 else X[None]


def effect(update: ff.GlobalUpdate, adapter: ff.Adapter, layer: str) -> np.ndarray:
    """What an adapter changes in the weight, with what goes into the frozen weight: (E, m, n) float64."""
    base = update.base_delta(layer)
    return batched(adapter.delta(layer)) + (0.0 if base is None else batched(base))


def assert_best(update: ff.GlobalUpdate, layer: str, truth: Truth, rank: int, got: np.ndarray) -> None:
    """``got`` is the best rank-``rank`` adapter, to what the solver that made it promises."""
    assert np.isfinite(got).all()
    rank = update[layer].given(rank)
    where = f"{layer} at rank {rank} by {update[layer].solver}"
    error, best, norm = float(np.linalg.norm(truth.whole - got)), truth.error(rank), truth.norm
    if update[layer].solver in EXACT_SOLVERS or truth.averaged is not None:
        iterated = update[layer].base is not None and update[layer].solver not in EXACT_SOLVERS
        # updates that cancel leave the rounding of their parts
        slack = (FLOAT32_FLOOR if iterated else EXACT) * max(norm, truth.mass * 1e-2)
        assert error <= best + slack, f"{where}: error {error:.3e}, best {best:.3e}, norm {norm:.3e}"
        if truth.unique(rank):
            off = float(np.linalg.norm(truth.at(rank) - got))
            assert off <= slack, f"{where}: off by {off / norm:.3e} of the norm"
    elif best < SMALL * norm:
        assert error <= best + FLOAT32_FLOOR * norm, f"{where}: error {error / norm:.3e} of the norm"
    else:
        assert error <= (1 + EXCESS) * best, f"{where}: excess {error / best - 1:.3e}"


def assert_right(case: Case, update: ff.GlobalUpdate, clients: Sequence[Client], missing: str = "zero") -> None:
    """Every layer at rank 1 and at all that is kept."""
    for layer in update.layers:
        truth = case.truth(clients, layer, missing)
        for rank in {1, update[layer].rank}:
            assert_best(update, layer, truth, rank, batched(update.delta(layer, rank)))


def assert_identical(one: ff.GlobalUpdate, two: ff.GlobalUpdate) -> None:
    """Bit for bit the same result, wherever its vectors are; wall times aside."""
    assert one.layers == two.layers
    assert one.extras.keys() == two.extras.keys() and one.template == two.template
    assert all(torch.equal(one.extras[key], two.extras[key]) for key in one.extras)
    for layer in one.layers:
        a, b = one[layer], two[layer]
        assert a.spec == b.spec and a.total_rank == b.total_rank
        assert (a.solver, a.iterations, a.excess) == (b.solver, b.iterations, b.excess)
        pairs = [(getattr(a.factorization, x), getattr(b.factorization, x)) for x in ("U", "S", "V", "energy")]
        pairs += list(zip(a.averaged or (), b.averaged or (), strict=True))
        pairs += list(zip(a.base or (), b.base or (), strict=True))
        assert (a.base_error, a.frozen, a.limit) == (b.base_error, b.frozen, b.limit)
        pairs += [] if a.bias is None and b.bias is None else [(a.bias, b.bias)]
        assert all(x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()) for x, y in pairs), layer


# -- the clauses ---


def check_truncation(case: Case) -> None:
    """s'·B'·A' is the truncated SVD of Σ w·s·B·A, for every layer and every rank up to R and beyond."""
    clients = case.round()
    total = sum(c.config["r"] for c in clients)
    update = case.aggregate(clients, rank=total)
    for rank in (1, 2, 3, 5, 8, total, total + 3):
        adapter = update.adapter(rank=rank)
        for layer in adapter.layers:
            assert update[layer].given(rank) <= adapter.rank(layer) <= rank
            assert_best(update, layer, case.truth(clients, layer), rank, effect(update, adapter, layer))


def check_every_client_gets_its_own(case: Case) -> None:
    """adapter(client=…) has that client's layers, ranks, scales and dtype, and the best update for them."""
    clients = case.round()
    update = case.aggregate(clients)
    for c in clients:
        adapter = update.adapter(client=c.name)
        assert adapter.layers == sorted(c.factors) and adapter.client == c.name
        wide = update.adapter(client=c.name, dtype=torch.float32)
        for layer in adapter.layers:
            rank = adapter.rank(layer)
            assert update[layer].given(c.rank(layer)) <= rank <= c.rank(layer)
            assert adapter.scale(layer) == c.scales[layer] or rank < c.rank(layer)
            assert all(X.dtype == c.factors[layer][0].dtype for X in adapter.factors(layer))
            assert_best(update, layer, case.truth(clients, layer), c.rank(layer), effect(update, wide, layer))
            # Rounding two factors of one adapter: twice the unit roundoff of each entry, less by averaging.
            rounding = 2 * torch.finfo(adapter.factors(layer)[0].dtype).eps
            off, norm = (adapter.delta(layer) - wide.delta(layer)).norm(), wide.delta(layer).norm()
            assert off <= rounding * norm, f"{layer}: {off:.2e} of {norm:.2e} lost in {c.factors[layer][0].dtype}"


def check_patterns(case: Case) -> None:
    """rank_pattern, alpha_pattern and rsLoRA count layer by layer, in and out; a default adapter can be made."""
    clients = case.fitted(rounds.patterned(case.model))
    update = case.aggregate(clients)
    assert_right(case, update, clients)
    for c in clients:
        adapter = update.adapter(client=c.name)
        for layer in adapter.layers:
            rank = adapter.rank(layer)
            assert update[layer].given(c.rank(layer)) <= rank <= c.rank(layer)
            assert adapter.scale(layer) == c.scales[layer] or rank < c.rank(layer)
            assert_best(update, layer, case.truth(clients, layer), rank, effect(update, adapter, layer))
        assert update.adapter(config=c.config).config == adapter.config
    largest = update.adapter()
    for layer in largest.layers:
        assert largest.rank(layer) >= update[layer].given(max(c.rank(layer) for c in clients))
        assert_best(update, layer, case.truth(clients, layer), largest.rank(layer), effect(update, largest, layer))


def check_scale_is_only_a_unit(case: Case) -> None:
    """The update does not depend on how a client splits it between alpha and B, nor an adapter's on its alpha."""
    clients = case.round()
    moved = [
        c.mapped(lambda _, A, B: (A, B * 4)).but(
            config=c.config | {"lora_alpha": c.config["lora_alpha"] / 4},
            scales={layer: s / 4 for layer, s in c.scales.items()},
        )
        for c in clients
    ]
    update = case.aggregate(moved)
    if case.traits.gauge_invariant:
        assert_right(case, update, clients)
    assert_right(case, update, moved)
    for layer in update.layers:
        plain, other = (update.adapter(rank=2, alpha=alpha).delta(layer) for alpha in (2, -7.5))
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


def check_weights_are_normalised(case: Case) -> None:
    clients = case.round()
    many = [c.but(weight=c.weight * 2**20) for c in clients]
    assert_identical(case.aggregate(clients), case.aggregate(many))


def check_weight_counts_copies(case: Case) -> None:
    """Weight 3 is three clients of weight 1."""
    clients = case.round()
    copies = [c.but(name=f"{c.name}-{i}", weight=c.weight / 3) for c in clients[:2] for i in range(3)]
    assert_right(case, case.aggregate(clients[2:] + copies), clients)


def check_zero_weight_is_absent(case: Case) -> None:
    """Also its layers, its ranks, its extras and its dtype."""
    clients = case.round()
    extra = [*rounds.MODELS[case.model], rounds.Layer("only.mine", 4, 5)]
    ghost = rounds.client("a-ghost", extra, rank=7, weight=0.0, dtype=torch.float16).but(
        extras={"head.weight": torch.ones(3)}
    )
    ghost = ghost.but(config=ghost.config | {"fan_in_fan_out": case.model == "conv1d_hf"})
    with_ghost = case.aggregate([clients[0], ghost, *clients[1:]])
    assert_identical(with_ghost, case.aggregate(clients))
    assert [record.name for record in with_ghost.clients] == [c.name for c in clients]


def check_order_of_arrival(case: Case) -> None:
    clients = case.round()
    shuffled = [clients[i] for i in (3, 0, 4, 2, 1)]
    assert_identical(case.aggregate(clients), case.aggregate(shuffled))


def check_gauge(case: Case) -> None:
    """(B·M, M⁻¹·A) gives the result of (B, A); a method that says otherwise must really differ."""
    clients = case.round()
    generator = torch.Generator().manual_seed(1)

    def regauge(_: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        rank = A.shape[1]
        M = torch.randn(rank, rank, generator=generator, dtype=torch.float64) + 2 * torch.eye(rank)
        return (torch.linalg.inv(M) @ A.double()).float(), (B.double() @ M).float()

    moved = [c.mapped(regauge) for c in clients]
    update = case.aggregate(moved)
    if case.traits.gauge_invariant:
        assert_right(case, update, clients)
    else:
        assert_right(case, update, moved)
        layer = update.layers[0]
        before, after = (case.truth(x, layer) for x in (clients, moved))
        assert np.linalg.norm(before.at(1) - after.at(1)) > 1e-3 * before.norm


def check_inputs_stay(case: Case) -> None:
    """Factors, extras and configs of the clients are never written to."""
    clients = [c.but(extras={"head.weight": torch.full((2, 3), float(i))}) for i, c in enumerate(case.round())]
    adapters = [c.adapter() for c in clients]
    before = [({k: v.clone() for k, v in a.state_dict().items()}, a.config) for a in adapters]
    update = ff.aggregate(adapters, **case.options)
    for split in ("B", "balanced", "A"):
        update.adapter(client="c0", split=split)
    for adapter, (tensors, config) in zip(adapters, before, strict=True):
        assert adapter.config == config
        assert all(torch.equal(adapter.state_dict()[key], tensor) for key, tensor in tensors.items())


def check_handed_out_adapters_are_independent(case: Case) -> None:
    """Training an adapter in place changes neither the update nor what another client gets."""
    clients = [c.but(extras={"head.weight": torch.full((2, 3), float(i))}) for i, c in enumerate(case.round())]
    update = case.aggregate(clients, rank=1)
    for split in ("B", "balanced", "A"):
        pristine = {k: v.clone() for k, v in update.adapter(rank=1, split=split).state_dict().items()}
        for tensor in update.adapter(rank=1, split=split).state_dict().values():
            tensor.fill_(7)
        again = update.adapter(rank=1, split=split).state_dict()
        changed = [key for key in pristine if not torch.equal(again[key], pristine[key])]
        assert not changed, f"split {split!r}: {changed}"


def check_full_rank_reproduces(case: Case) -> None:
    """At rank ≥ R nothing is cut off, and the certificate says so."""
    clients = case.round()
    update = case.aggregate(clients, rank=1000)
    for layer in update.layers:
        assert update[layer].complete or update[layer].limit is not None
        truth = case.truth(clients, layer)
        exact = (case.sliced and not case.traits.merges) or update[layer].solver in EXACT_SOLVERS
        off = np.linalg.norm(batched(update.delta(layer)) - truth.at(update[layer].given(5000)))
        left_out = truth.error(update[layer].given(5000))
        assert off <= (EXACT if exact else FLOAT32_FLOOR) * truth.norm
        assert update[layer].error(5000) <= left_out + (1e-6 if exact else CERTIFIED) * truth.norm
    wide = update.adapter(rank=50)
    assert all(np.allclose(effect(update, wide, x), batched(update.delta(x)), atol=1e-5) for x in update.layers)


def check_splits(case: Case) -> None:
    """The split moves S between B and A and nothing else."""
    update = case.aggregate(case.round())
    rank = update.adapter().config["r"]
    made = {split: update.adapter(rank=rank, alpha=rank, split=split) for split in ("B", "balanced", "A")}
    for layer in update.layers:
        dense = [adapter.delta(layer) for adapter in made.values()]
        for other in dense[1:]:
            torch.testing.assert_close(other, dense[0], rtol=1e-5, atol=2e-6 * float(dense[0].norm()))
        if case.sliced:  # they keep the basis that the clients averaged
            continue
        kept = min(rank, update[layer].factorization.S.shape[1])
        A, B = made["B"].factors(layer)[0].cpu(), made["A"].factors(layer)[1].cpu()
        eye = torch.eye(kept)
        assert (A[:, :kept] @ A[:, :kept].mT - eye).abs().max() <= EXACT
        assert (B[:, :, :kept].mT @ B[:, :, :kept] - eye).abs().max() <= EXACT
        A, B = (X.cpu() for X in made["balanced"].factors(layer))
        live = update[layer].factorization.S[:, :kept].cpu() > 0
        even = (A[:, :kept].norm(dim=2) - B[:, :, :kept].norm(dim=1))[live]
        assert even.abs().max() <= EXACT * float(A.norm())


def check_missing_layers(case: Case) -> None:
    """A client without a layer counts as zero there, or its weight is shared out."""
    clients = case.round()
    layers = sorted(clients[0].factors)
    clients[1] = clients[1].without(layers[0])
    clients[4] = clients[4].without(layers[-1])
    for missing in ("zero", "renormalize"):
        update = case.aggregate(clients, missing=missing)
        assert update.layers == layers
        assert_right(case, update, clients, missing)
        assert_targets_itself(update.adapter(rank=1))
    assert layers[0] not in update.adapter(client="c1").layers


def assert_targets_itself(adapter: ff.Adapter) -> None:
    """PEFT would build every layer that this adapter has tensors for."""
    lost = [x for x in adapter.layers if not configs.targets(adapter.config, adapter.spec(x).pattern_name)]
    assert not lost, f"its config does not target {lost}"


def check_disjoint_layers(case: Case) -> None:
    """Clients that share no layer at all, each choosing its own by ``layers_to_transform``."""
    clients = []
    for i in (0, 1):
        layers = [rounds.Layer(f"model.layers.{i}.proj", 9, 7)]
        config = {"layers_to_transform": [i], "target_modules": ["proj"]}
        clients.append(rounds.client(f"c{i}", layers, rank=2 + i).but())
        clients[-1] = clients[-1].but(config=clients[-1].config | config)
    update = case.aggregate(clients)
    assert_right(case, update, clients)
    assert_targets_itself(update.adapter(rank=2))


def check_extras(case: Case) -> None:
    """Whole tensors are averaged with the same weights, over the clients that have them."""
    clients = case.round()
    head = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    having = [0, 1, 3]
    for i in having:
        clients[i] = clients[i].but(extras={"head.weight": head[i], "head.steps": torch.tensor([i, 2 * i])})
    update = case.aggregate(clients)
    weights = np.array([clients[i].weight for i in having]) / sum(clients[i].weight for i in having)
    mean = sum(w * head[i].double() for w, i in zip(weights, having, strict=True))
    torch.testing.assert_close(update.extras[rounds.PREFIX + "head.weight"].double(), mean, rtol=1e-6, atol=1e-6)
    steps = update.extras[rounds.PREFIX + "head.steps"]
    assert steps.dtype == torch.int64
    assert steps.tolist() == [round(float(weights @ np.array(having))), round(float(weights @ (2 * np.array(having))))]
    assert rounds.PREFIX + "head.weight" in update.adapter(client="c0").extras
    assert not update.adapter(client="c2").extras  # it has no place for them


def check_lora_bias(case: Case) -> None:
    """lora_B.bias is applied times the scale: it is averaged as s·b, and handed back over s'."""
    clients = []
    for i, c in enumerate(case.round()):
        bias = {x: torch.full((c.layers[x].m,), i - 1.5) for x in c.factors if c.layers[x].kind == "linear"}
        clients.append(c.but(bias=bias, config=c.config | {"lora_bias": True}))
    update, weights = case.aggregate(clients), oracle.shares(clients)
    for layer in clients[0].bias:
        effect = sum(w * c.scales[layer] * c.bias[layer].double() for w, c in zip(weights, clients, strict=True))
        for adapter in (update.adapter(client="c3"), update.adapter(rank=2, alpha=0.5)):
            got = adapter.lora_bias(layer)
            assert got is not None
            tolerance = 2 * torch.finfo(got.dtype).eps
            torch.testing.assert_close(adapter.scale(layer) * got.double(), effect, rtol=tolerance, atol=tolerance)


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
