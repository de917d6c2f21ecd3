"""Worker processes: one a core, or one a GPU, each with the base model loaded once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

import torch

from flexlora_fast.errors import SimulationError
from flexlora_fast.simulate.jobs import Setup


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """One for each GPU, or one for each core where there are none."""
    return len(gpus()) or cores()


def gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; what it names and is not there ("-1")
    counts for none.
    """
    # Counting asks the driver's management library and starts nothing: the variable can still be set afterwards.
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if named is None else [name.strip() for name in named.split(",")]
    return names[:count]


def belong(taken: Any) -> None:
    """Make this process one of a pool's: it sees one GPU, where there are any, and ends with its parent.

    Called before CUDA looks. ``taken``: a shared counter of processes, which GPUs go by.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the parent ends the others
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # a parent that was killed ends nobody, and its processes would wait for work for ever

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
    with taken.get_lock():
        number, taken.value = taken.value, taken.value + 1
    if visible := gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


class Pool:
    """Runs jobs in ``workers`` processes, or in this one where ``workers`` is 0. What comes out is the same.

    Used as a context manager. ``KeyboardInterrupt`` and errors leave nothing running.
    """

    def __init__(self, setup: Setup, workers: int) -> None:
        self.setup, self.workers = setup, workers
        self._processes: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self.workers == 0:
            from flexlora_fast.simulate import worker

            worker.start(self.setup)
            return self
        from flexlora_fast.simulate.worker import start

        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
        self._processes = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=start, initargs=(self.setup, context.Value("i", 0))
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._processes is None:
            return
        if kind is not None:  # what still runs belongs to a round that will be done again
            for process in list((self._processes._processes or {}).values()):
                process.terminate()
        self._processes.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Any], done: Callable[[int, Any], None] = lambda index, result: None) -> list[Any]:
        """The results of all jobs in their order. ``done`` is called as each ends, with its index and result.

        Raises what a job raises, and ``SimulationError`` where a process died.
        """
        from flexlora_fast.simulate import worker  # with transformers, which takes seconds: while processes start

        results: list[Any] = [None] * len(jobs)
        if self._processes is None:
            for index, job in enumerate(jobs):
                results[index] = worker.run(job)
                done(index, results[index])
            return results
        try:
            futures = {self._processes.submit(worker.run, job): index for index, job in enumerate(jobs)}
            for future in as_completed(futures):
                index = futures[future]
                results[index] = future.result()
                done(index, results[index])
        except BrokenProcessPool as error:
            raise SimulationError(
                f"a worker process died ({error}). Where memory is short, take fewer (--workers) or smaller batches; "
                "what was done is kept: --resume goes on from there"
            ) from error
        return results
