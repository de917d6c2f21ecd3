"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace(target: Path, write_to: Callable[[str], object]) -> None:
    """Have ``write_to`` write a temporary file beside ``target``, flush it to disk, and swap it in.

    The old file stays intact until then: it may be mapped by the very tensors being written. The new one gets the
    permissions of the user's umask (safetensors makes its files private, which no other user could fetch).
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        write_to(str(temporary))
        temporary.chmod(mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # else a power cut could leave the new name with no content
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
