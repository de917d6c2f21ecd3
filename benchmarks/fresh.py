"""Running something once in another process: for its peak memory, its first answer, and a limit on its time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import pickle
import re
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What the process reports: the call's value, its seconds, and memory in bytes (None without /proc).

    ``grown`` is the peak during the call over what was resident before it; ``peak`` is the process's whole peak during
    the call, interpreter and libraries included.
    """

    value: Any
    seconds: float
    grown: int | None
    peak: int | None


class OverLimit(Exception):
    """The call was still running at its time limit, and was ended."""


def resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes.

    Not ``ru_maxrss``: a process started from a large one inherits its peak there (fork, then exec, on Linux).
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else None


def reset_peak() -> None:
    """Set VmHWM back to what is resident now (Linux only; elsewhere peaks are not reported)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _release() -> None:
    """Give freed memory back to the system, so that the next call cannot hide its peak in it (glibc only)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _serve(pipe: Connection) -> None:
    """Prepare, wait, run, report; until the pipe closes."""
    while True:
        try:
            prepare, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            call = prepare(*arguments)
            _release()
            reset_peak()
            before = resident("VmRSS")
            pipe.send_bytes(pickle.dumps(None))
            pipe.recv_bytes()
            start = time.perf_counter()
            value = call()
            seconds = time.perf_counter() - start
            peak = resident("VmHWM")
            grown = None if peak is None or before is None else max(peak - before, 0)
            # pickle, not the pipe's own: that one would hand tensors over by a file of a process that may be gone.
            pipe.send_bytes(pickle.dumps(Outcome(value, seconds, grown, peak)))
            del call, value
        except Exception:
            pipe.send_bytes(pickle.dumps(traceback.format_exc()))


class Fresh:
    """A process that prepares a call, waits, and runs it once on demand; ended where it takes too long.

    It is started when it is first needed, and anew after it was ended. Memory that one call freed is returned to the
    system before the next, so several calls may share a process; start another for a peak that includes the libraries.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Fresh:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def prepare(self, prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        """Call ``prepare`` (a function of a module) there; it returns the call to run.

        What it sets up (imports, inputs) is outside the time and the memory that are reported.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, state unknown
            self._pipe, child = context.Pipe()
            self._process = context.Process(target=_serve, args=(child,), daemon=True)
            self._process.start()
            child.close()
        self._pipe.send_bytes(pickle.dumps((prepare, arguments)))
        self._receive(None)

    def run(self, limit: float | None = None) -> Outcome:
        """Run what was prepared. Raises ``OverLimit`` after ``limit`` seconds, RuntimeError if it fails."""
        self._pipe.send_bytes(pickle.dumps(None))
        return self._receive(limit)

    def close(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(1)
            self._process.kill()
            self._process.join()
            self._process = None

    def _receive(self, limit: float | None) -> Any:
        if not self._pipe.poll(limit):
            self._process.kill()
            self.close()
            raise OverLimit
        try:
            message = pickle.loads(self._pipe.recv_bytes())
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise RuntimeError(f"the process ended with exit code {code}") from None
        if isinstance(message, str):
            raise RuntimeError(f"the process failed:\n{message}")
        return message
