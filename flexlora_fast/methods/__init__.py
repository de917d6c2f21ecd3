"""Aggregation methods by name. A new one is a subclass of :class:`Method` in a file of its own, listed here."""

from __future__ import annotations

from flexlora_fast.errors import OptionError
from flexlora_fast.methods.averaging import FedIT, HetLoRA
from flexlora_fast.methods.base import Contribution, Method
from flexlora_fast.methods.flexlora import FlexLoRA

METHODS: dict[str, type[Method]] = {method.name: method for method in (FlexLoRA, FedIT, HetLoRA)}

__all__ = ["METHODS", "Contribution", "Method", "get"]


def get(method: str | Method) -> Method:
    """The method of that name, or the instance given.

    >>> get("flexlora").summary
    'exact weighted sum of all updates; every client gets its best truncation (mixed ranks)'
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise OptionError(f"method {method!r} is not one of {', '.join(METHODS)}")
    return METHODS[method]()
