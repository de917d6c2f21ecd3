"""A device that does what it is asked to late, and in any order that its streams and events allow."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora_fast.streams import Native

PATIENCE = 30.0  # seconds: a test that would hang fails
COMPUTE = 0  # the stream that is current everywhere


class Event:
    """Counts how often it was put into a stream, and how often the stream got there."""

    def __init__(self, device: Simulated) -> None:
        self._device, self.recorded, self.reached = device, 0, 0

    def query(self) -> bool:
        return self.reached >= self.recorded

    def synchronize(self) -> None:
        with self._device.changed:
            wanted = self.recorded
            assert self._device.changed.wait_for(lambda: self.reached >= wanted, PATIENCE), "the event never came"


@dataclass
class Task:
    """``ready``: whether its stream may do it now."""

    run: Callable[[], object]
    ready: Callable[[], bool] = lambda: True


class Simulated:
    """``flexlora_fast.streams.Device``. Work is done by a thread of its own, between ``with`` and its end.

    Args:
        seed: of the order. pause: seconds between two pieces of work at most.
        through_native: whether the extension drives it, through callbacks.
    """

    def __init__(self, seed: int = 0, pause: float = 2e-4, *, through_native: bool = False) -> None:
        self.device = torch.device("cpu")
        self.streams: Sequence[Any] = [1, 2]
        self.changed = threading.Condition()
        self.allocated: list[int] = []
        self.refuse: int = 0  # what the next copies by the extension are answered with
        self._random, self._pause = random.Random(seed), pause
        self._queues: dict[int, deque[Task]] = {0: deque(), 1: deque(), 2: deque()}
        self._events: list[Event] = []
        self._ended = self._held = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._callbacks = self._made() if through_native else None

    def __enter__(self) -> Simulated:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self._ended = True
            self.changed.notify_all()
        self._thread.join()

    def hold(self, held: bool) -> None:
        """Do nothing from now on, or go on."""
        with self.changed:
            self._held = held
            self.changed.notify_all()

    def give(self, run: Callable[[], object], stream: int = COMPUTE) -> None:
        """Put something at the end of a stream."""
        self._put(stream, Task(run))

    # -- streams.Device ---

    def host(self, nbytes: int) -> Tensor:
        self.allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def memory(self, nbytes: int) -> Tensor:
        self.allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def event(self) -> Event:
        return Event(self)

    def copy(self, target: Tensor, source: Tensor, stream: int) -> None:
        self.give(lambda: target.copy_(source), stream)

    def record(self, event: Event, stream: int | None) -> None:
        with self.changed:
            event.recorded += 1
            number = event.recorded
        self.give(lambda: setattr(event, "reached", number), COMPUTE if stream is None else stream)

    def follow(self, event: Event) -> None:
        number = event.recorded
        self._put(COMPUTE, Task(lambda: None, lambda: event.reached >= number))

    def native(self, events: Sequence[Event]) -> Native | None:
        if self._callbacks is None:
            return None
        self._events = list(events)
        copy, record, wait = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._callbacks)
        return Native((copy, record, wait), list(self.streams), list(range(len(events))))

    # -- what the extension calls ---

    def _made(self) -> tuple[Any, Any, Any]:
        integer, size, handle = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p

        def copy(target: int, source: int, nbytes: int, stream: int) -> int:
            if self.refuse:
                return self.refuse
            self.give(lambda: _at(target, nbytes).__setitem__(slice(None), _at(source, nbytes)), stream)
            return 0

        def record(event: int | None, stream: int) -> int:  # a null pointer comes as None
            self.record(self._events[event or 0], stream)
            return 0

        def wait(event: int | None) -> int:
            self._events[event or 0].synchronize()
            return 0

        return (
            ctypes.CFUNCTYPE(integer, ctypes.c_uint64, size, size, handle)(copy),
            ctypes.CFUNCTYPE(integer, handle, handle)(record),
            ctypes.CFUNCTYPE(integer, handle)(wait),
        )

    # -- the work ---

    def _put(self, stream: int, task: Task) -> None:
        with self.changed:
            self._queues[stream].append(task)
            self.changed.notify_all()

    def _work(self) -> None:
        while True:
            with self.changed:
                ready = [queue for queue in self._queues.values() if queue and queue[0].ready() and not self._held]
                if not ready:
                    if self._ended:
                        return
                    self.changed.wait(PATIENCE)
                    continue
                task = self._random.choice(ready).popleft()
            time.sleep(self._pause * self._random.random())
            task.run()
            with self.changed:
                self.changed.notify_all()


def _at(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (nbytes,))
