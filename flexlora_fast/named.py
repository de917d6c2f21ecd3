"""Rules by name, with settings behind a colon: ``krum:byzantine=2``, ``florist:tau=0.95``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from flexlora_fast.errors import OptionError

T = TypeVar("T")


def made(text: str, known: Mapping[str, type[T]], what: str) -> T:
    """The rule that ``text`` names, with its settings. ``what``: the kind of rule, as errors call it.

    Raises ``OptionError`` for an unknown rule or setting.
    """
    name, _, given = text.partition(":")
    if name not in known:
        raise OptionError(f"{what} {name!r} is not one of {', '.join(known)}")
    rule = known[name]
    fields = list(settings(rule))
    found: dict[str, Any] = {}
    for item in filter(None, given.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in fields:
            raise OptionError(f"{what} {name!r} has no setting {item!r}; it has {', '.join(fields) or 'none'}")
        if key in found:
            raise OptionError(f"{what} {name!r} is given {key!r} twice; give it once")
        found[key] = _value(value)
    return rule(**found)


def settings(rule: type) -> dict[str, Any]:
    """The settings of a rule, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(rule)} if dataclasses.is_dataclass(rule) else {}


def spelled(rule: Any) -> str:
    """The text that :func:`made` takes for a rule: its settings that are numbers or texts and not the default."""
    told = []
    for name, default in settings(type(rule)).items():
        value = getattr(rule, name)
        if value != default and isinstance(value, (int, float, str, type(None))):
            told.append(f"{name}={value}")
    return f"{rule.name}:{','.join(told)}" if told else str(rule.name)


def _value(text: str) -> Any:
    """A number or None where it reads as one, else the text."""
    if text == "None":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
