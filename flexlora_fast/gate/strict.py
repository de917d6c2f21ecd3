"""JSON without what its readers disagree about: keys twice, NaN, numbers beyond any, nests without end."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

DEEPEST = 12  # PEFT's configs nest to 4
_DIGITS = 30


def dumps(document: Any) -> bytes:
    """What ``loads`` reads, and nothing else.

    Raises ``ValueError`` as ``loads`` does, and ``TypeError`` for what JSON does not have.
    """
    data = json.dumps(document, indent=1, allow_nan=False).encode("ascii")
    loads(data)
    return data


def loads(data: bytes) -> Any:
    """The document in ``data``.

    Raises ``ValueError``: no UTF-8, no JSON, a key twice, NaN or an infinity, numbers of more than 30 digits, nested
    more than 12 deep.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    if _deeper_than(document, DEEPEST):
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"it has {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_DIGITS]} is beyond any number")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _deeper_than(document: Any, deepest: int) -> bool:
    level = [document]
    for _ in range(deepest):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
