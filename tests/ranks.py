"""Ranks for the tests: processes of their own, with gloo and a store in a file, forked from a server that has imported
everything, so that starting one takes a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["flexlora_fast.distributed", "tests.checks", "tests.command", "hypothesis", "pytest"])


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: ``value``, or the ``error`` that it raised as (class, client, layer, text), or neither,
    where it was killed. ``seconds``: from the moment when all of them had come.
    """

    value: Any = None
    error: tuple[str, str | None, str | None, str] | None = None
    seconds: float = 0.0
    exitcode: int | None = None

    @property
    def kind(self) -> str | None:
        return self.error and self.error[0]

    @property
    def text(self) -> str:
        return self.error[3] if self.error else ""


def run(world: int, job: Callable[..., Any], *args: Any, patience: float = 60) -> list[Outcome]:
    """``job(rank, *args)`` in each of ``world`` ranks, a function of a module's own."""
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            arguments = (rank, world, Path(folder) / "store", theirs, job, args)
            process = _context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        end = time.monotonic() + patience
        outcomes = [_outcome(pipe, process, end) for pipe, process in zip(pipes, processes, strict=True)]
        for process in processes:
            process.kill()
            process.join()
        return outcomes


def values(world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """The values of ``run``, where no rank fails."""
    outcomes = run(world, job, *args)
    assert all(outcome.error is None and outcome.exitcode == 0 for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def _outcome(pipe: Any, process: Any, end: float) -> Outcome:
    found: dict[str, Any] = {}
    try:
        if pipe.poll(max(0.0, end - time.monotonic())):
            found = pipe.recv()
            process.join(max(1.0, end - time.monotonic()))
    except EOFError:  # killed
        process.join(5)
    return Outcome(**found, exitcode=process.exitcode)


def _rank(rank: int, world: int, store: Path, pipe: Any, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    dist.barrier()
    start, found = time.monotonic(), {}
    try:
        found["value"] = job(rank, *args)
    except BaseException as error:
        layer, client = getattr(error, "layer", None), getattr(error, "client", None)
        found["error"] = (type(error).__name__, client, layer, str(error))
    found["seconds"] = time.monotonic() - start
    pipe.send(found)
    pipe.close()
    if "error" not in found:
        dist.barrier()
    os._exit(0)  # at once: there is nothing that the interpreter should tidy up
