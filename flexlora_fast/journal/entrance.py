"""The aggregator of a journalled round: what it lets in is on disk first, and what it lost is no client's fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.errors import AdapterError, UnreadableError
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.gate.entrance import Entrance, Source
from flexlora_fast.gate.intake import Spool
from flexlora_fast.tensorfile import TensorFile


class SpoolEntrance(Entrance):
    """Admits uploads into files that the journal makes, and has it make them durable.

    An ``Adapter`` is one that was admitted before, and is taken as it is.

    Args:
        new_file: as ``gate.intake.Spool``. commit: of an accepted client's name and weight; returns when all is on
            disk. lost: bytes of the uploads, but for those of a client, that were acknowledged and are lost: they may
            come again, so nobody else gets their places.
    """

    def __init__(
        self,
        policy: RoundPolicy,
        new_file: Callable[[], tuple[int, str]],
        commit: Callable[[str, float], None],
        lost: Callable[[str], list[int]],
    ) -> None:
        super().__init__(policy, None)
        self._new_file, self._commit, self._kept_for = new_file, commit, lost

    def take(self, source: Source, client: str, weight: float) -> Adapter:
        return self._counted(source) if isinstance(source, Adapter) else super().take(source, client, weight)

    def keep(self, adapter: Adapter, client: str, weight: float) -> None:
        if adapter in self._copies:
            self._copies.remove(adapter)  # the journal's from now on, come what may
            self._commit(client, weight)

    def _kept(self, client: str) -> list[int]:
        return self._kept_for(client)

    def _folder(self) -> Spool:
        return self._new_file


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
