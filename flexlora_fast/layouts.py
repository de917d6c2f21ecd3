"""From the tensors of a PEFT state dict to 2-D factors, and back.

PEFT stores the factors of each kind of layer in its own shape (``peft/tuners/lora/layer.py``); m are the
outputs, n the inputs, r the rank, E the experts:

=================  ===========================  ==========================  =======================
kind               A in the state dict          B in the state dict         the weight's own layout
=================  ===========================  ==========================  =======================
linear             ``lora_A.weight`` (r, n)     ``lora_B.weight`` (m, r)    (m, n)
linear, HF Conv1D  the same                     the same                    (n, m)
embedding          ``lora_embedding_A`` (r, n)  ``lora_embedding_B`` (m, r) (n, m)
conv               (r, in, k…), n = in·k…       (m, r, 1…)                  (m, in, k…)
moe                (E·r, n), expert-major       (m, r·E), rank-major        (E, m, n) or (E, n, m)
=================  ===========================  ==========================  =======================

As factors all of them are A (E, r, n) and B (E, m, r), with E = 1 but for MoE.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError, UnsupportedAdapterError
from flexlora_fast.facts import LayerFacts, infer

PREFIX = "base_model.model."
FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# tensors that only a LoRA variant has, whatever its config says
_VARIANT_TENSORS = {
    "lora_magnitude_vector": "DoRA: its magnitude vector rescales the base weight, so ΔW is not s·B·A",
    "lora_diag": "KaSA: its update is s·B·diag(d)·A on a truncated base weight",
    "lora_monteclora_sampler": "MonteCLoRA: its update is sampled around B·A",
    "lora_arrow": "Arrow: its update depends on the input",
}
# VeLoRA's projection serves its backward pass only, and is made of a client's activations: not to be shared.
_TRAINING_ONLY = {"lora_velora_embed"}
_SLOTS = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "bias",
    ("lora_embedding_A",): "A",
    ("lora_embedding_B",): "B",
}


@dataclass(frozen=True)
class LayerSpec:
    """One adapted weight of m outputs and n inputs: its names and how its factors are stored.

    ``name``: module path without the leading ``base_model.model.``. ``kind``: ``"linear"``, ``"embedding"``,
    ``"conv"`` or ``"moe"``. ``experts``: E. ``a_key``, ``b_key``: state-dict keys. ``a_shape_tail``: for conv
    the shape of A behind r, (in, k…), else (). ``weight_transposed``: the weight itself is stored (n, m), as
    in HF Conv1D, Embedding and transposed MoE parameters. ``pattern_name``: the path that ``rank_pattern``
    and ``alpha_pattern`` are matched against.
    """

    name: str
    kind: str
    m: int
    n: int
    a_key: str
    b_key: str
    pattern_name: str
    experts: int = 1
    a_shape_tail: tuple[int, ...] = ()
    weight_transposed: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields; ``from_json`` gives the same spec again."""
        return dataclasses.asdict(self) | {"a_shape_tail": list(self.a_shape_tail)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LayerSpec:
        return cls(**{**fields, "a_shape_tail": tuple(fields["a_shape_tail"])})


def parse(
    tensors: Mapping[str, Tensor],
    config: Config,
    client: str | None = None,
    facts: Mapping[str, LayerFacts] | None = None,
) -> tuple[dict[str, LayerSpec], dict[str, str], list[str]]:
    """Sort a PEFT state dict into layers, ``lora_B.bias`` keys by layer, and the keys of everything else
    (extras).

    ``tensors`` may be on the meta device: only names, shapes and dtypes are read. ``config`` is a normalised
    config; its ranks are the truth that the tensors must agree with. ``facts``, by layer, come from a live
    model.

    Raises ``AdapterError`` for a factor without its partner, shapes or dtypes that cannot be factors, a rank
    other than the config's, or no layer at all, and ``UnsupportedAdapterError`` for tensors of a LoRA variant
    and grouped convolutions.
    """
    slots, extras = _sort_keys(tensors, client)
    if not slots:
        raise AdapterError(
            f"there is no lora_A/lora_B tensor among {len(tensors)} tensors; "
            "take the state dict from peft.get_peft_model_state_dict",
            client=client,
        )
    for layer, slot in slots.items():
        _check_pair(layer, slot, tensors, client)
    known = dict(facts) if facts is not None else infer(slots, tensors, config, client)
    specs: dict[str, LayerSpec] = {}
    for layer in sorted(slots):
        if layer not in known:
            raise AdapterError("the model has no such LoRA layer", client=client, layer=layer)
        try:
            specs[layer] = _spec(layer, slots[layer], tensors, config, known[layer])
        except AdapterError as error:
            raise error.at(client=client, layer=layer) from None
    biases = {layer: slot["bias"] for layer, slot in sorted(slots.items()) if "bias" in slot}
    return specs, biases, sorted(extras)


def training_only(key: str) -> bool:
    """Is this tensor a client's own training state (VeLoRA's projection), to be neither shared nor
    aggregated?
    """
    return not _TRAINING_ONLY.isdisjoint(key.split("."))


def _sort_keys(tensors: Mapping[str, Tensor], client: str | None) -> tuple[dict[str, dict[str, str]], list[str]]:
    slots: dict[str, dict[str, str]] = {}
    extras: list[str] = []
    for key in tensors:
        layer, slot = split_key(key)
        if slot is not None:
            slots.setdefault(layer, {})[slot] = key
        elif not training_only(key):
            _refuse_lora_key(key, key.split("."), client)
            extras.append(key)
    return slots, extras


def split_key(key: str) -> tuple[str, str | None]:
    """The layer of a state-dict key and what it is there: ``"A"``, ``"B"``, ``"bias"`` (of B), or ``None``.

    >>> split_key("base_model.model.mlp.fc.lora_A.weight"), split_key("base_model.model.head.bias")
    (('mlp.fc', 'A'), ('head.bias', None))
    """
    parts = key.removeprefix(PREFIX).split(".")
    for used in (1, 2):
        slot = _SLOTS.get(tuple(parts[-used:]))
        if slot is not None:
            return ".".join(parts[:-used]), slot
    return ".".join(parts), None


def _refuse_lora_key(key: str, parts: list[str], client: str | None) -> None:
    for part in parts:
        if part in _VARIANT_TENSORS:
            raise UnsupportedAdapterError(
                f"tensor {key!r} belongs to {_VARIANT_TENSORS[part]}; retrain with plain LoRA", client=client
            )
    reserved = [i for i, part in enumerate(parts) if (part,) in _SLOTS or part in ("lora_A", "lora_B")]
    if reserved and reserved[0] + 1 < len(parts):
        raise AdapterError(
            f"key {key!r} has something between {parts[reserved[0]]!r} and its end, as if it still held an "
            f"adapter name ({parts[reserved[0] + 1]!r}); take the state dict from "
            "peft.get_peft_model_state_dict, which leaves it out",
            client=client,
        )
    if any(part.startswith("lora_") for part in parts[-2:]):
        raise AdapterError(
            f"tensor {key!r} looks like a LoRA tensor but is none that PEFT 0.21 writes for plain LoRA; "
            "remove it, or update flexlora_fast",
            client=client,
        )


def _check_pair(layer: str, slot: dict[str, str], tensors: Mapping[str, Tensor], client: str | None) -> None:
    """Both factors there, of a floating dtype, of shapes that fit each other."""
    for one, other in (("A", "B"), ("B", "A")):
        if one not in slot:
            raise AdapterError(
                f"{other} ({slot.get(other) or slot['bias']!r}) has no partner {one}; send both factors of each layer",
                client=client,
                layer=layer,
            )
    for key in slot.values():
        tensor = tensors[key]
        if tensor.dtype not in FACTOR_DTYPES:
            raise AdapterError(
                f"{key!r} is {tensor.dtype}; factors must be float32, float16 or bfloat16: cast it before sending",
                client=client,
                layer=layer,
            )
        if tensor.numel() == 0:
            raise AdapterError(
                f"{key!r} has shape {tuple(tensor.shape)}, without any entry; gather the shards (ZeRO-3, "
                "FSDP) before saving",
                client=client,
                layer=layer,
            )
    _check_shapes(layer, tensors[slot["A"]].shape, tensors[slot["B"]].shape, slot, client)
    m = tensors[slot["B"]].shape[0]
    if "bias" in slot and tuple(tensors[slot["bias"]].shape) != (m,):
        shape = tuple(tensors[slot["bias"]].shape)
        raise AdapterError(f"lora_B.bias has shape {shape}, but B has {m} outputs", client=client, layer=layer)


def _check_shapes(layer: str, a: torch.Size, b: torch.Size, slot: dict[str, str], client: str | None) -> None:
    embedding = slot["A"].endswith("lora_embedding_A")
    if embedding != slot["B"].endswith("lora_embedding_B"):
        raise AdapterError(f"{slot['A']!r} and {slot['B']!r} are of different kinds", client=client, layer=layer)
    dims = (2,) if embedding else (2, 3, 4, 5)
    if len(a) not in dims or len(b) != len(a) or any(k != 1 for k in b[2:]):
        raise AdapterError(
            f"A {tuple(a)} and B {tuple(b)} are not the factors of a linear, embedding or convolution "
            "layer: expected (r, n) and (m, r), or (r, in, k…) and (m, r, 1…)",
            client=client,
            layer=layer,
        )
    if a[0] == b[1]:
        return
    if len(a) > 2 and a[0] % b[1] == 0:
        raise UnsupportedAdapterError(
            f"grouped convolution: A has {a[0]} ranks and B {b[1]} for each of {a[0] // b[1]} groups, so B "
            "is block-diagonal, which no aggregate keeps; leave this layer out of target_modules",
            client=client,
            layer=layer,
        )
    raise AdapterError(
        f"A {tuple(a)} has rank {a[0]}, B {tuple(b)} has rank {b[1]}; they must be of one rank",
        client=client,
        layer=layer,
    )


def _spec(
    layer: str,
    slot: dict[str, str],
    tensors: Mapping[str, Tensor],
    config: Config,
    fact: LayerFacts,
) -> LayerSpec:
    a, b = tensors[slot["A"]].shape, tensors[slot["B"]].shape
    rank = configs.rank_for(config, fact.pattern_name)
    if a[0] != rank * fact.experts:
        experts = f" for each of {fact.experts} experts" if fact.experts > 1 else ""
        raise AdapterError(
            f"the tensors have rank {a[0]} (A {tuple(a)}, B {tuple(b)}), the config says {rank}{experts}, "
            "and the scale follows from it; send the config that the adapter was trained with"
        )
    if slot["A"].endswith("lora_embedding_A"):
        kind = "embedding"
    elif len(a) > 2:
        kind = "conv"
    else:
        kind = "moe" if fact.experts > 1 else "linear"
    return LayerSpec(
        name=layer,
        kind=kind,
        m=b[0],
        n=math.prod(a[1:]),
        a_key=slot["A"],
        b_key=slot["B"],
        pattern_name=fact.pattern_name,
        experts=fact.experts,
        a_shape_tail=tuple(a[1:]) if kind == "conv" else (),
        weight_transposed=kind == "embedding" or (kind != "conv" and fact.weight_transposed),
    )


def to_factors(spec: LayerSpec, a_raw: Tensor, b_raw: Tensor) -> tuple[Tensor, Tensor]:
    """A (E, r, n) and B (E, m, r) from the tensors of the state dict; views wherever their strides allow."""
    e = spec.experts
    if spec.kind == "moe":
        a = a_raw.reshape(e, -1, spec.n)
        return a, b_raw.reshape(spec.m, -1, e).permute(2, 0, 1)
    return a_raw.reshape(1, -1, spec.n), b_raw.reshape(1, spec.m, -1)


def stored_shapes(spec: LayerSpec, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B in the state dict at this rank.

    >>> stored_shapes(LayerSpec("c", "conv", 6, 24, "A", "B", "c", a_shape_tail=(2, 3, 4)), rank=5)
    ((5, 2, 3, 4), (6, 5, 1, 1))
    """
    if spec.kind == "conv":
        return (rank, *spec.a_shape_tail), (spec.m, rank, *(1 for _ in spec.a_shape_tail[1:]))
    return (rank * spec.experts, spec.n), (spec.m, rank * spec.experts)


def from_factors(spec: LayerSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The contiguous tensors of the state dict from A (E, r, n) and B (E, m, r); the inverse of
    ``to_factors``.
    """
    rank = a.shape[1]
    if a.shape != (spec.experts, rank, spec.n) or b.shape != (spec.experts, spec.m, rank):
        raise AdapterError(
            f"A {tuple(a.shape)} and B {tuple(b.shape)} are not ({spec.experts}, r, {spec.n}) and "
            f"({spec.experts}, {spec.m}, r)",
            layer=spec.name,
        )
    if spec.kind == "moe":
        return a.reshape(-1, spec.n).contiguous(), b.permute(1, 2, 0).reshape(spec.m, -1).contiguous()
    if spec.kind == "conv":
        a_shape, b_shape = stored_shapes(spec, rank)
        return a[0].reshape(a_shape).contiguous(), b[0].reshape(b_shape).contiguous()
    return a[0].contiguous(), b[0].contiguous()


def to_weight_layout(spec: LayerSpec, delta: Tensor) -> Tensor:
    """An update (E, m, n) in the layout of the weight itself, as PEFT's ``get_delta_weight`` returns it."""
    if spec.weight_transposed:
        delta = delta.transpose(1, 2)
    if spec.kind == "moe":
        return delta
    return delta[0].reshape(spec.m, *spec.a_shape_tail) if spec.kind == "conv" else delta[0]
