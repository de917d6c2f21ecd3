"""Numbers on their way between the host and a device, without one waiting for more of the other than it has to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


def moved(X: Tensor, device: torch.device) -> Tensor:
    """A few numbers of the host on the device, without waiting for it.

    Copies of memory that is not pinned wait until the stream is done with all that it was given before.
    """
    return X.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else X.to(device)


class Own(NamedTuple):
    """This package's streams on one GPU: on which results are waited for, CUDA graphs recorded, and factors brought."""

    apart: torch.cuda.Stream
    recording: torch.cuda.Stream
    copying: tuple[torch.cuda.Stream, ...]


@functools.cache
def own(device: torch.device) -> Own:
    """The same for as long as the process lives, and taken at once.

    torch has 32 streams, which it hands out in turn, again and again (https://github.com/pytorch/pytorch/issues/173729).
    Neighbours are different ones; a stream taken later may be one of these, and a copy given to the stream that a graph
    is being recorded on is not made, but recorded.
    """
    apart, recording, *copying = [torch.cuda.Stream(device) for _ in range(4)]
    return Own(apart, recording, tuple(copying))


def so_far(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Mark what the current stream of ``device`` was given so far.

    In a ``with`` block of what is returned, the host waits for that alone when it looks at results, and not for what
    the stream was given since. What the block computes is there for the stream afterwards.
    """
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.current_stream(device)
    return functools.partial(_apart, stream, stream.record_event())


@contextmanager
def _apart(stream: torch.cuda.Stream, mark: torch.cuda.Event) -> Iterator[None]:
    side = own(stream.device).apart
    side.wait_event(mark)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        stream.wait_stream(side)


class Turns:
    """Memory that several streams use in turn: in a ``with`` block, the current stream waits for the one before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._last = torch.cuda.current_stream(self._device).record_event()
