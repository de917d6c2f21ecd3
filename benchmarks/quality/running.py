"""Plays the runs of a grid in separate processes, and goes on where an earlier call stopped."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from benchmarks.quality.grid import Cell
from flexlora_fast.simulate import words
from flexlora_fast.tables import count

# Importing torch and transformers takes longer than a small run: a process plays so many before a new one follows,
# which bounds what one that leaks can take.
RUNS_OF_A_PROCESS = 20


def play(cells: Sequence[Cell], workers: int) -> list[str]:
    """Play what is not complete, in so many processes; returns the names of the runs that failed.

    Complete runs are skipped, begun ones go on, and what fails does not keep the others from running. Each run is done
    in one process with one thread: numbers do not depend on ``workers``.
    """
    left = [cell for cell in cells if not cell.complete]
    say(f"{count(len(cells), 'run')}, {len(cells) - len(left)} complete")
    if not left:
        return []
    failed: list[str] = []
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    pool = ProcessPoolExecutor(min(workers, len(left)), mp_context=context, max_tasks_per_child=RUNS_OF_A_PROCESS)
    try:
        futures = {pool.submit(play_one, cell): cell for cell in left}
        for number, future in enumerate(as_completed(futures), 1):
            cell = futures[future]
            try:
                told = outcome(*future.result())
            except BrokenProcessPool:
                raise
            except Exception as error:  # whatever one method raises, the others' runs are worth having
                failed.append(cell.name)
                told = f"failed: {''.join(traceback.format_exception(error))}"
            remaining = (time.perf_counter() - started) / number * (len(left) - number)
            ahead = f"; about {words.duration(remaining)} left" if number < len(left) else ""
            say(f"[{number}/{len(left)}] {cell.name}: {told}{ahead}")
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def play_one(cell: Cell) -> tuple[dict[str, Any], float]:
    """One run in this process; returns its summary and the seconds it took."""
    from flexlora_fast.simulate.run import run

    # A run freezes what is there against the collector; without this, models of runs before would stay.
    gc.unfreeze()
    gc.collect()
    started = time.perf_counter()
    return run(cell.experiment, cell.folder, workers=0, resume=True), time.perf_counter() - started


def outcome(summary: dict[str, Any], seconds: float) -> str:
    return f"{summary['metric']} {summary['final']:.3f}, {words.duration(seconds)}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
