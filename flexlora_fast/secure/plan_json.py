"""A plan as text, read back strictly: a client gets it from a server that it need not believe."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NoReturn

import torch

from flexlora_fast import config as configs
from flexlora_fast.errors import FlexLoRAError, ProtocolError, shown
from flexlora_fast.layouts import FACTOR_DTYPES, LayerSpec
from flexlora_fast.secure.plan import FORMAT, Plan
from flexlora_fast.skeleton import Form
from flexlora_fast.tensorfile import unique

_LONGEST = 1 << 26  # characters
_LARGEST = 1 << 40  # entries of a tensor
_KINDS = ("linear", "embedding", "conv", "moe")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*FACTOR_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}


def written(plan: Plan) -> str:
    """The plan as JSON text."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    fields["layers"] = [spec.to_json() for spec in plan.layers]
    fields["biases"] = list(plan.biases)
    fields["extras"] = {
        key: [list(form.shape), str(form.dtype).removeprefix("torch.")] for key, form in plan.extras.items()
    }
    return json.dumps({"format": FORMAT, **fields}, sort_keys=True, ensure_ascii=False, allow_nan=False)


def parse(text: str) -> Plan:
    """The plan in a text.

    Raises ``ProtocolError``: more than 64 Mi characters, no strict JSON (names twice, NaN), fields missing, unknown or
    of another type, sizes and settings that no plan can have.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ProtocolError(f"a plan is text of at most {_LONGEST} characters; give what Plan.to_json returned")
    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=_constant)
        if document.pop("format") != FORMAT:
            raise ValueError(f"it is no {FORMAT}")
        document["layers"] = tuple(_spec(fields) for fields in document["layers"])
        names = [spec.name for spec in document["layers"]]
        document["biases"] = tuple(document["biases"])
        if not set(document["biases"]) <= set(names):
            raise ValueError("it has biases of layers that it has not")
        document["extras"] = {key: _form(*parts) for key, parts in document["extras"].items()}
        if configs.normalize(document["config"]) != document["config"]:
            raise ValueError("its config is not normalised")
        plan = Plan(**document)
        plan.digest.hex()  # raises for names that are no Unicode: they have no bytes to digest
        return plan
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = error.message if isinstance(error, FlexLoRAError) else shown(str(error))
        raise ProtocolError(
            f"this is no plan ({type(error).__name__}: {what}); have the server send it again"
        ) from None


def _constant(text: str) -> NoReturn:
    raise ValueError(f"it has {text}")


def _spec(fields: Any) -> LayerSpec:
    known = {field.name: field.type for field in dataclasses.fields(LayerSpec)}
    types = {"str": str, "int": int, "bool": bool, "tuple[int, ...]": list}
    if set(fields) != set(known):
        raise ValueError(f"a layer has the fields {shown(sorted(fields))}")
    for name, value in fields.items():
        if type(value) is not types[str(known[name])]:
            raise ValueError(f"{name} of a layer is {shown(value)}")
    _shape([fields["experts"], fields["m"], fields["n"]])
    tail = _shape(fields["a_shape_tail"])
    if fields["kind"] not in _KINDS or (fields["kind"] != "moe" and fields["experts"] != 1):
        raise ValueError(f"a layer of {shown(fields['experts'])} experts is of kind {shown(fields['kind'])}")
    if (fields["kind"] == "conv") != bool(tail):
        raise ValueError(f"a {fields['kind']} layer has the kernel {shown(tail)}")
    return LayerSpec.from_json(fields)


def _form(shape: Any, dtype: Any) -> Form:
    return Form(_shape(shape, least=0), _DTYPES[dtype])


def _shape(sides: list[Any], least: int = 1) -> tuple[int, ...]:
    size = 1
    for side in sides:
        if type(side) is not int or side < least:
            raise ValueError(f"a shape is {shown(sides)}")
        size *= side
        if size > _LARGEST:
            raise ValueError(f"a tensor of shape {shown(sides)} is too large")
    return tuple(sides)
