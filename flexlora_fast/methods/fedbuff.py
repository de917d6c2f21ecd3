"""FedBuff: asynchronous rounds, in which clients come and go when they like and old starts count less.

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (arXiv 2106.06639): the server steps
as soon as ``goal`` clients lie in its buffer, whatever version each of them started from,

    ΔW_{t+1} = ΔW_t + η·Σ_i p_i·s(τ_i)·(ΔW_i − start_i),   τ_i = t − v_i,   s(τ) = 1/√(1+τ),

with p_i the clients' weights, normalised over the buffer. Clients of mixed ranks start from a truncation: start_i is
what version v_i was cut to for that client, not the version itself. It is the first columns of the version's factors,
so that all starts of one version are one block with a coefficient for each column, and nothing dense is formed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from flexlora_fast import combining, devices, finishing
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import check_configs, check_geometries
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.combining import How
from flexlora_fast.errors import (
    AdapterError,
    EmptyRoundError,
    FlexLoRAError,
    IncompatibleAdapterError,
    OptionError,
    QuorumError,
)
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.gate.entrance import Source
from flexlora_fast.incremental import GramTable
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.methods.fedopt import number
from flexlora_fast.methods.starts import Start, extras, parts
from flexlora_fast.precision import full_precision
from flexlora_fast.refusals import Refusals
from flexlora_fast.update import GlobalUpdate
from flexlora_fast.work import Client

STALENESS: dict[str, Callable[[int], float]] = {
    "polynomial": lambda tau: (1 + tau) ** -0.5,
    "constant": lambda tau: 1.0,
}


class Sent(NamedTuple):
    """What a client starts from, and the number to hand in with what it makes of it."""

    version: int
    adapter: Adapter


class FedBuff:
    """A server of asynchronous rounds. Its versions and buffer are in memory alone: after a restart, begin with
    ``initial`` the last update that was saved, and send it out anew.

    Args:
        goal: clients in the buffer that a step takes.
        staleness: s(τ) by the number of steps since the client started: "polynomial" (1/√(1+τ)), "constant" (1) or a
            function of your own, finite and ≥ 0.
        lr: η > 0.
        rank: columns to keep in each layer: at least the largest rank that clients ask for (default: the most that the
            buffer and the current version have there).
        max_staleness: versions kept beside the current one, for clients that still train from them; who comes later is
            refused.
        initial: version 0, if clients start from more than new LoRA factors (ΔW = 0): an update, or an adapter. With
            heads or other tensors that are no low-rank pairs it is needed as soon as a client is late: what it changed
            is known only beside what it started from. Without it the first step takes their average.
        versions: in place of ``initial`` the versions of a server that was stopped between two steps, by number, the
            current one and those before it that clients still train from.
        policy, spool, memory_limit: as for ``ff.Aggregator``, of what clients send.
        solver, tol, seed, device: as for ``ff.aggregate``.

    Attributes:
        version: of ``current``; a step adds 1. current: the update clients start from now; None at version 0 without
            ``initial``. refused: clients not taken, and why.

    ``update[layer].error(rank)`` bounds ‖·‖_F of the distance to the exact step from the versions as they were kept.

    >>> import torch, flexlora_fast as ff
    >>> def trained(seed, rank):
    ...     A, B = torch.randn(2, rank, 8, generator=torch.Generator().manual_seed(seed))
    ...     state = {"base_model.model.fc.lora_A.weight": A, "base_model.model.fc.lora_B.weight": B.mT}
    ...     return ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": rank, "target_modules": ["fc"]})
    >>> server = FedBuff(goal=2, rank=4)
    >>> for name in ("anna", "ben"):
    ...     server.add(trained(len(name), 2), started_from=0, client=name)
    0
    0
    >>> update = server.step() if server.ready else None
    >>> server.version, server.adapter_for("anna").version, server.add(trained(5, 4), started_from=0, client="carl")
    (1, 1, 1)
    """

    def __init__(
        self,
        goal: int,
        staleness: str | Callable[[int], float] = "polynomial",
        lr: float = 1.0,
        rank: int | None = None,
        *,
        max_staleness: int = 10,
        initial: GlobalUpdate | Adapter | None = None,
        versions: Mapping[int, GlobalUpdate] | None = None,
        policy: RoundPolicy | None = None,
        spool: str | os.PathLike[str] | None = None,
        memory_limit: int | str | None = None,
        solver: str = "auto",
        tol: float = 1e-3,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        for what, value, least in (("goal", goal, 1), ("max_staleness", max_staleness, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{what} is {value!r}; give an integer ≥ {least}")
        if not callable(staleness) and staleness not in STALENESS:
            raise OptionError(f"staleness {staleness!r} is none of {', '.join(STALENESS)}, and no function")
        self.goal, self.max_staleness, self.lr = goal, max_staleness, number("lr", lr, above=0.0)
        self.staleness = staleness if callable(staleness) else STALENESS[staleness]
        self._how = How(rank, solver, tol, seed, devices.usable(device))
        self._new_buffer = lambda: _Buffer(policy=policy, spool=spool, memory_limit=memory_limit)
        self._buffer, self._starts = self._new_buffer(), dict[str, Start]()
        self.refused = Refusals()
        self.version = 0
        self._from_nothing = not versions and initial is None  # version 0 is then ΔW = 0
        self._versions: dict[int, GlobalUpdate] = {}
        if versions:
            if initial is not None:
                raise OptionError("initial= is version 0; give it in versions=, or give one of the two")
            for key, version in versions.items():
                if type(key) is not int or key < 0 or not isinstance(version, GlobalUpdate):
                    what = f"versions has {key!r}: {type(version).__name__}"
                    raise OptionError(f"{what}; give the GlobalUpdate of each version, by its number")
            self._versions = {key: _checked(version) for key, version in versions.items()}
            self.version = max(versions)
        if initial is not None:
            self._versions[0] = _as_update(initial)
        self._records = {r.name: r for key in sorted(self._versions) for r in self._versions[key].clients}
        self._sent: dict[str, tuple[int, torch.dtype]] = {}

    @property
    def current(self) -> GlobalUpdate | None:
        return self._versions.get(self.version)

    @property
    def buffered(self) -> list[str]:
        """Names of the clients in the buffer, sorted."""
        return self._buffer.clients

    @property
    def ready(self) -> bool:
        """Whether the buffer holds ``goal`` clients of positive weight."""
        return self._buffer.counting >= self.goal

    def adapter_for(
        self,
        client: str | None = None,
        *,
        rank: int | None = None,
        config: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Sent:
        """The adapter that a client starts from now, and its version.

        Args:
            client: its name. It is remembered in which dtype it was sent what; without rank and config it gets those
                of its last upload.
            rank, config, dtype: as for ``GlobalUpdate.adapter``.

        Raises ``EmptyRoundError`` where there is no version yet, ``AdapterError`` for a client never seen before of
        which nothing else is said, and ``RankError`` for a rank that the version does not keep.
        """
        current = self.current
        if current is None:
            what = "version 0 is ΔW = 0: clients start from new LoRA adapters"
            raise EmptyRoundError(f"{what}; give initial= if they should start from something")
        if client is not None and rank is None and config is None:
            if client not in self._records:
                raise AdapterError("it has sent nothing yet; give rank= or config=", client=client)
            record = self._records[client]
            ranks = {layer: rank for layer, rank in record.ranks.items() if layer in current}
            known = dataclasses.replace(current, clients=[dataclasses.replace(record, ranks=ranks)])
            adapter = known.adapter(client=client, dtype=dtype)
        else:
            adapter = current.adapter(rank=rank, config=config, dtype=dtype)
        if client is not None:
            self._sent[client] = (self.version, getattr(torch, adapter.skeleton.dtype))
        return Sent(self.version, adapter)

    def add(self, adapter: Source, started_from: int, weight: float = 1.0, client: str | None = None) -> int:
        """Take one client into the buffer. Returns its staleness τ.

        Args:
            adapter, weight, client: as for ``ff.Aggregator.add``. Each layer's start is what a client of its rank and
                scale was sent of ``started_from``; rounded to the dtype that ``adapter_for`` sent to this client, or
                else to the adapter's own.
            started_from: the version that came with what it trained from; 0 for new LoRA factors.

        Raises:
            IncompatibleAdapterError: a version that never was, or is older than ``max_staleness``; a client that is in
            the buffer already; layers, shapes or heads that do not fit. What ``Aggregator.add`` raises: NaN, and all
            that a policy refuses. RankError: a rank that the version did not keep. The buffer is as if it had never
            come, and it is noted in ``refused``.
        """
        name = self._buffer.name_for(adapter) if client is None else client
        try:
            tau = self._tau(started_from)
            factor = self.lr * _finite(self.staleness, tau)
            self._buffer.add(adapter, weight, name)
            try:
                taken = self._buffer.adapter(name)
                self._starts[name] = self._start(name, taken, started_from, factor)
            except BaseException:
                self._buffer.drop(name)
                raise
        except FlexLoRAError as error:
            error.at(client=str(name))
            self.refused.note(str(name), error)
            raise
        return tau

    @full_precision()
    def step(self) -> GlobalUpdate:
        """The next version, of all clients in the buffer, which is empty then.

        Raises ``QuorumError`` with fewer than ``goal``; what it raises leaves buffer and versions as they were.
        """
        if not self.ready:
            there = f"{self._buffer.counting} clients of positive weight of {self.goal}"
            raise QuorumError(f"{there} are there; wait for more, or lower goal")
        clients = self._buffer.shares()
        starts = [dataclasses.replace(self._starts[c.name], share=c.share) for c in clients]
        current, specs = self.current, dict[str, LayerSpec]()
        for start in starts:
            specs |= start.adapter.skeleton.specs
        specs |= {} if current is None else {layer: update.spec for layer, update in current.items()}
        layers = {}
        for layer in sorted(specs):
            layers[layer] = combining.solved(specs[layer], parts(layer, starts, current), self._how)
        skeletons = [start.adapter.skeleton.config for start in starts]
        templates = skeletons if current is None else [current.template, *skeletons]
        update = GlobalUpdate(
            layers,
            extras=extras(starts, current),
            clients=[finishing.record(client) for client in clients],
            refused=list(self.refused),
            method="fedbuff",
            seed=self._how.seed,
            template=finishing.widened(templates, {spec.pattern_name for spec in specs.values()}),
            weight=math.fsum(client.weight for client in clients),
        )
        self._records |= {record.name: record for record in update.clients}
        self.version += 1
        self._versions[self.version] = update
        self._versions = {v: x for v, x in self._versions.items() if v >= self.version - self.max_staleness}
        self._buffer, self._starts, self.refused = self._new_buffer(), {}, Refusals()
        return update

    def _tau(self, started_from: int) -> int:
        if isinstance(started_from, bool) or not isinstance(started_from, int) or not 0 <= started_from <= self.version:
            what = f"it started from version {started_from!r}, the server is at {self.version}"
            raise IncompatibleAdapterError(f"{what}; hand in the number that came with the adapter it trained from")
        tau = self.version - started_from
        if tau > self.max_staleness:
            what = f"it started from version {started_from}, {tau} steps ago, and max_staleness is {self.max_staleness}"
            raise IncompatibleAdapterError(f"{what}; send it version {self.version} and have it train again")
        if started_from not in self._versions and not (started_from == 0 and self._from_nothing):
            what = f"it started from version {started_from}, which is not here (versions= had {sorted(self._versions)})"
            raise IncompatibleAdapterError(f"{what}; send it version {self.version} and have it train again")
        return tau

    def _start(self, name: str, adapter: Adapter, started_from: int, factor: float) -> Start:
        """What it started from, once all fits."""
        version, current = self._versions.get(started_from), self.current
        sent = self._sent.get(name)
        start = Start(adapter, version, factor, sent[1] if sent is not None and sent[0] == started_from else None)
        if current is not None:
            skeleton = adapter.skeleton
            check_configs([("the current version", current.template), ("the adapter", skeleton.config)])
            theirs = [("the current version", current[x].spec) for x in skeleton.specs if x in current]
            check_geometries([*theirs, *(("the adapter", spec) for spec in skeleton.specs.values())])
            for key, form in skeleton.extras.items():
                if key not in current.extras:
                    continue
                if version is None or key not in version.extras:
                    what = f"version {started_from} has no tensor {key!r}, so that what it changed is not known"
                    raise IncompatibleAdapterError(f"{what}; give FedBuff an initial= with the one clients start from")
                if form.shape != version.extras[key].shape:
                    what = f"its tensor {key!r} has shape {form.shape}, version {started_from} another"
                    raise IncompatibleAdapterError(f"{what}; tensors that are averaged must have one shape")
        for layer in adapter.layers:
            if version is not None and layer in version:
                version[layer].check_rank(adapter.rank(layer))
                if adapter.scale(layer) == 0:
                    raise IncompatibleAdapterError("its scale is 0, which no adapter is sent with", layer=layer)
        return start


class _Buffer(Aggregator):
    """The clients of a step: admitted, checked and kept as those of a round are."""

    def _gram_table(self) -> GramTable | None:
        return None  # of the clients alone, which nothing is solved from

    def adapter(self, name: str) -> Adapter:
        return self._clients[name].adapter

    def drop(self, name: str) -> None:
        self._take_out(name)

    @property
    def counting(self) -> int:
        """How many have a positive weight."""
        return sum(client.weight > 0 for client in self._clients.values())

    def shares(self) -> list[Client]:
        """Those of positive weight, by name, with p_i."""
        return self._weighted()


def _as_update(initial: GlobalUpdate | Adapter) -> GlobalUpdate:
    if not isinstance(initial, Adapter | GlobalUpdate):
        raise OptionError(f"initial is a {type(initial).__name__}; give an Adapter or a GlobalUpdate")
    return combining.combine([(1.0, initial)]) if isinstance(initial, Adapter) else _checked(initial)


def _checked(initial: GlobalUpdate) -> GlobalUpdate:
    if any(layer.frozen or layer.merges for layer in initial.values()):
        raise OptionError(
            f"initial= is of method {initial.method!r}, which freezes A or goes into the frozen weight; give an update "
            "whose adapters stand for all that changed"
        )
    return initial


def _finite(staleness: Callable[[int], float], tau: int) -> float:
    value = staleness(tau)
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise OptionError(f"staleness({tau}) is {value!r}; it must give finite numbers ≥ 0")
    return float(value)
