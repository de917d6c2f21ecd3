"""A round's layers on the way from the ranks that solved them to the first, which makes one update of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlora_fast.distributed.team import Stopped, Team
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.lowrank.factorization import Factorization


@dataclass(frozen=True)
class _Slot:
    """Where a tensor was."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def bring(
    team: Team,
    owners: Mapping[str, int],
    mine: Mapping[str, Any],
    take: Callable[[str, Any], None],
) -> None:
    """Have the first rank ``take`` every item of ``owners``, in their order, from the rank that has it in ``mine``.

    Items are layers and tensors. A rank that fails goes on taking part, so that no other waits for it, and raises at
    the end.
    """
    failure: Exception | None = None
    for name, owner in owners.items():
        value, tensors = None, list[Tensor]()
        try:
            if owner == team.rank and failure is None:
                value, tensors = _taken_apart(mine[name])
        except Exception as error:
            failure = error
        if owner and owner == team.rank:
            team.send(value, tensors)
        elif owner and team.rank == 0:
            value, tensors = team.receive(owner, _room)
        try:
            if team.rank == 0 and failure is None:
                if value is None:
                    raise Stopped  # its owner says why
                take(name, _put_together(value, tensors))
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


def _taken_apart(item: Any) -> tuple[Any, list[Tensor]]:
    """The item with slots in place of its tensors, and these."""
    tensors = list[Tensor]()

    def stow(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Slot(tuple(value.shape), value.dtype)
        if isinstance(value, tuple):
            return tuple(stow(part) for part in value)
        return value

    if isinstance(item, LayerUpdate):
        factorization = {f.name: stow(getattr(item.factorization, f.name)) for f in dataclasses.fields(Factorization)}
        rest = {f.name: getattr(item, f.name) for f in dataclasses.fields(LayerUpdate) if f.name != "factorization"}
        return (factorization, {name: stow(value) for name, value in rest.items()}), tensors
    return stow(item), tensors


def _room(value: Any) -> list[Tensor]:
    """Empty tensors for the slots."""
    found = list[Tensor]()

    def look(part: Any) -> None:
        if isinstance(part, _Slot):
            found.append(torch.empty(part.shape, dtype=part.dtype))
        elif isinstance(part, tuple):
            for x in part:
                look(x)
        elif isinstance(part, dict):
            for x in part.values():
                look(x)

    look(value)
    return found


def _put_together(value: Any, tensors: list[Tensor]) -> Any:
    filled = iter(tensors)

    def fill(part: Any) -> Any:
        if isinstance(part, _Slot):
            return next(filled)
        return tuple(fill(x) for x in part) if isinstance(part, tuple) else part

    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], dict):
        factorization, rest = ({name: fill(x) for name, x in part.items()} for part in value)
        return LayerUpdate(factorization=Factorization(**factorization), **rest)
    return fill(value)
