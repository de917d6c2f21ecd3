"""A global update as one safetensors file: tensors by layer, everything else as JSON in the header's metadata.

It is written layer by layer while a round runs, and read tensor by tensor when they are used, so that an update may be
larger than memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlora_fast.defence.base import Verdict
from flexlora_fast.errors import AdapterError
from flexlora_fast.files import replace
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.privacy import Spent
from flexlora_fast.skeleton import Form
from flexlora_fast.tensorfile import TensorFile, TensorWriter
from flexlora_fast.update import ClientRecord, GlobalUpdate, Refusal

FORMAT = "flexlora_fast.global_update/4"
# Of files with what goes into frozen weights, with frozen factors or with ranks that were cut; readers of 4 do not know
# of those, and would hand out other adapters.
FORMAT_MORE = "flexlora_fast.global_update/5"
UPDATE_NAME = "global_update.safetensors"  # in the folder of a round
_PADDING = "padding"
# Bytes of the header for the dtype, shape and offsets of one tensor, and for the numbers of one layer; generous.
_ENTRY, _FACTS = 400, 400
_PARTS = ("U", "V", "B", "A", "base0", "base1", "bias", "S", "energy", "energy_error")


def save(update: GlobalUpdate, path: Path) -> Path:
    """Write ``update`` to ``path``, whole or not at all (a temporary file, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    forms = {key: Form(tuple(tensor.shape), tensor.dtype) for key, tensor in update.extras.items()}

    def write(to: str) -> None:
        with UpdateWriter(to, [layer.spec for layer in update.values()], forms, about(update)) as writer:
            for layer in update.values():
                writer.add(layer)
            for key in writer.extras:
                writer.add_extra(key, update.extras[key])
            writer.finish(update.seconds)

    replace(path, write)
    return path


def about(update: GlobalUpdate) -> dict[str, Any]:
    """What is known of a round before its layers are solved, JSON-able. What clients share is said once."""
    kinds: list[dict[str, Any]] = []
    clients, by_identity, by_text = [], dict[Any, int](), dict[str, int]()
    for record in update.clients:
        identity = (id(record.config), id(record.ranks), record.extras, record.dtype)
        if identity not in by_identity:
            kind = {"config": record.config, "ranks": record.ranks, "extras": record.extras, "dtype": record.dtype}
            by_identity[identity] = by_text.setdefault(json.dumps(kind, sort_keys=True), len(kinds))
            if by_identity[identity] == len(kinds):
                kinds.append(kind)
        clients.append({"name": record.name, "weight": record.weight, "kind": by_identity[identity]})
    # No key at all without privacy, so that files of format 3 stay what they were.
    private = {} if update.privacy is None else {"privacy": dataclasses.asdict(update.privacy)}
    return private | {
        "clients": clients,
        "kinds": kinds,
        "refused": [dataclasses.asdict(refusal) for refusal in update.refused],
        "method": update.method,
        "seed": update.seed,
        "weight": update.weight,
        "missing": update.missing,
        "template": update.template,
        "defence": update.defence,
        "verdicts": [dataclasses.asdict(verdict) for verdict in update.verdicts],
    }


class UpdateWriter:
    """A file written layer by layer, in a ``with`` block. Layers first, then ``add_extra`` in the order of ``extras``,
    then ``finish``.
    """

    def __init__(
        self, path: str, specs: Iterable[LayerSpec], extras: Mapping[str, Form], about: dict[str, Any]
    ) -> None:
        specs = list(specs)
        # The metadata is JSON in a JSON string.
        room = len(_quoted({**about, "layers": {spec.name: spec.to_json() for spec in specs}})) + 4096
        room += sum(len(_PARTS) * (len(json.dumps(spec.name)) + _ENTRY) + _FACTS for spec in specs)
        room += sum(len(json.dumps(key)) + _ENTRY for key in extras)
        self.extras = in_order(extras)
        self._about = {**about, "layers": {}}
        self._small: dict[str, Tensor] = {}
        self._format = FORMAT
        self._writer = TensorWriter(path, room)

    def __enter__(self) -> UpdateWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, layer: LayerUpdate) -> None:
        """Write a layer's float32 tensors; its few float64 numbers are kept for the end."""
        f = layer.factorization
        self._about["layers"][layer.name] = {
            "spec": layer.spec.to_json(),
            "total_rank": layer.total_rank,
            "solver": f.solver,
            "iterations": f.iterations,
            "excess": f.excess,
        }
        parts = {"U": f.U, "V": f.V}
        if layer.averaged is not None:
            parts |= {"B": layer.averaged[0], "A": layer.averaged[1]}
        parts |= {f"base{i}": part for i, part in enumerate(layer.base or ())}
        if layer.bias is not None:
            parts["bias"] = layer.bias
        for part, tensor in parts.items():
            self._writer.add(f"{part}/{layer.name}", tensor)
        self._small |= {f"S/{layer.name}": f.S, f"energy/{layer.name}": f.energy}
        if layer.inherited:
            self._about["layers"][layer.name]["inherited"] = layer.inherited
        more = _more(layer)
        self._about["layers"][layer.name] |= more
        self._format = FORMAT_MORE if more else self._format
        if f.energy_error is not None:
            self._small[f"energy_error/{layer.name}"] = f.energy_error

    def add_extra(self, key: str, tensor: Tensor) -> None:
        self._flush()
        self._writer.add(f"extra/{key}", tensor)

    def finish(self, seconds: Mapping[str, float]) -> None:
        """Write the header, and close."""
        self._flush()
        about = {**self._about, "layers": dict(sorted(self._about["layers"].items())), "seconds": dict(seconds)}
        self._writer.finish({"format": self._format, "update": json.dumps(about)})

    def _flush(self) -> None:
        if self._small and self._writer.position % 8:
            self._writer.add(_PADDING, torch.zeros(1))
        for key, tensor in self._small.items():
            self._writer.add(key, tensor)
        self._small = {}


def _more(layer: LayerUpdate) -> dict[str, Any]:
    """What a file of format 4 has not; empty for layers of methods that hand out truncations or averages alone."""
    more: dict[str, Any] = {}
    if layer.base is not None:
        more |= {"base": len(layer.base), "base_error": layer.base_error}
    if layer.frozen:
        more["frozen"] = True
    if layer.limit is not None:
        more["limit"] = layer.limit
    return more


def in_order(extras: Mapping[str, Form]) -> list[str]:
    """Keys of averages as they are written: wide elements first, so that each lies at a multiple of its size."""
    return sorted(extras, key=lambda key: (-extras[key].dtype.itemsize, key))


def _quoted(document: Any) -> str:
    return json.dumps(json.dumps(document))


# -- reading ---


class StoredFactorization(Factorization):
    """A factorization whose U and V are read from the file at each use."""

    U = property(lambda self: self._file[f"U/{self._name}"])
    V = property(lambda self: self._file[f"V/{self._name}"])

    def __init__(self, file: TensorFile, name: str, small: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        known: dict[str, Any] = {"S": small[f"S/{name}"], "energy": small[f"energy/{name}"]}
        known |= {key: facts[key] for key in ("solver", "iterations", "excess")}
        known["energy_error"] = small.get(f"energy_error/{name}")
        self.__dict__.update(known, _file=file, _name=name)


class StoredLayer(LayerUpdate):
    """A layer of a file; its averaged factors, and what goes into the frozen weight, are read at each use."""

    _file: TensorFile
    _matrices: int
    averaged = property(lambda self: self._averaged())
    base = property(lambda self: self._base())
    merges = property(lambda self: bool(self._matrices))
    fresh = property(lambda self: self.merges and f"B/{self.name}" not in self._file)

    def __init__(self, file: TensorFile, f: StoredFactorization, spec: LayerSpec, facts: Mapping[str, Any]) -> None:
        known = {"inherited": 0.0, "base_error": 0.0, "frozen": False, "limit": None} | dict(facts)
        names = ("total_rank", "inherited", "base_error", "frozen", "limit")
        if not (known["limit"] is None or (type(known["limit"]) is int and known["limit"] > 0)):
            raise ValueError(f"layer {spec.name!r} has the limit {known['limit']!r}, not a number of columns")
        self.__dict__.update({name: known[name] for name in names}, spec=spec, factorization=f, _file=file)
        self.__dict__.update(bias=file.get(f"bias/{spec.name}"), _matrices=facts.get("base", 0))

    def _averaged(self) -> tuple[Tensor, Tensor] | None:
        keys = (f"B/{self.name}", f"A/{self.name}")
        if keys[0] not in self._file:
            return None
        parts = self._file.read(keys)
        return parts[keys[0]], parts[keys[1]]

    def _base(self) -> tuple[Tensor, ...] | None:
        keys = [f"base{i}/{self.name}" for i in range(self._matrices)]
        parts = self._file.read(keys) if keys else {}
        return tuple(parts[key] for key in keys) or None


def load(path: Path) -> GlobalUpdate:
    """Read what :func:`save` wrote. U, V and the extras are read from the file, which stays open, as they are used."""
    try:
        file = TensorFile(path, hold=True)
    except AdapterError as error:
        raise AdapterError(f"{path} cannot be read as a global update: {error.message}") from error
    if file.metadata.get("format") not in (FORMAT, FORMAT_MORE):
        raise AdapterError(f"{path} is not a {FORMAT} or {FORMAT_MORE} file; give a file that GlobalUpdate.save wrote")
    try:
        return _parse(json.loads(file.metadata["update"]), file)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is damaged ({type(error).__name__}: {error}); aggregate the round again") from error


def _parse(about: dict[str, Any], file: TensorFile) -> GlobalUpdate:
    extras = {key.removeprefix("extra/"): key for key in file if key.startswith("extra/")}
    keys = [f"{part}/{name}" for name in about["layers"] for part in ("S", "energy")]
    small = file.read(keys + [key for key in file if key.startswith("energy_error/")])
    return GlobalUpdate(
        layer_updates={name: _load_layer(name, facts, file, small) for name, facts in about["layers"].items()},
        extras=file.renamed(extras) if extras else {},
        clients=[_record(client, about["kinds"]) for client in about["clients"]],
        refused=[Refusal(**refusal) for refusal in about["refused"]],
        method=about["method"],
        seed=about["seed"],
        template=about["template"],
        seconds=about["seconds"],
        defence=about["defence"],
        verdicts=[Verdict(**verdict) for verdict in about["verdicts"]],
        privacy=Spent(**about["privacy"]) if "privacy" in about else None,
        weight=about["weight"],
        missing=about["missing"],
    )


def _record(client: dict[str, Any], kinds: list[dict[str, Any]]) -> ClientRecord:
    kind = kinds[client["kind"]]
    extras = tuple(kind["extras"])
    return ClientRecord(client["name"], client["weight"], kind["config"], kind["ranks"], extras, kind["dtype"])


def _load_layer(name: str, facts: dict[str, Any], file: TensorFile, small: Mapping[str, Tensor]) -> LayerUpdate:
    spec = LayerSpec.from_json(facts["spec"])
    count, k = small[f"S/{name}"].shape
    shapes = {"U": (count, spec.m, k), "V": (count, spec.n, k), "energy": (count,)}
    for part, shape in shapes.items():
        if file.entry(f"{part}/{name}").shape != shape:
            raise ValueError(f"{part} of layer {name!r} has not shape {shape}")
    f = StoredFactorization(file, name, small, facts)
    if f"B/{name}" in file:
        file.entry(f"A/{name}")
    _check_base([file.entry(f"base{i}/{name}").shape for i in range(facts.get("base", 0))], spec)
    return StoredLayer(file, f, spec, facts)


def _check_base(shapes: Sequence[tuple[int, ...]], spec: LayerSpec) -> None:
    """Raise ``ValueError`` where these are no matrices whose product is (E, m, n)."""
    if not shapes:
        return
    first, last = shapes[0], shapes[-1]
    right = len(shapes) == 1 or (len(shapes) == 2 and first[2] == last[1])
    if not right or (len(first), len(last)) != (3, 3) or (*first[:2], last[2]) != (spec.experts, spec.m, spec.n):
        raise ValueError(f"what goes into the frozen weight of layer {spec.name!r} has shapes {shapes}")
