"""Files of experiments: how they are parsed and changed, and what is said about wrong ones."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flexlora_fast.errors import OptionError, shown

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def parse(path: Path, text: bytes) -> Any:
    """What the file says, by its suffix. Raises ``ValueError`` where it does not follow its format."""
    if path.suffix == ".toml":
        return tomllib.loads(text.decode())
    if path.suffix in (".yaml", ".yml"):
        import yaml

        class Loader(yaml.SafeLoader):
            """YAML 1.2's numbers, which PyYAML takes for text where they have no point: 1e-3."""

        Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    raise OptionError(f"{path}: what ends in {path.suffix!r} is not read; give a .toml or .yaml file")


def change(document: dict[str, Any], wanted: str) -> None:
    """Put ``key.path=value`` into it; a key without value goes away, which gives its default back."""
    key, sign, text = wanted.partition("=")
    if not sign or not key.strip():
        raise OptionError(f"--set {wanted!r} is not key=value; such as --set clients.alpha=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *path, last = key.strip().split(".")
    table = document
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise OptionError(f"--set {wanted!r}: {name!r} is {shown(table)}, not a table of keys")
    if text.strip() == "":
        table.pop(last, None)
    else:
        table[last] = value


def told(problem: Any, source: str, experiment: type[BaseModel], options: type[BaseModel] | None = None) -> str:
    """One of pydantic's errors in this package's words; ``options``: the model of the ``[task]`` table it is about."""
    path = [str(part) for part in problem["loc"] if not str(part).startswith(("constrained-", "function-"))]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _keys(experiment, path[:-1]) if options is None else _keys(options, path[1:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"{source}: {key} is no key of an experiment; {hint}"
    if problem["type"] == "missing":
        return f"{source}: {key} is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if problem["type"] == "value_error" else f" is {shown(problem['input'])}"
    return f"{source}: {key or 'the file'}{value}: {message[0].lower() + message[1:]}"


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys that a table knows."""
    for name in path:
        if name.isdecimal():
            continue
        field = model.model_fields.get(name)
        found = [] if field is None else [a for a in _classes(field.annotation) if issubclass(a, BaseModel)]
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [cls for part in getattr(annotation, "__args__", ()) for cls in _classes(part)]
