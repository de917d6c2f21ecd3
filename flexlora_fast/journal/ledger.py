"""What the lines of a manifest mean, taken one after the other. No file is looked at here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexlora_fast.journal.lines import Record
from flexlora_fast.update import Refusal

DROPPED = "dropped"  # the code of a client that the server took out again


@dataclass(frozen=True)
class Accepted:
    """An acknowledged upload.

    Attributes:
        n: the number of its line, after which its file in the spool is called. bytes: of the weights.
        sha256: of the weights. config: of the ``adapter_config.json`` that came with them, or None.
    """

    n: int
    client: str
    weight: float
    sha256: str
    config: str | None
    bytes: int

    def same(self, weight: float, sha256: str, config: str | None) -> bool:
        """Whether an upload is this one again: its weight and config are part of it."""
        return (self.weight, self.sha256, self.config) == (weight, sha256, config)


class Ledger:
    """The state of a round.

    Attributes:
        accepted: by client. refusals, dropped: what was turned away, each thing once. last: number of the last line.
        numbers: of all lines that are there. resolved: of those that are not, and are done with.
        finished: the line that says so.
    """

    def __init__(self) -> None:
        self.accepted: dict[str, Accepted] = {}
        self.refusals: dict[Refusal, int] = {}
        self.dropped: dict[str, str] = {}
        self.finished: Record | None = None
        self.last = 0
        self.numbers: set[int] = set()
        self.resolved: set[int] = set()

    def apply(self, record: Record) -> None:
        """Take the next line."""
        self.last = record["n"]
        self.numbers.add(self.last)
        getattr(self, f"_{record['kind']}")(record)

    def refused(self) -> list[Refusal]:
        """Who is not in the round and why, in an order that does not depend on who came first: a server that died may
        have been sent the same again in another one.
        """
        dropped = [
            Refusal(client, f"client {client!r}: taken out of the round by the server: {reason}", DROPPED)
            for client, reason in self.dropped.items()
        ]
        return sorted([*self.refusals, *dropped], key=lambda refusal: (refusal.client, refusal.code, refusal.reason))

    def _accept(self, record: Record) -> None:
        entry = Accepted(**{name: record[name] for name in Accepted.__dataclass_fields__})
        self.accepted[entry.client] = entry
        self.dropped.pop(entry.client, None)
        self.resolved.update(record["restores"])

    def _refuse(self, record: Record) -> None:
        refusal = Refusal(record["client"], record["reason"], record["code"])
        self.refusals.setdefault(refusal, record["n"])

    def _drop(self, record: Record) -> None:
        self.accepted.pop(record["client"], None)
        self.dropped[record["client"]] = record["reason"]

    def _forgo(self, record: Record) -> None:
        self.resolved.add(record["line"])

    def _finish(self, record: Record) -> None:
        self.finished = record


def accept(client: str, weight: float, sha256: str, config: str | None, size: int, restores: list[int]) -> Record:
    """``restores``: lost lines that this one makes up for."""
    facts: dict[str, Any] = {"client": client, "weight": weight, "sha256": sha256, "config": config, "bytes": size}
    return {"kind": "accept", **facts, "restores": restores}


def refuse(refusal: Refusal, evidence: bool) -> Record:
    return {
        "kind": "refuse",
        "client": refusal.client,
        "code": refusal.code,
        "reason": refusal.reason,
        "evidence": evidence,
    }


def drop(client: str, reason: str) -> Record:
    return {"kind": "drop", "client": client, "reason": reason}


def forgo(line: int, reason: str) -> Record:
    """A lost line that the server goes on without."""
    return {"kind": "forgo", "line": line, "reason": reason}


def finish(sha256: str, size: int, seconds: dict[str, float]) -> Record:
    return {"kind": "finish", "sha256": sha256, "bytes": size, "seconds": seconds}
