"""What PEFT means by a LoRA config: which rank, alpha and scale a layer has, and which configs are not plain
LoRA.

A config is a plain, JSON-able ``dict`` with the content of ``adapter_config.json``. The rules are those of
PEFT 0.21 (``peft/tuners/lora/model.py: _create_and_replace``, ``peft/utils/other.py: get_pattern_key``,
``peft/tuners/tuners_utils.py: check_target_module_exists``), written here without importing PEFT, and tested
equal to it. Every ``layer`` argument is the module path that PEFT itself matches patterns against,
``LayerSpec.pattern_name``; it is the layer's own name except inside MultiheadAttention and for MoE
parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from flexlora_fast.errors import AdapterError, RankError, UnsupportedAdapterError
from flexlora_fast.variants import Config, refuse_unsupported

__all__ = [
    "Config",
    "alpha_for",
    "check_numbers",
    "filled",
    "normalize",
    "parameter_targets",
    "rank_for",
    "refuse_unsupported",
    "scale_for",
    "targets",
    "targets_module",
    "with_ranks",
]

# What PEFT itself assumes for a key that adapter_config.json leaves out (LoraConfig's defaults).
_DEFAULTS: Config = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
}


def normalize(config: Any, client: str | None = None) -> Config:
    """A checked, independent, JSON-able copy of a LoRA config.

    ``config`` is a ``peft.LoraConfig`` or a mapping with the content of ``adapter_config.json``. Sets become
    sorted lists, enums their values, nested dataclasses dicts; what PEFT would fill in by default is filled
    in.

    Raises ``AdapterError`` where ``r``, ``lora_alpha`` or a pattern has a wrong type, is not finite, or is
    not a regular expression, and ``UnsupportedAdapterError`` where ``peft_type`` is not LORA.

    >>> c = normalize({"r": 4, "lora_alpha": 8, "target_modules": {"v", "q"}})
    >>> c["target_modules"], scale_for(c, "layers.0.q")
    (['q', 'v'], 2.0)
    """
    plain = filled(config, client)
    check_numbers(plain, client)
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in plain[name]:
            _compile(rf"(.*\.)?({pattern})$", name, pattern, client)
    return plain


def filled(config: Any, client: str | None = None) -> Config:
    """``normalize`` without its checks of numbers and patterns."""
    if not isinstance(config, Mapping):
        if not callable(getattr(config, "to_dict", None)):
            raise AdapterError(
                f"the config is a {type(config).__name__}; pass a peft.LoraConfig or the dict of its "
                "adapter_config.json",
                client=client,
            )
        config = config.to_dict()
    plain: Config = {k: _jsonable(v, k, client) for k, v in config.items() if k != "runtime_config"}
    for key, value in _DEFAULTS.items():
        if plain.get(key) is None:
            plain[key] = copy.copy(value)
    if str(plain["peft_type"]).upper() != "LORA":
        raise UnsupportedAdapterError(
            f"peft_type is {plain['peft_type']!r}; only LORA adapters can be aggregated: train with peft.LoraConfig",
            client=client,
        )
    return plain


def _jsonable(value: Any, key: str, client: str | None) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v, f"{key}.{k}", client) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_jsonable(v, key, client) for v in value), key=lambda v: (str(type(v)), v))
    if isinstance(value, list | tuple):
        return [_jsonable(v, key, client) for v in value]
    raise AdapterError(
        f"config entry {key!r} is a {type(value).__name__}, which adapter_config.json cannot hold; remove it",
        client=client,
    )


def check_numbers(config: Config, client: str | None = None) -> None:
    """Raise ``AdapterError`` for ranks, alphas and patterns of a wrong type; no pattern is compiled."""
    _check_rank(config["r"], "r", client)
    _check_alpha(config["lora_alpha"], "lora_alpha", client)
    if not isinstance(config["use_rslora"], bool):
        raise AdapterError(f"use_rslora is {config['use_rslora']!r}; it must be true or false", client=client)
    for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
        patterns = config[name]
        if not isinstance(patterns, dict):
            raise AdapterError(
                f"{name} is a {type(patterns).__name__}; it must map layer names to numbers", client=client
            )
        for pattern, value in patterns.items():
            check(value, f"{name}[{pattern!r}]", client)


def _check_rank(value: Any, what: str, client: str | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{what} is {value!r}; a rank must be an integer of at least 1", client=client)


def _check_alpha(value: Any, what: str, client: str | None) -> None:
    finite = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        finite = finite and math.isfinite(float(value))
    except OverflowError:
        finite = False
    if not finite:
        raise AdapterError(f"{what} is {value!r}; alpha must be a finite number", client=client)


@lru_cache(maxsize=8192)
def _regex(pattern: str) -> re.Pattern[str] | str:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)


def _compile(pattern: str, option: str, shown: str, client: str | None = None) -> re.Pattern[str]:
    compiled = _regex(pattern)
    if isinstance(compiled, str):
        raise AdapterError(
            f"{option} holds {shown!r}, which is not a regular expression ({compiled}); escape or correct it",
            client=client,
        )
    return compiled


@lru_cache(maxsize=64)
def _split_patterns(keys: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Patterns as ``with_ranks`` writes them (one exact path each) by path; the others, in order, as
    regexes.
    """
    exact: dict[str, int] = {}
    general: list[tuple[int, str]] = []
    for index, key in enumerate(keys):
        path = re.sub(r"\\(.)", r"\1", key[1:])
        if key.startswith("^") and re.escape(path) == key[1:]:
            exact.setdefault(path, index)
        else:
            general.append((index, key))
    return exact, general


def _lookup(config: Config, option: str, layer: str) -> Any | None:
    """The value of the first pattern that matches, by PEFT's rule ``re.match(rf"(.*\\.)?({key})$",
    layer)``.
    """
    patterns: dict[str, Any] = config.get(option) or {}
    if not patterns:
        return None
    keys = tuple(patterns)
    exact, general = _split_patterns(keys)
    found = exact.get(layer)
    for index, key in general:
        if found is not None and index > found:
            break
        if _compile(rf"(.*\.)?({key})$", option, key).match(layer):
            found = index
            break
    return None if found is None else patterns[keys[found]]


def rank_for(config: Config, layer: str) -> int:
    """The rank PEFT gives a layer: the first matching entry of ``rank_pattern``, else ``r``.

    >>> rank_for(normalize({"r": 4, "rank_pattern": {"q": 16}}), "layers.0.q")
    16
    """
    found = _lookup(config, "rank_pattern", layer)
    return int(config["r"] if found is None else found)


def alpha_for(config: Config, layer: str) -> float:
    """The alpha PEFT gives a layer: the first matching entry of ``alpha_pattern``, else ``lora_alpha``."""
    found = _lookup(config, "alpha_pattern", layer)
    return float(config["lora_alpha"] if found is None else found)


def scale_for(config: Config, layer: str, rank: int | None = None) -> float:
    """The scale s of a layer: alpha/r, or alpha/√r with rsLoRA (arXiv 2312.03732). ``rank`` overrides the
    config's.
    """
    rank = rank_for(config, layer) if rank is None else rank
    return alpha_for(config, layer) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def targets(config: Config, layer: str) -> bool:
    """Does this config adapt the module (or parameter) at that path?

    The rule of PEFT's ``check_target_module_exists``, and of ``target_parameters``. ``"all-linear"`` depends
    on the model's module types, which a path does not tell, and counts as a match of any module.

    >>> c = normalize({"target_modules": ["q_proj"], "layers_to_transform": [1]})
    >>> [targets(c, f"model.layers.{i}.q_proj") for i in range(3)]
    [False, True, False]
    """
    return targets_module(config, layer) or bool(parameter_targets(config, layer))


def parameter_targets(config: Config, layer: str) -> list[str]:
    """Names of the parameters at module ``layer`` (or the one that ``layer`` is) that ``target_parameters``
    means.
    """
    names: list[str] = []
    for target in config.get("target_parameters") or []:
        module, _, parameter = target.rpartition(".")
        of_module = not module or layer == module or layer.endswith(f".{module}")
        if (of_module or layer == target or layer.endswith(f".{target}")) and parameter not in names:
            names.append(parameter)
    return names


def targets_module(config: Config, layer: str) -> bool:
    """Does ``target_modules`` (less ``exclude_modules``, ``modules_to_save``, ``layers_to_transform``) name
    it?
    """
    if _excluded(config, layer):
        return False
    wanted = config.get("target_modules")
    if wanted is None:
        return False
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            return True
        return _compile(wanted, "target_modules", wanted).fullmatch(layer) is not None
    if layer in wanted:
        return True
    if not any(layer.endswith(f".{name}") for name in wanted):
        return False
    return _in_transformed_layers(config, layer)


def _excluded(config: Config, layer: str) -> bool:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        if _compile(excluded, "exclude_modules", excluded).fullmatch(layer):
            return True
    elif layer in excluded or any(layer.endswith(f".{name}") for name in excluded):
        return True
    return any(
        _compile(rf"(^|.*\.){name}($|\..*)", "modules_to_save", name).match(layer)
        for name in config.get("modules_to_save") or []
    )


def _in_transformed_layers(config: Config, layer: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # PEFT takes the first numbered path segment, so that expert numbers do not count as layer numbers
    regexes = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    for regex, shown in zip(regexes, patterns or regexes, strict=True):
        found = _compile(regex, "layers_pattern", shown).match(layer)
        if found:
            return int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def extras_for(config: Config, keys: Iterable[str]) -> list[str]:
    """The averaged tensors that a model with this config has a place for."""
    heads = config.get("modules_to_save") or []
    kept = []
    for key in keys:
        path = key.split(".")
        is_head = any(part in heads for part in path)
        is_token = "trainable_tokens_delta" in key and config.get("trainable_token_indices")
        is_bias = path[-1].endswith("bias") and config.get("bias", "none") != "none"
        if is_head or is_token or is_bias or key.endswith("base_layer.weight"):
            kept.append(key)
    return kept


def with_ranks(
    config: Config,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    names: Mapping[str, str] | None = None,
) -> Config:
    """A copy of ``config`` under which PEFT gives each layer exactly this rank and scale.

    ``ranks`` and ``scales`` go by layer. ``names`` maps a layer to the path that PEFT matches patterns
    against (``LayerSpec.pattern_name``) where that is not the layer's own name. A config that already says so
    comes back unchanged. Otherwise ``r`` and ``lora_alpha`` become the most common values, and each other
    layer gets an entry anchored so that it matches that layer only.

    Raises ``RankError`` for a rank below one, ``AdapterError`` for layers that must share one rank and scale
    in PEFT (the two of a MultiheadAttention) and do not.

    >>> c = with_ranks({"r": 4}, {"a.q": 2, "a.k": 2, "a.v": 6}, {"a.q": 2.0, "a.k": 2.0, "a.v": 2.0})
    >>> c["r"], c["rank_pattern"], c["lora_alpha"], c["alpha_pattern"]
    (2, {'^a\\\\.v': 6}, 4, {'^a\\\\.v': 12})
    """
    config = normalize(config)
    by_name: dict[str, tuple[int, float]] = {}
    for layer, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise RankError(f"the rank is {rank!r}; it must be an integer of at least 1", layer=layer)
        name = (names or {}).get(layer, layer)
        wanted = (rank, float(scales[layer]))
        if not math.isfinite(wanted[1]):
            raise AdapterError(f"the scale is {wanted[1]}; it must be finite", layer=layer)
        if by_name.setdefault(name, wanted) != wanted:
            raise AdapterError(
                f"rank {rank} and scale {wanted[1]:g} here, but PEFT gives all layers of {name!r} one rank "
                f"and scale ({by_name[name][0]} and {by_name[name][1]:g}); use one rank for all of them",
                layer=layer,
            )
    if all((rank_for(config, n), scale_for(config, n)) == wanted for n, wanted in by_name.items()):
        return config
    alphas = {n: _alpha(scale, rank, config["use_rslora"]) for n, (rank, scale) in by_name.items()}
    config["r"] = _most_common([rank for rank, _ in by_name.values()], config["r"])
    config["lora_alpha"] = _most_common(list(alphas.values()), config["lora_alpha"])
    config["rank_pattern"] = {f"^{re.escape(n)}": r for n, (r, _) in by_name.items() if r != config["r"]}
    config["alpha_pattern"] = {f"^{re.escape(n)}": a for n, a in alphas.items() if a != config["lora_alpha"]}
    return config


def _most_common(values: list[Any], current: Any) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda v: (-counts[v], v != current, v))


def _alpha(scale: float, rank: int, rslora: bool) -> int | float:
    """The alpha that gives this scale again, to the last bit where a float64 can."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scale * divisor
    near = [alpha, round(alpha), math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)]
    alpha = next((a for a in near if a / divisor == scale), alpha)
    return int(alpha) if float(alpha).is_integer() else alpha
