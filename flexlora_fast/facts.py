"""What a state dict does not say of its layers: the name PEFT matches them by, their experts, how the weight is stored.

A live model knows; without one it is inferred from names and shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError

Shapes = Mapping[str, tuple[torch.Size, torch.Size]]


@dataclass(frozen=True)
class LayerFacts:
    """What a live model knows of a layer and a state dict does not tell."""

    pattern_name: str
    experts: int
    weight_transposed: bool


def infer(
    slots: Mapping[str, dict[str, str]], tensors: Mapping[str, Tensor], config: Config, client: str | None
) -> dict[str, LayerFacts]:
    """What names and shapes alone tell about each layer; ``slots`` has the keys of its factors, "A" and "B".

    Raises ``AdapterError`` where adapted parameters (MoE) fit no assignment to ``target_parameters``, or several
    that the config treats differently.
    """
    facts: dict[str, LayerFacts] = {}
    nests: dict[str, list[str]] = {}
    for layer, slot in slots.items():
        owner = layer.removesuffix(".base_layer.out_proj")
        if owner != layer and owner in slots:
            # MultiheadAttention makes its out_proj itself, with the rank it got under its own name
            facts[layer] = LayerFacts(owner, 1, False)
            continue
        module = unwrapped(layer)
        transposed = bool(config.get("fan_in_fan_out")) and f"{layer}.base_layer.out_proj" not in slots
        facts[layer] = LayerFacts(module, 1, transposed)
        # a parameter cannot be adapted in a module that target_modules adapts as a whole (PEFT raises)
        is_module = configs.targets_module(config, module) and config.get("target_modules") != "all-linear"
        is_matrix = tensors[slot["A"]].ndim == 2 and slot["A"].endswith("lora_A.weight")
        if is_matrix and not is_module and configs.parameter_targets(config, module):
            nests.setdefault(module, []).append(layer)
    for module, layers in nests.items():
        shapes = {layer: (tensors[slots[layer]["A"]].shape, tensors[slots[layer]["B"]].shape) for layer in layers}
        facts.update(_parameter_facts(module, shapes, config, client))
    return facts


def unwrapped(layer: str) -> str:
    """The path a module has in the model before PEFT wraps it: without ``base_layer``.

    >>> unwrapped("mlp.experts.base_layer")
    'mlp.experts'
    """
    return ".".join(part for part in layer.split(".") if part != "base_layer")


def _parameter_facts(module: str, shapes: Shapes, config: Config, client: str | None) -> dict[str, LayerFacts]:
    """Which of ``target_parameters`` each of the nested wrappers of one module adapts, and its number of
    experts.

    PEFT nests one wrapper per parameter, in the order in which the module registered them (first is
    innermost), and writes neither their names nor E. Every assignment that the ranks and shapes allow is
    tried.
    """
    names = configs.parameter_targets(config, module)
    layers = sorted(shapes, key=len)  # outermost first
    fits = []
    # the last registered, so most likely the last listed, is the outermost: its assignment comes first
    for chosen in itertools.islice(itertools.permutations(reversed(names), len(layers)), 5040):
        paths = [f"{module}.{name}" for name in chosen]
        ranks = [configs.rank_for(config, path) for path in paths]
        if all(shapes[layer][0][0] % rank == 0 for layer, rank in zip(layers, ranks, strict=True)):
            experts = [shapes[layer][0][0] // rank for layer, rank in zip(layers, ranks, strict=True)]
            fits.append([LayerFacts(p, e, False) for p, e in zip(paths, experts, strict=True)])
    if not fits:
        raise AdapterError(
            f"{len(layers)} adapted parameter(s) with {[shapes[x][0][0] for x in layers]} ranks over all "
            f"experts do not fit target_parameters {names} and the config's ranks; send the config the "
            "adapter was trained with",
            client=client,
            layer=layers[0],
        )
    fits = [f for f in fits if len({fact.experts for fact in f}) == 1] or fits
    fits = [f for f in fits if _fits_feed_forward(f, [shapes[x] for x in layers])] or fits
    if len({tuple(_numbers(config, fact) for fact in f) for f in fits}) > 1:
        raise AdapterError(
            f"the state dict does not tell which of the parameters {names} this is, and rank_pattern or "
            "alpha_pattern treat them differently; give them one rank and alpha, or read the adapter with "
            "Adapter.from_peft",
            client=client,
            layer=layers[0],
        )
    return dict(zip(layers, fits[0], strict=True))


def _numbers(config: Config, fact: LayerFacts) -> tuple[int, float, int]:
    return (
        fact.experts,
        configs.alpha_for(config, fact.pattern_name),
        configs.rank_for(config, fact.pattern_name),
    )


def _fits_feed_forward(facts: list[LayerFacts], shapes: list[tuple[torch.Size, torch.Size]]) -> bool:
    """Do ``gate_up_proj`` (hidden → 2·inner) and ``down_proj`` (inner → hidden) fit together in this
    assignment?
    """
    named = {fact.pattern_name.rpartition(".")[2]: shape for fact, shape in zip(facts, shapes, strict=True)}
    if not {"gate_up_proj", "down_proj"} <= named.keys():
        return False
    (up_a, up_b), (down_a, down_b) = named["gate_up_proj"], named["down_proj"]
    return up_a[1] == down_b[0] and up_b[0] == 2 * down_a[1]
