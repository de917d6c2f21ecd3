"""What an adapter of a round is like, apart from its ranks and numbers: that part of the server's own that a policy is
made of.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexlora_fast.config import Config, normalize, rank_for, refuse_unsupported
from flexlora_fast.errors import FlexLoRAError, OptionError
from flexlora_fast.layouts import FACTOR_DTYPES, PREFIX, LayerSpec
from flexlora_fast.skeleton import Form, Skeleton
from flexlora_fast.tensorfile import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_KINDS = ("linear", "embedding", "conv", "moe")


@dataclass(frozen=True)
class Reference:
    """Shared, so never changed.

    Attributes:
        config: normalised. specs: by layer, sorted. scales: s of each layer as the reference has it. bias_keys: of
            ``lora_B.bias``, by layer. extras: form of all other tensors, by state-dict key.
    """

    config: Config
    specs: dict[str, LayerSpec]
    scales: dict[str, float]
    bias_keys: dict[str, str]
    extras: dict[str, Form]

    @classmethod
    def of(cls, skeleton: Skeleton) -> Reference:
        return cls(skeleton.config, skeleton.specs, skeleton.scales, skeleton.bias_keys, skeleton.extras)

    @classmethod
    def of_shapes(
        cls,
        config: Any,
        layers: Mapping[str, Sequence[int]],
        extras: Mapping[str, Sequence[int]],
        embeddings: Mapping[str, Sequence[int]],
    ) -> Reference:
        """Raises ``OptionError`` and ``AdapterError`` as ``RoundPolicy.from_config`` does."""
        plain = normalize(config)
        if plain.get("target_parameters"):
            raise OptionError(
                "the config has target_parameters, and shapes do not tell which tensor PEFT keeps each of them in; "
                "use from_adapter or from_model"
            )
        state = {name: _empty(shape, name, ()) for name, shape in extras.items()}
        for layer, (m, *tail) in _weights(layers, (2, 3, 4, 5)):
            rank = rank_for(plain, layer)
            state[f"{PREFIX}{layer}.lora_A.weight"] = torch.empty(rank, *tail, device="meta")
            state[f"{PREFIX}{layer}.lora_B.weight"] = torch.empty(m, rank, *(1 for _ in tail[1:]), device="meta")
        for layer, (m, n) in _weights(embeddings, (2,)):
            rank = rank_for(plain, layer)
            state[f"{PREFIX}{layer}.lora_embedding_A"] = torch.empty(rank, n, device="meta")
            state[f"{PREFIX}{layer}.lora_embedding_B"] = torch.empty(m, rank, device="meta")
        return cls.of(Skeleton.of(state, plain, None))

    def narrowed(self, layers: Collection[str]) -> Reference:
        """The same for an adapter of some of the layers: its config names these, each by its whole path."""
        specs = {layer: spec for layer, spec in self.specs.items() if layer in layers}
        if len(specs) == len(self.specs):
            return self
        paths = {kind: {s.pattern_name for s in specs.values() if (s.kind == "moe") == kind} for kind in (False, True)}
        config = self.config | {
            "target_modules": sorted(paths[False]),
            "target_parameters": sorted(paths[True]) or None,
        }
        biases = {layer: key for layer, key in self.bias_keys.items() if layer in specs}
        return Reference(config, specs, {layer: self.scales[layer] for layer in specs}, biases, self.extras)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; ``from_json`` gives the same again."""
        return {
            "config": copy.deepcopy(self.config),
            "layers": [
                {"spec": spec.to_json(), "scale": self.scales[layer], "bias_key": self.bias_keys.get(layer)}
                for layer, spec in self.specs.items()
            ],
            "extras": {
                key: {"shape": list(form.shape), "dtype": _CODES[form.dtype]} for key, form in self.extras.items()
            },
        }

    @classmethod
    def from_json(cls, document: Any) -> Reference:
        """Raises ``ValueError`` for anything that ``to_json`` does not write."""
        parts = fields(document, "reference", "config", "layers", "extras")
        try:
            config = normalize(parts["config"])
            refuse_unsupported(config)
        except FlexLoRAError as error:
            raise ValueError(f"config: {error.message}") from None
        specs, scales, biases = dict[str, LayerSpec](), dict[str, float](), dict[str, str]()
        for part in parts["layers"] if isinstance(parts["layers"], list) else [None]:
            layer = fields(part, "a layer", "spec", "scale", "bias_key")
            spec = _spec(layer["spec"])
            if spec.name in specs:
                raise ValueError(f"layer {spec.name!r} occurs twice")
            specs[spec.name] = spec
            scales[spec.name] = number(layer["scale"], f"the scale of layer {spec.name!r}")
            if layer["bias_key"] is not None:
                biases[spec.name] = text(layer["bias_key"], f"the bias_key of layer {spec.name!r}")
        if not specs:
            raise ValueError("it has no layer")
        extras = {key: _form(form, key) for key, form in mapping(parts["extras"], "extras").items()}
        keys = [key for spec in specs.values() for key in (spec.a_key, spec.b_key)] + [*biases.values(), *extras]
        if len(set(keys)) != len(keys):
            raise ValueError("a tensor occurs twice")
        return cls(config, dict(sorted(specs.items())), scales, biases, dict(sorted(extras.items())))


def _spec(document: Any) -> LayerSpec:
    known = {field.name: str(field.type) for field in dataclasses.fields(LayerSpec)}
    parts = fields(document, "the spec of a layer", *known)
    for name, kind in known.items():
        value = parts[name]
        right = {
            "str": lambda x: isinstance(x, str) and x,
            "int": is_count,
            "bool": lambda x: isinstance(x, bool),
            "tuple[int, ...]": lambda x: isinstance(x, list) and all(is_count(side) for side in x),
        }[kind](value)
        if not right or (name == "kind" and value not in _KINDS):
            raise ValueError(f"{name} of a layer is {value!r}")
    return LayerSpec.from_json(parts)


def _form(document: Any, key: str) -> Form:
    parts = fields(document, f"tensor {key!r}", "shape", "dtype")
    shape = parts["shape"]
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"the shape of tensor {key!r} is {shape!r}")
    return Form(tuple(shape), dtype(parts["dtype"]))


def _empty(shape: Sequence[int], name: str, sides: Collection[int]) -> torch.Tensor:
    if not all(is_count(side) for side in shape) or (sides and len(shape) not in sides):
        raise OptionError(f"the shape of {name!r} is {shape!r}; give whole numbers ≥ 1, outputs first")
    return torch.empty(tuple(shape), device="meta")


def _weights(shapes: Mapping[str, Sequence[int]], sides: Collection[int]) -> Iterator[tuple[str, torch.Size]]:
    for name, shape in shapes.items():
        yield name, _empty(shape, name, sides).shape


# -- pieces of stored documents ---


def fields(document: Any, what: str, *names: str) -> dict[str, Any]:
    """The document, which must be an object of exactly these entries."""
    found = mapping(document, what)
    if found.keys() != set(names):
        odd = sorted(found.keys() ^ set(names))
        raise ValueError(f"{what} has entries {', '.join(sorted(found))}; the difference is {', '.join(odd)}")
    return found


def mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}, not an object")
    return value


def text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} is {value!r}, not a text")
    return value


def number(value: Any, what: str) -> float:
    """Finite, as the strict reader lets no other pass."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {value!r}, not a number")
    return float(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def code(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors' headers."""
    return _CODES[dtype]


def dtype(code: Any) -> torch.dtype:
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"dtype {code!r} is none of {', '.join(DTYPES)}")
    return DTYPES[code]


def factor_dtype(code: Any) -> torch.dtype:
    found = dtype(code)
    if found not in FACTOR_DTYPES:
        raise ValueError(f"dtype {code!r} is none that factors have")
    return found
