"""Which client affords which ranks: the paper's distributions over types of devices, a list, or one rank for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flexlora_fast import config as configs
from flexlora_fast.adapter import Adapter
from flexlora_fast.simulate.spec import Ranks, RankType


def uniform(types: int) -> list[float]:
    """Every type is as likely."""
    return [1 / types] * types


def heavy_tail_light(types: int) -> list[float]:
    """80 % of the lightest type, 10 % of the heaviest, 10 % of those between (0.80, 0.05, 0.05, 0.10 of four)."""
    if types < 3:
        return [1.0] if types == 1 else [0.8, 0.2]
    return [0.8, *[0.1 / (types - 2)] * (types - 2), 0.1]


def heavy_tail_strong(types: int) -> list[float]:
    """80 % of the heaviest type, 10 % of the one before it, 10 % of the lighter (0.05, 0.05, 0.10, 0.80 of four)."""
    if types < 3:
        return [1.0] if types == 1 else [0.2, 0.8]
    return [*[0.1 / (types - 2)] * (types - 2), 0.1, 0.8]


def normal(types: int) -> list[float]:
    """∝ the density of N((types − 1)/2, (0.7·types/4)²) at the type's index (0.06, 0.44, 0.44, 0.06 of four)."""
    mean, deviation = (types - 1) / 2, 0.7 * types / 4
    density = [math.exp(-(((i - mean) / deviation) ** 2) / 2) for i in range(types)]
    return [value / sum(density) for value in density]


# The shares of FlexLoRA's released code (main.py, get_peft) over types from light to heavy. Its "normal" counts the
# types in another order, in which 30/200 and 200 get the 44 %; here they go to the two in the middle, as its paper's
# figure has them.
SHARES: dict[str, Callable[[int], list[float]]] = {
    "uniform": uniform,
    "heavy-tail-light": heavy_tail_light,
    "heavy-tail-strong": heavy_tail_strong,
    "normal": normal,
}


def assign(ranks: Ranks, clients: int, seed: Sequence[int]) -> list[RankType]:
    """The type of each client, in client order.

    With a ``distribution`` each draws its own, whatever it is then made to use (``everyone``): methods that are
    compared by that see the same clients.
    """
    if ranks.all is not None:
        types = [RankType(r=ranks.all)] * clients
    elif ranks.each is not None:
        types = [RankType(r=ranks.each[i % len(ranks.each)]) for i in range(clients)]
    else:
        assert ranks.distribution is not None
        shares = SHARES[ranks.distribution](len(ranks.types))
        drawn = np.random.default_rng(np.random.SeedSequence(seed)).choice(len(ranks.types), clients, p=shares)
        types = [ranks.types[i] for i in drawn]
    if ranks.everyone == "own":
        return types
    pick = min if ranks.everyone == "smallest" else max
    return [pick(types, key=lambda kind: (kind.r, kind.ffn or kind.r))] * clients


def config(kind: RankType, attention: str) -> dict[str, Any]:
    """A type's ``r`` and ``rank_pattern``, as PEFT has them.

    >>> config(RankType(r=30, ffn=200), "attn")
    {'r': 30, 'rank_pattern': {'^(?!.*(attn)).*': 200}}
    """
    return {"r": kind.r, "rank_pattern": {} if kind.ffn is None else {f"^(?!.*({attention})).*": kind.ffn}}


def order(ranks: Mapping[str, Any]) -> tuple[int, ...]:
    """Sorts types from light to heavy: by the ranks that ``config`` gave."""
    return (ranks["r"], *(ranks["rank_pattern"].values() or [ranks["r"]]))


def of_layers(ranks: Mapping[str, Any], adapter: Adapter) -> dict[str, int]:
    """The rank of each of the adapter's layers, by what ``config`` gave; at most min(m, n), which holds anything."""
    asked = configs.normalize(ranks)
    specs = {layer: adapter.spec(layer) for layer in adapter.layers}
    return {layer: min(configs.rank_for(asked, s.pattern_name), s.m, s.n) for layer, s in specs.items()}
