"""What a command line names: client folders, their names, their weights."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora_fast.errors import OptionError, WeightError
from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME

_MARKS = (CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin")
_LONGEST = 60  # characters of a folder name: at most 240 of the 255 bytes that file systems take


@dataclass(frozen=True)
class Source:
    """A client's adapter folder and the name the client gets."""

    path: Path
    name: str


def find(folders: Sequence[Path], trusted: bool = True) -> tuple[list[Source], list[Path]]:
    """The clients in ``folders``, and the subfolders that were passed over as they hold no adapter.

    A folder is an adapter folder itself, or holds adapter folders one level down, which are taken in the order of
    their names. One that is neither is kept as a client, to be refused with its reason. A client's name is its
    folder's, with as many parent folders in front as tell it from the others.

    Where what is in the folders is not ``trusted``, no link in them is followed: one that stands where an adapter
    folder may stand is a client, for the gate to refuse.

    Raises ``OptionError`` where two of them are the same folder.
    """
    paths: list[Path] = []
    skipped: list[Path] = []
    for folder in folders:
        inside = [] if is_adapter(folder) else sorted(x for x in folder.iterdir() if _may_be_folder(x, trusted))
        adapters = [x for x in inside if (x.is_symlink() and not trusted) or is_adapter(x)]
        paths += adapters or [folder]
        skipped += sorted({*inside} - {*adapters}) if adapters else []
    for path, count in Counter(os.path.abspath(path) for path in paths).items():
        if count > 1:
            raise OptionError(f"{path!r} is given {count} times; give it once, with {count} times the weight")
    return [Source(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)], skipped


def is_adapter(folder: Path) -> bool:
    """Whether a folder looks like a PEFT adapter, be it a broken one; no link in it is followed."""
    return any(os.path.lexists(folder / name) for name in _MARKS)


def _may_be_folder(path: Path, trusted: bool) -> bool:
    return path.is_dir() if trusted else path.is_symlink() or path.is_dir()


def distinct_names(paths: Iterable[Path]) -> list[str]:
    """For different paths the shortest ends that differ.

    >>> distinct_names([Path("/x/anna/out"), Path("/x/ben/out"), Path("/y/carl")])
    ['anna/out', 'ben/out', 'carl']
    """
    parts = [Path(os.path.abspath(path)).parts[1:] or ("root",) for path in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        counts = Counter(names)
        longer = [i for i, name in enumerate(names) if counts[name] > 1 and depth[i] < len(parts[i])]
        if not longer:
            return names
        for i in longer:
            depth[i] += 1


def folder_names(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each client: one path part, safe on any file system, different even without case.

    >>> folder_names(["anna/out", "anna-out", "..", "Ben", "ben"])
    {'anna/out': 'anna-out', 'anna-out': 'anna-out-2', '..': 'client', 'Ben': 'Ben', 'ben': 'ben-2'}
    """
    result: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        base = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:_LONGEST] or "client"
        folder, i = base, 1
        while folder.casefold() in taken:
            i += 1
            folder = f"{base}-{i}"
        taken.add(folder.casefold())
        result[name] = folder
    return result


def read_weights(text: str, sources: Sequence[Source]) -> tuple[list[float], list[str]]:
    """The weight of each source, and the entries of a weights file that belong to none of them.

    ``text`` is a list of numbers separated by commas, one for each source in their order, or the path of a JSON
    object or a CSV table from client (name, folder name or path) to weight.

    Raises ``WeightError`` quoting the entry or client for what cannot be read or is missing. Whether a weight is
    finite and ≥ 0 is left to the round, which refuses that client alone.
    """
    path = Path(text)
    if path.suffix.lower() in (".json", ".csv") or path.is_file():
        return _assign(_read_file(path), path, sources)
    weights = [_number(item, f"--weights item {i + 1}") for i, item in enumerate(text.split(","))]
    if len(weights) != len(sources):
        names = ", ".join(source.name for source in sources[:8]) + (" …" if len(sources) > 8 else "")
        raise WeightError(f"{len(weights)} weights for {len(sources)} clients; give one for each, in the order {names}")
    return weights, []


def _read_file(path: Path) -> list[tuple[str, float]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"the weights file {str(path)!r} cannot be read ({error})") from error
    if path.suffix.lower() != ".json":
        return _read_csv(content, path)
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{str(path)!r} is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise WeightError(f'{str(path)!r} holds a {type(table).__name__}; give an object like {{"client": 1200}}')
    return [(key, _number(value, f"{str(path)!r}, client {key!r}")) for key, value in table.items()]


def _read_csv(content: str, path: Path) -> list[tuple[str, float]]:
    rows = [(i, row) for i, row in enumerate(csv.reader(content.splitlines()), start=1) if any(row)]
    entries = []
    for position, (line, row) in enumerate(rows):
        if len(row) != 2:
            raise WeightError(f"{str(path)!r} line {line} has {len(row)} columns; give two: client,weight")
        try:
            entries.append((row[0].strip(), _number(row[1], f"{str(path)!r} line {line}")))
        except WeightError:
            if position > 0:  # the first line may be a header
                raise
    return entries


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(value)
        return float(value)
    except (ValueError, OverflowError):
        raise WeightError(f"{where} is {value!r}, not a number") from None


def _assign(entries: list[tuple[str, float]], path: Path, sources: Sequence[Source]) -> tuple[list[float], list[str]]:
    """Match entries to sources by name, by path (from here or from the file's folder), then by folder name."""
    by_name = {source.name: i for i, source in enumerate(sources)}
    by_path = {os.path.abspath(source.path): i for i, source in enumerate(sources)}
    by_folder: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        by_folder.setdefault(Path(os.path.abspath(source.path)).name, []).append(i)
    weights: dict[int, float] = {}
    unknown = []
    for key, weight in entries:
        candidates = [
            by_name.get(key),
            by_path.get(os.path.abspath(key)),
            by_path.get(os.path.abspath(path.parent / key)),
        ]
        found = [i for i in candidates if i is not None] or by_folder.get(key, [])
        if not found:
            unknown.append(key)
        elif len(found) > 1 and len(set(found)) > 1:
            names = " or ".join(repr(sources[i].name) for i in dict.fromkeys(found))
            raise WeightError(f"{str(path)!r}: {key!r} could be {names}; say which")
        elif found[0] in weights:
            raise WeightError(f"{str(path)!r} gives a weight twice", client=sources[found[0]].name)
        else:
            weights[found[0]] = weight
    absent = [repr(source.name) for i, source in enumerate(sources) if i not in weights]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise WeightError(f"{str(path)!r} has no weight for {', '.join(absent[:5])}{more}")
    return [weights[i] for i in range(len(sources))], unknown
