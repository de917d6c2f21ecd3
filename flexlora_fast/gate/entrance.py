"""How clients come into one round: through its policy, where it has one."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref

import numpy as np

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.gate.intake import Spool, Upload
from flexlora_fast.gate.policy import RoundPolicy, discard
from flexlora_fast.gate.quota import Quota

Source = Adapter | str | os.PathLike[str] | bytes | Upload


class Entrance:
    """Adapters from what clients send, and the copies of theirs that the round reads from.

    Args:
        policy: None believes clients as far as they do not contradict themselves.
        spool: folder for the copies, which stay there; None makes one that goes with this object.
    """

    def __init__(self, policy: RoundPolicy | None, spool: str | os.PathLike[str] | None) -> None:
        if spool is not None and policy is None:
            raise OptionError("spool is where a policy's copies go, and there is no policy; give one, or no spool")
        self.policy, self._spool = policy, spool
        self._copies: set[Adapter] = set()
        self._quota = None if policy is None else Quota(policy)

    def take(self, source: Source, client: str, weight: float) -> Adapter:
        """The adapter in ``source``; with a policy its values are checked as well.

        Raises ``AdapterError``, with a policy ``RefusedError``.
        """
        if isinstance(source, np.ndarray):
            raise AdapterError(
                "an array is no adapter; sketches and their sums go to secure.Server, which takes no defence and no "
                "policy: those judge single updates, and secure aggregation hides them"
            )
        if self.policy is None or self._quota is None:
            if isinstance(source, bytes | Upload):
                raise AdapterError("bytes do not tell their scales; give the round a policy, or an Adapter")
            return source if isinstance(source, Adapter) else Adapter.load(source, client=client)
        room = self._quota.room(self._kept(client))
        if isinstance(source, Adapter):
            self.policy.check(source, client=client, weight=weight, room=room)
            adapter = source
        else:
            adapter = self.policy.admit(source, client=client, weight=weight, spool=self._folder(), room=room)
            self._copies.add(adapter)
        return self._counted(adapter)

    def keep(self, adapter: Adapter, client: str, weight: float) -> None:
        """Called once all checks are passed, before the client is in: a journal makes it durable here."""

    def drop(self, adapter: Adapter) -> None:
        """A client that was taken is refused after all: its place is free, and its copy removed, if there is one."""
        if self._quota is not None:
            self._quota.remove(adapter)
        if adapter in self._copies:
            self._copies.remove(adapter)
            discard(adapter)

    def _kept(self, client: str) -> list[int]:
        """Bytes of the weights of others than ``client`` that come, or come again, into places kept for them."""
        return []

    def _counted(self, adapter: Adapter) -> Adapter:
        if self._quota is not None:
            self._quota.add(adapter)
        return adapter

    def _folder(self) -> Spool:
        if self._spool is None:
            self._spool = tempfile.mkdtemp(prefix="flexlora-")
            weakref.finalize(self, shutil.rmtree, self._spool, ignore_errors=True)
        return self._spool
