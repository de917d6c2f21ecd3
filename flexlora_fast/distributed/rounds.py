"""A round that all ranks of a process group make together: the same clients everywhere, the update on the first."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexlora_fast
from flexlora_fast import aggregator, memory
from flexlora_fast.admission import check_values
from flexlora_fast.defence import Verdict, judging
from flexlora_fast.defence.gram import gram_of
from flexlora_fast.distributed import finishing
from flexlora_fast.distributed.sharding import owned, owners
from flexlora_fast.distributed.team import Team, nothing
from flexlora_fast.errors import AdapterError, DistributedError, OptionError
from flexlora_fast.incremental import KeptGrams
from flexlora_fast.planning import Settings
from flexlora_fast.update import GlobalUpdate
from flexlora_fast.work import Client, Work

SHARDS = ("auto", "layers", "clients")
# What one process alone can do, and why.
_ALONE = {
    "policy": "an upload is taken by one process; admit it there (policy.admit), and hand over what it gives",
    "spool": "there is no policy",
    "results": "layers are gathered in the first rank's memory",
    "privacy": "its noise is drawn, and charged, by one process; use ff.Aggregator",
    "reference": "it belongs to privacy=, whose noise is drawn by one process",
}


class Aggregator(aggregator.Aggregator):
    """``ff.Aggregator`` on all ranks: each adds the same clients, under the same names, and all call ``finish``.

    Args:
        team: the ranks.
        shard: "layers": each is solved by one rank. "clients": each rank has some of them, and what their factors make
            of blocks of vectors (or ΔW itself, where that fits) is summed up. "auto": the second for layers that do not
            fit one rank's memory, the first for all others.
        options: as for ``ff.Aggregator``. ``memory_limit`` is each rank's (default: half of the machine's memory,
            shared by the ranks there). ``read`` is "finish", so that a tensor is read by the one rank that needs it.

    Raises ``OptionError`` for options that one process alone can honour, by name.
    """

    def __init__(self, team: Team, *args: Any, shard: str = "auto", **options: Any) -> None:
        for name in sorted(name for name in _ALONE if options.get(name) not in (None, "cpu")):
            raise OptionError(f"{name}= is not for rounds on several ranks: {_ALONE[name]}")
        if shard not in SHARDS:
            raise OptionError(f"shard {shard!r} is not one of {', '.join(map(repr, SHARDS))}")
        here = options.get("memory_limit")
        limit = team.run(lambda: memory.parse_limit(here) // (team.neighbours if here is None else 1))
        options |= {"memory_limit": min(team.gather(limit)), "read": options.get("read", "finish")}
        options |= {} if team.rank == 0 else {"progress": False}
        self.team, self.shard = team, shard
        team.run(lambda: aggregator.Aggregator.__init__(self, *args, **options))
        room = self.memory_limit if self.device.type == "cpu" else memory.room(self.device, here)
        places = team.gather((socket.gethostname(), str(self.device)))
        self._room_here = min(
            team.gather(room if self.device.type == "cpu" else room // places.count(places[team.rank]))
        )

    def finish(self, out: str | os.PathLike[str] | None = None) -> GlobalUpdate | None:  # type: ignore[override]
        """The update on the first rank, which writes ``out``; None on the others.

        Raises what ``ff.Aggregator.finish`` does, the same on all ranks; and ``DistributedError`` where they do not
        have the same round, or one of them failed, died or hangs.
        """
        _compare(self.team, self._description())
        path = None if out is None else Path(out)

        def solve(work: Work, frame: GlobalUpdate, budget: int) -> GlobalUpdate | None:
            _compare(self.team, {"plans": repr([(plan, plan.spec.name) for plan in work.plans])})
            return finishing.finish(self.team, work, frame, budget, self.progress, path)

        return self._finished(solve)

    def _description(self) -> dict[str, Any]:
        """What must be the same on all ranks, as text."""
        clients = [(name, self._clients[name]) for name in self.clients]
        skeletons = {id(client.source.skeleton): client.source.skeleton for _, client in clients}
        told = {i: _digest(repr((s.config, s.specs, s.ranks, s.scales, s.forms))) for i, s in skeletons.items()}
        options = self.rank, str(self.method), self.solver, self.tol, self.seed, self.missing, self.certificate
        return {
            "version": flexlora_fast.__version__,
            "options": repr((*options, str(self.defence), self.shard)),
            "refused clients": repr([(refusal.client, refusal.code) for refusal in self.refused]),
            "clients": repr([name for name, _ in clients]),
            "weights": repr([client.weight for _, client in clients]),
            "adapters": repr([told[id(client.source.skeleton)] for _, client in clients]),
        }

    # -- what one process does alone, shared out ---

    def _settings(self) -> Settings:
        return dataclasses.replace(
            super()._settings(), room=self._room_here, processes=self.team.size, shard=self.shard
        )

    def _judged(self, grams: KeptGrams) -> tuple[list[Client], list[Verdict]]:
        with self.team.agreed():
            clients, verdicts = super()._judged(grams)
        # The same numbers may be judged otherwise by another machine's arithmetic: the first rank's word counts.
        said = self.team.first((verdicts, [(client.share, client.factor) for client in clients]))
        for client, (share, factor) in zip(clients, said[1], strict=True):
            client.share, client.factor = share, factor
        return clients, said[0]

    def _gram_of(self, work: Work, pairs: bool) -> Tensor:
        unseen = [client for client in work.clients if not client.checked]
        share = owned(owners(self.team, work.plans, work.settings), self.team.rank)

        def measure() -> Tensor:
            for client in unseen[self.team.rank :: self.team.size]:
                judging.check_extras(client)
            return gram_of(dataclasses.replace(work, only=share), pairs)

        grams = self.team.gather(self.team.run(measure))
        for client in unseen:
            client.checked = True
        return torch.stack(grams).sum(dim=0)

    def _check_the_others(self) -> None:
        unseen = [client for client in self._clients.values() if not client.checked]

        def look() -> dict[str, AdapterError]:
            found = {}
            for client in sorted(unseen, key=lambda client: client.name)[self.team.rank :: self.team.size]:
                self.team.look()
                try:
                    check_values(client.name, client.adapter)
                except AdapterError as error:
                    error.at(client=client.name)
                    found[client.name] = error
            return found

        found = {name: error for part in self.team.gather(self.team.run(look)) for name, error in part.items()}
        for name in sorted(found):
            self._refuse(name, found[name])
        for client in unseen:
            client.checked = True
        self._suspicious = False


def _compare(team: Team, mine: Mapping[str, str]) -> None:
    """Raise ``DistributedError`` on all ranks where some of them differ in one of these texts."""
    team.run(nothing)  # whoever failed before says so now
    told = team.gather({what: (_digest(text), text[:200]) for what, text in mine.items()})
    for what in mine:
        for rank, other in enumerate(told):
            if other[what][0] != told[0][what][0]:
                raise DistributedError(
                    f"the ranks do not make the same round: {what} of rank 0 are {told[0][what][1]}, those of rank "
                    f"{rank} are {other[what][1]}; call it with the same arguments on all ranks, which see the same "
                    "files through the same version of this package"
                )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
