"""What an adapter is apart from its numbers: config, layers, ranks, scales, and where each tensor goes.

Adapters of one model and rank agree in all of it. Those read from files share one skeleton, so that ten thousand of
them cost little more than their paths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast import layouts
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError
from flexlora_fast.facts import LayerFacts
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.tensorfile import TensorFile


@dataclass(frozen=True)
class Form:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Skeleton:
    """Shared between adapters, so never changed.

    Attributes:
        config: normalised. specs: by layer, sorted. bias_keys: of ``lora_B.bias``, by layer. extra_keys: of what is
            not a low-rank pair. ranks, scales: by layer.
        names: state-dict key (with PEFT's prefix) to the name the tensor came under. forms: by state-dict key.
    """

    config: Config
    specs: dict[str, LayerSpec]
    bias_keys: dict[str, str]
    extra_keys: list[str]
    ranks: dict[str, int]
    scales: dict[str, float]
    names: dict[str, str]
    forms: dict[str, Form] = field(repr=False)

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        config: Any,
        client: str | None,
        facts: Mapping[str, LayerFacts] | None = None,
        initial: bool = False,
    ) -> Skeleton:
        """From the tensors (on any device, meta as well) and the config of an adapter.

        Raises ``AdapterError`` and ``UnsupportedAdapterError`` as ``Adapter.from_state_dict`` does.
        """
        config = configs.normalize(config, client)
        configs.refuse_unsupported(config, client, initial=initial)
        names = _canonical(tensors, client)
        canonical = {key: tensors[name] for key, name in names.items()}
        specs, biases, extras = layouts.parse(canonical, config, client, facts)
        ranks = {layer: configs.rank_for(config, spec.pattern_name) for layer, spec in specs.items()}
        scales = {layer: configs.scale_for(config, spec.pattern_name) for layer, spec in specs.items()}
        forms = {key: Form(tuple(tensor.shape), tensor.dtype) for key, tensor in canonical.items()}
        return cls(config, specs, biases, extras, ranks, scales, names, forms)

    @classmethod
    def of_file(cls, file: TensorFile, config: Any, client: str | None, initial: bool = False) -> Skeleton:
        """The same from a file's header alone; equal headers and configs give one and the same skeleton."""
        key = (file.index.digest, json.dumps(config, sort_keys=True, default=repr), initial)
        known = _skeletons.get(key)
        if known is None:
            meta = {name: _meta(file, name) for name in file}
            known = _skeletons[key] = cls.of(meta, config, client, None, initial)
        return known

    def keys_of(self, layer: str) -> tuple[str, ...]:
        """State-dict keys of A, B and, where there is one, the bias of B."""
        spec = self.specs[layer]
        keys = (spec.a_key, spec.b_key)
        return (*keys, self.bias_keys[layer]) if layer in self.bias_keys else keys

    @cached_property
    def extras(self) -> dict[str, Form]:
        """Forms of ``extra_keys``."""
        return {key: self.forms[key] for key in self.extra_keys}

    @cached_property
    def layer_bytes(self) -> dict[str, int]:
        """Bytes of each layer's tensors as stored."""
        return {layer: sum(self.forms[key].nbytes for key in self.keys_of(layer)) for layer in self.specs}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(form.nbytes for form in self.forms.values())

    @property
    def dtype(self) -> str:
        """That of the factors, such as ``"bfloat16"`` (of the first layer's A)."""
        first = next(iter(self.specs.values()))
        return str(self.forms[first.a_key].dtype).removeprefix("torch.")


_skeletons: WeakValueDictionary[tuple[bytes, str, bool], Skeleton] = WeakValueDictionary()


def _meta(file: TensorFile, name: str) -> Tensor:
    entry = file.entry(name)
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _canonical(tensors: Mapping[str, Tensor], client: str | None) -> dict[str, str]:
    """State-dict keys, sorted by name and each with PEFT's ``base_model.model.`` in front, to the names they came
    under.
    """
    result: dict[str, str] = {}
    for name in sorted(tensors):
        full = name if name.startswith(layouts.PREFIX) else layouts.PREFIX + name
        if full in result:
            raise AdapterError(f"the state dict has {name!r} with and without its prefix", client=client)
        result[full] = name
    return {full: name for full, name in result.items() if not layouts.training_only(full)}
