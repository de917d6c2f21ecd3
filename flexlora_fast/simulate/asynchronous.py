"""Asynchronous rounds in simulated time: who trains from what, who is done next, and the server's buffer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from flexlora_fast.errors import AdapterError, OptionError, SimulationError
from flexlora_fast.methods.fedbuff import FedBuff
from flexlora_fast.simulate import metrics
from flexlora_fast.simulate.jobs import Model, Trained
from flexlora_fast.simulate.prepare import DROPOUT, SAMPLE, SPEED, Client
from flexlora_fast.simulate.server import Server
from flexlora_fast.simulate.spec import Experiment
from flexlora_fast.simulate.state import State
from flexlora_fast.simulate.training import Ask, Clients
from flexlora_fast.update import GlobalUpdate


@dataclass(frozen=True, order=True)
class Flight:
    """A client that trains: when it is ``due`` in simulated time, its running ``number``, and what it started from."""

    due: float
    number: int
    client: int
    version: int


@dataclass
class Flights:
    """All clients that train at a time, and the clock.

    Who comes next is known before anybody has trained: how long it takes depends on the client's rows and pace alone.
    So those of a step can train at once, in any processes, and the same clients come in the same order.
    """

    experiment: Experiment
    clients: list[Client]
    clock: float = 0.0
    begun: int = 0
    open: list[Flight] = field(default_factory=list)

    @classmethod
    def of(cls, experiment: Experiment, clients: list[Client], facts: Mapping[str, Any]) -> Flights:
        """As ``to_dict`` said; nobody has begun where there are no ``facts``."""
        wanted = experiment.server.asynchronous
        assert wanted is not None
        if wanted.concurrency + wanted.goal > len(clients):
            raise OptionError(
                f"server.asynchronous has {wanted.concurrency} clients training beside {wanted.goal} that have, and "
                f"there are {len(clients)}; lower concurrency or goal"
            )
        return cls(
            experiment,
            clients,
            facts.get("clock", 0.0),
            facts.get("begun", 0),
            [Flight(**flight) for flight in facts.get("open", [])],
        )

    def to_dict(self) -> dict[str, Any]:
        return {"clock": self.clock, "begun": self.begun, "open": [asdict(flight) for flight in self.open]}

    def pop(self, count: int, version: int, busy: Collection[str], send: Callable[[Client], object]) -> list[Flight]:
        """The next ``count`` clients to be done, in that order; for each another begins at that time.

        Args:
            version: what a client that begins now starts from. busy: names of those whose upload is in the buffer.
            send: called with each client that begins.
        """
        wanted = self.experiment.server.asynchronous
        assert wanted is not None
        done: list[Flight] = []
        while len(self.open) < wanted.concurrency:
            self._begin(version, busy, done, send)
        while len(done) < count:
            flight = min(self.open)
            self.open.remove(flight)
            self.clock = flight.due
            done.append(flight)
            self._begin(version, busy, done, send)
        return done

    def lost(self, flight: Flight) -> bool:
        """Whether that upload never comes."""
        drawn = np.random.default_rng([self.experiment.seed, DROPOUT, flight.number]).random()
        return bool(drawn < self.experiment.clients.dropout)

    def _begin(self, version: int, busy: Collection[str], done: list[Flight], send: Callable[[Client], object]) -> None:
        away = {flight.client for flight in (*self.open, *done)}
        free = [client for client in self.clients if client.index not in away and client.name not in busy]
        if not free:
            raise SimulationError(
                f"all {len(self.clients)} clients came in one round, and too few uploads could be taken; lower "
                "training.lr, clients.dropout or server.asynchronous.goal"
            )
        pick = np.random.default_rng([self.experiment.seed, SAMPLE, self.begun]).integers(len(free))
        client = free[pick]
        self.open.append(Flight(self.clock + self._duration(client), self.begun, client.index, version))
        self.begun += 1
        send(client)

    def _duration(self, client: Client) -> float:
        assert self.experiment.server.asynchronous is not None
        drawn = np.random.default_rng([self.experiment.seed, SPEED, client.index]).normal()
        pace = math.exp(self.experiment.server.asynchronous.spread * drawn)
        return pace * self.experiment.training.examples(client.train)


class Asynchronous:
    """Rounds of FedBuff: a step of the server as soon as enough uploads are there, whatever they started from."""

    def __init__(self, server: Server, clients: Clients) -> None:
        self.server, self.clients = server, clients
        wanted = server.experiment.server.asynchronous
        assert wanted is not None
        self.wanted = wanted
        self.flights = Flights.of(server.experiment, server.people.clients, server.state.extra)
        options, exponent = server.experiment.server, wanted.exponent
        old = self._versions()
        self.buffer = FedBuff(
            wanted.goal,
            lambda tau: (1.0 + tau) ** -exponent,
            rank=server.rank,
            max_staleness=wanted.max_staleness,
            initial=None if old else server.initial,
            versions=old or None,
            solver=options.solver,
            tol=options.tol,
            seed=server.experiment.seed,
            device="cuda" if torch.cuda.is_available() else None,
        )

    def _versions(self) -> dict[int, GlobalUpdate]:
        """Of a run that was stopped: the current version, and those that clients still train from."""
        now = self.server.state
        if now.update is None:
            return {}
        found = {now.round: now.update}
        for number in self.needed():
            before = State.load(self.server.folder / f"{number:05d}").update if number else self._first()
            assert before is not None
            found[number] = before
        return found

    def _first(self) -> GlobalUpdate:
        """Version 0, as FedBuff makes it of the initial adapter."""
        first = FedBuff(1, initial=self.server.initial).current
        assert first is not None
        return first

    def needed(self) -> set[int]:
        """Rounds before the last whose states are still needed: those that clients train from."""
        return {flight.version for flight in self.flights.open} - {self.server.state.round}

    def play(self, number: int, seconds: dict[str, float]) -> dict[str, Any]:
        """One step of the server; its part of the line."""
        seconds |= {"train": 0.0, "aggregate": 0.0}
        popped: list[Flight] = []
        done: dict[str, Trained] = {}
        staleness: dict[str, int] = {}
        while not self.buffer.ready:
            flights = self.flights.pop(
                self.wanted.goal - len(self.buffer.buffered),
                self.buffer.version,
                [*self.buffer.buffered, *done],
                self.server.model_of,
            )
            popped += flights
            self._trained(
                number, [flight for flight in flights if not self.flights.lost(flight)], done, staleness, seconds
            )
        return self._stepped(popped, done, staleness, seconds)

    def _trained(
        self,
        number: int,
        flights: list[Flight],
        done: dict[str, Trained],
        staleness: dict[str, int],
        seconds: dict[str, float],
    ) -> None:
        """Have these train, and put what they send into the buffer, in their order."""
        started = time.perf_counter()
        people = self.server.people.clients
        asks = [Ask(people[f.client], self._model(f), f.number, (f.version, f.number)) for f in flights]
        done |= self.clients.train(number, asks)
        trained = time.perf_counter()
        for ask, flight in zip(asks, flights, strict=True):
            upload = self.clients.upload(number, ask)
            try:
                tau = self.buffer.add(upload.adapter, flight.version, ask.client.train, ask.client.name)
            except AdapterError:
                continue  # noted by the buffer; a client that diverged ends no round
            staleness[ask.client.name] = tau
        seconds["train"] += trained - started
        seconds["aggregate"] += time.perf_counter() - trained

    def _model(self, flight: Flight) -> Model:
        client = self.server.people.clients[flight.client]
        return Model(self.server.place(flight.version, client.type))

    def _stepped(
        self, popped: list[Flight], done: dict[str, Trained], staleness: dict[str, int], seconds: dict[str, float]
    ) -> dict[str, Any]:
        started = time.perf_counter()
        refused, people, now = list(self.buffer.refused), self.server.people.clients, self.server.state
        now.update = self.buffer.step()
        now.round, now.extra = self.buffer.version, self.flights.to_dict()
        now.save(self.server.folder / f"{now.round:05d}")
        seconds["aggregate"] += time.perf_counter() - started
        names = [people[flight.client].name for flight in popped]
        return {
            "sampled": names,
            "dropped": [name for name in names if name not in done],
            "refused": metrics.refusals(refused),
            "train": metrics.training(done),
            "update": self.server.updated(),
            "bytes": {
                "up": sum(trained.bytes for trained in done.values()),
                "down": self.server.sent_bytes([self._model(flight) for flight in popped]),
            },
            "staleness": staleness,
            "clock": self.flights.clock,
        }
