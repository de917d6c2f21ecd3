"""Task files of JSON, read with errors that say where: file, line or entry, what stands there, what to do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora_fast.errors import DataError, shown


@dataclass(frozen=True)
class Entry:
    """An object of a file, and where it stands, to be quoted. Values are taken out of it with their types checked.

    ``remedy``: what somebody should do whose file is another.
    """

    where: str
    values: dict[str, Any]
    remedy: str

    def text(self, key: str) -> str:
        """The text under ``key``."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """The texts under ``key``, at least one; one that stands there alone counts as a list of one."""
        value = self._get(key)
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
            raise self.wrong(key, "a list of texts")
        return found

    def entries(self, key: str) -> list[Entry]:
        """The objects in the list under ``key``."""
        value = self._get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of objects")
        return [_entry(f"{self.where}, {key}[{i}]", x, self.remedy) for i, x in enumerate(value)]

    def wrong(self, key: str, expected: str) -> DataError:
        """The error for a value that is not as ``expected``."""
        return DataError(f"{self.where}: {key!r} is {shown(self.values.get(key))}, not {expected}; {self.remedy}")

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise DataError(f"{self.where}: has no {key!r}, only {shown(sorted(self.values))}; {self.remedy}")
        return self.values[key]


def document(path: Path, remedy: str) -> Entry:
    """The object that a JSON file holds (``.gz`` too). Raises ``DataError``."""
    return _entry(str(path), _parsed(_content(path, remedy), str(path), remedy), remedy)


def array(path: Path, remedy: str) -> list[Entry]:
    """The objects in the list that a JSON file holds (``.gz`` too). Raises ``DataError``."""
    value = _parsed(_content(path, remedy), str(path), remedy)
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {shown(value)}, not a list of objects; {remedy}")
    return [_entry(f"{path}[{i}]", x, remedy) for i, x in enumerate(value)]


def lines(path: Path, remedy: str) -> Iterator[Entry]:
    """The objects of a JSON Lines file (``.gz`` too), one a line; empty lines are passed over. Raises ``DataError``."""
    for number, line in enumerate(_content(path, remedy).splitlines(), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield _entry(where, _parsed(line, where, remedy), remedy)


def _content(path: Path, remedy: str) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error


def _parsed(text: str, where: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = text[error.pos : error.pos + 40]
        raise DataError(
            f"{where}: no JSON at line {error.lineno}, column {error.colno}: {shown(at)}; {remedy}"
        ) from error


def _entry(where: str, value: Any, remedy: str) -> Entry:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {shown(value)} is no object; {remedy}")
    return Entry(where, value, remedy)
