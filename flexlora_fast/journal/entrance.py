"""The aggregator of a journalled round: what it lets in is on disk first, and what it lost is no client's fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.errors import AdapterError, UnreadableError
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.gate.entrance import Entrance, Source
from flexlora_fast.gate.policy import discard
from flexlora_fast.tensorfile import TensorFile


class SpoolEntrance(Entrance):
    """Admits uploads into files that the journal makes, and has it make them durable.

    An ``Adapter`` is one that was admitted before, and is taken as it is.

    Args:
        new_file: as ``gate.intake.Spool``. commit: of an accepted client's name and weight; returns when all is on
            disk.
    """

    def __init__(
        self, policy: RoundPolicy, new_file: Callable[[], tuple[int, str]], commit: Callable[[str, float], None]
    ) -> None:
        super().__init__(policy, None)
        self._rules, self._new_file, self._commit = policy, new_file, commit
        self._fresh: Adapter | None = None  # admitted, and not on disk for good yet

    def take(self, source: Source, client: str, weight: float) -> Adapter:
        if isinstance(source, Adapter):
            return source
        self._fresh = self._rules.admit(source, client=client, weight=weight, spool=self._new_file)
        return self._fresh

    def keep(self, adapter: Adapter, client: str, weight: float) -> None:
        if adapter is self._fresh:
            self._commit(client, weight)
            self._fresh = None

    def drop(self, adapter: Adapter) -> None:
        if adapter is self._fresh:  # all others are the journal's, which may need them again
            discard(adapter)
            self._fresh = None


class Journalled(Aggregator):
    """Clients come from the spool, and may be taken out again."""

    def __init__(self, policy: RoundPolicy, entrance: Entrance, **options: Any) -> None:
        super().__init__(policy=policy, **options)
        self._entrance = entrance
        self._timed = False  # the file must come out the same after a crash

    def holds(self, client: str) -> bool:
        return client in self._clients

    def intact(self, client: str) -> bool:
        """Whether the file of an accepted client is the one that it came in."""
        tensors = self._clients[client].source.tensors
        assert isinstance(tensors, TensorFile)
        try:
            tensors.opened()
        except UnreadableError:
            return False
        return True

    def withdraw(self, client: str) -> None:
        """Let an accepted client be one that never came."""
        self._take_out(client)

    def _refuse(self, name: str, error: AdapterError) -> None:
        if isinstance(error, UnreadableError):  # ``finish`` would go on without a client that was acknowledged
            raise error
        super()._refuse(name, error)
