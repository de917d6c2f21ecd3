"""Defences against hostile or broken clients, by name.

>>> from flexlora_fast import defence
>>> defence.get("krum:byzantine=2")
Krum(byzantine=2)
"""

from __future__ import annotations

from typing import Any

from flexlora_fast.defence.base import Defence, Judgement, Rule, Verdict
from flexlora_fast.defence.clip import CentredClipping, Clip
from flexlora_fast.defence.coordinates import Coordinates, Median, TrimmedMean
from flexlora_fast.defence.reweighting import FLTrust, FoolsGold, GeometricMedian
from flexlora_fast.defence.selection import Krum, MultiKrum
from flexlora_fast.errors import OptionError

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Clip,
        Krum,
        MultiKrum,
        GeometricMedian,
        CentredClipping,
        FoolsGold,
        FLTrust,
        Median,
        TrimmedMean,
    )
}

__all__ = [
    "RULES",
    "CentredClipping",
    "Clip",
    "Coordinates",
    "Defence",
    "FLTrust",
    "FoolsGold",
    "GeometricMedian",
    "Judgement",
    "Krum",
    "Median",
    "MultiKrum",
    "Rule",
    "TrimmedMean",
    "Verdict",
    "get",
]


def get(defence: str | Defence | Coordinates | None) -> Defence | Coordinates | None:
    """The rule of that name with its default settings, or with those behind a colon; an instance or None as it is.

    Raises ``OptionError`` for an unknown rule or setting.
    """
    if defence is None or isinstance(defence, Coordinates):
        return defence
    if not isinstance(defence, (str, type)) and isinstance(defence, Defence):
        return defence
    if not isinstance(defence, str):
        raise OptionError(
            f"defence {defence!r} is no rule; give one of {', '.join(RULES)}, or an instance with name, reference "
            "and judge()"
        )
    name, _, text = defence.partition(":")
    if name not in RULES:
        raise OptionError(f"defence {name!r} is not one of {', '.join(RULES)}")
    settings: dict[str, Any] = {}
    known = list(getattr(RULES[name], "__dataclass_fields__", {}))
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            raise OptionError(f"defence {name!r} has no setting {item!r}; it has {', '.join(known) or 'none'}")
        settings[key] = _value(value)
    return RULES[name](**settings)  # type: ignore[return-value]


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
