"""Reading ahead: a thread that fetches what comes next while this is computed, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Results of ``jobs`` in their order, each started as soon as the budget has room for it.

    Args:
        jobs: bytes that the result of a job holds, and the job.
        budget: bytes of the results that are waiting or in use; a job beyond it runs when nothing else is held.

    A result counts as in use until the next one is asked for, so drop it before. An exception in a job, or in
    ``jobs``, is raised where its result would have come. To be used in a ``with`` block: leaving it stops the thread,
    at the end of the job it is at.

    >>> with ReadAhead([(1, lambda: "a"), (1, lambda: "b")], budget=1) as results:
    ...     list(results)
    ['a', 'b']
    """

    def __init__(self, jobs: Iterable[tuple[int, Callable[[], T]]], budget: int) -> None:
        self._jobs, self._budget = jobs, budget
        self._ready: deque[tuple[int, T]] = deque()
        self._held = 0  # bytes waiting or in use
        self._in_use = 0
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flexlora_fast-read", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._held -= self._in_use
            self._in_use = 0
            self._changed.notify_all()
            while not self._ready and not self._ended:
                self._changed.wait()
            if self._ready:
                self._in_use, result = self._ready.popleft()
                return result
        if self._error is not None:
            raise self._error
        raise StopIteration

    def _run(self) -> None:
        error = None
        try:
            for nbytes, job in self._jobs:
                if not self._reserve(nbytes):
                    break
                result = job()
                with self._changed:
                    self._ready.append((nbytes, result))
                    self._changed.notify_all()
                del result
        except BaseException as caught:  # whatever it is, it belongs to the one who waits for the result
            error = caught
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _reserve(self, nbytes: int) -> bool:
        """Wait for room. False where nobody wants more."""
        with self._changed:
            while not self._stopped and self._held and self._held + nbytes > self._budget:
                self._changed.wait()
            self._held += nbytes
            return not self._stopped
