"""How many of torch's threads a piece of work gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single(when: bool = True) -> Iterator[None]:
    """One thread of torch's inside, where ``when`` holds; as many as before afterwards.

    A pool that has slept for a tenth of a second takes 8 ms to wake, on two cores: work of less is done by then.

    >>> with single():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    if not when or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
