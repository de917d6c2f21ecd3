"""Files that appear whole or not at all, and how many may be open."""

from __future__ import annotations

import errno
import os
import resource
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from flexlora_fast.errors import OptionError

_SPARE = 64  # files that something else may open meanwhile


def replace(target: Path, write_to: Callable[[str], object]) -> None:
    """Have ``write_to`` write a temporary file beside ``target``, flush it to disk, and swap it in.

    Once this returns, a power cut takes neither the content nor the name away. The old file stays intact until then: it
    may be mapped by the very tensors being written. The new one gets the permissions of the user's umask (safetensors
    makes its files private, which no other user could fetch).

    Raises ``OSError`` where it cannot be written (a full disk), whatever ``write_to`` says of that.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        try:
            write_to(str(temporary))
        except SafetensorError as error:  # all that it knows of a full disk is in its text
            raise OSError(errno.EIO, str(error), str(target)) from error
        temporary.chmod(mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # else a power cut could leave the new name with no content
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flush the names in a folder to disk: a new file's content is worth nothing without its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allow_open(count: int) -> None:
    """Let this process hold ``count`` more files open, by raising its soft limit as far as that takes.

    Not further: programs that call ``select`` rely on a low limit. It stays raised.

    Raises ``OptionError`` where the hard limit is in the way.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + count + _SPARE
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise OptionError(
            f"{count} files are to be held open beside {needed - count - _SPARE} others, and this process may have "
            f"{hard}; raise the limit (`ulimit -Hn`), or have fewer clients on disk"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
