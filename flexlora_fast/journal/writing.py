"""The journal of one round: lines and uploads that are on disk for good once a method returns."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from flexlora_fast.errors import DamagedRoundError, FlexLoRAError
from flexlora_fast.files import sync_folder
from flexlora_fast.journal import evidence, examination, ledger, lines, place
from flexlora_fast.journal.evidence import Arriving, Quarantine
from flexlora_fast.journal.examination import Damage
from flexlora_fast.journal.ledger import Accepted
from flexlora_fast.journal.place import SEALED, Place
from flexlora_fast.tensorfile import Opened
from flexlora_fast.update import Refusal


class Journal:
    """What is on disk, and the one who writes there. Every method may raise ``OSError``: then nothing has changed, or
    ``doubtful`` is set and ``take_up`` comes first.

    Attributes:
        ledger: what was acknowledged. damage: what of it is lost. lost: numbers of lost lines, with the SHA-256 of what
            the spool has of them. next: the number of the next line.
    """

    def __init__(self, where: Place, head: dict[str, Any]) -> None:
        self.place, self._key = where, head["key"]
        self._quarantine = Quarantine(**head["options"]["quarantine"])
        self._doubtful = True
        self.take_up()

    def take_up(self) -> None:
        """Read what is on disk, clear away what a crash left, and go on from there."""
        self._doubtful = True
        found = examination.look(self.place, self._key)
        self.ledger, self.next = found.ledger, found.next
        self.damage, self.lost = found.damage, found.lost
        self._arriving: Arriving | None = None
        self._flushed: Opened | None = None
        if found.content.torn:
            place.put(self.place.quarantine / f"{found.next:06d}.torn", found.content.torn)
        for path in [*self.place.leftovers(), *found.superfluous]:
            with contextlib.suppress(IsADirectoryError):  # somebody else's
                os.unlink(path)
        if self.ledger.finished is None and os.path.lexists(self.place.update):
            os.unlink(self.place.update)  # whole, but nobody was told of it: more clients may come
        self._room = self._quarantine.bytes - evidence.used(self.place.quarantine)
        self._log = place.Log(self.place.lines, found.content.sound)
        for entry in self.ledger.accepted.values():
            if not self.is_damaged(entry.client):
                self._seal(entry.n)
        self._doubtful = False

    @property
    def doubtful(self) -> bool:
        """Whether a flush failed: what of the folder is on disk has to be found out, and written anew."""
        return self._doubtful or self._log.broken

    def is_damaged(self, client: str) -> bool:
        return any(damage.client == client for damage in self.damage)

    def check_whole(self) -> None:
        """Raise ``DamagedRoundError`` where something acknowledged is lost; a lost update can be made again."""
        gone = [damage for damage in self.damage if damage.client is not None or damage.line is not None]
        if gone:
            who = ", ".join(repr(damage.client) if damage.client else f"line {damage.line}" for damage in gone)
            raise DamagedRoundError(
                f"{len(gone)} of the things that were acknowledged are lost: {who}; the first: {gone[0].problem}; "
                f"{gone[0].remedy} (Round.drop, Round.forgo, or `flexlora-fast round resume --without`)",
                client=gone[0].client if len(gone) == 1 else None,
            )

    def append(self, record: dict[str, Any]) -> None:
        """Put the next line on disk; what it says counts from then on."""
        record = {"n": self.next, "time": _now(), **record}
        line = lines.encode(self._key, record)
        self._doubtful = True  # an interrupt must not leave a line on disk that nobody here knows of
        try:
            self._log.append(line)
        except OSError:
            self._doubtful = False  # the log knows better
            raise
        self.next += 1
        self.ledger.apply(record)
        self._doubtful = False

    # -- uploads ---

    @contextlib.contextmanager
    def receiving(self, arriving: Arriving) -> Iterator[None]:
        """In this block ``new_file`` and ``commit`` are about this upload. Without ``commit`` nothing of it stays."""
        number, self._arriving = self.next, arriving
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt, wherever it came: what is on disk is found out
                self._doubtful = True
            raise
        finally:
            self._arriving = self._flushed = None
            if self.next == number and not self.doubtful:  # else its line may be there
                self.place.upload(number).unlink(missing_ok=True)

    def new_file(self) -> tuple[int, str]:
        """A new file for the upload that the next line will tell of: its descriptor and path."""
        path = os.fspath(self.place.upload(self.next))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            self._flushed = Opened(os.dup(descriptor))  # the kernel tells an error to those who had the file open
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, path

    def commit(self, client: str, weight: float) -> None:
        """Have the upload on disk, then its name, then the line that acknowledges it."""
        arriving, file = self._arriving, self._flushed
        assert arriving is not None and file is not None
        known, n, digest = self.ledger.accepted.get(client), self.next, arriving.sha256
        os.fsync(file.descriptor)
        self._doubtful = True
        sync_folder(self.place.spool)
        self._doubtful = False
        restored = [line for line, found in self.lost.items() if found == digest]
        self.append(ledger.accept(client, weight, digest, arriving.config, arriving.upload.size, restored))
        self.settle(client=client)
        for line in restored:
            self.settle(line=line)
        self._seal(n)
        self.remove([known] if known is not None else [])

    def settle(self, *, client: str | None = None, line: int | None = None) -> None:
        """This damage is none any more; what the spool has of the line goes."""
        self.damage = [x for x in self.damage if (x.client, x.line) != (client, line)]
        if line is not None:
            del self.lost[line]
            self._unlink(line)

    def remove(self, entries: list[Accepted]) -> None:
        """Remove uploads that do not count any more."""
        for entry in entries:
            self._unlink(entry.n)

    def look_around(self) -> None:
        """Note which uploads are not there any more, or have another size: no more than a look at each."""
        for entry in self.ledger.accepted.values():
            try:
                status = os.lstat(self.place.upload(entry.n))
                there = stat.S_ISREG(status.st_mode) and status.st_size == entry.bytes
            except FileNotFoundError:
                there = False
            if not there:
                self.note(entry, f"its upload {str(self.place.upload(entry.n))!r} has vanished or been altered")

    def note(self, entry: Accepted, problem: str) -> None:
        """Another upload turned out to be lost."""
        if not self.is_damaged(entry.client):
            self.damage.append(Damage(problem, examination.SEND_AGAIN, client=entry.client))

    def _unlink(self, n: int) -> None:
        with contextlib.suppress(OSError):  # what cannot be removed now goes when the round is taken up again
            os.unlink(self.place.upload(n))

    def _seal(self, n: int) -> None:
        """Mark an upload as one whose line is on disk: should the line be lost, this tells."""
        with contextlib.suppress(OSError):  # it is as safe without
            path = self.place.upload(n)
            if stat.S_IMODE(os.lstat(path).st_mode) != SEALED:
                os.chmod(path, SEALED)

    # -- refusals ---

    def turn_away(self, error: FlexLoRAError, client: str, arriving: Arriving | None) -> None:
        """Record a refusal, once, and keep what the upload looked like."""
        refusal, known = Refusal(client, str(error), error.code), self.ledger.refusals
        if self.ledger.finished is not None or refusal in known or len(known) >= self._quarantine.records:
            return
        kept = evidence.write(self.place.quarantine, self.next, refusal, _now(), arriving, self._room)
        self._room -= kept
        self.append(ledger.refuse(refusal, evidence=kept > 0))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
