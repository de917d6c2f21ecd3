"""Which commit is measured, on machines where the tree is a copy without its history as well."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"
VARIABLE, FILE = "FLEXLORA_COMMIT", "COMMIT"
REMEDY = f"this tree has no git history: set {VARIABLE}, or write the commit into a file {FILE}"


class Commit(NamedTuple):
    """The commit's name, and who says so."""

    id: str
    source: str


def find(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> Commit:
    """From git where ``root`` is a checkout, else from ``FLEXLORA_COMMIT``, else from the file ``COMMIT``."""
    if described := _from_git(root):
        return Commit(described, "git")
    if named := environment.get(VARIABLE, "").strip():
        return Commit(named, VARIABLE)
    file = root / FILE
    if file.is_file() and (written := file.read_text().strip()):
        return Commit(written, FILE)
    return Commit(UNKNOWN, REMEDY)


def _from_git(root: Path) -> str | None:
    """``git describe`` of ``root`` itself, marked where the tree differs; None where it is no checkout of its own.

    A copy inside another repository must not be taken for that one's commit. The owner of the files may be another
    than who runs this (root, in a container), which git refuses unless told not to.
    """
    git = ["git", "-c", "safe.directory=*", "-C", str(root)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False)
        if top.returncode != 0 or Path(top.stdout.strip()).resolve() != root.resolve():
            return None
        done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None
