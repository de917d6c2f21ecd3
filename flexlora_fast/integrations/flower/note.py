"""What a server says beside the arrays: the config that they are an adapter of, and s at every rank that it admits."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord

from flexlora_fast import config as configs
from flexlora_fast.adapter import Adapter
from flexlora_fast.config import Config
from flexlora_fast.errors import OptionError
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.integrations.flower import wire
from flexlora_fast.truncation import truncated

KEY = "flexlora"  # of the ConfigRecord, in messages both ways
RANK = "lora-rank"  # in a node's config, a run's config, and the answer to a question


@dataclass(frozen=True)
class ScaleTable:
    """s by layer and rank. ``groups``: layers that agree at all ranks, with s at each; one of them has no list of
    layers, and is all the others.
    """

    ranks: list[int]
    groups: list[tuple[list[str] | None, list[float]]]

    @classmethod
    def of(cls, policy: RoundPolicy) -> ScaleTable:
        ranks = sorted(policy.ranks)
        groups: dict[tuple[float, ...], list[str]] = defaultdict(list)
        for layer in policy.specs:
            groups[tuple(policy.scale(layer, rank) for rank in ranks)].append(layer)
        largest = max(groups, key=lambda scales: len(groups[scales]))
        return cls(ranks, [(None if s == largest else layers, list(s)) for s, layers in groups.items()])

    def at(self, layers: list[str], rank: int) -> dict[str, float]:
        """s of each layer at a rank. Raises ``OptionError`` for a rank that the server does not admit."""
        if rank not in self.ranks:
            raise OptionError(f"{RANK} is {rank}, and the server admits {self.ranks}; train at one of these")
        place, found = self.ranks.index(rank), dict[str, float]()
        for named, scales in sorted(self.groups, key=lambda group: group[0] is not None):  # all the others first
            found |= dict.fromkeys(layers if named is None else named, scales[place])
        return found


def config_at(policy: RoundPolicy, ranks: Mapping[str, int]) -> Config:
    """The policy's config at these ranks, by layer, and the scales that it has for them."""
    specs = policy.specs
    scales = {layer: policy.scale(layer, rank) for layer, rank in ranks.items()}
    return configs.with_ranks(policy.config, ranks, scales, {layer: specs[layer].pattern_name for layer in ranks})


def at_ranks(adapter: Adapter, policy: RoundPolicy, ranks: Mapping[str, int]) -> Adapter:
    """``adapter`` cut to these ranks, by layer, at the policy's scales; itself where it has them."""
    if all(adapter.rank(layer) == rank for layer, rank in ranks.items()):
        return adapter
    return truncated(adapter, ranks, {layer: policy.scale(layer, rank) for layer, rank in ranks.items()})


def write(adapter: Adapter, table: ScaleTable, arrays_key: str) -> ConfigRecord:
    """The note that goes with an adapter whose arrays are under ``arrays_key``."""
    return ConfigRecord(
        {
            "arrays": arrays_key,
            "adapter-config": json.dumps(adapter.config),
            "scales": json.dumps({"ranks": table.ranks, "groups": table.groups}),
        }
    )


def localized(record: ArrayRecord, note: ConfigRecord, rank: int) -> ArrayRecord:
    """The arrays of a message at another rank, at the scale that the server has for it; the same where it fits.

    Raises ``OptionError`` for a rank that the server does not admit.
    """
    adapter = Adapter.from_state_dict(wire.from_record(record), json.loads(str(note["adapter-config"])))
    scales = ScaleTable(**json.loads(str(note["scales"]))).at(adapter.layers, rank)
    if all((adapter.rank(layer), adapter.scale(layer)) == (rank, scales[layer]) for layer in adapter.layers):
        return record
    cut = truncated(adapter, dict.fromkeys(adapter.layers, rank), scales)
    return wire.to_record(cut.state_dict())


def checked_rank(value: Any, where: str) -> int:
    """A rank that somebody configured; raises ``OptionError`` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{RANK} in {where} is {value!r}; give an integer of at least 1")
    return value
