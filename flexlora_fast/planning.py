"""How each layer of a round is solved, from shapes alone: by which solver, whole or in pieces, with which others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexlora_fast import memory
from flexlora_fast.defence import coordinates
from flexlora_fast.defence.coordinates import Coordinates
from flexlora_fast.errors import OptionError
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank import plan
from flexlora_fast.methods import Method
from flexlora_fast.privacy import solving
from flexlora_fast.privacy.mechanism import Mechanism
from flexlora_fast.skeleton import Skeleton
from flexlora_fast.staging import ALIGNMENT

# Columns of the pieces that are brought to a GPU: each is made ready in about half a millisecond of Python, and so many
# of 4096² in bfloat16 take 1.2 ms to come.
STREAMED_COLUMNS = 4096
# Of a device's memory one part in four is for factors on their way there, of which a group may fill one in four where
# it can be as small: then others come while it is solved. The rest is for two groups.
PARTS = 4


@dataclass(frozen=True)
class Settings:
    """What an :class:`~flexlora_fast.Aggregator` was made with, as far as layers are concerned."""

    rank: int | None
    method: Method
    solver: str
    tol: float
    device: torch.device
    seed: int
    missing: str
    limit: int
    certificate: str = "exact"
    results: str = "cpu"
    room: int = 0
    coordinates: Coordinates | None = None
    private: Mechanism | None = None
    processes: int = 1
    shard: str = "layers"

    def __post_init__(self) -> None:
        """``limit`` bounds this machine's memory, ``room`` that in which layers are solved: a GPU's, or the same.

        ``processes``: those that make the round together, each with so much memory. ``shard``: what they share out, see
        ``distributed``.
        """
        if self.device.type == "cpu":
            object.__setattr__(self, "room", self.limit)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is solved.

    ``total_rank``: R. ``rank``: columns wanted. ``grouped``: with other layers of its shape, by ``lowrank.grouped``.
    ``folded``: clients come in pieces that are added to a dense ΔW.
    ``solver``: settled already, in private rounds.
    ``held``: bytes of the largest piece as read (of all factors where not folded). ``scratch``: bytes beside it.
    ``spread``: the solver, "dense" or one on the factors, for which each rank has some of the clients; "" for a layer
    that one rank solves.
    """

    spec: LayerSpec
    total_rank: int
    rank: int
    folded: bool
    held: int
    scratch: int
    grouped: bool = False
    solver: str = ""
    spread: str = ""

    @property
    def group(self) -> tuple[int, ...]:
        """What layers that are solved together have in common; () for those solved one by one."""
        return (self.spec.m, self.spec.n, self.rank, self.folded) if self.grouped else ()


def plans(skeletons: Sequence[tuple[Skeleton, int]], of: Settings) -> list[LayerPlan]:
    """``plan_layer`` for every layer; most of a model's are alike, and planned once."""
    known: dict[object, LayerPlan] = {}
    found = []
    specs = {layer: spec for skeleton, _ in reversed(skeletons) for layer, spec in skeleton.specs.items()}
    for name, spec in sorted((specs if of.private is None else of.private.specs).items()):
        having = [(s, count) for s, count in skeletons if name in s.specs]
        alike = [(s.ranks[name], s.layer_bytes[name], count) for s, count in having]
        key = (spec.m, spec.n, spec.experts, *alike)
        if key not in known:
            known[key] = plan_layer(name, having, of) if of.private is None else _privately(spec, having, of)
        found.append(dataclasses.replace(known[key], spec=spec))
    return found


def plan_layer(name: str, having: Sequence[tuple[Skeleton, int]], of: Settings) -> LayerPlan:
    """Choose between all factors at once and a dense ΔW from pieces, by the shapes of all clients that have the layer.

    The planner's own choice stands wherever it fits the limit, so that results do not depend on it. Where it chooses
    "dense", pieces are as fast as all at once and need less memory.
    """
    spec = having[0][0].specs[name]
    widest = max(s.ranks[name] for s, _ in having)
    total_rank = sum(s.ranks[name] * count for s, count in having)
    nbytes = sum(s.layer_bytes[name] * count for s, count in having)
    if of.device.type != "cpu":  # each B and A begins on a boundary there
        nbytes += 2 * ALIGNMENT * sum(count for _, count in having)
    rank = of.rank or widest
    if of.coordinates is not None:
        return _by_coordinates(name, having, of, rank, nbytes)
    if of.shard == "clients":
        return _spread(name, having, of)
    columns = total_rank if of.method.stacked else widest
    kept = min(rank, columns, spec.m, spec.n)
    shape = plan.Shape(spec.m, spec.n, columns, kept, of.tol, spec.experts, of.certificate)
    grouped = of.device.type != "cpu" and of.method.output == "svd"
    solver = plan.choose(shape, plan.constants_of(of.device), grouped=grouped) if of.solver == "auto" else of.solver
    beside = 8 * spec.experts * (spec.m + spec.n) * columns if of.method.merges else 0  # what goes into frozen weights
    scratch = memory.scratch(solver, shape) + beside
    whole = LayerPlan(spec, total_rank, rank, False, nbytes, scratch, solver == "filtered")
    whole = dataclasses.replace(whole, grouped=whole.grouped and of.method.output == "svd")
    least, needs = whole, _needs(whole, of)
    if of.method.folds:
        columns = memory.PIECE_COLUMNS if of.device.type == "cpu" else STREAMED_COLUMNS
        piece = memory.piece_bytes(nbytes, total_rank, widest, columns)
        folded = LayerPlan(spec, total_rank, rank, True, piece, memory.scratch_folded(shape, widest), grouped)
        if _needs(folded, of) <= of.room and (solver == "dense" or needs > of.room):
            return folded
        least = min(whole, folded, key=lambda layer: _needs(layer, of))
    if needs > of.room and of.shard == "auto" and of.method.folds:
        return _spread(name, having, of)
    if needs > of.room:
        fold = "" if of.method.folds else f" (method {of.method.name!r} takes all clients of a layer at once)"
        raise OptionError(
            f"a layer of {spec.m} outputs and {spec.n} inputs with R = {total_rank} needs "
            f"{memory.show(_needs(least, of))}{fold}, and {_bound(of)}",
            layer=name,
        )
    return whole


def _by_coordinates(
    name: str, having: Sequence[tuple[Skeleton, int]], of: Settings, rank: int, nbytes: int
) -> LayerPlan:
    """All factors at once, and a dense ΔW whose rank is not theirs."""
    spec = having[0][0].specs[name]
    full = min(spec.m, spec.n)
    shape = plan.Shape(spec.m, spec.n, full, min(rank, full), of.tol, spec.experts, of.certificate)
    tile = coordinates.tile_bytes(spec.m, spec.n, sum(count for _, count in having))
    layer = LayerPlan(spec, full, rank, False, nbytes, memory.scratch("dense", shape) + tile)
    if _needs(layer, of) > of.room:
        raise OptionError(
            f"a layer of {spec.m} outputs and {spec.n} inputs needs {memory.show(_needs(layer, of))} with defence "
            f"{str(of.coordinates)!r}, which takes all clients of a layer at once, and {_bound(of)}",
            layer=name,
        )
    return layer


def _privately(spec: LayerSpec, having: Sequence[tuple[Skeleton, int]], of: Settings) -> LayerPlan:
    """A noised matrix, formed where that takes no more than half of the memory, made by tiles where it would.

    By the layer's shape alone: who came must not show in how it was solved. Forming it is always faster, since each
    pass over tiles makes all noise again: of 4096², 1.1 s against 9.3 s (16 clients of rank 16, k = 16), 4.9 s against
    108 s (100 clients, k = 64; ``benchmarks/results/privacy.md``).
    """
    assert of.private is not None
    full, widest = min(spec.m, spec.n), of.private.widest
    total_rank = sum(s.ranks[spec.name] * count for s, count in having)
    nbytes = sum(s.layer_bytes[spec.name] * count for s, count in having)
    rank = of.rank or full
    shape = plan.Shape(spec.m, spec.n, full, min(rank, full), of.tol, spec.experts, of.certificate)
    ways = []
    for solver in ("dense", "factored", "subspace"):
        beside = solving.scratch(spec.m, spec.n, spec.experts, widest)
        ways.append((solver, memory.scratch_noised(solver, shape) + beside))
    fitting = [way for way in ways if 2 * way[1] <= of.room] or [min(ways, key=lambda way: way[1])]
    solver, needs = fitting[0] if of.solver == "auto" else next(way for way in ways if way[0] == of.solver)
    layer = LayerPlan(spec, full, rank, False, nbytes, needs, False, solver)
    if _needs(layer, of) > of.room and solver == "dense":
        piece = memory.piece_bytes(nbytes, total_rank, widest)
        summed = solving.sum_bytes(spec.m, spec.n, spec.experts, widest)
        layer = dataclasses.replace(layer, folded=True, held=piece, scratch=needs + summed)
    if _needs(layer, of) > of.room:
        raise OptionError(
            f"a layer of {spec.m} outputs and {spec.n} inputs needs {memory.show(_needs(layer, of))} in a private "
            f"round solved by {solver!r}, and {_bound(of)}",
            layer=spec.name,
        )
    return layer


def _spread(name: str, having: Sequence[tuple[Skeleton, int]], of: Settings) -> LayerPlan:
    """Some of the clients on each rank, which sum up their ΔW, or what their factors make of blocks of vectors."""
    if not of.method.folds:
        raise OptionError(
            f"method {of.method.name!r} takes all clients of a layer at once, so they cannot be on several ranks; "
            "use shard='layers' or method 'flexlora'",
            layer=name,
        )
    spec, widest = having[0][0].specs[name], max(s.ranks[name] for s, _ in having)
    total_rank = sum(s.ranks[name] * count for s, count in having)
    nbytes = sum(s.layer_bytes[name] * count for s, count in having)
    share = min(nbytes, math.ceil(nbytes / of.processes) + max(s.layer_bytes[name] for s, _ in having))
    rank = of.rank or widest
    kept = min(rank, total_rank, spec.m, spec.n)
    shape = plan.Shape(spec.m, spec.n, total_rank, kept, of.tol, spec.experts, of.certificate)
    mine = dataclasses.replace(shape, R=min(total_rank, math.ceil(total_rank / of.processes) + widest))
    piece = memory.piece_bytes(nbytes, total_rank, widest)
    dense = LayerPlan(spec, total_rank, rank, True, piece, memory.scratch_folded(shape, widest), spread="dense")
    solver = "subspace" if of.solver == "subspace" else "factored"
    factored = LayerPlan(spec, total_rank, rank, True, share, memory.scratch(solver, mine), spread=solver)
    if of.solver in ("factored", "subspace"):
        ways = [factored]
    else:  # the others end with a ΔW as well; it is as exact as its float32 sums
        ways = [dense, factored] if of.solver == "auto" else [dense]
    fitting = [layer for layer in ways if _needs(layer, of) <= of.room]
    if not fitting:
        least = min(ways, key=lambda layer: _needs(layer, of))
        raise OptionError(
            f"a layer of {spec.m} outputs and {spec.n} inputs with R = {total_rank} needs "
            f"{memory.show(_needs(least, of))} on each of {of.processes} ranks, and {_bound(of)}, or start more ranks",
            layer=name,
        )
    return fitting[0]


def seconds(layer: LayerPlan, of: Settings) -> float:
    """What one rank is expected to take for a layer, by the cost model."""
    spec, c = layer.spec, plan.constants_of(of.device)
    columns = layer.total_rank if of.method.stacked else layer.rank
    kept = min(layer.rank, columns, spec.m, spec.n)
    costs = plan.seconds(plan.Shape(spec.m, spec.n, columns, kept, of.tol, spec.experts, of.certificate), c)
    if layer.folded or of.coordinates is not None:
        return costs["dense"]
    if layer.grouped:
        return costs["filtered"]
    return costs[of.solver] if of.solver != "auto" else min(costs.values())


def _needs(layer: LayerPlan, of: Settings) -> int:
    """Bytes of ``Settings.room``: of a layer that is solved alone, what was read and the solver's scratch; see
    ``together.runs`` for groups on a GPU.
    """
    if layer.grouped and of.device.type != "cpu":
        return max(PARTS * layer.held, 3 * layer.scratch)
    return layer.held + layer.scratch


def _bound(of: Settings) -> str:
    room = memory.show(of.room)
    if of.device.type == "cpu" or of.room == of.limit:
        return f"memory_limit is {room}; raise it"
    return f"{room} of {of.device} are free for it; free more, or compute on the CPU"
