"""Layers of one shape solved together: which ones, from where, and without waiting for each group in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from flexlora_fast import memory
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
    room = memory.free(of.device) if of.device.type != "cpu" else of.limit
    run, held, scratch = list["LayerPlan"](), 0, 0
    for plan in plans:
        held, scratch = held + plan.held, scratch + plan.scratch
        full = 4 * held > of.limit or 2 * (held + scratch) > room
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
    source, biases = _resident(work, layers) if work.all_here else _read(work, layers, pieces)
    of = work.settings
    how = How(of.tol, of.seed, [layer.spec.name for layer in layers], of.certificate)
    results = begin_group(source, layers[0].rank, how)

    @full_precision()
    def updates() -> list[LayerUpdate]:
        found = zip(layers, results(), source.ranks, biases, strict=True)
        return [LayerUpdate(layer.spec, work.brought(result), R, None, bias) for layer, result, R, bias in found]

    return updates


def _read(work: Work, layers: Sequence[LayerPlan], pieces: Iterator[Piece]) -> tuple[Layers, list[Tensor | None]]:
    """Stacks of the pieces of these layers, and their biases."""
    made = [work.stack_of(layer.spec, next(pieces)) for layer in layers]
    return Stacks([stack for stack, _ in made]), [bias for _, bias in made]


def _resident(work: Work, layers: Sequence[LayerPlan]) -> tuple[Layers, list[Tensor | None]]:
    """The layers from where their factors lie in the device's memory; none of them has a bias."""
    spec = layers[0].spec
    assert work.resident is not None

    def usual(place: int) -> Stack:
        ((_, read),) = work.pieces_of(layers[place])
        return work.stack_of(layers[place].spec, read())[0]

    source = ResidentLayers(
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
    return source, [None] * len(layers)
