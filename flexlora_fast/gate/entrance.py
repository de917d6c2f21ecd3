"""How clients come into one round: through its policy, where it has one."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, OptionError, RefusedError
from flexlora_fast.gate.intake import Spool, Upload
from flexlora_fast.gate.policy import RoundPolicy, discard
from flexlora_fast.gate.reasons import Reason
from flexlora_fast.tensorfile import TensorFile

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
        self._clients = self._bytes = 0  # of what is in the round

    def take(self, source: Source, client: str, weight: float) -> Adapter:
        """The adapter in ``source``; with a policy its values are checked as well.

        Raises ``AdapterError``, with a policy ``RefusedError``.
        """
        if self.policy is None:
            if isinstance(source, bytes | Upload):
                raise AdapterError("bytes do not tell their scales; give the round a policy, or an Adapter")
            return source if isinstance(source, Adapter) else Adapter.load(source, client=client)
        if self.policy.max_clients is not None and self._clients >= self.policy.max_clients:
            raise RefusedError(
                f"the round has its {self.policy.max_clients} clients",
                code=Reason.ROUND_FULL,
                value=self._clients,
                remedy="take it into the next round, or give the policy another max_clients",
            )
        most = self.policy.max_round_bytes
        room = None if most is None else most - self._bytes
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
        if self.policy is None:
            return
        self._clients -= 1
        self._bytes -= _size(adapter)
        if adapter in self._copies:
            self._copies.remove(adapter)
            discard(adapter)

    def _counted(self, adapter: Adapter) -> Adapter:
        self._clients += 1
        self._bytes += _size(adapter)
        return adapter

    def _folder(self) -> Spool:
        if self._spool is None:
            self._spool = tempfile.mkdtemp(prefix="flexlora-")
            weakref.finalize(self, shutil.rmtree, self._spool, ignore_errors=True)
        return self._spool


def _size(adapter: Adapter) -> int:
    """Bytes of its weights as they came."""
    return adapter.tensors.index.size if isinstance(adapter.tensors, TensorFile) else adapter.skeleton.nbytes
