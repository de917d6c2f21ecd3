"""Aggregation methods by name. A new one is a subclass of :class:`Method` in a file of its own, listed here."""

from __future__ import annotations

from flexlora_fast import named
from flexlora_fast.errors import OptionError
from flexlora_fast.methods.base import Base, Contribution, Method
from flexlora_fast.methods.fedex import FedEx
from flexlora_fast.methods.fedit import FedIT
from flexlora_fast.methods.ffa import FFALoRA
from flexlora_fast.methods.flexlora import FlexLoRA
from flexlora_fast.methods.flora import FLoRA
from flexlora_fast.methods.florist import FLoRIST
from flexlora_fast.methods.hetlora import HetLoRA
from flexlora_fast.methods.raflora import RaFLoRA

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (FlexLoRA, FedIT, HetLoRA, FLoRA, FFALoRA, FedEx, RaFLoRA, FLoRIST)
}

__all__ = ["METHODS", "Base", "Contribution", "Method", "get"]


def get(method: str | Method) -> Method:
    """The method of that name, with its settings behind a colon, or the instance given.

    Raises ``OptionError`` for an unknown method or setting.

    >>> get("flexlora").summary
    'exact weighted sum of all updates; every client gets its best truncation (mixed ranks)'
    >>> get("florist:tau=0.95")
    FLoRIST(tau=0.95)
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise OptionError(f"method is {method!r}; give a name ({', '.join(METHODS)}) or an instance of Method")
    return named.made(method, METHODS, "method")
