"""Uploads on their way in, and what is kept of those that are refused."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora_fast.errors import OptionError
from flexlora_fast.gate.intake import Upload
from flexlora_fast.journal.place import put
from flexlora_fast.update import Refusal

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Quarantine:
    """How much a round keeps of what it refuses. A hostile client must not fill the disk.

    Attributes:
        records: refusals that are recorded in all; later ones are raised and forgotten.
        first: bytes that are kept of the beginning of an upload. bytes: of all records together.
    """

    records: int = 1000
    first: int = 4096
    bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(f"quarantine: {field.name} is {value!r}; give an integer ≥ 0")


class Arriving:
    """An upload whose first bytes and SHA-256 are remembered as it is read, in order and from its beginning.

    ``upload`` is what to read from.
    """

    def __init__(self, upload: Upload, first: int) -> None:
        self._from, self._first = upload, first
        self.upload = dataclasses.replace(upload, read=self._read)
        self._hash = hashlib.sha256()
        self._at = 0
        self.head = b""

    def _read(self, count: int, offset: int) -> bytes:
        data = self._from.read(count, offset)
        if offset == 0:  # the header is read first, then all from the beginning: what counts is what is copied
            self._hash, self._at, self.head = hashlib.sha256(), 0, b""
        if offset == self._at:
            self._hash.update(data)
            self._at += len(data)
            self.head += data[: max(0, self._first - len(self.head))]
        return data

    @property
    def sha256(self) -> str:
        """Of all that was read since the last time that reading began."""
        return self._hash.hexdigest()

    @property
    def config(self) -> str | None:
        """The SHA-256 of the config that came with it."""
        return None if self._from.config is None else hashlib.sha256(self._from.config).hexdigest()

    def read_all(self) -> str:
        """Read it from beginning to end, at most as long as it said it was; its SHA-256."""
        at = 0
        while at < self._from.size:
            data = self._read(min(_CHUNK, self._from.size - at), at)
            if not data:
                break
            at += len(data)
        return self.sha256

    def facts(self) -> dict[str, Any]:
        """What is known of it, JSON-able: ``sha256`` is that of the ``read`` first bytes of ``size``."""
        wanted = min(self._first, self._from.size)
        if len(self.head) < wanted:  # a reader that stopped early, or looked at the first bytes again
            self._read(wanted, 0)
        config = self._from.config
        return {
            "size": self._from.size,
            "read": self._at,
            "sha256": self.sha256,
            "first": base64.b64encode(self.head).decode(),
            "config": None if config is None else base64.b64encode(config[: self._first]).decode(),
        }


def write(folder: Path, n: int, refusal: Refusal, time: str, arriving: Arriving | None, left: int) -> int:
    """Keep the evidence of the refusal that line ``n`` will tell of, if it takes at most ``left`` bytes. Its bytes."""
    document: dict[str, Any] = {"client": refusal.client, "code": refusal.code, "reason": refusal.reason, "time": time}
    if arriving is not None:
        try:
            document |= arriving.facts()
        except OSError as error:  # the client's file, not ours
            document["unread"] = str(error)
    content = json.dumps(document, indent=1).encode("ascii")
    if len(content) > left:
        return 0
    put(folder / f"{n:06d}.json", content)
    return len(content)


def used(folder: Path) -> int:
    """Bytes of the records there."""
    with os.scandir(folder) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
