"""The frozen weights of a live PEFT model: where an update's ``base_delta`` is added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_fast import layouts, live
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, UnsupportedAdapterError
from flexlora_fast.facts import unwrapped
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.precision import full_precision

if TYPE_CHECKING:
    from flexlora_fast.update import GlobalUpdate

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.inference_mode(False)
@full_precision()
def merge(update: GlobalUpdate, model: Any, adapter_name: str) -> list[str]:
    """See ``GlobalUpdate.merge_into``. All checks come before the first write."""
    model, _ = live.peft_model(model, adapter_name, None)
    adapted = live.lora_layers(model, adapter_name)
    shared = _shared(model)
    found: dict[str, Tensor] = {}
    for layer in update.layers:
        if not update[layer].merges:
            continue
        weight, what = _weight(model, adapted, update[layer].spec)
        delta = update[layer].base_delta()
        assert delta is not None
        _check(layer, weight, what, layouts.to_weight_layout(update[layer].spec, delta), shared)
        found[layer] = weight
    for layer, weight in found.items():
        delta = update.base_delta(layer, layout="weight")
        assert delta is not None
        with live.mode_of(weight):
            weight.copy_(_sum(weight, delta))
    return list(found)


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """In float32 at least, and where the weight is; rounded to its dtype."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    return (weight.detach().to(exact) + delta.to(weight.device, exact)).to(weight.dtype)


def _weight(model: Any, adapted: Mapping[str, Any], spec: LayerSpec) -> tuple[Any, str]:
    """The frozen weight of a layer, adapted in this model or not, and its name in the module."""
    if spec.name in adapted:
        module, name = adapted[spec.name].get_base_layer(), getattr(adapted[spec.name], "parameter_name", "")
    else:
        path, name = unwrapped(spec.name), ""
        if spec.kind == "moe":
            path, _, name = spec.pattern_name.rpartition(".")
        try:
            module = model.get_submodule(f"base_model.model.{path}")
        except AttributeError:
            raise IncompatibleAdapterError(
                f"the model has no module {path!r}; merge into the base model that clients trained", layer=spec.name
            ) from None
        module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    name = name or ("in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight")
    return getattr(module, name, None), f"{type(module).__name__}.{name}"


def _check(layer: str, weight: Any, what: str, delta: Tensor, shared: Mapping[int, list[str]]) -> None:
    if not isinstance(weight, Tensor):
        raise UnsupportedAdapterError(
            f"{what} is no weight that can be added to (quantized?); load the base model unquantized", layer=layer
        )
    plain = type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor and weight.dtype in PLAIN
    if not plain:
        raise UnsupportedAdapterError(
            f"{what} is {type(weight).__name__} of {weight.dtype}, a quantized weight, which cannot take a small sum; "
            "load the base model unquantized, or use a method that leaves base weights alone",
            layer=layer,
        )
    if weight.is_meta:
        raise AdapterError(f"{what} has no values yet (meta device); load the model's weights first", layer=layer)
    if weight.shape != delta.shape:
        raise IncompatibleAdapterError(
            f"{what} has shape {tuple(weight.shape)}, the update {tuple(delta.shape)}; merge into the base model that "
            "clients trained",
            layer=layer,
        )
    names = shared.get(weight.untyped_storage().data_ptr(), [])
    if len(names) > 1:
        raise UnsupportedAdapterError(
            f"{what} is tied to another weight ({', '.join(names[:3])}), which would change with it; untie them "
            "(tie_word_embeddings=False), or leave this layer out of target_modules",
            layer=layer,
        )
    if not bool(torch.isfinite(_sum(weight, delta)).all()):
        raise AdapterError(f"{what} would overflow {weight.dtype}; use bfloat16 or float32 base weights", layer=layer)


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """The names of parameters by the memory that holds them."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            names[parameter.untyped_storage().data_ptr()].append(name)
    return names
