"""The ranks of one job: what they tell each other, and what becomes of all where one fails, dies or hangs.

All of it goes over two process groups of torch.distributed, beside the default one: in one a thread of each rank gives
signs of life while its main thread works; the other carries data. Both are gloo's, which says at once where another
process is gone. What is summed up on GPUs goes over the default group's own backend for them, where it has one.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flexlora_fast.errors import DistributedError, FlexLoRAError, OptionError

T = TypeVar("T")

# Seconds that a rank may be silent. Its main thread may work for hours; the thread that speaks for it needs no more
# than the GIL for a moment.
TIMEOUT = 120.0
_INTERVAL = 0.5  # seconds between signs of life of a rank that works
_BUSY, _DONE, _FAILED, _LOST = range(4)


class Stopped(Exception):
    """Another rank failed or was lost: what this one does has no use any more."""


class Team:
    """The ranks of the default process group. To be made by all of them; to be used in a ``with`` block.

    They trust each other: what is small is pickled.

    Args:
        timeout: seconds that a rank may be silent until it counts as lost.

    Raises:
        DistributedError: there is no process group, or not all ranks come within ``timeout``.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        if not (isinstance(timeout, (int, float)) and 0 < timeout < float("inf")):
            raise OptionError(f"timeout is {timeout!r}; give seconds > 0 that a rank may be silent")
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError(
                "there is no process group; call torch.distributed.init_process_group on all ranks first, or start "
                "the command with `torchrun --nproc-per-node N -m flexlora_fast aggregate …`"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._broken: DistributedError | None = None
        self._pulse: _Pulse | None = None
        # The first rank waits for each of the others, and these for what it has to say of all.
        patience = timedelta(seconds=timeout if self.rank == 0 else 2 * timeout)
        with self._talking("not all ranks have come"):
            self._control = dist.new_group(timeout=patience, backend="gloo")
            self._data = dist.new_group(timeout=timedelta(seconds=timeout), backend="gloo")
            self._here = self.gather(socket.gethostname())

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for group in (self._control, self._data):
            with contextlib.suppress(RuntimeError, ValueError):  # broken, or gone with the default group
                dist.destroy_process_group(group)

    @property
    def neighbours(self) -> int:
        """How many ranks share this machine's memory, this one among them."""
        return self._here.count(self._here[self.rank])

    # -- work ---

    def run(self, job: Callable[[], T]) -> T:
        """Have every rank do its ``job`` and wait for all of them: nobody goes on where one failed.

        Raises on all ranks the same: what the first of those that failed raised, a ``FlexLoRAError`` as it is, others
        as a ``DistributedError`` on the other ranks. ``DistributedError`` also where a rank died or hangs. Long jobs
        call ``look`` now and then.
        """
        if self._broken is not None:
            raise self._broken
        if self.size == 1:
            return job()
        self._pulse = pulse = _Pulse(self.rank, self.size, self._control)
        result, failure = None, None
        try:
            result = job()
        except Stopped:
            pass
        except BaseException as error:
            failure = error
        finally:
            pulse.end(_DONE if failure is None else _FAILED)
            self._pulse = None
        if pulse.lost is not None:
            self._broken = pulse.lost
            raise pulse.lost from failure
        if pulse.failed:
            self._raise_first(failure)
        return result  # type: ignore[return-value]  # a rank that stopped has just raised

    def look(self) -> None:
        """Raise ``Stopped`` where another rank failed or was lost since ``run`` began."""
        if self._pulse is not None and (self._pulse.failed or self._pulse.lost is not None):
            raise Stopped

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that all ranks leave the same way: with the same error, or all without, and then all at once."""
        try:
            yield
        except BaseException as error:
            if not _is_agreed(error):
                self.run(_raising(error))
            raise
        self.run(nothing)

    def _raise_first(self, failure: BaseException | None) -> None:
        told = None if failure is None else _portable(failure, self.rank)
        errors = [error for error in self.gather(told) if error is not None]
        own = failure is not None and self._first(errors)
        error = failure if own else errors[0]
        assert error is not None
        error.__dict__["agreed"] = True
        raise error from (None if own else failure)

    def _first(self, errors: list[Any]) -> bool:
        return bool(errors[0].__dict__.get("rank") == self.rank)

    # -- data: in the main thread, by all ranks in the same order, right after a ``run`` ---

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank. Small ones: they are pickled."""
        values: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value, group=self._data)
        return values

    def first(self, value: T) -> T:
        """The first rank's value."""
        values = [value]
        with self._talking():
            dist.broadcast_object_list(values, src=0, group=self._data)
        return values[0]

    def send(self, value: Any, tensors: list[Tensor]) -> None:
        """Send the first rank a small value, which is pickled, and tensors as they are."""
        with self._talking():
            dist.send_object_list([value], dst=0, group=self._data)
            for tensor in tensors:
                if tensor.numel():
                    dist.send(_bytes(tensor.detach().cpu().contiguous()), dst=0, group=self._data)

    def receive(self, rank: int, empty: Callable[[Any], list[Tensor]]) -> tuple[Any, list[Tensor]]:
        """What a rank sends: the value, and the tensors, into those that ``empty`` makes for it."""
        values: list[Any] = [None]
        with self._talking():
            dist.recv_object_list(values, src=rank, group=self._data)
            tensors = empty(values[0])
            for tensor in tensors:
                if tensor.numel():
                    dist.recv(_bytes(tensor), src=rank, group=self._data)
        return values[0], tensors

    def copied(self, X: Tensor, owner: int) -> Tensor:
        """X of the owner, in place."""
        with self._talking():
            dist.broadcast(X, src=owner, group=self._group_for(X))
        return X

    def summed(self, X: Tensor) -> Tensor:
        """Σ over the ranks, in place; the order of the sum depends on how many there are."""
        with self._talking():
            dist.all_reduce(X, group=self._group_for(X))
        return X

    def summed_at(self, X: Tensor, rank: int) -> Callable[[], Tensor | None]:
        """Begin to sum X up over the ranks, for one of them. What is returned waits for it, and gives that rank the
        sum; until then X is not to be touched.
        """
        group, device = self._group_for(X), X.device
        X = X.cpu() if group is not None else X  # gloo's reduce is none for GPUs
        with self._talking():
            work = dist.reduce(X, dst=rank, group=group, async_op=True)

        def wait() -> Tensor | None:
            with self._talking():
                work.wait()
            return X.to(device) if rank == self.rank else None

        return wait

    def _group_for(self, X: Tensor) -> Any:
        return None if X.is_cuda and "nccl" in str(dist.get_backend_config()) else self._data

    @contextlib.contextmanager
    def _talking(self, what: str = "a rank was lost, or was silent for too long") -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            lost = DistributedError(f"{what} ({_first_line(error)}); look at the other ranks' output, and start again")
            self._broken = self._broken or lost
            raise lost from error


class _Pulse:
    """A thread that speaks for its rank while the main thread works, until no rank is at work any more.

    All ranks tell the first how they are, and it tells all, again and again. ``failed``: whether one of them failed.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self._rank, self._size, self._group = rank, size, group
        self._state = _BUSY
        self._changed = threading.Event()
        self.failed = False
        self.lost: DistributedError | None = None
        self._thread = threading.Thread(target=self._run, name="flexlora_fast-pulse", daemon=True)
        self._thread.start()

    def end(self, state: int) -> None:
        """Say that the main thread is through, and wait for the others'."""
        self._state = state
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while self.lost is None:
            states = self._exchange(torch.tensor([self._state], dtype=torch.uint8)).tolist()
            if _LOST in states:
                self._lose(states.index(_LOST))
            self.failed |= _FAILED in states
            if _BUSY not in states:
                return
            self._changed.wait(_INTERVAL)

    def _exchange(self, mine: Tensor) -> Tensor:
        """The states of all ranks, (size,) uint8."""
        if self._rank:
            states = torch.full((self._size,), _DONE, dtype=torch.uint8)
            try:
                dist.send(mine, dst=0, group=self._group)
                dist.recv(states, src=0, group=self._group)
            except RuntimeError:
                states[0] = _LOST
            return states
        states = torch.cat([mine, torch.zeros(self._size - 1, dtype=torch.uint8)])
        for rank in range(1, self._size):
            try:
                dist.recv(states[rank : rank + 1], src=rank, group=self._group)
            except RuntimeError:  # after a timeout gloo gives up the whole group: the first one lost is to blame
                states[rank] = _LOST
        for rank in range(1, self._size):
            if int(states[rank]) != _LOST:
                with contextlib.suppress(RuntimeError):
                    dist.send(states, dst=rank, group=self._group)
        return states

    def _lose(self, rank: int) -> None:
        what = "it died, or gave no sign of life in time"
        if rank == 0 and self._rank:
            what = "it died, gave no sign of life in time, or has lost another rank and says which"
        self.lost = DistributedError(
            f"rank {rank} of {self._size} was lost: {what}; start the round again on all ranks"
        )


def _portable(error: BaseException, rank: int) -> BaseException:
    """The error as other ranks raise it."""
    told = error
    if not isinstance(error, FlexLoRAError):
        told = DistributedError(f"rank {rank} failed: {type(error).__name__}: {error}")
    told.__dict__["rank"] = rank
    return told


def _is_agreed(error: BaseException) -> bool:
    """Whether all ranks know of it, or of what it was raised for."""
    known = error, error.__cause__
    return any(isinstance(x, DistributedError) or x.__dict__.get("agreed") for x in known if x is not None)


def _raising(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def nothing() -> None:
    """Nothing to do but to wait for the others."""


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
