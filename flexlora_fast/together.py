"""Layers of one shape solved together: which ones, from where, and without waiting for each group in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexlora_fast.backends import groups
from flexlora_fast.lowrank.cores import Core, Dense
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.grouped import How, Layers, Stacks, begin_group
from flexlora_fast.precision import full_precision
from flexlora_fast.resident import ResidentLayers
from flexlora_fast.stack import Stack
from flexlora_fast.update import LayerUpdate

if TYPE_CHECKING:
    from flexlora_fast.work import LayerPlan, Piece, Settings, Work

# Groups that a device may have before it while the host makes the next. Of factors that were read, one: they stay in
# memory until their group is done.
_RESIDENT_IN_FLIGHT = 64


def runs(plans: Sequence[LayerPlan], of: Settings) -> Iterator[list[LayerPlan]]:
    """The plans in runs of one group whose factors, and what solving them needs, fit half of the memory at once."""
    run, held, scratch = list["LayerPlan"](), 0, 0
    for plan in plans:
        held, scratch = held + plan.held, scratch + plan.scratch
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


@full_precision()
def begin(work: Work, layers: Sequence[LayerPlan], pieces: Iterator[Piece]) -> Callable[[], list[LayerUpdate]]:
    """Have the device begin with layers of one shape; what is returned waits for it and gives their updates."""
    source, biases = _layers(work, layers, pieces)
    of = work.settings
    how = How(of.tol, of.seed, [layer.spec.name for layer in layers], of.certificate)
    results = begin_group(source, layers[0].rank, how)

    @full_precision()
    def updates() -> list[LayerUpdate]:
        found = zip(layers, results(), source.ranks, biases, strict=True)
        return [LayerUpdate(layer.spec, work.brought(result), R, None, bias) for layer, result, R, bias in found]

    return updates


def _layers(work: Work, layers: Sequence[LayerPlan], pieces: Iterator[Piece]) -> tuple[Layers, Sequence[Tensor | None]]:
    """What is solved, and the averaged biases."""
    if work.all_here:
        source = _resident(work, layers)
        if layers[0].folded:
            return _summed(work, layers, source.group(range(len(layers))).materialize()), [None] * len(layers)
        return source, [None] * len(layers)
    if not layers[0].folded:
        made = [work.stack_of(layer.spec, next(pieces)) for layer in layers]
        return Stacks([stack for stack, _ in made]), [bias for _, bias in made]
    spec, biases = layers[0].spec, list[Tensor | None]()
    D = torch.zeros(sum(layer.spec.experts for layer in layers), spec.m, spec.n, device=work.settings.device)
    for layer, out in zip(layers, D.split([layer.spec.experts for layer in layers]), strict=True):
        biases.append(work.each_stack(layer, pieces, partial(_add, out)))
    return _summed(work, layers, D), biases


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

    def core(self, places: Sequence[int]) -> Core:
        if len(places) == len(self.batches):
            return Dense(self.D)
        parts = self.D.split(list(self.batches))
        return Dense(torch.cat([parts[i] for i in places]))

    def alone(self, place: int, rank: int, how: How) -> Factorization:
        return self.again(place)


def _summed(work: Work, layers: Sequence[LayerPlan], D: Tensor) -> Summed:
    def again(place: int) -> Factorization:
        pieces = (read() for _, read in work.pieces_of(layers[place]))
        return work.summed(layers[place], pieces)[0]

    return Summed(D, [layer.total_rank for layer in layers], [layer.spec.experts for layer in layers], again)


def _resident(work: Work, layers: Sequence[LayerPlan]) -> ResidentLayers:
    """The layers from where their factors lie in the device's memory; none of them has a bias."""
    spec = layers[0].spec
    assert work.resident is not None

    def usual(place: int) -> Stack:
        ((_, read),) = work.pieces_of(layers[place])
        return work.stack_of(layers[place].spec, read())[0]

    return ResidentLayers(
        work.resident,
        spec.m,
        spec.n,
        [layer.spec.name for layer in layers],
        [layer.total_rank for layer in layers],
        [client.name for client in work.clients],
        [client.share for client in work.clients],
        work.settings.missing == "renormalize",
        usual,
    )
