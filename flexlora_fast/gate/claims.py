"""What a client's ``adapter_config.json`` claims: parsed strictly, held against the policy, and then thrown away.

The adapter that is admitted carries a config made by the server. The client's is read only to find out that it trained
something else than the server asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from flexlora_fast import config as configs
from flexlora_fast.admission import facts_of
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError, RefusedError, UnsupportedAdapterError, sentence, shown
from flexlora_fast.gate import strict
from flexlora_fast.gate.reasons import Reason
from flexlora_fast.layouts import LayerSpec

_SAME = 1e-6  # relative: alphas go through decimal text
# What a pattern may be: a name, whole or its last parts, perhaps anchored as ``config.with_ranks`` does it. The
# alternatives share no first character, so matching is linear.
_LITERAL = re.compile(r"\^?(?:[\w\-/ .]|\\[^\w\n])+")
_SAVE = "send the config that peft's save_pretrained wrote"


def parse(data: bytes, longest: int) -> Config:
    """The JSON object in ``data``, with PEFT's defaults filled in.

    Raises ``RefusedError``: config (longer than ``longest`` bytes, no UTF-8, no JSON, a key twice, NaN or an infinity,
    numbers of more than 30 digits, nested more than 12 deep, wrong types), peft-type.
    """
    if len(data) > longest:
        _refuse(f"its config has more than the {longest} bytes that the policy takes", f"> {longest} bytes")
    try:
        document = strict.loads(data)
    except ValueError as error:
        _refuse(f"its config is not strict JSON ({sentence(error)})", type(error).__name__)
    if not isinstance(document, dict):
        _refuse(f"its config holds a {type(document).__name__}, not an object", type(document).__name__)
    kind = document.get("peft_type")
    if kind is not None and kind != "LORA":
        raise RefusedError(
            f"peft_type is {shown(kind)}", code=Reason.PEFT_TYPE, value=kind, remedy="train with peft.LoraConfig"
        )
    try:
        config = configs.filled(document)
        configs.check_numbers(config)
    except AdapterError as error:
        _refuse(f"its config is wrong: {sentence(error)}", sentence(error))
    return config


def check(
    config: Config,
    agreed: Config,
    specs: Mapping[str, LayerSpec],
    ranks: Mapping[str, int],
    scale: Callable[[str, int], float],
) -> None:
    """Hold a parsed config against the policy's, and against the ranks that the tensors have.

    Raises ``RefusedError``: unsupported, base, pattern, config-rank, scale.
    """
    try:
        configs.refuse_unsupported(config)
    except UnsupportedAdapterError as error:
        raise RefusedError(
            sentence(error), code=Reason.UNSUPPORTED, value=sentence(error), remedy="this round takes plain LoRA"
        ) from None
    check_base(config, agreed)
    paths = {spec.pattern_name for spec in specs.values()}
    found = {option: _resolve(config, option, paths) for option in ("rank_pattern", "alpha_pattern")}
    for layer, rank in ranks.items():
        path = specs[layer].pattern_name
        claimed = found["rank_pattern"].get(path, config["r"])
        if claimed != rank:
            raise RefusedError(
                f"its config says rank {shown(claimed)}, its tensors have rank {rank}",
                code=Reason.CONFIG_RANK,
                layer=layer,
                value=claimed,
                remedy="send the config that the adapter was trained with",
            )
        alpha: Any = found["alpha_pattern"].get(path, config["lora_alpha"])
        check_scale(alpha / (math.sqrt(rank) if config["use_rslora"] else rank), scale(layer, rank), layer)


def check_base(config: Config, agreed: Config) -> None:
    """Raise ``RefusedError`` (base) for a config of another base model or other tokens than the agreed one's."""
    expected = facts_of(agreed)
    for fact, (value, remedy) in facts_of(config).items():
        known, _ = expected.get(fact, (value, ""))
        if value != known:
            raise RefusedError(
                f"its {fact} is {shown(value)}, the policy's is {shown(known)}",
                code=Reason.BASE,
                value=value,
                remedy=remedy,
            )


def check_scale(claimed: float, expected: float, layer: str) -> None:
    """Raise ``RefusedError`` (scale) for another scale than the policy's."""
    if not math.isclose(claimed, expected, rel_tol=_SAME):
        raise RefusedError(
            f"its scale is {claimed:.6g}, the policy's is {expected:.6g}",
            code=Reason.SCALE,
            layer=layer,
            value=claimed,
            remedy="train with the alpha that the policy asks for at this rank",
        )


def _resolve(config: Config, option: str, paths: Iterable[str]) -> dict[str, Any]:
    """The value of each path, by the first of the config's patterns that is its name or the end of it."""
    patterns = config[option]
    if not patterns:
        return {}
    ends: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(path)
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        if not _LITERAL.fullmatch(pattern):
            raise RefusedError(
                f"{option} holds {shown(pattern)}, which is not a literal name",
                code=Reason.PATTERN,
                value=pattern,
                remedy="give names of modules, whole or their last parts, as in {'layers.0.q_proj': 8}",
            )
        name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
        for path in ends.get(name, ()):
            if path == name or not pattern.startswith("^"):
                found.setdefault(path, value)
    return found


def _refuse(what: str, value: object) -> NoReturn:
    raise RefusedError(what, code=Reason.CONFIG, value=value, remedy=_SAVE) from None
