"""Plays the runs of a grid in separate processes, and goes on where an earlier call stopped."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from benchmarks.quality.grid import Cell
from flexlora_fast.simulate import words
from flexlora_fast.tables import count

# Importing torch and transformers takes longer than a small run: a process plays about so many before new ones follow,
# which bounds what one that leaks can take. A pool is made anew for them: with ``max_tasks_per_child``, CPython's waits
# for ever once all processes have ended (github.com/python/cpython/issues/115634).
RUNS_OF_A_PROCESS = 20
Result = tuple[dict[str, Any], float]


def play(cells: Sequence[Cell], workers: int) -> list[str]:
    """Play what is not complete, in so many processes, or in this one where it is 0; returns the names of those that
    failed.

    Complete runs are skipped, begun ones go on, and what fails does not keep the others from running. Each run is done
    in one process with one thread: numbers do not depend on ``workers``.
    """
    left = [cell for cell in cells if not cell.complete]
    say(f"{count(len(cells), 'run')}, {len(cells) - len(left)} complete")
    failed: list[str] = []
    started = time.perf_counter()
    size = workers * RUNS_OF_A_PROCESS
    for begin in range(0, len(left), size):
        for number, (cell, told) in enumerate(outcomes(left[begin : begin + size], workers, failed), begin + 1):
            remaining = (time.perf_counter() - started) / number * (len(left) - number)
            ahead = f"; about {words.duration(remaining)} left" if number < len(left) else ""
            say(f"[{number}/{len(left)}] {cell.name}: {told}{ahead}")
    return failed


def outcomes(cells: Sequence[Cell], workers: int, failed: list[str]) -> Iterator[tuple[Cell, str]]:
    """Each run as it ends, and what came out; names of those that raised go to ``failed``."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    pool = ProcessPoolExecutor(min(workers, len(cells)), mp_context=context)
    try:
        futures = {pool.submit(play_one, cell): cell for cell in cells}
        for future in as_completed(futures):
            cell = futures[future]
            try:
                told = outcome(*future.result())
            except BrokenProcessPool:
                raise
            except Exception as error:  # whatever one method raises, the others' runs are worth having
                failed.append(cell.name)
                told = f"failed: {''.join(traceback.format_exception(error))}"
            yield cell, told
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def play_one(cell: Cell) -> Result:
    """One run in this process; returns its summary and the seconds it took."""
    from flexlora_fast.simulate.run import run

    # A run freezes what is there against the collector; without this, models of runs before would stay.
    gc.unfreeze()
    gc.collect()
    started = time.perf_counter()
    return run(cell.experiment, cell.folder, workers=0, resume=True), time.perf_counter() - started


def take_gpu(taken: Any) -> None:
    """Have this process see one GPU, where there are any; ``taken``: a shared counter of processes."""
    from flexlora_fast.simulate import worker

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the parent ends the others
    with taken.get_lock():
        number, taken.value = taken.value, taken.value + 1
    visible = worker.gpus()
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def outcome(summary: dict[str, Any], seconds: float) -> str:
    return f"{summary['metric']} {summary['final']:.3f}, {words.duration(seconds)}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
