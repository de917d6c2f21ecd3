"""The lines of a manifest: a checksum and a JSON object each, numbered from 1.

The checksum is that of the round's key and the object, so that a line of another round is none of this one. A write
that a crash cut short has no end of line; anything else that no checksum vouches for is damage. Lines are found by how
they begin, not by where the one before ends: a flipped bit harms one line at most.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Record = dict[str, Any]
# Within a JSON text a quote that belongs to a string has a backslash before it: no client's name can look like this.
_BEGIN = re.compile(rb'[0-9a-f]{16} \{"n":')


@dataclass(frozen=True)
class Content:
    """What was read of a manifest.

    Attributes:
        records: the lines that are whole, their numbers rising.
        bad: stretches that are no lines, each in the place of one or more; bad_behind: those behind the last record.
        torn: what a crash left of the last line; empty where there was none.
        sound: the content to go on from: without ``torn``, with an end of line at the end.
    """

    records: list[Record]
    bad: int
    bad_behind: int
    torn: bytes
    sound: bytes


def encode(key: str, record: Record) -> bytes:
    """A line of ASCII with its end. ``record`` begins with its number "n".

    >>> encode("key", {"n": 1, "kind": "accept"})
    b'9e00ab7510a49bc4 {"n":1,"kind":"accept"}\\n'
    """
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")
    return _sum(key, body) + b" " + body + b"\n"


def parse(key: str, data: bytes) -> Content:
    """The lines in ``data``, and what else is there."""
    records: list[Record] = []
    bad, behind, torn = 0, 0, b""
    starts = [found.start() for found in _BEGIN.finditer(data)]
    pieces = [data[start:stop] for start, stop in pairwise([0, *starts, len(data)])]
    for i, piece in enumerate(pieces):
        record, rest = _first(key, piece)
        if record is not None and record["n"] <= (records[-1]["n"] if records else 0):
            record, rest = None, piece  # a line twice, or in the wrong place
        if record is not None:
            records.append(record)
            behind = 0
        if i == len(pieces) - 1 and not rest.endswith(b"\n"):
            torn, rest = rest, b""
        if rest.strip(b"\n"):
            bad, behind = bad + 1, behind + 1
    sound = data[: len(data) - len(torn)]
    return Content(records, bad, behind, torn, _ended(key, sound))


def _first(key: str, piece: bytes) -> tuple[Record | None, bytes]:
    """The line that ``piece`` begins with, and what follows it."""
    body, _, rest = piece.partition(b"\n")
    record = _decoded(key, body)
    if record is not None:
        return record, rest
    record = _decoded(key, piece[:-1])  # its end of line was altered
    return record, b"" if record is not None else piece


def _ended(key: str, sound: bytes) -> bytes:
    """With an end of line where the last one lost its own, or has another byte for it."""
    if not sound or sound.endswith(b"\n"):
        return sound
    last = sound[[found.start() for found in _BEGIN.finditer(sound)][-1] :]
    return (sound if _decoded(key, last) is not None else sound[:-1]) + b"\n"


def _decoded(key: str, text: bytes) -> Record | None:
    if text[16:17] != b" " or text[:16] != _sum(key, text[17:]):
        return None
    record: Record = json.loads(text[17:])
    return record


def _sum(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b":" + body).hexdigest()[:16].encode()
