"""Rounds of state dicts under a policy: one global state dict at the largest rank out, whatever comes in."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flexlora_fast.errors import AdapterError, EmptyRoundError, OptionError, RefusedError, WeightError, shown
from flexlora_fast.gate import Reason, RoundPolicy
from flexlora_fast.integrations.rounds import Rounds
from flexlora_fast.integrations.states import checked_rank, upload_of
from flexlora_fast.refusals import Refusals
from flexlora_fast.truncation import truncated
from flexlora_fast.update import GlobalUpdate, Refusal

UNREADABLE = "unreadable"
"""The code of a refusal of what cannot be read at all, beside ``gate.Reason``'s."""

log = logging.getLogger(__name__)


class Served:
    """A server's rounds, fed with state dicts as they come (from several threads, if need be).

    Args:
        policy: what clients may send; a ``RoundPolicy``, its ``to_json`` document, or the path of its file.
        rank: of the global factors; default: the largest that the policy allows.
        options: what else a round takes (``Aggregator``): ``{"defence": "clip", "min_clients": 3}``.

    Attributes:
        update: the last finished round's, None before. refused: the refusals of this
            round, or of the last one until another begins. metrics: numbers of the last
            round that was finished: accepted, refused, refused-CODE, seconds, and of a round that made an update norm
            (‖ΔW‖_F) and energy-kept-rN at each rank N of its clients. ranks: the rank that each client sent last, by
            layer.

    Raises ``OptionError`` for a policy of partial uploads: a layer that nobody sent would be missing afterwards.
    """

    def __init__(
        self,
        policy: RoundPolicy | Mapping[str, Any] | str | Path,
        rank: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy = policy_of(policy)
        if self.policy.partial:
            raise OptionError("the policy has partial=True, and one global model has all layers; leave it away")
        self.rank = checked_rank(max(self.policy.ranks) if rank is None else rank, self.policy)
        self.update: GlobalUpdate | None = None
        self.refused = Refusals()
        self.metrics: dict[str, float] = {}
        self.ranks: dict[str, dict[str, int]] = {}
        self._rounds = Rounds(self.policy, None, dict(options or {}))
        self._lock = threading.Lock()
        self._number = 1
        self._open()

    @property
    def clients(self) -> list[str]:
        """Names of those accepted in the open round, sorted."""
        return self._rounds.clients

    def begin(self) -> None:
        """A new round; what came since the last one is forgotten. Without it, the first who comes begins one."""
        with self._lock:
            self._open()

    def take(self, state: Any, weight: Any, client: Any) -> Refusal | None:
        """One client's state dict into the round, or why not. What it holds never raises.

        Raises ``OSError`` where this server's own disk fails.
        """
        with self._lock:
            if not self._rounds.is_open:
                self._open()
            try:
                if not isinstance(client, str):  # None would have the round find a name
                    what = f"its name is {shown(client)}"
                    raise RefusedError(what, code=Reason.NAME, value=client, remedy="give a non-empty string")
                self._rounds.add(self._upload(state), weight, client)
            except (AdapterError, WeightError) as error:
                error.at(client=str(client))
                return self._refuse(str(client), error)
        return None

    def refuse(self, client: str, error: AdapterError) -> Refusal:
        """Note a refusal that was found out elsewhere."""
        error.at(client=client)
        with self._lock:
            if not self._rounds.is_open:
                self._open()
            return self._refuse(client, error)

    def finish(self) -> dict[str, Tensor] | None:
        """The global state dict at ``rank``; None where the round had too few clients, and changes nothing."""
        with self._lock:
            if not self._rounds.is_open:
                self._open()
            started, accepted = time.perf_counter(), len(self.clients)
            update: GlobalUpdate | None = None
            state = None
            try:
                update = self._rounds.finish()
                state = self._state(update)
            except (EmptyRoundError, WeightError, AdapterError) as error:  # too few, or too large for float32 together
                log.warning("Round %s changes nothing (%s): %s", self._number, error.code, error)
            else:
                self.update = update
                self.ranks |= {client.name: dict(client.ranks) for client in update.clients}
            made = update if state is not None else None
            self.metrics = _metrics(made, accepted, self.refused) | {"seconds": time.perf_counter() - started}
            log.info("Round %s: %s", self._number, self.metrics)
            self._number += 1
            return state

    def _open(self) -> None:
        self.refused = Refusals()
        self._rounds.open(self._number, self.rank)

    def _upload(self, state: Any) -> bytes:
        try:
            return upload_of(state, self.policy)
        except (AdapterError, MemoryError):
            raise
        except Exception as error:  # whatever reading a stranger's objects raises
            what = f"its state dict cannot be read ({type(error).__name__}: {shown(str(error), 200)})"
            raise RefusedError(what, code=UNREADABLE, value=type(error).__name__) from error

    def _refuse(self, client: str, error: AdapterError | WeightError) -> Refusal:
        refusal = self.refused.note(client, error)
        log.warning("Refused (%s): %s", refusal.code, refusal.reason)
        return refusal

    def _state(self, update: GlobalUpdate) -> dict[str, Tensor]:
        ranks = dict.fromkeys(update.layers, self.rank)
        scales = {layer: self.policy.scale(layer, self.rank) for layer in ranks}
        return truncated(update.adapter(), ranks, scales, seed=update.seed).state_dict()


def policy_of(given: RoundPolicy | Mapping[str, Any] | str | Path) -> RoundPolicy:
    """A policy, as it is, from its document, or from its file. Raises ``OptionError`` for what is none."""
    if isinstance(given, RoundPolicy):
        return given
    return RoundPolicy.load(given) if isinstance(given, str | Path) else RoundPolicy.from_json(given)


def _metrics(update: GlobalUpdate | None, accepted: int, refused: Refusals) -> dict[str, float]:
    counts = Counter(refusal.code for refusal in refused)
    metrics: dict[str, float] = {"accepted": accepted if update is None else len(update.clients)}
    metrics |= {"refused": refused.total} | {f"refused-{code}": count for code, count in sorted(counts.items())}
    if update is not None:
        metrics["norm"] = update.norm
        kept = min((layer.rank for layer in update.values() if not layer.complete), default=math.inf)
        ranks = sorted({rank for client in update.clients for rank in client.ranks.values()})
        metrics |= {f"energy-kept-r{rank}": update.energy_kept(rank) for rank in ranks if rank <= kept}
    return metrics
