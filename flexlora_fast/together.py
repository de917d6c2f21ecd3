"""Layers of one shape solved together: which ones, from where, and without waiting for each group in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora_fast import memory
from flexlora_fast.backends import groups
from flexlora_fast.backends.group import Group
from flexlora_fast.backends.transfer import so_far
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.grouped import How, Layers, Stacks, alone, begin_group
from flexlora_fast.planning import PARTS, LayerPlan, Settings
from flexlora_fast.precision import full_precision
from flexlora_fast.stack import Stack
from flexlora_fast.streamed import Brought, summed

if TYPE_CHECKING:
    from flexlora_fast.work import Work

# Groups that a device may have before it while the host makes the next. Of factors that were read, one: they stay in
# memory until their group is done.
_RESIDENT_IN_FLIGHT = 64


def runs(plans: Sequence[LayerPlan], of: Settings) -> Iterator[list[LayerPlan]]:
    """The plans in runs of one group whose factors, and what solving them needs, fit the memory."""
    on_device = of.device.type != "cpu"
    run, held, scratch = list[LayerPlan](), 0, 0
    for plan in plans:
        held, scratch = held + plan.held, scratch + plan.scratch
        if on_device:
            full = PARTS * PARTS * held > of.room or 3 * scratch > of.room
        else:
            full = 4 * held > of.limit or 2 * (held + scratch) > of.room
        if run and (not plan.grouped or plan.group != run[0].group or full):
            yield run
            run, held, scratch = [], plan.held, plan.scratch
        run.append(plan)
    if run:
        yield run


def in_flight(work: Work) -> int:
    """How many groups may be begun before the first of them is asked for."""
    if work.settings.device.type == "cpu":
        return 0  # nothing runs on while the host does something else
    return _RESIDENT_IN_FLIGHT if work.all_here else 1


def fits(work: Work, begun: Sequence[Sequence[LayerPlan]], group: Sequence[LayerPlan]) -> bool:
    """Whether a group may be begun while those begun before it have not been asked for, by what they hold.

    Of the device's memory, what is not for staging: a third for what they keep until then, as for what the next needs.
    Of the staging, all that they brought, unless they are folded. Memory there comes free in the order in which it was
    taken: where the next one cannot have all of its own beside that, it would wait for a release that never comes.
    """
    if not begun:
        return True
    if 3 * sum(_kept(layers) for layers in begun) > work.settings.room:
        return False
    if not work.streamed or all(layers[0].folded for layers in begun):
        return True
    largest = max(sum(layer.held for layer in layers) for layers in (*begun, group))
    return not group[0].folded and 3 * largest <= memory.staged(work.settings.room)


def _kept(layers: Sequence[LayerPlan]) -> int:
    """Bytes of the device that a group holds once it was begun: its results; where it is folded, ΔW as well."""
    if layers[0].folded:
        return sum(layer.scratch for layer in layers)
    return sum(4 * layer.spec.experts * (layer.spec.m + layer.spec.n) * layer.rank for layer in layers)


@full_precision()
def begin(work: Work, layers: Sequence[LayerPlan], pieces: Iterator[Any]) -> Callable[[], list[LayerUpdate]]:
    """Have the device begin with layers of one shape; what is returned waits for it and gives their updates."""
    source, biases, done = _layers(work, layers, pieces)
    of = work.settings
    how = How(of.tol, of.seed, [layer.spec.name for layer in layers], of.certificate)
    results = begin_group(source, layers[0].rank, how)
    apart = so_far(of.device)

    @full_precision()
    def updates() -> list[LayerUpdate]:
        with apart():
            found = zip(layers, results(), source.ranks, biases, strict=True)
            solved = [LayerUpdate(layer.spec, work.brought(result), R, None, bias) for layer, result, R, bias in found]
            done()
        return solved

    return updates


def _layers(
    work: Work, layers: Sequence[LayerPlan], pieces: Iterator[Any]
) -> tuple[Layers, Sequence[Tensor | None], Callable[[], None]]:
    """What is solved, the averaged biases, and what is to be called when the results are there."""
    none, device = [None] * len(layers), work.settings.device
    if work.all_here:
        source = _tabled(work, layers, partial(_resident, work, layers))
        if layers[0].folded:
            return _summed(work, layers, source.group(None).materialize()), none, _nothing
        return source, none, _nothing
    if work.streamed:
        if layers[0].folded:
            return _summed(work, layers, summed(layers, pieces, device)), none, _nothing
        piece: Brought = next(pieces)
        return _tabled(work, layers, piece.group), none, piece.arrival.release
    if not layers[0].folded:
        made = [work.stack_of(layer.spec, next(pieces)) for layer in layers]
        return Stacks([stack for stack, _ in made]), [bias for _, bias in made], _nothing
    spec, biases = layers[0].spec, list[Tensor | None]()
    D = torch.zeros(sum(layer.spec.experts for layer in layers), spec.m, spec.n, device=device)
    for layer, out in zip(layers, D.split([layer.spec.experts for layer in layers]), strict=True):
        biases.append(work.each_stack(layer, pieces, partial(_add, out)))
    return _summed(work, layers, D), biases, _nothing


def _nothing() -> None:
    """Nothing is left to be done."""


def _add(out: Tensor, stack: Stack) -> None:
    """Add ΔW of a stack (b, m, n)."""
    groups.of([stack]).materialize(out)


@dataclass(frozen=True)
class Summed:
    """``lowrank.grouped.Layers`` that are summed up already: D (Σ experts, m, n) float32.

    ``again``: solves one from its pieces, looking at each of them.
    """

    D: Tensor
    ranks: Sequence[int]
    batches: Sequence[int]
    again: Callable[[int], Factorization]

    @property
    def m(self) -> int:
        return self.D.shape[1]

    @property
    def n(self) -> int:
        return self.D.shape[2]

    def operand(self, places: Sequence[int]) -> Tensor:
        if len(places) == len(self.batches):
            return self.D
        parts = self.D.split(list(self.batches))
        return torch.cat([parts[i] for i in places])

    def alone(self, place: int, rank: int, how: How) -> Factorization:
        return self.again(place)


def _summed(work: Work, layers: Sequence[LayerPlan], D: Tensor) -> Summed:
    def again(place: int) -> Factorization:
        pieces = (read() for _, read in work.pieces_of(layers[place]))
        return work.summed(layers[place], pieces)[0]

    return Summed(D, [layer.total_rank for layer in layers], [layer.spec.experts for layer in layers], again)


@dataclass(frozen=True)
class Tabled:
    """``lowrank.grouped.Layers`` of one shape whose factors lie on the device.

    ``group``: of some of them, by their places, or of all (None). ``usual``: the stack of one that needs a closer look.
    """

    m: int
    n: int
    ranks: Sequence[int]
    group: Callable[[Sequence[int] | None], Group]
    usual: Callable[[int], Stack]

    @property
    def batches(self) -> list[int]:
        return [1] * len(self.ranks)

    def operand(self, places: Sequence[int]) -> Group:
        return self.group(None if len(places) == len(self.ranks) else places)

    def alone(self, place: int, rank: int, how: How) -> Factorization:
        return alone(self.usual(place), place, rank, how)


def _tabled(work: Work, layers: Sequence[LayerPlan], group: Callable[[Sequence[int] | None], Group]) -> Tabled:
    spec = layers[0].spec

    def usual(place: int) -> Stack:
        ((_, read),) = work.pieces_of(layers[place])
        return work.stack_of(layers[place].spec, read())[0]

    return Tabled(spec.m, spec.n, [layer.total_rank for layer in layers], group, usual)


def _resident(work: Work, layers: Sequence[LayerPlan], places: Sequence[int] | None) -> Group:
    """The group from where the factors lay when their clients came."""
    assert work.resident is not None
    chosen = layers if places is None else [layers[i] for i in places]
    return work.resident.group(
        (layers[0].spec.m, layers[0].spec.n),
        [layer.spec.name for layer in chosen],
        [client.name for client in work.clients],
        work.shares,
        work.settings.missing == "renormalize",
    )
