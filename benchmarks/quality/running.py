"""Plays the runs of a grid in separate processes, and goes on where an earlier call stopped."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from benchmarks.quality.grid import Cell
from flexlora_fast.simulate import words
from flexlora_fast.simulate.pool import belong
from flexlora_fast.tables import count

# Importing torch and transformers takes longer than a small run: a process plays about so many before new ones follow,
# which bounds what one that leaks can take. A pool is made anew for them: with ``max_tasks_per_child``, CPython's waits
# for ever once all processes have ended (github.com/python/cpython/issues/115634).
RUNS_OF_A_PROCESS = 20
Result = tuple[dict[str, Any], float]


def play(cells: Sequence[Cell], workers: int) -> list[str]:
    """Play what is not complete, in so many processes, or in this one where it is 0; returns the names of those that
    failed.

    Complete runs are skipped, begun ones go on, those of the grid before it was changed are replaced, and what fails
    does not keep the others from running. Each run is done in one process with one thread: numbers do not depend on
    ``workers``.
    """
    left = [cell for cell in cells if not cell.complete]
    stale = sum(cell.stale for cell in left)
    replaced = f", {stale} of an earlier grid, which are replaced" if stale else ""
    say(f"{count(len(cells), 'run')}, {len(cells) - len(left)} complete{replaced}")
    failed: list[str] = []
    started = time.perf_counter()
    for number, (cell, result) in enumerate(results(left, workers), 1):
        if isinstance(result, Exception):  # whatever one method raises, the others' runs are worth having
            failed.append(cell.name)
            told = f"failed: {''.join(traceback.format_exception(result))}"
        else:
            told = outcome(*result)
        remaining = (time.perf_counter() - started) / number * (len(left) - number)
        ahead = f"; about {words.duration(remaining)} left" if number < len(left) else ""
        say(f"[{number}/{len(left)}] {cell.name}: {told}{ahead}")
    return failed


def results(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, Result | Exception]]:
    """Each run as it ends, with what it raised in place of its result. Raises ``BrokenProcessPool`` where a process
    died.
    """
    if workers:
        size = workers * RUNS_OF_A_PROCESS
        for begin in range(0, len(cells), size):
            yield from _in_processes(cells[begin : begin + size], workers)
        return
    for cell in cells:
        try:
            yield cell, play_one(cell)
        except Exception as error:
            yield cell, error


def _in_processes(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, Result | Exception]]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    pool = ProcessPoolExecutor(
        min(workers, len(cells)), mp_context=context, initializer=belong, initargs=(context.Value("i", 0),)
    )
    try:
        futures = {pool.submit(play_one, cell): cell for cell in cells}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            yield futures[future], error if isinstance(error, Exception) else future.result()
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
    stale = cell.stale
    summary = run(cell.experiment, cell.folder, workers=0, resume=not stale, force=stale)
    return summary, time.perf_counter() - started


def outcome(summary: dict[str, Any], seconds: float) -> str:
    return f"{summary['metric']} {summary['final']:.3f}, {words.duration(seconds)}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
