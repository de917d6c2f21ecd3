"""Tensors on their way from files and host memory to a device that computes meanwhile.

Bytes are read into pinned slots by several threads, and every full slot is copied to the device while the next are
filled. On the device they stay in one piece of memory, taken once and given out in turn: what was brought first is the
first to make room again. So neither side ever holds more than it was given, and nothing is allocated on the way.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from flexlora_fast import _native, memory, streams
from flexlora_fast.errors import OptionError
from flexlora_fast.gather import Ranges, ReadError, gather
from flexlora_fast.streams import Device, Event, Native

ALIGNMENT = 128  # bytes: what kernels read at a time, and more than any element's size
SLOTS = 8  # some being filled, some being copied
_MOST_THREADS = 16


@dataclass
class _Slot:
    """Host memory, and when the last copy from it is done."""

    memory: Tensor
    free: Event


@dataclass(eq=False)
class _Room:
    """Bytes ``start`` … ``stop`` of the device's memory. ``ends``: once they are all reached it is free again."""

    start: int
    stop: int
    ends: list[Event] = field(default_factory=list)
    released: bool = False


class Arrival:
    """N tensors under way to the device, or there.

    Attributes:
        buffer: (bytes,) uint8 on the device.
        offsets: (N,) int64: where each tensor starts in it, multiples of ``ALIGNMENT``.
        nbytes: of the buffer.
    """

    def __init__(self, staging: Staging, room: _Room, buffer: Tensor, offsets: np.ndarray) -> None:
        self.buffer, self.offsets, self.nbytes = buffer, offsets, buffer.numel()
        self._staging, self._room, self._copied = staging, room, list(room.ends)

    def wait(self) -> None:
        """Have the current stream wait until all is there; the host does not. Before anything reads the buffer."""
        self._staging._follow(self._copied)

    def release(self) -> None:
        """What the current stream was given so far is the last that reads the buffer: then it is used again."""
        self._staging._release(self._room)


class Staging:
    """The way to a device, for use in a ``with`` block; what was brought must not be read after it.

    Args:
        device: "cuda", …, or "cpu", where everything is done at once; or what stands in for one.
        host_bytes: of the slots in all. They have a power of two of bytes each: as torch takes pinned memory.
        device_bytes: of everything brought and not yet released and read.
        threads: that read (default: as many as there are cores for this process, 16 at most).

    Raises ``OptionError`` where ``host_bytes`` or ``device_bytes`` leave no room for anything.
    """

    def __init__(
        self, device: torch.device | str | Device, *, host_bytes: int, device_bytes: int, threads: int | None = None
    ) -> None:
        if host_bytes < SLOTS * ALIGNMENT or device_bytes < ALIGNMENT:
            raise OptionError(
                f"host_bytes is {host_bytes} and device_bytes {device_bytes}; give {SLOTS * ALIGNMENT} and {ALIGNMENT} "
                "at least"
            )
        self._device = streams.device_of(device)
        self._threads = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._slot_bytes = 1 << ((host_bytes // SLOTS).bit_length() - 1)
        self._size = device_bytes // ALIGNMENT * ALIGNMENT
        self._slots: list[_Slot] = []
        self._memory: Tensor | None = None
        self._closed = False
        self._rooms: deque[_Room] = deque()  # in the order in which they were taken
        self._changed = threading.Condition()
        self._filling = threading.Lock()  # one arrival at a time goes through the slots
        self._turn = 0  # the slot to be filled next

    def __enter__(self) -> Staging:
        self._memory = self._device.memory(self._size)
        for _ in range(SLOTS):
            slot = _Slot(self._device.host(self._slot_bytes), self._device.event())
            self._device.record(slot.free, self._device.streams[0])
            self._slots.append(slot)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._closed = True  # who waits for room waits no longer
            self._changed.notify_all()
        with self._filling, self._changed:  # who reads ends
            events = [slot.free for slot in self._slots] + [event for room in self._rooms for event in room.ends]
        for event in events:  # until then copies read the slots and write to the memory
            event.synchronize()
        self._slots, self._memory = [], None

    def bring(self, ranges: Ranges) -> Arrival:
        """Wait for room, read the tensors, and have them copied; called from a thread that reads.

        Returns when the copies are under way. What takes up to a third of ``device_bytes`` finds room beside one other
        such arrival; what takes more may have to wait until everything else is released and read.

        Raises:
            OptionError: tensors that take more than ``device_bytes``.
            ReadError: what could not be read, by its index in ``ranges``. The next call finds everything in order.
            RuntimeError: this was closed.
        """
        ends = np.cumsum((ranges.nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)
        nbytes = int(ends[-1]) if len(ranges) else 0
        offsets = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
        room = self._take(nbytes)
        try:
            buffer = self._open()[room.start : room.start + nbytes]
            self._fill(ranges, offsets, buffer, room)
        except BaseException:
            with self._changed:
                room.released = True
                self._changed.notify_all()
            raise
        return Arrival(self, room, buffer, offsets)

    # -- through the slots ---

    def _fill(self, ranges: Ranges, offsets: np.ndarray, buffer: Tensor, room: _Room) -> None:
        """Read everything and begin its copies; ``room`` is told when they are done, also where reading fails."""
        with self._filling:
            self._open()
            try:
                native = self._device.native([slot.free for slot in self._slots])
                if native is None or _native.extension is None:
                    self._through_slots(ranges, offsets, buffer)
                else:
                    self._through_native(ranges, offsets, buffer, native)
            finally:
                for stream in self._device.streams:
                    room.ends.append(event := self._device.event())
                    self._device.record(event, stream)

    def _through_slots(self, ranges: Ranges, offsets: np.ndarray, buffer: Tensor) -> None:
        device = self._device
        for low in range(0, buffer.numel(), self._slot_bytes):
            target = buffer[low : low + self._slot_bytes]
            slot, stream = self._slots[self._turn], device.streams[self._turn % len(device.streams)]
            slot.free.synchronize()
            read_part(ranges, offsets, low, slot.memory[: target.numel()], self._threads)
            device.copy(target, slot.memory[: target.numel()], stream)
            device.record(slot.free, stream)
            self._turn = (self._turn + 1) % SLOTS

    def _through_native(self, ranges: Ranges, offsets: np.ndarray, buffer: Tensor, native: Native) -> None:
        """The same in one call, which needs the GIL for no slot: a thread that computes in Python may take 5 ms to
        hand it over, and a slot of 64 MiB is copied in one.
        """
        assert _native.extension is not None
        refusal = _native.extension.stage(
            ranges.descriptor,
            ranges.start,
            ranges.nbytes,
            offsets,
            buffer.data_ptr(),
            buffer.numel(),
            [slot.memory for slot in self._slots],
            self._turn,
            native.functions,
            native.streams,
            native.events,
            self._threads,
        )
        self._turn = (self._turn + -(-buffer.numel() // self._slot_bytes)) % SLOTS
        if refusal is None:
            return
        index, error, answer = refusal
        if answer:
            raise RuntimeError(f"{self._device.device} refused a copy with CUDA's error {answer}; see its driver's log")
        raise ReadError(index, error)

    # -- the device's memory ---

    def _open(self) -> Tensor:
        """The device's memory, while it is there."""
        memory = self._memory
        if memory is None or self._closed:
            raise RuntimeError("this Staging is closed, or was never entered: bring tensors inside its `with` block")
        return memory

    def _take(self, nbytes: int) -> _Room:
        """Room for so many bytes, as soon as what was brought before has left it."""
        if nbytes > self._size:
            raise OptionError(
                f"these tensors take {memory.show(nbytes)} ({nbytes} bytes) of the device's memory, and device_bytes "
                f"is {memory.show(self._size)} ({self._size}); bring fewer at a time, or raise it"
            )
        while True:
            with self._changed:
                self._open()
                while self._rooms and self._rooms[0].released and all(end.query() for end in self._rooms[0].ends):
                    self._rooms.popleft()
                start = free_at([(room.start, room.stop) for room in self._rooms], self._size, max(nbytes, 1))
                if start is not None:
                    stop = start + max(nbytes, ALIGNMENT)  # never empty: its place in the ring would tell nothing
                    self._rooms.append(room := _Room(start, stop))
                    return room
                oldest = self._rooms[0]
                if not oldest.released:
                    self._changed.wait()
                    continue
            for event in oldest.ends:
                event.synchronize()

    def _follow(self, events: Sequence[Event]) -> None:
        for event in events:
            self._device.follow(event)

    def _release(self, room: _Room) -> None:
        event = self._device.event()
        self._device.record(event, None)
        with self._changed:
            if room.released:
                raise RuntimeError("this arrival was released before: its memory may hold another by now")
            room.ends.append(event)
            room.released = True
            self._changed.notify_all()


def free_at(taken: Sequence[tuple[int, int]], size: int, nbytes: int) -> int | None:
    """Where ``nbytes`` fit into a ring of ``size`` in which these were taken, oldest first; None where they do not.

    >>> free_at([], 10, 10), free_at([(0, 6)], 10, 4), free_at([(0, 6)], 10, 5), free_at([(4, 8), (0, 2)], 10, 3)
    (0, 6, None, None)
    """
    if not taken:
        return 0
    first, last = taken[0][0], taken[-1][1]
    if taken[-1][0] < first:  # the newest lie in front of the oldest
        return last if first - last >= nbytes else None
    if size - last >= nbytes:
        return last
    return 0 if first >= nbytes else None


def read_part(ranges: Ranges, offsets: np.ndarray, low: int, out: Tensor, threads: int) -> None:
    """What is to lie from byte ``low`` of an arrival on, as far as ``out`` reaches.

    Raises ``ReadError`` with the index among all ``ranges``.
    """
    high = low + out.numel()
    first = int(np.searchsorted(offsets + ranges.nbytes, low, "right"))
    last = int(np.searchsorted(offsets, high, "left"))
    descriptor, start, nbytes, at = (
        x[first:last].copy() for x in (ranges.descriptor, ranges.start, ranges.nbytes, offsets)
    )
    if len(at):
        begun = max(low - int(at[0]), 0)
        start[0], nbytes[0], at[0] = start[0] + begun, nbytes[0] - begun, at[0] + begun
        nbytes[-1] -= max(int(at[-1] + nbytes[-1]) - high, 0)
    try:
        gather(Ranges(descriptor, start, nbytes), at - low, out, threads)
    except ReadError as error:
        error.index += first
        raise
