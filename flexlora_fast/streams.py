"""What moving bytes to a device needs of it: memory to copy from, streams that copy, and events that tell when."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flexlora_fast.backends import transfer
from flexlora_fast.errors import BackendError


class Event(Protocol):
    """A point in a stream's work; one that was never recorded counts as reached."""

    def query(self) -> bool:
        """Whether the stream has got there."""
        ...

    def synchronize(self) -> None:
        """Wait until it has, without the GIL."""
        ...


@dataclass(frozen=True)
class Native:
    """How the extension asks a device for the same, without Python: see ``_C.stage``.

    ``functions``: addresses of copy, record and wait. ``streams``, ``events``: handles.
    """

    functions: tuple[int, int, int]
    streams: list[int]
    events: list[int]


class Device(Protocol):
    """Where bytes go to. ``streams`` copy, each in the order of what it is given."""

    device: torch.device
    streams: Sequence[Any]

    def host(self, nbytes: int) -> Tensor:
        """Host memory that copies can be made from while the host does something else: uint8."""
        ...

    def memory(self, nbytes: int) -> Tensor:
        """Memory of the device, uint8, which the streams may write to."""
        ...

    def event(self) -> Event:
        """A new one."""
        ...

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Have a stream copy from ``host`` memory to ``memory``."""
        ...

    def record(self, event: Event, stream: Any | None) -> None:
        """Put the event behind what a stream (None: the current one of the calling thread) was given so far."""
        ...

    def follow(self, event: Event) -> None:
        """Have the current stream of the calling thread wait for the event; the host does not."""
        ...

    def native(self, events: Sequence[Event]) -> Native | None:
        """The streams and these events, each recorded before, for the extension to use from the calling thread; None
        where there is nothing that Python would keep waiting.
        """
        ...


def device_of(device: torch.device | str | Device) -> Device:
    """The ``Device`` of a torch device; one that is one already is left as it is."""
    if not isinstance(device, torch.device | str):
        return device
    device = torch.device(device)
    return Cuda(device) if device.type == "cuda" else Host(device)


class Cuda:
    """A CUDA GPU."""

    def __init__(self, device: torch.device) -> None:
        # With its index: to another thread "cuda" may be another one.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        # Two: while one copy ends the next has begun.
        self.streams: Sequence[Any] = transfer.own(self.device).copying
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()  # the driver's context of this device is current from here on
            _succeed(self._driver.cuCtxGetCurrent(ctypes.byref(self._context)))

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def memory(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for stream in self.streams:  # the memory may be another's until the current stream gets here
            stream.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def event(self) -> Event:
        # Not the kind that spins: the core is better used for reading.
        event: Event = torch.cuda.Event(blocking=True)
        return event

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def record(self, event: Any, stream: Any | None) -> None:
        event.record(torch.cuda.current_stream(self.device) if stream is None else stream)

    def follow(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def native(self, events: Sequence[Any]) -> Native:
        # The functions of the driver that are behind torch's own copies and events; they need a thread's context.
        _succeed(self._driver.cuCtxSetCurrent(self._context))
        copy, record, wait = (
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (
                self._driver.cuMemcpyHtoDAsync_v2,
                self._driver.cuEventRecord,
                self._driver.cuEventSynchronize,
            )
        )
        streams = [stream.cuda_stream for stream in self.streams]
        return Native((copy, record, wait), streams, [event.cuda_event for event in events])


def _succeed(answer: int) -> None:
    """Raise ``BackendError`` for a driver's answer that is not 0."""
    if answer != 0:
        raise BackendError(f"CUDA's driver answered with error {answer}; `nvidia-smi` shows whether the GPU is well")


class Host:
    """The CPU itself: everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: Sequence[Any] = [None]

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def event(self) -> Event:
        return _Reached()

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        target.copy_(source)

    def record(self, event: Event, stream: Any | None) -> None:
        """Nothing is left to be done."""

    def follow(self, event: Event) -> None:
        """Nothing is left to be waited for."""

    def native(self, events: Sequence[Event]) -> None:
        """A copy keeps the host busy anyway."""


class _Reached:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """It has been reached."""
