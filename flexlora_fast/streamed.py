"""A round whose factors are in files or in host memory, and come to the device that solves it while it does.

A thread brings what comes next (``staging``); the device multiplies what is there. Layers that are solved on their
Grams come a group at a time, and stay until its results have been looked at. Those that are solved on ΔW come in pieces
of some clients, which are added to it and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexlora_fast import memory, planning
from flexlora_fast.backends.group import Group
from flexlora_fast.backends.transfer import moved
from flexlora_fast.planning import LayerPlan
from flexlora_fast.readahead import ReadAhead
from flexlora_fast.staging import SLOTS, Arrival, Staging
from flexlora_fast.stored import Reading, Wanted

if TYPE_CHECKING:
    from flexlora_fast.work import Work

# Of pinned memory, for all slots: as much as one GPU's link moves in 10 ms.
_HOST_BYTES = 512 * 1024**2
# Choices of what to read that are made ahead.
_AHEAD = 16


@dataclass(frozen=True)
class Brought:
    """Some clients' factors in some layers of ``shape`` (m, n). ``last``: no more of these layers are to come."""

    shape: tuple[int, int]
    wanted: Wanted
    arrival: Arrival
    last: bool

    def group(self, places: Sequence[int] | None = None) -> Group:
        """The group of all its layers or of those at ``places``, to be read before ``arrival`` is released."""
        from flexlora_fast.backends.triton import Tabled

        self.arrival.wait()
        table, d = self.wanted.table(self.shape, self.arrival, places)
        return Tabled(table, moved(torch.from_numpy(d), table.device))


class Stream:
    """The factors of one round on their way, for use in a ``with`` block."""

    def __init__(self, work: Work, reading: Reading) -> None:
        groups = [group for group in work.groups if group[0].grouped]
        largest = max((sum(layer.held for layer in group) for group in groups), default=0)
        self._reading = reading
        self._staging = Staging(
            work.settings.device,
            host_bytes=max(SLOTS * 4096, min(_HOST_BYTES, work.settings.limit // 8, 4 * largest)),
            device_bytes=max(4096, min(memory.staged(work.settings.room), 4 * largest)),
        )
        # Choosing what to read takes long enough for copies to run dry in between: a thread of its own does it.
        self._chosen = ReadAhead(
            ((1, partial(self._choose, part)) for group in groups for part in _parts(group)), _AHEAD
        )
        self._stack = ExitStack()

    def __enter__(self) -> Stream:
        with ExitStack() as stack:
            stack.enter_context(self._reading)
            stack.enter_context(self._staging)
            stack.enter_context(self._chosen)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._stack:
            self.close()
            if error is None:
                self._reading.check()

    def close(self) -> None:
        """Bring nothing more; who waits for room to bring something gets an error."""
        self._staging.close()

    def jobs(self, layers: Sequence[LayerPlan]) -> Iterator[tuple[int, Callable[[], Brought]]]:
        """What is to be brought for layers that are solved together, group by group in the order of the round; the
        bytes are the staging's to bound.
        """
        shape = (layers[0].spec.m, layers[0].spec.n)
        for _ in _parts(layers):
            pieces = next(self._chosen)
            for i, piece in enumerate(pieces):
                yield 0, partial(self._bring, shape, piece, i == len(pieces) - 1)

    def _choose(self, part: Sequence[LayerPlan]) -> list[Wanted]:
        wanted = self._reading.of([layer.spec.name for layer in part])
        return wanted.pieces(planning.STREAMED_COLUMNS) if part[0].folded else [wanted]

    def _bring(self, shape: tuple[int, int], wanted: Wanted, last: bool) -> Brought:
        return Brought(shape, wanted, wanted.bring(self._staging), last)


def _parts(group: Sequence[LayerPlan]) -> list[Sequence[LayerPlan]]:
    """What is brought at once: all layers of a group, or one after another."""
    return [[layer] for layer in group] if group[0].folded else [group]


def summed(layers: Sequence[LayerPlan], pieces: Iterator[Brought], device: torch.device) -> Tensor:
    """ΔW (L, m, n) float32 of layers of one shape, from all their pieces."""
    D = torch.zeros(len(layers), layers[0].spec.m, layers[0].spec.n, device=device)
    for i in range(len(layers)):
        last = False
        while not last:
            piece = next(pieces)
            piece.group().materialize(D[i : i + 1])
            piece.arrival.release()
            last = piece.last
    return D
