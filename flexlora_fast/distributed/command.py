"""The command line as one rank of several: started by torchrun, or by whatever sets the same variables."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import typer

from flexlora_fast import aggregator
from flexlora_fast.distributed import rounds
from flexlora_fast.distributed.team import Team
from flexlora_fast.errors import DistributedError

F = TypeVar("F", bound=Callable[..., None])

# What torch.distributed's "env://" reads.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_joined: ContextVar[Team | None] = ContextVar("_joined", default=None)


def launched() -> bool:
    """Whether this process was started as one rank of several."""
    if not all(os.environ.get(name) for name in _VARIABLES):
        return False
    numbers = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = next((name for name, text in numbers.items() if not (text.isascii() and text.isdigit())), None)
    if wrong is not None:
        raise typer.BadParameter(
            f"{wrong} is {numbers[wrong]!r} in the environment, and torch.distributed wants a number; unset "
            f"{', '.join(_VARIABLES)} for one process, or start several with torchrun"
        )
    return int(numbers["WORLD_SIZE"]) > 1


def on_all_ranks(command: F) -> F:
    """The command as it is, or, where it was ``launched``, by all ranks: the first says what there is to say, and all
    end with the same exit code. Tracebacks of unexpected errors come from each.

    Of the command's options, ``device`` and ``timeout`` are looked at.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        if not launched():
            return command(*args, **options)
        options["device"], backend = _device(options["device"])
        try:
            with _group(backend, options["timeout"]), Team(options["timeout"]) as team, _quiet(team.rank > 0):
                _joined.set(team)
                return command(*args, **options)
        except DistributedError as error:  # before the command could see it
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        finally:
            _joined.set(None)

    return run  # type: ignore[return-value]


def Aggregator(*args: Any, **options: Any) -> aggregator.Aggregator:
    """The round of this process, or its rank's part of that of all."""
    team = _joined.get()
    return aggregator.Aggregator(*args, **options) if team is None else rounds.Aggregator(team, *args, **options)


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    team = _joined.get()
    return team is None or team.rank == 0


def agreed() -> contextlib.AbstractContextManager[None]:
    """``Team.agreed``, where there are several ranks."""
    team = _joined.get()
    return contextlib.nullcontext() if team is None else team.agreed()


def _device(name: str | None) -> tuple[str | None, str]:
    """A GPU for each rank of this machine, and the backend that they talk through."""
    if name != "cuda" or not torch.cuda.is_available():
        return name, "gloo"
    local, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    # NCCL wants a GPU of its own for each rank.
    return f"cuda:{local % gpus}", "cpu:gloo,cuda:nccl" if ranks <= gpus and dist.is_nccl_available() else "gloo"


@contextlib.contextmanager
def _group(backend: str, timeout: float) -> Iterator[None]:
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        variables = ", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES)
        raise DistributedError(f"the ranks do not find each other ({variables}): {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _quiet(yes: bool) -> Iterator[None]:
    """No output but tracebacks inside, where ``yes``; a wrong call is then told by its exit code alone."""
    if not yes:
        yield
        return
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    except typer.BadParameter as error:
        raise typer.Exit(error.exit_code) from error
