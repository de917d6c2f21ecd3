"""Rounds in which all that were asked are waited for."""

from __future__ import annotations

import time
from typing import Any

from flexlora_fast.simulate import metrics
from flexlora_fast.simulate.server import Server
from flexlora_fast.simulate.training import Ask, Clients


class Synchronous:
    """Sample clients, have them train, add up what they send."""

    def __init__(self, server: Server, clients: Clients) -> None:
        self.server, self.clients = server, clients

    def play(self, number: int, seconds: dict[str, float]) -> dict[str, Any]:
        """One round; its part of the line."""
        started = time.perf_counter()
        server = self.server
        sampled, answering = server.sample(number)
        down = server.sent_bytes([server.model_of(client) for client in sampled])
        asks = [Ask(client, server.model_of(client), client.index, (number, client.index)) for client in answering]
        done = self.clients.train(number, asks)
        trained = time.perf_counter()
        outcome = server.aggregate([self.clients.upload(number, ask) for ask in asks])
        server.advance(outcome, {name: result.rank for name, result in done.items()})
        seconds |= {"train": trained - started, "aggregate": time.perf_counter() - trained}
        names = [client.name for client in sampled]
        return {
            "sampled": names,
            "dropped": [name for name in names if name not in done],
            "refused": metrics.refusals(outcome.refused),
            "train": metrics.training(done),
            "update": None if outcome.update is None else server.updated(),
            "bytes": {"up": sum(trained.bytes for trained in done.values()), "down": down},
        }

    def needed(self) -> set[int]:
        """Rounds before the last whose states are still needed."""
        return set()
