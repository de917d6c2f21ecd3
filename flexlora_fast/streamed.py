"""A round whose factors are in files or in host memory, and come to the device that solves it while it does.

A thread brings what comes next (``staging``); the device multiplies what is there. Layers that are solved on their
Grams come a group at a time, and stay until its results have been looked at. Those that are solved on ΔW come in pieces
of some clients, which are added to it and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from flexlora_fast.staging import SLOTS, Arrival, Staging
from flexlora_fast.stored import Reading, Wanted

if TYPE_CHECKING:
    from flexlora_fast.work import Work

# Of pinned memory, for all slots: as much as one GPU's link moves in 10 ms.
_HOST_BYTES = 512 * 1024**2


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
        largest = max((sum(layer.held for layer in group) for group in work.groups if group[0].grouped), default=0)
        self._reading = reading
        self._staging = Staging(
            work.settings.device,
            host_bytes=max(SLOTS * 4096, min(_HOST_BYTES, work.settings.limit // 8, 4 * largest)),
            device_bytes=max(4096, min(memory.staged(work.settings.room), 4 * largest)),
        )

    def __enter__(self) -> Stream:
        self._reading.__enter__()
        try:
            self._staging.__enter__()
        except BaseException as error:
            self._reading.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.stop()
            if error is None:
                self._reading.check()
        finally:
            self._reading.__exit__(kind, error, at)

    def stop(self) -> None:
        """Bring nothing more; who waits for room to bring something gets an error."""
        self._staging.__exit__(None, None, None)

    def jobs(self, layers: Sequence[LayerPlan]) -> Iterator[tuple[int, Callable[[], Brought]]]:
        """What is to be brought for layers that are solved together; the bytes are the staging's to bound, not ours."""
        if not layers[0].folded:
            yield 0, partial(self._bring, layers, self._reading.of([layer.spec.name for layer in layers]), True)
            return
        for layer in layers:
            pieces = self._reading.of([layer.spec.name]).pieces(planning.STREAMED_COLUMNS)
            for i, piece in enumerate(pieces):
                yield 0, partial(self._bring, layers, piece, i == len(pieces) - 1)

    def _bring(self, layers: Sequence[LayerPlan], wanted: Wanted, last: bool) -> Brought:
        return Brought((layers[0].spec.m, layers[0].spec.n), wanted, wanted.bring(self._staging), last)


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
