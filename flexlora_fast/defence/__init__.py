"""Defences against hostile or broken clients, by name.

>>> from flexlora_fast import defence
>>> defence.get("krum:byzantine=2")
Krum(byzantine=2)
"""

from __future__ import annotations

from flexlora_fast import named
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
    return named.made(defence, RULES, "defence")  # type: ignore[return-value]
