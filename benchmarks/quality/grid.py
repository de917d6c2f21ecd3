"""A grid of runs: one experiment, and what each setting, method (arm) and seed changes in it. Read from a TOML file."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flexlora_fast.errors import OptionError, shown
from flexlora_fast.simulate.results import EXPERIMENT, SUMMARY
from flexlora_fast.simulate.spec import Experiment


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Change(_Table):
    """What a setting or an arm changes in the experiment: nested tables; a key set to "" is taken away.

    ``note``: a sentence for the tables.
    """

    name: str
    note: str = ""
    change: dict[str, Any] = {}

    @property
    def slug(self) -> str:
        """The name as a folder has it.

        >>> Change(name="FedIT, smallest rank").slug
        'fedit-smallest-rank'
        """
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


class Grid(_Table):
    """The whole file.

    Attributes:
        title: of the results. about: a paragraph on what is measured.
        reference: the arm that all others are compared with. part: of the data that tables go by.
        seeds: of the runs. experiment: as ``flexlora-fast simulate`` reads it.
    """

    title: str
    about: str = ""
    reference: str
    part: Literal["test", "unseen"] = "test"
    seeds: Annotated[list[int], Field(min_length=1)]
    experiment: dict[str, Any]
    settings: Annotated[list[Change], Field(min_length=1)]
    arms: Annotated[list[Change], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        for what, changes in (("settings", self.settings), ("arms", self.arms)):
            slugs = [change.slug for change in changes]
            if len(set(slugs)) < len(slugs):
                raise ValueError(f"two {what} have the same name; there are {', '.join(slugs)}")
        if self.reference not in [arm.name for arm in self.arms]:
            raise ValueError(f"reference {self.reference!r} is none of the arms")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a grid: ``folder`` is where it goes, below the grid's."""

    setting: Change
    arm: Change
    seed: int
    experiment: Experiment
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.setting.slug}/{self.arm.slug}/seed-{self.seed}"

    @property
    def complete(self) -> bool:
        """Whether this very experiment has been played to its end."""
        return (self.folder / SUMMARY).is_file() and not self.stale

    @property
    def stale(self) -> bool:
        """Whether the folder has a run of another experiment: of the grid as it was before it was changed."""
        path = self.folder / EXPERIMENT
        return path.is_file() and json.loads(path.read_text()) != self.experiment.to_dict()


def read(path: Path) -> Grid:
    """The grid in a file. Raises ``OptionError`` quoting the key and the value that does not fit."""
    try:
        return Grid.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{path}: not a TOML file ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the grid"
        raise OptionError(f"{path}: {key} is {shown(first['input'])}: {first['msg']}") from error


def cells(grid: Grid, out: Path, changes: Sequence[str] = (), seeds: Sequence[int] | None = None) -> list[Cell]:
    """Every run of the grid, all arms of a seed before the next seed, so that what is done early can be compared.

    ``changes``: ``key.path=value`` each, over all of it (where the data lies; fewer rounds). Raises ``OptionError``
    where a run's experiment does not make sense.
    """
    found = []
    for seed in grid.seeds if seeds is None else seeds:
        for setting in grid.settings:
            for arm in grid.arms:
                document = merged(grid.experiment, setting.change, arm.change, *map(_parsed, changes))
                document["seed"] = seed
                document.setdefault("method", {})["label"] = arm.name
                source = f"{setting.name}, {arm.name}, seed {seed}"
                folder = out / setting.slug / arm.slug / f"seed-{seed}"
                found.append(Cell(setting, arm, seed, Experiment.of(document, source), folder))
    return found


def chosen(every: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Those whose name, SETTING/ARM/seed-N, fits one of the patterns, or begins with one (none: all of them)."""
    if not patterns:
        return list(every)
    found = [
        cell
        for cell in every
        if any(fnmatch(cell.name, pattern) or fnmatch(cell.name, f"{pattern.rstrip('/')}/*") for pattern in patterns)
    ]
    if not found:
        raise OptionError(f"no run fits {' or '.join(map(repr, patterns))}; they are called like {every[0].name!r}")
    return found


def merged(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the changes put into it one after the other, table by table.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"c": ""}})
    {'a': {'b': 3}}
    """
    result: dict[str, Any] = copy.deepcopy(dict(base))
    for change in changes:
        for key, value in change.items():
            if isinstance(value, Mapping):
                inner = result.get(key)
                result[key] = merged(inner if isinstance(inner, Mapping) else {}, value)
            elif value == "":
                result.pop(key, None)
            else:
                result[key] = copy.deepcopy(value)
    return result


def _parsed(change: str) -> dict[str, Any]:
    """``key.path=value``, the value as TOML writes it, or plain text."""
    key, sign, text = change.partition("=")
    if not sign or not key.strip():
        raise OptionError(f"--set {change!r} is not key=value; such as --set rounds=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for name in reversed(key.strip().split(".")):
        value = {name: value}
    return dict(value)


def flattened(change: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A change as ``key.path = value``, for tables."""
    for key, value in change.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value}" if value != "" else f"no {prefix}{key}"
