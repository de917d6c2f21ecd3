"""What a round was begun with, as ``round.json`` has it: a round is taken up under the same, or not at all."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

import torch

from flexlora_fast import defence as defences
from flexlora_fast import methods
from flexlora_fast.defence import Coordinates, Defence
from flexlora_fast.errors import OptionError, shown
from flexlora_fast.gate import strict
from flexlora_fast.journal.evidence import Quarantine
from flexlora_fast.methods import Method

DUPLICATE = ("refuse", "replace")


class Options(TypedDict, total=False):
    """As for :class:`~flexlora_fast.Aggregator`, and what becomes of a second upload and of refused ones."""

    rank: int | None
    method: str | Method
    solver: str
    tol: float
    device: str | torch.device | None
    seed: int
    missing: str
    certificate: str
    defence: str | Defence | Coordinates | None
    min_clients: int
    min_weight: float
    duplicate: str
    quarantine: Quarantine


def recorded(given: Options) -> dict[str, Any]:
    """The given ones, JSON-able. Raises ``OptionError`` for what has no name to be recorded by."""
    found: dict[str, Any] = dict(given)
    unknown = sorted(found.keys() - Options.__annotations__.keys())
    if "privacy" in unknown:
        raise OptionError(
            "a journal keeps uploads and replays them, and a private round may be released once: its noise is made "
            "anew by each finish(), which the ledger charges; use Aggregator(privacy=…)"
        )
    if unknown:
        raise OptionError(f"{unknown[0]!r} is no option of a round; it has {', '.join(Options.__annotations__)}")
    if "method" in found:
        found["method"] = _name_of_method(found["method"])
    if "device" in found:
        found["device"] = None if found["device"] is None else str(found["device"])
    if found.get("defence") is not None:
        rule = defences.get(found["defence"])
        if not _is_named(rule):
            raise OptionError(f"defence {str(rule)!r} has settings that no name tells; give one that a name does")
        found["defence"] = str(rule)
    if found.get("duplicate", "refuse") not in DUPLICATE:
        raise OptionError(f"duplicate {found['duplicate']!r} is neither 'refuse' nor 'replace'")
    if "quarantine" in found:
        found["quarantine"] = dataclasses.asdict(found["quarantine"])
    for name, value in found.items():
        try:
            strict.dumps(value)
        except (TypeError, ValueError):
            raise OptionError(
                f"{name} is {shown(value)}, which JSON cannot record; give a plain, finite value"
            ) from None
    return found


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """With the defaults that a new round gets."""
    defaults = recorded(
        {
            "rank": None,
            "method": "flexlora",
            "solver": "auto",
            "tol": 1e-3,
            "device": None,
            "seed": 0,
            "missing": "zero",
            "certificate": "exact",
            "defence": None,
            "min_clients": 1,
            "min_weight": 0.0,
            "duplicate": "refuse",
            "quarantine": Quarantine(),
        }
    )
    return defaults | given


def check_same(given: dict[str, Any], known: dict[str, Any], where: object) -> None:
    """Raise ``OptionError`` for an option that is not what the round began with."""
    for name, value in given.items():
        if known[name] != value:
            raise OptionError(
                f"{name} is {value!r}, and the round at {str(where)!r} was begun with {known[name]!r}; leave it away, "
                "or begin another round"
            )


def of_aggregator(known: dict[str, Any]) -> dict[str, Any]:
    """Those that the aggregator takes."""
    return {name: value for name, value in known.items() if name not in ("duplicate", "quarantine")}


def _name_of_method(method: str | Method) -> str:
    found = methods.get(method)
    if type(found) is not methods.METHODS.get(found.name):
        raise OptionError(f"method {found.name!r} is one of your own, and a round records it by its name: register it")
    return str(found)


def _is_named(rule: Any) -> bool:
    """Whether the rule's text stands for it."""
    try:
        return bool(defences.get(str(rule)) == rule)
    except OptionError:
        return False
