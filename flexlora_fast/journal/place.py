"""The folder of a round: what is where, who may write to it, and how a line gets there for good."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from flexlora_fast.errors import JournalError
from flexlora_fast.files import replace, sync_folder
from flexlora_fast.gate import strict
from flexlora_fast.gate.intake import SHORTAGES
from flexlora_fast.storage import UPDATE_NAME
from flexlora_fast.tensorfile import Opened

FORMAT = "flexlora_fast.round/1"
SEALED = 0o400  # the mode of an upload whose line is on disk
_HEAD, _LINES, _LOCK, _SPOOL, _QUARANTINE = "round.json", "manifest.jsonl", "lock", "spool", "quarantine"
_NAME = re.compile(r"(\d{6,18})\.safetensors", re.ASCII)
_CHUNK = 1 << 20


class Place:
    """The paths of a round; nothing is looked at yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))  # wherever this process goes later
        self.head, self.lines, self.lock = self.path / _HEAD, self.path / _LINES, self.path / _LOCK
        self.spool, self.quarantine, self.update = self.path / _SPOOL, self.path / _QUARANTINE, self.path / UPDATE_NAME

    def upload(self, n: int) -> Path:
        """The file of the upload that line ``n`` accepted."""
        return self.spool / f"{n:06d}.safetensors"

    def uploads(self) -> dict[int, Path]:
        """All files of that form, by number; what else lies there is not ours."""
        with os.scandir(self.spool) as entries:
            found = [(_NAME.fullmatch(entry.name), Path(entry.path)) for entry in entries]
        return {int(match[1]): path for match, path in found if match is not None}

    def sealed(self, n: int) -> bool:
        """Whether the line of this upload was on disk."""
        try:
            status = os.lstat(self.upload(n))
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_mode & 0o777 == SEALED

    # -- made once ---

    def create(self, options: dict[str, Any], policy: dict[str, Any]) -> None:
        """Make it a round: all its parts first, what says that they are there last."""
        for folder in (self.spool, self.quarantine):
            folder.mkdir(mode=0o700, exist_ok=True)
        put(self.lines, b"")
        head = {"format": FORMAT, "key": secrets.token_hex(8), "options": options, "policy": policy}
        put(self.head, json.dumps(head | {"sum": _sum(head)}, indent=1).encode("ascii"))
        sync_folder(self.path.parent)

    def read_head(self) -> dict[str, Any]:
        """The content of ``round.json``; raises ``JournalError`` for one that is not as it was written."""
        self._check_parts()
        try:
            head = strict.loads(read(self.head))
        except ValueError as error:
            raise JournalError(f"{str(self.head)!r} is damaged ({error}); restore it from a copy") from None
        found = head.get("format") if isinstance(head, dict) else None
        if found != FORMAT:
            raise JournalError(
                f"{str(self.head)!r} has format {found!r}, this version reads {FORMAT!r}; use the one that wrote it"
            )
        if head.pop("sum", None) != _sum(head):
            raise JournalError(f"{str(self.head)!r} is not as it was written; restore it from a copy")
        return head

    def _check_parts(self) -> None:
        """Raise ``JournalError`` for a folder that is none of the round's own: a link leads elsewhere."""
        for path in (self.path, self.spool, self.quarantine):
            check_folder(path)

    def check_foreign(self) -> None:
        """Raise ``JournalError`` where a new round would get between the files of something else, or of a round that
        lost its head.
        """
        ours = {_LINES, _LOCK, _SPOOL, _QUARANTINE}
        with os.scandir(self.path) as entries:
            foreign = sorted(x.name for x in entries if x.name not in ours and not x.name.startswith(f".{_HEAD}."))
        foreign = [name for name in foreign if not name.startswith(f".{_LINES}.")]
        if foreign:
            raise JournalError(
                f"{str(self.path)!r} is no round, and holds something else ({', '.join(foreign[:3])} …); give a folder "
                "of its own"
            )
        held = [path for path in (self.spool, self.quarantine) if path.is_dir() and any(path.iterdir())]
        held += [self.lines] if os.path.lexists(self.lines) and os.lstat(self.lines).st_size else []
        if held:
            raise JournalError(
                f"{str(self.head)!r} is gone, and {str(held[0])!r} is not empty; restore it from a copy, or "
                "give another folder"
            )

    # -- one writer ---

    def locked(self) -> Opened:
        """Held by one at a time, until it is let go of, or its process ends. Raises ``JournalError``."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        held = Opened(os.open(self.lock, flags, 0o600))
        try:
            fcntl.flock(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(held.descriptor, 20, 0).decode("ascii", "replace") or "unknown"
            raise JournalError(
                f"{str(self.path)!r} is in use by process {holder}; close the round there, or wait for it"
            ) from None
        try:
            os.ftruncate(held.descriptor, 0)
            write(held.descriptor, str(os.getpid()).encode())
        except BaseException:
            let_go(held)
            raise
        return held

    def leftovers(self) -> list[Path]:
        """Temporary files of writes that were cut short."""
        found = [path for name in (_HEAD, _LINES, UPDATE_NAME) for path in self.path.glob(f".{name}.*")]
        return found + list(self.quarantine.glob(".[0-9]*"))


class Log:
    """The end of a manifest, where lines are put.

    ``broken``: a flush failed. What of the file is on disk is not known any more, and flushing again would not tell:
    the kernel reports such an error once and may keep the pages as if they were written. The file has to be written
    anew, from what is in it.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        put(path, content)
        self._file = Opened(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC))
        self._size, self.broken = len(content), False

    def append(self, line: bytes) -> None:
        """Have ``line`` on disk when this returns. Raises ``OSError``; then it is not there, or ``broken`` is set."""
        self.broken = True  # whatever interrupts this
        try:
            write(self._file.descriptor, line)
        except OSError:
            os.ftruncate(self._file.descriptor, self._size)
            self.broken = False
            raise
        os.fdatasync(self._file.descriptor)
        self._size += len(line)
        self.broken = False


def let_go(held: Opened) -> None:
    """Let others lock it: an error that somebody keeps, or a forked process, may keep the descriptor open."""
    fcntl.flock(held.descriptor, fcntl.LOCK_UN)


def check_folder(path: Path) -> None:
    """Raise ``JournalError`` for what is no folder: a link leads elsewhere."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise JournalError(f"{str(path)!r} is not there ({error.strerror}); give a round's folder") from None
    if not stat.S_ISDIR(mode):
        raise JournalError(f"{str(path)!r} is no folder ({stat.filemode(mode)}), as a round has it there")


def make(path: Path) -> None:
    """Make a folder; all that are made above it are on disk then (its own name ``create`` flushes)."""
    if not path.parent.is_dir():
        make(path.parent)
        sync_folder(path.parent.parent)
    path.mkdir(exist_ok=True)


def put(path: Path, content: bytes) -> None:
    """Have a file of this content on disk, whole or not at all."""

    def write_to(temporary: str) -> None:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            write(descriptor, content)
        finally:
            os.close(descriptor)

    replace(path, write_to)


def write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def read(path: Path) -> bytes:
    """The content of a file of ours, which is no link. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def sha256(path: Path, size: int) -> str | None:
    """Of a regular file of ``size`` bytes; None for anything else. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return None
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: Path, digest: str, size: int) -> bool:
    """Whether it is there, with this SHA-256 and size."""
    try:
        return sha256(path, size) == digest
    except OSError:
        return False


def remedy(error: OSError) -> str:
    """What to do about a file system that says no."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room there, then go on"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make it writable, then go on"
    if error.errno in SHORTAGES:
        return "let this process have more (`ulimit -n`, memory), then go on"
    return "look at the disk, then go on"


def _sum(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
