"""A global update as one safetensors file: tensors by layer, everything else as JSON in the header's metadata."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexlora_fast.errors import AdapterError
from flexlora_fast.files import replace
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.update import ClientRecord, GlobalUpdate, LayerUpdate, Refusal

FORMAT = "flexlora_fast.global_update/1"


def save(update: GlobalUpdate, path: Path) -> Path:
    """Write ``update`` to ``path``, whole or not at all (a temporary file, fsync, rename)."""
    tensors: dict[str, Tensor] = {f"extra/{key}": tensor.contiguous() for key, tensor in update.extras.items()}
    layers = {}
    for name, layer in update.items():
        layers[name] = _layer_facts(layer)
        tensors.update({f"{part}/{name}": tensor for part, tensor in _layer_tensors(layer).items()})
    about = {
        "layers": layers,
        "clients": [dataclasses.asdict(record) for record in update.clients],
        "refused": [dataclasses.asdict(refusal) for refusal in update.refused],
        "method": update.method,
        "seed": update.seed,
        "template": update.template,
        "seconds": update.seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "update": json.dumps(about)}
    replace(path, lambda to: save_file(tensors, to, metadata=metadata))
    return path


def load(path: Path) -> GlobalUpdate:
    """Read what :func:`save` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as a global update: {error}") from error
    if metadata.get("format") != FORMAT:
        raise AdapterError(f"{path} is not a {FORMAT} file; give a file that GlobalUpdate.save wrote")
    try:
        return _parse(json.loads(metadata["update"]), tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is damaged ({type(error).__name__}: {error}); aggregate the round again") from error


def _parse(about: dict[str, Any], tensors: dict[str, Tensor]) -> GlobalUpdate:
    return GlobalUpdate(
        layer_updates={name: _load_layer(name, facts, tensors) for name, facts in about["layers"].items()},
        extras={key.removeprefix("extra/"): tensor for key, tensor in tensors.items() if key.startswith("extra/")},
        clients=[ClientRecord(**{**record, "extras": tuple(record["extras"])}) for record in about["clients"]],
        refused=[Refusal(**refusal) for refusal in about["refused"]],
        method=about["method"],
        seed=about["seed"],
        template=about["template"],
        seconds=about["seconds"],
    )


def _layer_facts(layer: LayerUpdate) -> dict[str, Any]:
    f = layer.factorization
    return {
        "spec": layer.spec.to_json(),
        "total_rank": layer.total_rank,
        "solver": f.solver,
        "iterations": f.iterations,
        "excess": f.excess,
    }


def _layer_tensors(layer: LayerUpdate) -> dict[str, Tensor]:
    f = layer.factorization
    parts = {"U": f.U, "S": f.S, "V": f.V, "energy": f.energy}
    if layer.averaged is not None:
        parts |= {"B": layer.averaged[0], "A": layer.averaged[1]}
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {part: tensor.contiguous() for part, tensor in parts.items()}


def _load_layer(name: str, facts: dict[str, Any], tensors: dict[str, Tensor]) -> LayerUpdate:
    def part(key: str) -> torch.Tensor:
        return tensors[f"{key}/{name}"]

    return LayerUpdate(
        spec=LayerSpec.from_json(facts["spec"]),
        factorization=Factorization(
            part("U"),
            part("S"),
            part("V"),
            part("energy"),
            facts["solver"],
            facts["iterations"],
            facts["excess"],
        ),
        total_rank=facts["total_rank"],
        averaged=(part("B"), part("A")) if f"B/{name}" in tensors else None,
        bias=tensors.get(f"bias/{name}"),
    )
