"""Progress bars: on a terminal only, and only for what takes a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, enabled: bool | None = None) -> Iterator[T]:
    """Yield ``items`` with a rich bar on stderr. ``enabled=None`` shows it where stderr is a terminal.

    >>> list(track([1, 2], "counting"))
    [1, 2]
    """
    if enabled is None:
        enabled = sys.stderr.isatty()
    if not enabled:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=description, console=Console(stderr=True), transient=True)
