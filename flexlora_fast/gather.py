"""Bytes of many files and of memory, copied into one buffer by several threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexlora_fast import _native

MEMORY = -1  # the descriptor of what lies in memory
_LAST_DESCRIPTOR = 2**31 - 1


@dataclass(frozen=True)
class Ranges:
    """Where the bytes of N tensors are, as int64 arrays (N,).

    ``descriptor``: of an open file, or -1 for memory. ``start``: an offset in the file, or an address. ``nbytes``: how
    many there are.
    """

    descriptor: np.ndarray
    start: np.ndarray
    nbytes: np.ndarray

    def __post_init__(self) -> None:
        for name, array in vars(self).items():
            if array.dtype != np.int64 or array.shape != (len(self.descriptor),):
                raise ValueError(
                    f"{name} is {array.dtype} of shape {array.shape}: expected int64 ({len(self.descriptor)},)"
                )

    def __len__(self) -> int:
        return len(self.descriptor)


class ReadError(OSError):
    """A range that could not be read: ``index`` among the ranges; ``errno`` is 0 where its file ends too early."""

    def __init__(self, index: int, error: int) -> None:
        super().__init__(error, os.strerror(error) if error else "the file ends too early")
        self.index = index


def gather(ranges: Ranges, target: np.ndarray, out: Tensor, threads: int) -> None:
    """Copy every range to byte ``target`` (N,) int64 of ``out``, contiguous uint8 on the CPU.

    Ranges that lie side by side, in their file and in ``out``, are read in one go if they come in this order. Targets
    must not overlap. Memory that is read must stay for the time of the call.

    Args:
        threads: how many may read, the caller's among them. The GIL is released.

    Raises:
        ValueError: a range that is none or does not fit ``out``; nothing was read then.
        ReadError: the first range that could not be read. ``out`` holds anything then.
    """
    native = _native.extension
    if native is None:
        return twin(ranges, target, out)
    failure = native.gather(ranges.descriptor, ranges.start, ranges.nbytes, target, out, threads)
    if failure is not None:
        raise ReadError(*failure)


def twin(ranges: Ranges, target: np.ndarray, out: Tensor) -> None:
    """``gather`` range by range in Python, for where there is no extension and to test it."""
    _check(ranges, target, out)
    buffer = memoryview(out.numpy())  # type: ignore[arg-type]
    columns = (ranges.descriptor, ranges.start, ranges.nbytes, target)
    for i, (descriptor, start, nbytes, to) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        if descriptor == MEMORY and nbytes:
            out.numpy()[to : to + nbytes] = np.asarray(_Memory(start, nbytes))
            continue
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(descriptor, [buffer[to + done : to + nbytes]], start + done)
            except OSError as error:
                raise ReadError(i, error.errno or 0) from None
            if got == 0:
                raise ReadError(i, 0)
            done += got


def _check(ranges: Ranges, target: np.ndarray, out: Tensor) -> None:
    if target.shape != ranges.start.shape:
        raise ValueError(f"target has shape {target.shape}: expected ({len(ranges)},)")
    if out.device.type != "cpu" or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} on {out.device}: expected contiguous bytes on the CPU")
    start, nbytes, size = ranges.start, ranges.nbytes, out.numel()
    first = np.where(ranges.descriptor == MEMORY, 1, 0)
    wrong = (ranges.descriptor < MEMORY) | (ranges.descriptor > _LAST_DESCRIPTOR) | (nbytes < 0)
    wrong |= (nbytes > 0) & ((start < first) | (start > np.iinfo(np.int64).max - nbytes.clip(0)))
    wrong |= (target < 0) | (target > size) | (nbytes > size - target)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"range {i} of {nbytes[i]} bytes, from {start[i]} of descriptor {ranges.descriptor[i]}, would go to byte "
            f"{target[i]} of a buffer of {size}"
        )


class _Memory:
    """Bytes at an address, as numpy takes them."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, True), "shape": (nbytes,), "typestr": "|u1", "version": 3}
