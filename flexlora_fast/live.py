"""Live PEFT models: take a snapshot of an adapter, and put one back in place.

This is the only module that imports ``peft``, and only when it is used. PEFT's own loader refuses another
rank, and with ``ignore_mismatched_sizes=True`` silently keeps the old weights; here a layer whose rank
changes gets new parameters through its own ``update_layer``, and the model's config is corrected to match.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_fast import config as configs
from flexlora_fast import layouts
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, UnsupportedAdapterError
from flexlora_fast.facts import LayerFacts, unwrapped

if TYPE_CHECKING:
    from flexlora_fast.adapter import Adapter


def snapshot(
    model: Any, adapter_name: str, client: str | None = None
) -> tuple[dict[str, Tensor], Config, dict[str, LayerFacts]]:
    """Copies of an adapter's tensors by checkpoint key, its config with the ranks and scales that each layer
    has now, and what the model knows of each layer.
    """
    from peft import get_peft_model_state_dict

    model, config = peft_model(model, adapter_name, client)
    layers = lora_layers(model, adapter_name)
    facts = {layer: _facts(layer, module, layers, client) for layer, module in layers.items()}
    # full embeddings are base weights, not the adapter's; "auto" would send them along
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _check_complete(state, layers, adapter_name, client)
    ranks = {layer: _rank(module, adapter_name, facts[layer]) for layer, module in layers.items()}
    scales = {layer: float(module.scaling[adapter_name]) for layer, module in layers.items()}
    names = {layer: fact.pattern_name for layer, fact in facts.items()}
    try:
        config = configs.with_ranks(config, ranks, scales, names)
    except AdapterError as error:
        raise error.at(client=client) from None
    return {key: _detached(key, value, client) for key, value in state.items()}, config, facts


def config(model: Any, adapter_name: str) -> Config:
    """The config of an adapter, checked to be plain LoRA; a copy."""
    return peft_model(model, adapter_name, None)[1]


def ranks(model: Any, adapter_name: str) -> dict[str, int]:
    """The rank that each layer of an adapter has now, by layer name."""
    model, _ = peft_model(model, adapter_name, None)
    layers = lora_layers(model, adapter_name)
    return {layer: _rank(module, adapter_name, _facts(layer, module, layers, None)) for layer, module in layers.items()}


def _check_complete(state: Mapping[str, Any], layers: Mapping[str, Any], adapter_name: str, client: str | None) -> None:
    """PEFT filters keys by adapter names as text: with adapters "0" and "1" it takes ``layers.1`` for the other one."""
    there = {layouts.split_key(key)[0] for key in state}
    for layer in layers:
        if layer not in there:
            raise AdapterError(
                f"PEFT leaves it out of the state dict of adapter {adapter_name!r}, since the name of another adapter "
                "is also part of the layer's; give the adapters other names",
                client=client,
                layer=layer,
            )


def _detached(key: str, value: Any, client: str | None) -> Tensor:
    if not isinstance(value, Tensor) or value.is_meta:
        what = "has no values yet (meta device)" if isinstance(value, Tensor) else "is not a tensor"
        raise AdapterError(f"{key!r} {what}; load the model's weights first", client=client)
    return value.detach().clone()


@torch.inference_mode(False)
def load(adapter: Adapter, model: Any, adapter_name: str) -> bool:
    """Put an adapter into a live model; see ``Adapter.load_into``. All checks come before the first write.

    The caller's inference mode is left for the call: parameters made in it could never be trained, nor written
    again outside it.
    """
    model, config = peft_model(model, adapter_name, adapter.client)
    layers = lora_layers(model, adapter_name)
    facts = {layer: _facts(layer, module, layers, adapter.client) for layer, module in layers.items()}
    _check_layers(adapter, layers, facts, adapter_name)
    extras = _extra_targets(adapter, model, adapter_name)
    ranks = {layer: adapter.rank(layer) for layer in layers}
    scales = {layer: adapter.scale(layer) for layer in layers}
    names = {layer: fact.pattern_name for layer, fact in facts.items()}
    try:
        config = configs.with_ranks(config, ranks, scales, names)
    except AdapterError as error:
        raise error.at(client=adapter.client) from None
    resized = [layer for layer, module in layers.items() if _rank(module, adapter_name, facts[layer]) != ranks[layer]]
    _check_untied(layers, resized, adapter_name, adapter.client)

    live_config = model.peft_config[adapter_name]
    for layer, module in layers.items():
        alpha = configs.alpha_for(config, names[layer])
        alpha = int(alpha) if alpha.is_integer() else alpha
        with mode_of(parameters(module, adapter_name)[0]):
            if layer in resized:
                _resize(module, adapter_name, ranks[layer], alpha, live_config)
            _write(adapter, layer, module, adapter_name)
            module.r[adapter_name] = ranks[layer]
            module.lora_alpha[adapter_name] = alpha
            set_scale(module, adapter_name, scales[layer])
    for key, target in extras.items():
        with mode_of(target):
            target.copy_(adapter.extras[key])
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(live_config, field, config[field])
    return bool(resized)


# -- the model ---


def peft_model(model: Any, adapter_name: str, client: str | None) -> tuple[Any, Config]:
    """The model that holds the adapter, and the adapter's config, checked to be plain LoRA."""
    model = getattr(model, "_orig_mod", model)  # torch.compile
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, Mapping):
        raise AdapterError(
            f"{type(model).__name__} is not a model with PEFT adapters; pass what peft.get_peft_model "
            "returned (of a DistributedDataParallel model, its .module)",
            client=client,
        )
    if adapter_name not in adapters:
        raise AdapterError(f"the model has no adapter {adapter_name!r}; it has {sorted(adapters)}", client=client)
    config = configs.normalize(adapters[adapter_name], client)
    configs.refuse_unsupported(config, client)
    return model, config


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The LoRA layers that hold the adapter, by layer name, sorted."""
    from peft.tuners.lora import LoraLayer

    found = {
        name.removeprefix(layouts.PREFIX): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A)
    }
    return dict(sorted(found.items()))


def _facts(layer: str, module: Any, layers: Mapping[str, Any], client: str | None) -> LayerFacts:
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    base = module.get_base_layer()
    if getattr(base, "groups", 1) > 1:
        raise UnsupportedAdapterError(
            f"grouped convolution (groups={base.groups}): its B is block-diagonal, which no aggregate "
            "keeps; leave this layer out of target_modules",
            client=client,
            layer=layer,
        )
    owner = layer.removesuffix(".base_layer.out_proj")
    if owner != layer and isinstance(layers.get(owner), MultiheadAttention):
        return LayerFacts(unwrapped(owner), 1, bool(module.fan_in_fan_out))
    if isinstance(module, ParamWrapper):
        experts = module.num_experts
        transposed = experts > 1 and bool(getattr(base, "is_transposed", False))
        return LayerFacts(f"{unwrapped(layer)}.{module.parameter_name}", experts, transposed)
    return LayerFacts(unwrapped(layer), 1, bool(getattr(module, "fan_in_fan_out", False)))


def parameters(module: Any, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The live A, B and bias of B, in the state dict's shapes."""
    if adapter_name in module.lora_embedding_A:
        return module.lora_embedding_A[adapter_name], module.lora_embedding_B[adapter_name], None
    b = module.lora_B[adapter_name]
    return module.lora_A[adapter_name].weight, b.weight, getattr(b, "bias", None)


def _stored(adapter: Adapter, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """An adapter's A, B and bias of B, in the state dict's shapes."""
    return (*layouts.from_factors(adapter.spec(layer), *adapter.factors(layer)), adapter.lora_bias(layer))


def _rank(module: Any, adapter_name: str, fact: LayerFacts) -> int:
    return parameters(module, adapter_name)[0].shape[0] // fact.experts


# -- checks ---


def _check_layers(
    adapter: Adapter, layers: Mapping[str, Any], facts: Mapping[str, LayerFacts], adapter_name: str
) -> None:
    for ours, theirs, where in ((adapter.layers, layers, "model"), (layers, adapter.layers, "adapter")):
        missing = [layer for layer in ours if layer not in theirs]
        if missing:
            raise IncompatibleAdapterError(
                f"{len(missing)} layer(s) are missing in the {where}, the first is named here; use the same "
                "target_modules on both sides",
                client=adapter.client,
                layer=missing[0],
            )
    adapter.validate_finite()
    for layer, module in layers.items():
        try:
            _check_layer(adapter, layer, module, facts[layer], adapter_name)
        except AdapterError as error:
            raise error.at(client=adapter.client, layer=layer) from None


def _check_layer(adapter: Adapter, layer: str, module: Any, fact: LayerFacts, adapter_name: str) -> None:
    if adapter_name in module.merged_adapters:
        raise AdapterError("this adapter is merged into the base weight; call model.unmerge_adapter() first")
    spec = adapter.spec(layer)
    a, b, bias = parameters(module, adapter_name)
    new_a, new_b, new_bias = _stored(adapter, layer)
    embedding = adapter_name in module.lora_embedding_A
    same = a.shape[1:] == new_a.shape[1:] and (b.shape[0], b.shape[2:]) == (new_b.shape[0], new_b.shape[2:])
    if not same or spec.experts != fact.experts or embedding != (spec.kind == "embedding"):
        raise IncompatibleAdapterError(
            f"A {tuple(new_a.shape)}, B {tuple(new_b.shape)} with {spec.experts} expert(s), but the model "
            f"has A {tuple(a.shape)}, B {tuple(b.shape)} with {fact.experts}: this is another base model or "
            "layer"
        )
    if (bias is None) != (new_bias is None):
        who = "the model" if new_bias is None else "the adapter"
        raise IncompatibleAdapterError(f"only {who} has a lora_bias here; use one lora_bias on both sides")
    for old, new in ((a, new_a), (b, new_b), (bias, new_bias)):
        if old is not None and new is not None:
            _check_fits(old, new)


def _check_fits(old: Tensor, new: Tensor) -> None:
    if old.is_meta:
        raise AdapterError("the model's parameters have no values yet (meta device); load its weights first")
    if not (old.is_floating_point() and new.is_floating_point()):
        return
    limit = torch.finfo(old.dtype).max
    if limit < torch.finfo(new.dtype).max and new.numel() and float(new.abs().max()) > limit:
        raise AdapterError(
            f"a value of {float(new.abs().max()):g} does not fit the model's {old.dtype}; use bfloat16 or "
            "float32 adapter weights, or split='balanced'"
        )


def _check_untied(layers: Mapping[str, Any], resized: list[str], adapter_name: str, client: str | None) -> None:
    """``ensure_weight_tying`` lets two layers share memory; new parameters would silently part them."""
    seen: dict[int, str] = {}
    for layer, module in layers.items():
        for parameter in parameters(module, adapter_name)[:2]:
            other = seen.setdefault(parameter.untyped_storage().data_ptr(), layer)
            if other != layer and (layer in resized or other in resized):
                raise UnsupportedAdapterError(
                    f"its factors are tied to those of {other!r}, and a new rank would untie them; keep the "
                    "rank of tied layers (a rank_pattern entry)",
                    client=client,
                    layer=layer,
                )


def _extra_targets(adapter: Adapter, model: Any, adapter_name: str) -> dict[str, Tensor]:
    """Where each of the adapter's extras goes: the model's own tensors by the adapter's keys."""
    from peft import get_peft_model_state_dict
    from peft.utils.other import AuxiliaryTrainingWrapper

    state = model.state_dict()
    places = {layouts.PREFIX + key.removeprefix(layouts.PREFIX): key for key in state}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key, stored in module.adapter_state_dict_load_map(adapter_name).items():
                if f"{name}.{stored}" in state:
                    places[layouts.PREFIX + f"{name}.{key}".removeprefix(layouts.PREFIX)] = f"{name}.{stored}"
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for key in own:
        full = layouts.PREFIX + key.removeprefix(layouts.PREFIX)
        expected = layouts.split_key(key)[1] is None and not layouts.training_only(key)
        if expected and full not in adapter.extras:
            raise IncompatibleAdapterError(
                f"the model trains {key!r} (modules_to_save, bias or tokens), and the adapter does not have "
                "it; use one such setting on both sides",
                client=adapter.client,
            )
    targets: dict[str, Tensor] = {}
    for key, value in adapter.extras.items():
        target = state[places[key]] if key in places else None
        if target is None or target.shape != value.shape:
            what = "nothing" if target is None else f"{tuple(target.shape)}"
            raise IncompatibleAdapterError(
                f"{key!r} has shape {tuple(value.shape)}, and the model has {what} there; use the same "
                "modules_to_save, bias and trainable_token_indices on both sides",
                client=adapter.client,
            )
        try:
            _check_fits(target, value)
        except AdapterError as error:
            raise AdapterError(f"{key!r}: {error.message}", client=adapter.client) from None
        targets[key] = target
    return targets


# -- writes ---


@contextmanager
def mode_of(target: Tensor) -> Iterator[None]:
    """Write as the tensor that is written allows it: one made in inference mode only there. No autograd."""
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        yield


def _resize(module: Any, adapter_name: str, rank: int, alpha: float, live_config: Any) -> None:
    """New parameters of another rank, with the dtype, device, dropout and trainable flags of the old ones."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention

    config = copy.copy(live_config)
    config.init_lora_weights = False  # the values come next; an initialisation may reject the rank or need data
    old = parameters(module, adapter_name)[0]
    dropout = module.lora_dropout[adapter_name]
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    # of a MultiheadAttention only its own factors: its update_layer would also reset out_proj, a layer of its own
    update = LoraLayer.update_layer if isinstance(module, MultiheadAttention) else type(module).update_layer
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # leave the training's random numbers alone
        update(module, adapter_name, rank, lora_alpha=alpha, config=config)
    module.lora_dropout[adapter_name] = dropout
    for holder in (module.lora_A, module.lora_B):
        if adapter_name in holder:
            holder[adapter_name].to(device=old.device, dtype=old.dtype).train(module.training)
    for holder in (module.lora_embedding_A, module.lora_embedding_B):
        if adapter_name in holder:
            holder[adapter_name] = nn.Parameter(holder[adapter_name].detach().to(old.device, old.dtype))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[name])


def _write(adapter: Adapter, layer: str, module: Any, adapter_name: str) -> None:
    for parameter, value in zip(parameters(module, adapter_name), _stored(adapter, layer), strict=True):
        if parameter is not None and value is not None:
            parameter.copy_(value)


def set_scale(module: Any, adapter_name: str, scale: float) -> None:
    if isinstance(module.scaling[adapter_name], Tensor):  # as peft's compiled hot-swapping keeps it
        module.scaling[adapter_name].fill_(scale)
    else:
        module.scaling[adapter_name] = scale
