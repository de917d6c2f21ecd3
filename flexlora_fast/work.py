"""The work of a round, layer by layer: planned from shapes alone, then read, checked and solved."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from flexlora_fast import memory, outcome, planning, together, values
from flexlora_fast.adapter import Adapter
from flexlora_fast.defence.coordinates import Coordinates, combined, combined_bias
from flexlora_fast.errors import FlexLoRAError
from flexlora_fast.incremental import KeptGrams
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.accumulate import Accumulator
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.plan import FLOAT32_TOL
from flexlora_fast.lowrank.random import stream
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.methods import Contribution
from flexlora_fast.planning import LayerPlan, Settings
from flexlora_fast.precision import full_precision
from flexlora_fast.privacy import solving
from flexlora_fast.privacy.mechanism import Release
from flexlora_fast.resident import Resident
from flexlora_fast.stack import Stack
from flexlora_fast.stored import Stored
from flexlora_fast.streamed import Brought, Stream

_READ_AHEAD = 64 * 1024**2  # bytes that are read ahead at least, where the limit has room for them


@dataclass
class Client:
    """One accepted client.

    ``adapter``: as the round reads it. ``source``: as it came; they differ where a file's tensors are kept in memory.
    ``checked``: whether its values are known to be good. ``share``: its weight, normalised. ``factor``: what a defence
    scales its update by.
    """

    name: str
    adapter: Adapter
    weight: float
    source: Adapter
    checked: bool
    share: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Piece:
    """What was read of one layer: of some clients their contributions and biases of B. ``last``: none is to come."""

    clients: Sequence[Client]
    contributions: list[Contribution]
    biases: list[Tensor | None]
    last: bool


@dataclass(frozen=True)
class Work:
    """All layers of a round, planned; ``pieces`` reads and ``solve_layer`` solves them.

    ``only``: the layers and extras that are done here, where others do the rest.

    Raises ``OptionError`` at once for a layer that does not fit the memory limit in any way.
    """

    clients: Sequence[Client]  # of positive weight, in canonical order
    settings: Settings
    grams: KeptGrams | None = None
    resident: Resident | None = None
    stored: Stored | None = None
    release: Release | None = None  # of a private round, once it is charged
    only: frozenset[str] | None = None
    plans: list[LayerPlan] = field(init=False)  # in the order of solving
    groups: list[list[LayerPlan]] = field(init=False)  # the same in runs that are solved together

    def __post_init__(self) -> None:
        skeletons = {id(client.adapter.skeleton): client.adapter.skeleton for client in self.clients}
        counts = Counter(id(client.adapter.skeleton) for client in self.clients)
        plans = planning.plans([(skeleton, counts[i]) for i, skeleton in skeletons.items()], self.settings)
        if self.only is not None:
            plans = [plan for plan in plans if plan.spec.name in self.only]
        plans.sort(key=lambda plan: (plan.group, plan.spec.name))
        object.__setattr__(self, "plans", plans)
        object.__setattr__(self, "groups", list(together.runs(plans, self.settings)))

    @property
    def scratch(self) -> int:
        """Bytes that solving needs beside what was read."""
        if self.settings.device.type != "cpu":
            return 0  # of this machine's memory
        return max(sum(p.scratch for p in group) for group in self.groups)

    @property
    def held(self) -> int:
        """Bytes of what was read that solving and reading ahead need: what is in use, and as much again."""
        return 2 * max(sum(p.held for p in group) for group in self.groups)

    @property
    def ahead(self) -> int:
        """Bytes of what was read that there is any use for."""
        return max(self.held, _READ_AHEAD)

    # -- reading ---

    @cached_property
    def streamed(self) -> bool:
        """Whether factors are brought to the device without a look at each. Values that no sum may take up are found by
        what becomes of them: such a layer is read again the usual way, which names the client.
        """
        usual = self.stored is None or self.all_here or not self.in_shares
        if usual or not any(layer.grouped for layer in self.plans):
            return False
        assert self.stored is not None
        return self.stored.has([client.name for client in self.clients])

    def stream(self) -> Stream:
        """The way that factors are brought by, of a round that is ``streamed``."""
        assert self.stored is not None
        names = [client.name for client in self.clients]
        return Stream(self, self.stored.opened(names, self.shares, self.settings.missing == "renormalize"))

    def pieces(self, stream: Stream | None = None) -> Iterator[tuple[int, Callable[[], Piece | Brought]]]:
        """What is to be read in the order of solving: its bytes in memory that is not held already, and how."""
        for group in self.groups:
            if not group[0].grouped:
                yield from self.pieces_of(group[0])
            elif stream is not None:
                yield from stream.jobs(group)
            elif not self.all_here:  # those are solved from where their factors lie
                for layer in group:
                    yield from self.pieces_of(layer)

    def pieces_of(
        self, layer: LayerPlan, among: Collection[str] | None = None
    ) -> Iterator[tuple[int, Callable[[], Piece]]]:
        """Of all clients that have the layer, or of those of them that are ``among`` these names."""
        having = [client for client in self.clients if layer.spec.name in client.adapter.skeleton.specs]
        total = math.fsum(client.share for client in having) if self.settings.missing == "renormalize" else 1.0
        if among is not None:
            having = [client for client in having if client.name in among]
        for group, last in _groups(layer, having):
            nbytes = sum(_bytes(client, layer) for client in group if client.adapter.on_disk)
            yield nbytes, partial(_read, layer.spec.name, group, total, last)

    # -- solving ---

    def solved(self, pieces: Iterator[Any]) -> Iterator[LayerUpdate]:
        """Every layer in the order of ``plans``. Raises ``AdapterError`` naming client and layer for bad values."""
        begun: deque[tuple[list[LayerPlan], Callable[[], list[LayerUpdate]]]] = deque()
        most = together.in_flight(self)
        for group in self.groups:
            if group[0].grouped:
                while len(begun) > most or not together.fits(self, [layers for layers, _ in begun], group):
                    yield from begun.popleft()[1]()
                begun.append((group, together.begin(self, group, pieces)))
            else:  # these come first
                yield self.solve_layer(group[0], pieces)
        while begun:
            yield from begun.popleft()[1]()

    @cached_property
    def all_here(self) -> bool:
        """Whether all clients' factors lie in the device's memory, known to be good and where."""
        clients = self.clients
        return (
            self.resident is not None
            and self.in_shares
            and all(client.checked for client in clients)
            and self.resident.has([client.name for client in clients])
        )

    @property
    def in_shares(self) -> bool:
        """Whether one number for each client says all about its coefficients: ``shares``."""
        plain = self.settings.missing == "zero" or all(client.factor == 1 for client in self.clients)
        return self.settings.method.uniform and plain

    @property
    def shares(self) -> list[float]:
        """What every client's s·B·A is multiplied by (with ``missing="renormalize"``, before that)."""
        return [client.share * client.factor for client in self.clients]

    @full_precision()
    def solve_layer(self, layer: LayerPlan, pieces: Iterator[Piece]) -> LayerUpdate:
        """Take the layer's pieces and solve it. Raises ``AdapterError`` naming client and layer for bad values."""
        if self.settings.private is not None:
            result, bias = self._privately(layer, pieces)
            return LayerUpdate(layer.spec, self.brought(result), layer.total_rank, None, bias)
        if self.settings.coordinates is not None:
            result, bias = self._by_coordinates(self.settings.coordinates, layer, next(pieces))
            return LayerUpdate(layer.spec, self.brought(result), layer.total_rank, None, bias)
        if layer.folded:
            result, bias = self.summed(layer, pieces)
            return LayerUpdate(layer.spec, self.brought(result), layer.total_rank, None, bias)
        return self._whole(layer, next(pieces))

    def _by_coordinates(self, rule: Coordinates, layer: LayerPlan, piece: Piece) -> tuple[Factorization, Tensor | None]:
        of, spec = self.settings, layer.spec
        contributions = self.checked(spec, piece)
        total = Accumulator(spec.m, spec.n, spec.experts, of.device)
        total.take(combined(rule, contributions, spec))
        rank = min(layer.rank, spec.m, spec.n)
        result = total.solve(rank, tol=of.tol, seed=of.seed, name=spec.name)
        return result, combined_bias(rule, contributions, piece.biases)

    def _privately(self, layer: LayerPlan, pieces: Iterator[Piece]) -> tuple[Factorization, Tensor | None]:
        """The clipped clients' sum with its noise: clip factors are in the scales, the denominator in the release."""
        of, spec, release = self.settings, layer.spec, self.release
        assert release is not None
        bias, total = _Bias(), torch.zeros(spec.m, dtype=torch.float64)

        def contributions() -> Iterator[list[Contribution]]:
            last = False
            while not last:
                piece = next(pieces)
                checked, last = self.checked(spec, piece), piece.last
                for c, b in zip(checked, piece.biases, strict=True):
                    bias.add(c, b)
                yield checked

        result = solving.solve_noised(
            release,
            spec,
            contributions(),
            min(layer.rank, spec.m, spec.n),
            key=stream(of.seed, spec.name),
            tol=max(of.tol, FLOAT32_TOL),
            solver=layer.solver,
            folded=layer.folded,
            device=of.device,
        )
        if spec.name not in release.of.biased:
            return result, None
        total += bias.total if bias.total is not None else 0.0
        return result, release.released(f"bias/{spec.name}", total)

    def brought(self, f: Factorization) -> Factorization:
        """The same on the CPU; with ``results="device"`` U and V stay on the device that they were computed on."""
        error = None if f.energy_error is None else f.energy_error.cpu()
        f = dataclasses.replace(f, S=f.S.cpu(), energy=f.energy.cpu(), energy_error=error)
        return f if self.settings.results == "device" else dataclasses.replace(f, U=f.U.cpu(), V=f.V.cpu())

    def _whole(self, layer: LayerPlan, piece: Piece) -> LayerUpdate:
        of, spec, bias = self.settings, layer.spec, _Bias()
        contributions = self._contributions(spec, piece, bias)

        def solved(stack: Stack, rank: int) -> Factorization:
            how: Any = {"solver": of.solver, "tol": of.tol, "seed": of.seed, "certificate": of.certificate}
            return self.brought(solve(stack, rank, name=spec.name, **how))

        def known(stack: Stack) -> None:
            if (table := self.grams) is not None:
                factors = [(c.client, c.B, c.A) for c in piece.contributions]
                stack.grams = lambda: table.of(spec.name, factors)

        return outcome.of_contributions(of.method, spec, contributions, layer.rank, solved, known, bias.mean)

    def summed(self, layer: LayerPlan, pieces: Iterator[Piece]) -> tuple[Factorization, Tensor | None]:
        """A folded layer solved by itself, and its averaged bias."""
        of, spec = self.settings, layer.spec
        total = Accumulator(spec.m, spec.n, spec.experts, of.device)
        bias = self.each_stack(layer, pieces, lambda stack: total.add(stack, spec.name))
        rank = min(layer.rank, layer.total_rank, spec.m, spec.n)
        return total.solve(rank, tol=of.tol, seed=of.seed, name=spec.name), bias

    def each_stack(self, layer: LayerPlan, pieces: Iterator[Piece], take: Callable[[Stack], None]) -> Tensor | None:
        """Hand on the stack of every piece of a folded layer. The layer's averaged bias."""
        bias, last = _Bias(), False
        while not last:
            last = self._hand_on(layer.spec, next(pieces), bias, take)
        return bias.mean

    def _hand_on(self, spec: LayerSpec, piece: Piece, bias: _Bias, take: Callable[[Stack], None]) -> bool:
        take(self._stack(spec, piece, bias))
        return piece.last

    def stack_of(self, spec: LayerSpec, piece: Piece) -> tuple[Stack, Tensor | None]:
        """The stack of a layer that was read whole, and its averaged bias."""
        bias = _Bias()
        return self._stack(spec, piece, bias), bias.mean

    def _stack(self, spec: LayerSpec, piece: Piece, bias: _Bias) -> Stack:
        """Check what was read, and put it side by side."""
        return outcome.stack_of(self.settings.method, spec, self._contributions(spec, piece, bias))

    def _contributions(self, spec: LayerSpec, piece: Piece, bias: _Bias) -> list[Contribution]:
        contributions = self.checked(spec, piece)
        for c, b in zip(contributions, piece.biases, strict=True):
            bias.add(c, b)
        return contributions

    def checked(self, spec: LayerSpec, piece: Piece) -> list[Contribution]:
        """The contributions of a piece on the device, once their values are known to be good.

        Raises ``AdapterError`` naming client and layer for bad ones.
        """
        contributions = []
        for client, c, b in zip(piece.clients, piece.contributions, piece.biases, strict=True):
            if not client.checked:
                keys = client.adapter.skeleton.keys_of(spec.name)
                values.check_layer(c.A, c.B, b, c.scale, keys=keys, client=c.client, layer=spec.name)
            A, B = c.A.to(self.settings.device), c.B.to(self.settings.device)
            contributions.append(Contribution(c.client, A, B, c.scale, c.weight))
        return contributions


def _read(layer: str, clients: Sequence[Client], total: float, last: bool) -> Piece:
    contributions, biases = [], []
    for client in clients:
        try:
            A, B, bias = client.adapter.factors_and_bias(layer)
        except FlexLoRAError as error:
            raise error.at(client=client.name, layer=layer) from None
        # The scale takes the factor, not the weight: what is scaled is the client's update, whatever the method's sum.
        scale = client.factor * client.adapter.scale(layer)
        contributions.append(Contribution(client.name, A, B, scale, client.share / total))
        biases.append(bias)
    return Piece(clients, contributions, biases, last)


def _groups(layer: LayerPlan, clients: Sequence[Client]) -> Iterator[tuple[list[Client], bool]]:
    """Neighbours in canonical order, and whether they are the last: all clients, or as many as have
    ``memory.PIECE_COLUMNS`` together.
    """
    group, columns = list[Client](), 0
    for client in clients:
        if layer.folded and columns >= memory.PIECE_COLUMNS:
            yield group, False
            group, columns = [], 0
        group.append(client)
        columns += client.adapter.skeleton.ranks[layer.spec.name]
    yield group, True


def _bytes(client: Client, layer: LayerPlan) -> int:
    return client.adapter.skeleton.layer_bytes[layer.spec.name]


class _Bias:
    """Σ w·s·b over the clients' lora_B.bias: it is applied times the scale, so it is an update like s·B·A."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # float64

    def add(self, c: Contribution, bias: Tensor | None) -> None:
        if bias is not None:
            term = c.weight * c.scale * bias.double().cpu()
            self.total = term if self.total is None else self.total + term

    @property
    def mean(self) -> Tensor | None:
        return None if self.total is None else self.total.float()
