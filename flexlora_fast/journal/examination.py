"""A round's folder held against its manifest: what is there, what is not any more, and what to do about it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexlora_fast.errors import JournalError
from flexlora_fast.gate.intake import SHORTAGES
from flexlora_fast.journal import lines
from flexlora_fast.journal.ledger import Accepted, Ledger
from flexlora_fast.journal.place import Place, is_file, read, remedy, sha256
from flexlora_fast.update import Refusal

if TYPE_CHECKING:
    from rich.console import RenderableType

SEND_AGAIN = "have it sent again, the same bytes, or take the client out of the round"
_TRIES = 5
_FARTHEST = 100_000  # lines that a manifest can have lost; an upload of a number beyond is none of ours


@dataclass(frozen=True)
class Damage:
    """Something acknowledged that is not there any more, or is another now.

    Attributes:
        problem, remedy: in words. client: whose upload it was, where that is known. line: its number, where a line of
            the manifest is lost.
    """

    problem: str
    remedy: str
    client: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class Status:
    """What a round's folder holds.

    Attributes:
        path: of the folder. state: "open", "finished" or "damaged". clients: the acknowledged uploads, by name.
        refused: who was turned away. damage: all that was found. bytes: of the uploads. options: what the round was
            begun with. update: the path of the finished update, or None.
    """

    path: Path
    state: str
    clients: list[Accepted]
    refused: list[Refusal]
    damage: list[Damage]
    options: dict[str, Any]
    update: Path | None

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.clients)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "format": "flexlora_fast.round_status/1",
            "path": str(self.path),
            "state": self.state,
            "bytes": self.bytes,
            "clients": [vars(entry) for entry in self.clients],
            "refused": [vars(refusal) for refusal in self.refused],
            "damage": [vars(damage) for damage in self.damage],
            "options": self.options,
            "update": None if self.update is None else str(self.update),
        }

    def view(self) -> RenderableType:
        """Tables for a terminal."""
        from rich.console import Group

        from flexlora_fast import memory, tables

        size = memory.show(self.bytes)
        parts: list[RenderableType] = [f"{self.state}: {tables.count(len(self.clients), 'client')}, {size}"]
        rows: list[list[Any]] = [[x.client, tables.number(x.weight), x.bytes, x.sha256[:16]] for x in self.clients]
        parts += [tables.table("Clients", ["client", "weight", "bytes", "sha256"], rows, left=["client", "sha256"])]
        if self.refused:
            rows = [[x.client, x.code, x.reason] for x in self.refused]
            parts.append(tables.table("Refused", ["client", "code", "reason"], rows, left=["client", "code", "reason"]))
        if self.damage:
            rows = [[x.client or (f"line {x.line}" if x.line else "–"), x.problem, x.remedy] for x in self.damage]
            parts.append(tables.table("Damage", ["of", "what", "what to do"], rows, left=["of", "what", "what to do"]))
        return Group(*parts)


@dataclass
class Findings:
    """What the journal goes on from.

    Attributes:
        manifest: its bytes, as they are. content, ledger: what they say. damage: all of it.
        lost: numbers of lines that are gone, with the SHA-256 of what the spool has of them.
        next: the number of the next line. superfluous: files of the spool that belong to no acknowledged upload.
        whole: whether a finished round has its update.
    """

    manifest: bytes
    content: lines.Content
    ledger: Ledger
    damage: list[Damage] = field(default_factory=list)
    lost: dict[int, str | None] = field(default_factory=dict)
    next: int = 1
    superfluous: list[Path] = field(default_factory=list)
    whole: bool = False


def examine(path: str | os.PathLike[str]) -> Status:
    """The state of the round in a folder; nothing is changed, and it may be in use. Every upload is read.

    Raises ``JournalError`` for a folder that is no round, or cannot be read.
    """
    place = Place(path)
    try:
        head = place.read_head()
        found = look(place, head["key"])
        for _ in range(_TRIES):  # an upload that is replaced meanwhile would look as if it had vanished
            if not found.damage or _manifest(place) == found.manifest:
                break
            found = look(place, head["key"])
    except OSError as error:
        raise JournalError(f"{str(place.path)!r} cannot be read ({error.strerror}); {remedy(error)}") from error
    state = "damaged" if found.damage else "finished" if found.ledger.finished else "open"
    return Status(
        place.path,
        state,
        sorted(found.ledger.accepted.values(), key=lambda entry: entry.client),
        found.ledger.refused(),
        found.damage,
        head["options"],
        place.update if found.whole else None,
    )


def look(place: Place, key: str) -> Findings:
    """Read the manifest, and hold the spool against it. Raises ``OSError``."""
    data = _manifest(place)
    content = lines.parse(key, data)
    ledger = Ledger()
    for record in content.records:
        ledger.apply(record)
    found = Findings(data, content, ledger)
    end = ledger.last + content.bad_behind
    uploads = place.uploads()
    sealed = [n for n in uploads if end < n <= end + _FARTHEST and place.sealed(n)]
    end = max([end, *sealed])
    gaps = sorted(set(range(1, end + 1)) - ledger.numbers - ledger.resolved)
    found.next = end + 1
    finished = ledger.finished
    if finished is not None:
        found.whole = is_file(place.update, finished["sha256"], finished["bytes"])
        if not found.whole:
            found.damage.append(_lost_update(place))
    if not found.whole:
        found.lost = {n: _digest(uploads.get(n)) for n in gaps}
        found.damage += [_lost_line(n, found.lost[n]) for n in gaps]
        found.damage += filter(None, (_lost_upload(place, entry) for entry in ledger.accepted.values()))
    kept = {entry.n for entry in ledger.accepted.values()}.union(gaps)
    found.superfluous = [path for n, path in sorted(uploads.items()) if n not in kept and n <= found.next]
    return found


def _manifest(place: Place) -> bytes:
    try:
        return read(place.lines)
    except FileNotFoundError:
        return b""  # the sealed uploads tell what was in it


def _lost_upload(place: Place, entry: Accepted) -> Damage | None:
    try:
        digest = sha256(place.upload(entry.n), entry.bytes)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        gone = {errno.ENOENT: "has vanished", errno.ELOOP: "is a link now"}
        problem = gone.get(error.errno or 0, f"cannot be read ({error.strerror})")
    else:
        if digest == entry.sha256:
            return None
        problem = "has been altered"
    what = f"its upload {str(place.upload(entry.n))!r} {problem}"
    return Damage(what, SEND_AGAIN, client=entry.client)


def _lost_line(n: int, digest: str | None) -> Damage:
    known = f"it acknowledged an upload of SHA-256 {digest[:16]}…" if digest else "nothing tells what it said"
    what = f"line {n} of the manifest cannot be read, or is gone; {known}"
    todo = "have all clients send again (what is known is not taken twice)" if digest else "see who is missing"
    return Damage(what, f"{todo}, or go on without this line", line=n)


def _lost_update(place: Place) -> Damage:
    what = f"the finished update {str(place.update)!r} has vanished or been altered"
    return Damage(what, "finish the round again: it comes out the same")


def _digest(path: Path | None) -> str | None:
    try:
        return None if path is None else sha256(path, os.lstat(path).st_size)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return None
