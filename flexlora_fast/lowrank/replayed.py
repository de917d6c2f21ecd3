"""CUDA graphs of groups whose shapes come again, in the next round or the next layers: one launch instead of 900.

The kernels of a group take the same arguments each time but for where factors lie, the coefficients and the random
start; these are copied to where the recorded kernels read them.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexlora_fast.backends.group import Group
from flexlora_fast.backends.transfer import Turns, own
from flexlora_fast.errors import BackendError

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool  # the name of a graph's memory

    from flexlora_fast.lowrank.filtered import Found

Compute = Callable[[Group, Tensor], "Found"]

# A recorded group keeps the memory that its kernels work in. Groups whose Grams take more than this run for longer than
# the host needs to launch them, and gain nothing.
_MOST_BYTES = 256 * 1024**2
# Recorded at the same time: a model has a few shapes, and a server a few models.
_MOST = 8


@dataclasses.dataclass
class _Recorded:
    group: Group
    start: Tensor
    found: Found
    replay: Callable[[], None]
    pool: Pool
    turns: Turns  # all graphs of a device work in the same memory

    def run(self, group: Group, start: Tensor) -> Found:
        """The results for another group of the same signature. They are copies: the next run overwrites its own."""
        with self.turns:
            for mine, given in zip((self.start, *self.group.inputs()), (start, *group.inputs()), strict=True):
                mine.copy_(given)
            self.replay()
            f = self.found
            return dataclasses.replace(f, U=f.U.clone(), S=f.S.clone(), V=f.V.clone(), report=f.report.clone())


class Replays:
    """Recorded groups by their signature, the least recently used dropped first."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Recorded | None] = OrderedDict()
        self._lock = threading.Lock()
        self.obstacle: str | None = None

    def found(self, group: Group, start: Tensor, compute: Compute, key: Hashable) -> Found:
        """``compute(group, start)``, from the second time on that ``key`` and the group's signature come, recorded.

        The first time kernels are compiled and libraries prepared. Recording that fails warns, once, and is not tried
        again.
        """
        if self.obstacle is not None or 8 * group.layers * group.W**2 > _MOST_BYTES:
            return compute(group, start)
        key = (key, group.signature())
        with self._lock:  # a recorded group has one set of inputs
            if key not in self._known:
                self._keep(key, None)
                return compute(group, start)
            recorded = self._known[key]
            if recorded is None:
                recorded = self._recorded(group, start, compute)
                if recorded is None:
                    return compute(group, start)
            self._keep(key, recorded)
            return recorded.run(group, start)

    def _keep(self, key: Hashable, recorded: _Recorded | None) -> None:
        self._known[key] = recorded
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)

    def _recorded(self, group: Group, start: Tensor, compute: Compute) -> _Recorded | None:
        mine, begin, device = group.copied(), start.clone(), start.device
        beside = next((r for r in self._known.values() if r is not None and r.start.device == device), None)
        try:
            found, replay, pool = record(lambda: compute(mine, begin), device, beside.pool if beside else None)
        except (RuntimeError, BackendError) as error:
            first = error.__context__ or error  # leaving a recording that failed raises as well, and says less
            self.obstacle = f"{type(first).__name__}: {first}"
            self._known.clear()
            warnings.warn(
                "small groups of layers are launched kernel by kernel on this GPU, which takes several times longer "
                f"than they do: recording them as a CUDA graph failed ({self.obstacle})",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return _Recorded(mine, begin, found, replay, pool, beside.turns if beside else Turns(device))


def record(
    run: Callable[[], Found], device: torch.device, beside: Pool | None
) -> tuple[Found, Callable[[], None], Pool]:
    """What ``run`` gives, unfilled until the graph of its kernels is replayed; the replay, and the graph's memory.

    beside: the memory of another graph, to be used by this one as well: they must be replayed one after the other, and
    so must all of a device. torch gives cuBLAS one workspace for all recordings on a stream, in the memory of the first
    of them, and takes it back with any of them (https://github.com/pytorch/pytorch/issues/193402): in a memory of its
    own, a graph would go on writing to what may be another's by then.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # The stream that is current now is put back whatever happens: torch leaves its own where a recording fails.
    with torch.cuda.device(device), torch.cuda.stream(before):
        run()  # in this thread for the first time, perhaps: libraries make handles, which cannot be recorded
        # Other threads go on bringing factors meanwhile: what they call is theirs.
        with torch.cuda.graph(graph, pool=beside, stream=own(device).recording, capture_error_mode="thread_local"):
            found = run()
    return found, graph.replay, graph.pool()


replays = Replays()
