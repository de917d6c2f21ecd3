"""A policy as a JSON document, so that a round can be described in a file, compared, and taken up again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexlora_fast.errors import OptionError, shown
from flexlora_fast.files import replace
from flexlora_fast.gate import strict
from flexlora_fast.gate.reference import Reference, code, factor_dtype, fields, is_count, mapping, number

if TYPE_CHECKING:
    from flexlora_fast.gate.policy import RoundPolicy, Rules

FORMAT = "flexlora_fast.policy/1"
QUOTAS = ("max_clients", "max_round_bytes")  # whole numbers ≥ 1; null: any number
BOUNDS = ("max_weight", "max_layer_norm", "max_norm", "max_extra_norm")  # numbers > 0; null: infinite


@dataclass(frozen=True)
class ScaleTable:
    """A scale rule written out: s by layer and rank."""

    scales: Mapping[str, Mapping[int, float]]

    def __call__(self, layer: str, rank: int) -> float:
        try:
            return self.scales[layer][rank]
        except KeyError:
            raise OptionError(f"the policy has no scale for rank {rank} of layer {layer!r}") from None


def to_json(policy: RoundPolicy) -> dict[str, Any]:
    """JSON-able; policies of equal documents admit the same.

    Raises ``OptionError`` for a scale function that gives no finite number, for a function of ``client_ranks``, which
    cannot be asked about all clients there may be, and for what would not be read again, such as a NaN in the config.
    """
    if callable(policy.client_ranks):
        raise OptionError("client_ranks is a function, which no file can hold; give a mapping from client to ranks")
    ranks = sorted(policy.ranks)
    rule: Any = policy.scale_rule
    if callable(rule):
        rule = {layer: [policy.scale(layer, rank) for rank in ranks] for layer in policy.specs}
        for layer, scales in rule.items():
            for rank, scale in zip(ranks, scales, strict=True):
                if not math.isfinite(scale):
                    raise OptionError(f"the scale rule gives {scale} for rank {rank} of layer {layer!r}")
    document = {
        "format": FORMAT,
        "reference": policy.reference.to_json(),
        "ranks": ranks,
        "scale": rule,
        "dtypes": sorted(code(dtype) for dtype in policy.dtypes),
        "max_bytes": policy.max_bytes,
        "client_ranks": {client: sorted(own) for client, own in sorted((policy.client_ranks or {}).items())},
        "partial": policy.partial,
        **{name: getattr(policy, name) for name in QUOTAS},
    } | {name: _bound(getattr(policy, name)) for name in BOUNDS}
    try:
        strict.dumps(document)
    except ValueError as error:
        raise OptionError(f"the policy cannot be written down: {error}; give plain, finite values") from None
    return document


def from_json(document: Any) -> tuple[Reference, Rules]:
    """What a policy is made of.

    Raises ``OptionError`` for anything that ``to_json`` does not write.
    """
    try:
        found = mapping(document, "it")
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is {shown(found.get('format'))}, not {FORMAT}")
        plain = ("max_bytes", "partial", *QUOTAS)  # the policy itself checks these
        names = ("format", "reference", "ranks", "scale", "dtypes", "client_ranks", *plain, *BOUNDS)
        found = fields(found, "it", *names)
        ranks = _ranks(found["ranks"], "ranks")
        if not isinstance(found["dtypes"], list):
            raise ValueError(f"dtypes is {shown(found['dtypes'])}, not a list")
        reference = Reference.from_json(found["reference"])
        rules: Any = {
            "ranks": ranks,
            "scale": _scale(found["scale"], reference, ranks),
            "dtypes": [factor_dtype(name) for name in found["dtypes"]],
            "client_ranks": {
                client: _ranks(own, f"client_ranks of {client!r}")
                for client, own in mapping(found["client_ranks"], "client_ranks").items()
            },
        }
        rules |= {name: found[name] for name in plain}
        rules |= {name: math.inf if found[name] is None else number(found[name], name) for name in BOUNDS}
    except ValueError as error:
        raise OptionError(f"the stored policy cannot be used: {error}; write it again with RoundPolicy.save") from None
    return reference, rules


def save(policy: RoundPolicy, path: str | os.PathLike[str]) -> Path:
    """Write the file, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = strict.dumps(to_json(policy))
    replace(target, lambda to: Path(to).write_bytes(content + b"\n"))
    return target


def read(path: str | os.PathLike[str]) -> Any:
    """The document in a file.

    Raises ``OptionError`` for a file that cannot be read, or holds no strict JSON.
    """
    try:
        return strict.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise OptionError(
            f"the policy {str(path)!r} cannot be read ({error}); write it with RoundPolicy.save"
        ) from None


def _ranks(ranks: Any, what: str) -> list[int]:
    if not isinstance(ranks, list) or not all(is_count(rank) for rank in ranks) or len(set(ranks)) != len(ranks):
        raise ValueError(f"{what} is {shown(ranks)}, not a list of different whole numbers ≥ 1")
    return ranks


def _bound(value: float) -> float | None:
    return None if math.isinf(value) else value


def _scale(rule: Any, reference: Reference, ranks: list[int]) -> Any:
    if isinstance(rule, str):
        return rule
    table = mapping(rule, "scale")
    if table.keys() != reference.specs.keys():
        raise ValueError(f"scale has layers {shown(sorted(table))}, the reference {shown(sorted(reference.specs))}")
    scales = {}
    for layer, row in table.items():
        if not isinstance(row, list) or len(row) != len(ranks):
            raise ValueError(f"the scale of layer {layer!r} is {shown(row)}, not one number for each of {ranks}")
        scales[layer] = {
            rank: number(scale, f"the scale of layer {layer!r}") for rank, scale in zip(ranks, row, strict=True)
        }
    return ScaleTable(scales)
