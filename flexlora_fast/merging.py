"""Updates of parts of a round made one: edge servers aggregate their own clients, and the centre merges the results.

With ω_e the share of edge e and X_e what its update keeps of its ΔW_e, ΔW = Σ ω_e·ΔW_e is what one flat round of all
clients would sum up, and M = Σ ω_e·X_e is what the centre can. The best rank-k M_k of M then has
‖ΔW − M_k‖_F ≤ ‖M − M_k‖_F + Σ ω_e·‖ΔW_e − X_e‖_F, where every term is known: the last sum is the layers' ``inherited``.
It is zero where the edges keep all of their ΔW_e (``rank`` as large as the ranks of an edge's clients together).
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexlora_fast import devices, extras, finishing, methods, outcome, storage
from flexlora_fast.admission import check_configs, check_geometries, is_weight
from flexlora_fast.combining import columns_of, kept, left_out
from flexlora_fast.errors import AdapterError, EmptyRoundError, IncompatibleAdapterError, OptionError, WeightError
from flexlora_fast.files import replace
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.plan import check_solver
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.methods import Contribution, Method
from flexlora_fast.precision import full_precision
from flexlora_fast.skeleton import Form
from flexlora_fast.soundness import check_clients, check_layer, finite
from flexlora_fast.stack import Stack
from flexlora_fast.update import ClientRecord, GlobalUpdate


@dataclass(frozen=True)
class _Edge:
    """One of the updates, by the name it has in errors, and its weight."""

    name: str
    update: GlobalUpdate
    weight: float

    def having(self, layer: str, missing: str) -> float:
        """The weight that stands behind its layer, of all its clients or of those that have the layer."""
        clients = self.update.clients
        if missing == "zero" or not clients:
            return self.weight
        return self.weight * math.fsum(client.weight for client in clients if layer in client.ranks)

    def averaging(self, key: str) -> float:
        """The weight of the clients that have a tensor which is no low-rank pair."""
        clients = self.update.clients
        return self.weight * math.fsum(c.weight for c in clients if key in c.extras) if clients else self.weight


@full_precision()
def merge(
    updates: Sequence[GlobalUpdate],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    solver: str = "auto",
    tol: float = 1e-3,
    device: str | torch.device | None = None,
    *,
    names: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> GlobalUpdate:
    """The update of all clients behind some updates, as one flat round would have given it.

    Exactly, to rounding, where the updates keep all of their ΔW; otherwise certified: ``update[layer].error(rank)`` is
    then an upper bound of ‖ΔW − ΔW_rank‖_F against the flat round's ΔW, with ``update[layer].inherited`` in it.
    Averages and biases are exact as far as their dtypes go. Merged updates can be merged again.

    Args:
        updates: of ``ff.aggregate``, ``Aggregator.finish``, ``GlobalUpdate.load`` or ``merge``, in any order.
        weights: a finite number ≥ 0 for each (default: the sums of their clients' weights, ``GlobalUpdate.weight``).
        rank: columns to keep in each layer (default: the most that one of them keeps there).
        solver, tol, device: as for ``ff.aggregate``. Layers are read, solved and let go one by one.
        names: one for each, put in front of its clients' names ("north/hospital-3"), which may then be the same.
        out: as for ``Aggregator.finish``.

    Raises:
        EmptyRoundError: no updates. WeightError: weights that are none, are not known, or sum to zero.
        AdapterError: an update that cannot be what it says (NaN, shares beyond 1 …), by its name. What an edge says of
        its clients' number and weights is believed: give ``weights`` where it must not be.
        IncompatibleAdapterError: other base models, layers, methods or treatments of missing layers; clients of one
        name. OptionError: updates of private rounds, or of a method whose sums over parts of a round do not add up to
        the whole's ("hetlora").

    >>> import torch, flexlora_fast as ff
    >>> def client(name, seed):
    ...     A, B = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(seed))
    ...     state = {"base_model.model.fc.lora_A.weight": A, "base_model.model.fc.lora_B.weight": B.mT}
    ...     return ff.Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 4}, client=name)
    >>> anna, ben, carl = client("anna", 0), client("ben", 1), client("carl", 2)
    >>> north = ff.aggregate([anna, ben], weights=[100, 300], rank=4)
    >>> update = ff.merge([north, ff.aggregate([carl], weights=[200])], rank=2)
    >>> flat = ff.aggregate([anna, ben, carl], weights=[100, 300, 200])
    >>> bool((update.delta("fc") - flat.delta("fc")).norm() < 1e-5 * flat.norm), update.weight
    (True, 600.0)
    """
    start = time.perf_counter()
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise OptionError(f"rank is {rank!r}; give an integer ≥ 1, or None for the most that one of them keeps")
    check_solver(solver)
    edges = _edges(updates, weights, names)
    method, missing = _common(edges)
    for edge in edges:
        check_clients(edge.update, edge.name)
    here = devices.usable(device)
    frame = _frame(edges)
    layers = sorted({layer for edge in edges for layer in edge.update})
    forms = {key: _form(edges, key) for key in sorted({key for edge in edges for key in edge.update.extras})}

    def merged(layer: str) -> LayerUpdate:
        return _layer(layer, edges, method, missing, rank, solver, tol, here)

    if out is None:
        found = {layer: merged(layer) for layer in layers}
        averages = {key: _average(edges, key) for key in forms}
        seconds = {"merge": time.perf_counter() - start}
        return dataclasses.replace(frame, layer_updates=found, extras=averages, seconds=seconds)

    def write(to: str) -> None:
        specs = [_first(edges, layer).spec for layer in layers]
        with storage.UpdateWriter(to, specs, forms, storage.about(frame)) as writer:
            for layer in layers:
                writer.add(merged(layer))
            for key in writer.extras:
                writer.add_extra(key, _average(edges, key))
            writer.finish({"merge": time.perf_counter() - start})

    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, write)
    return storage.load(path)


# -- what is merged ---


def _edges(
    updates: Sequence[GlobalUpdate], weights: Sequence[float] | None, names: Sequence[str] | None
) -> list[_Edge]:
    """Those of positive weight, in an order that does not depend on how they came."""
    updates = list(updates)
    if not updates:
        raise EmptyRoundError("there are no updates; give at least one")
    for what, values in (("weights", weights), ("names", names)):
        if values is not None and len(values) != len(updates):
            raise WeightError(f"{len(values)} {what} for {len(updates)} updates; give one for each")
    if names is not None and len(set(names)) < len(names):
        raise OptionError(f"names are {list(names)!r}; give each update one of its own")
    edges = []
    for i, update in enumerate(updates):
        name = names[i] if names is not None else f"update {i}"
        weight = weights[i] if weights is not None else update.weight
        if weight is None:
            raise WeightError(f"{name} does not say what its clients weigh together; give weights=, one for each")
        if not is_weight(weight):
            raise WeightError(f"the weight of {name} is {weight!r}; give a finite number ≥ 0")
        edges.append(_Edge(name, update if names is None else _renamed(update, name), float(weight)))
    edges = [edge for edge in edges if edge.weight > 0]
    if not edges:
        raise WeightError(f"the weights of {len(updates)} updates sum to 0; they must sum to > 0")
    return sorted(edges, key=lambda edge: [client.name for client in edge.update.clients])


def _renamed(update: GlobalUpdate, name: str) -> GlobalUpdate:
    """The update with ``name`` in front of its clients' names."""
    return dataclasses.replace(
        update,
        clients=[dataclasses.replace(client, name=f"{name}/{client.name}") for client in update.clients],
        refused=[dataclasses.replace(refusal, client=f"{name}/{refusal.client}") for refusal in update.refused],
        verdicts=[dataclasses.replace(verdict, client=f"{name}/{verdict.client}") for verdict in update.verdicts],
    )


def _common(edges: Sequence[_Edge]) -> tuple[Method, str]:
    """The method and the treatment of missing layers, once all that must be the same is."""
    first = edges[0]
    for edge in edges[1:]:
        for what in ("method", "missing"):
            one, other = getattr(first.update, what), getattr(edge.update, what)
            if one != other:
                raise IncompatibleAdapterError(
                    f"{edge.name} was made with {what}={other!r}, {first.name} with {one!r}; aggregate them alike"
                )
    check_configs((edge.name, edge.update.template) for edge in edges)
    private = next((edge.name for edge in edges if edge.update.privacy is not None), None)
    if private is not None:
        raise OptionError(
            f"{private} is of a private round, and what several of them cost together is not known here; make one "
            "private round of all clients, or one round of these updates' adapters"
        )
    known = _method(first.update.method)
    if known is None or not known.linear:
        raise OptionError(
            f"updates of method {first.update.method!r} do not add up to that of all clients; aggregate these in one "
            f"round, or use one of {', '.join(name for name, m in methods.METHODS.items() if m.linear)}"
        )
    check_geometries((edge.name, layer.spec) for edge in edges for layer in edge.update.values())
    owners = dict[str, str]()
    for edge in edges:
        for client in edge.update.clients:
            if owners.setdefault(client.name, edge.name) != edge.name:
                raise IncompatibleAdapterError(
                    f"it is in {owners[client.name]} and in {edge.name}; count nobody twice, or tell them apart by "
                    "names= for the updates",
                    client=client.name,
                )
    return known, first.update.missing


def _method(text: str) -> Method | None:
    """The method that an update was made with; None for one of somebody's own, and for sums that no round made."""
    try:
        return methods.get(text)
    except OptionError:
        return None


def _frame(edges: Sequence[_Edge]) -> GlobalUpdate:
    """The merged update without its layers and averages."""
    total = math.fsum(edge.weight for edge in edges)
    clients: list[ClientRecord] = []
    for edge in edges:
        clients += [dataclasses.replace(c, weight=c.weight * edge.weight / total) for c in edge.update.clients]
    templates = [edge.update.template for edge in edges]
    paths = {update.spec.pattern_name for edge in edges for update in edge.update.values()}
    defences = sorted({edge.update.defence for edge in edges if edge.update.defence is not None})
    return GlobalUpdate(
        layer_updates={},
        clients=sorted(clients, key=lambda client: client.name),
        refused=[refusal for edge in edges for refusal in edge.update.refused],
        method=edges[0].update.method,
        seed=edges[0].update.seed,
        template=finishing.widened(templates, paths),
        defence=", ".join(defences) or None,
        verdicts=[verdict for edge in edges for verdict in edge.update.verdicts],
        weight=total,
        missing=edges[0].update.missing,
    )


def _first(edges: Sequence[_Edge], layer: str) -> LayerUpdate:
    return next(edge.update[layer] for edge in edges if layer in edge.update)


# -- layers ---


def _layer(
    name: str,
    edges: Sequence[_Edge],
    method: Method,
    missing: str,
    rank: int | None,
    solver: str,
    tol: float,
    device: torch.device,
) -> LayerUpdate:
    having = [edge for edge in edges if name in edge.update]
    counted = having if missing == "renormalize" else edges
    total = math.fsum(edge.having(name, missing) for edge in counted)
    if not total > 0:
        raise AdapterError("it is there, but none of the clients in the records has it", layer=name)
    contributions, inherited = list[Contribution](), 0.0
    bias: Tensor | None = None
    for edge in having:
        layer, share = edge.update[name], edge.having(name, missing) / total
        check_layer(layer, edge.name)
        B, A = (X.to(device) for X in kept(layer)[0])
        contributions.append(Contribution(edge.name, A, B, 1.0, share))
        inherited += share * left_out(layer)
        if layer.bias is not None:
            part = share * layer.bias.double()
            bias = part if bias is None else bias + part
    spec = _first(having, name).spec
    columns = max([*(c.rank for c in contributions), *(columns_of(edge.update, name) for edge in having)])
    seed = edges[0].update.seed

    def solved(stack: Stack, columns: int) -> Factorization:
        f = solve(stack, columns, solver=solver, tol=tol, seed=seed, name=name)
        error = None if f.energy_error is None else f.energy_error.cpu()
        return dataclasses.replace(f, U=f.U.cpu(), S=f.S.cpu(), V=f.V.cpu(), energy=f.energy.cpu(), energy_error=error)

    mean = None if bias is None else bias.float()
    update = outcome.of_contributions(
        method, spec, contributions, rank or columns, solved, lambda stack: None, mean, inherited
    )
    return outcome.limited(method, update)


# -- averages ---


def _form(edges: Sequence[_Edge], key: str) -> Form:
    having = [edge for edge in edges if key in edge.update.extras]
    forms = [Form(tuple(edge.update.extras[key].shape), edge.update.extras[key].dtype) for edge in having]
    for edge, form in zip(having, forms, strict=True):
        if form.shape != forms[0].shape:
            raise IncompatibleAdapterError(
                f"tensor {key!r} has shape {form.shape} in {edge.name} and {forms[0].shape} in {having[0].name}; "
                "tensors that are averaged must have one shape"
            )
    return forms[0]


def _average(edges: Sequence[_Edge], key: str) -> Tensor:
    """Σ w·t / Σ w over the clients that have it, from the updates' own averages; as ``extras.average``."""
    form = _form(edges, key)
    having = [(edge.averaging(key), edge.update.extras[key]) for edge in edges if key in edge.update.extras]
    total = math.fsum(weight for weight, _ in having)
    if not total > 0:
        raise AdapterError(f"tensor {key!r} is there, but none of the clients in the records has it")
    mean = torch.zeros(form.shape, dtype=torch.float64)
    for edge, (weight, tensor) in zip((edge for edge in edges if key in edge.update.extras), having, strict=True):
        if not finite(tensor):
            raise AdapterError(f"{edge.name} is not sound: tensor {key!r} holds NaN or Inf; merge without it")
        mean += weight / total * tensor.double().cpu()
    return extras.cast(mean, form.dtype)
