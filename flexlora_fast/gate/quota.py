"""How much of what a policy lets one round take is taken."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import RefusedError
from flexlora_fast.gate.policy import RoundPolicy
from flexlora_fast.gate.reasons import Reason
from flexlora_fast.tensorfile import TensorFile


class Quota:
    """Counts the clients of one round and the bytes of their weights against the policy's ``max_clients`` and
    ``max_round_bytes``.
    """

    def __init__(self, policy: RoundPolicy) -> None:
        self._policy = policy
        self._clients = self._bytes = 0

    def room(self, kept: Sequence[int] = ()) -> int | None:
        """Bytes that are left for one client more; None for any number.

        ``kept``: bytes of other clients' weights, for whom a place is kept though they are not here.

        Raises ``RefusedError`` (round-full) where no client is.
        """
        most = self._policy.max_clients
        if most is not None and self._clients + len(kept) >= most:
            raise RefusedError(
                f"the round has its {most} clients",
                code=Reason.ROUND_FULL,
                value=self._clients + len(kept),
                remedy="take it into the next round, or give the policy another max_clients",
            )
        left = self._policy.max_round_bytes
        return None if left is None else left - self._bytes - sum(kept)

    def add(self, adapter: Adapter) -> None:
        """Count a client that was taken."""
        self._clients += 1
        self._bytes += _size(adapter)

    def remove(self, adapter: Adapter) -> None:
        """Give back the place of one that was refused after all."""
        self._clients -= 1
        self._bytes -= _size(adapter)


def _size(adapter: Adapter) -> int:
    """Bytes of its weights as they came."""
    return adapter.tensors.index.size if isinstance(adapter.tensors, TensorFile) else adapter.skeleton.nbytes
