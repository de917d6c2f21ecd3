"""What all commands share: options, how failures end, how results are shown."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn, TextIO

import torch
import typer
from rich.console import Console, RenderableType

from flexlora_fast import tables
from flexlora_fast.distributed import command
from flexlora_fast.errors import FlexLoRAError, OptionError, RankError, WeightError

DTYPES = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Full = Annotated[bool, typer.Option("--full", help="List every layer, however many there are.")]


def parse_ranks(text: str | None, distinct: bool = True) -> list[int]:
    """``"8,16"`` as numbers, sorted and each once where ``distinct``."""
    if text is None:
        return []
    items = [item.strip() for item in text.split(",")]
    bad = [item for item in items if not (item.isascii() and item.isdecimal() and int(item) >= 1)]
    if bad:
        raise RankError(f"--ranks has {bad[0]!r}; give whole numbers ≥ 1, such as 8,16,64")
    values = [int(item) for item in items]
    return sorted(set(values)) if distinct else values


def one_of(option: str, value: str, known: Any) -> Any:
    """``value``, if it is known. (typer has taken ``Literal`` for this only since 0.19.)"""
    if value not in known:
        raise OptionError(f"{option} is {value!r}; give one of {', '.join(known)}")
    return value


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """A wrong argument ends with exit code 2 and how to do it right."""
    try:
        with command.agreed():
            yield
    except (OptionError, RankError, WeightError) as error:
        raise typer.BadParameter(tables.clean(error)) from error


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """What can go wrong in the world ends with exit code 1 and a message; a traceback is for bugs."""
    try:
        with command.agreed():
            yield
    except (FlexLoRAError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        fail(str(error) or type(error).__name__)


def fail(message: str) -> NoReturn:
    note(f"error: {message}")
    raise typer.Exit(1)


def note(message: str) -> None:
    print(tables.clean(message), file=sys.stderr)


def show(what: RenderableType, stream: TextIO | None = None) -> None:
    """As wide as the terminal; in a pipe as plain text, wide enough for the tables."""
    console = Console(file=stream or sys.stdout, highlight=False)
    if console.is_terminal:
        console.print(what)
    else:
        print(tables.plain(what), file=stream or sys.stdout)


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))
