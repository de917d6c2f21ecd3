"""The device table: where each column of P and each row of Q of all layers of one shape lies in memory.

Clients' factors stay where they are. For layer λ the columns are ``offsets[λ] … offsets[λ+1]``, in the order of its
clients; entry (i, c) of P lies at ``P.address[c] + i·P.stride[c]`` (counted in elements) and entry (c, j) of Q at
``Q.address[c] + j``; d[c] is the coefficient. Layers may have different clients, different ranks, or none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flexlora_fast.kernels._triton import ELEMENTS, tl
from flexlora_fast.stack import Stack

# A load of one thread is at most this wide.
WIDEST_LOAD = 16


@dataclass(frozen=True)
class Side:
    """One side of a table: P, or Q read as the columns of Qᵀ.

    Attributes:
        name: "P" or "Q".
        length: m or n.
        dtype: of all factors of this side.
        address: (C,) int64, in bytes: the first entry of each column.
        stride: (C,) int64, in elements: from one entry of a column to the next; all 1 for Q.
        run: columns come in runs of this many neighbours in memory, and strides are multiples of it; 1 for Q.
        bytes: what the address of every run is a multiple of.
        wide: whether an offset inside a factor needs 64 bits.
    """

    name: Literal["P", "Q"]
    length: int
    dtype: torch.dtype
    address: Tensor
    stride: Tensor
    run: int
    bytes: int
    wide: bool

    @property
    def aligned(self) -> bool:
        """Whether this side is read in the widest loads everywhere."""
        width = self.bytes if self.name == "Q" else self.run * self.dtype.itemsize
        return width == WIDEST_LOAD and self.length % 16 == 0

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel constants that describe how this side is read (see ``tiles.py``)."""
        return {
            "ELEMENT": ELEMENTS[self.dtype],
            "INDEX": tl.int64 if self.wide else tl.int32,
            "UNIT": self.name == "Q",
            "RUN": self.run,
            "BYTES": self.bytes,
        }


class Table:
    """The columns of L layers of one shape (m, n), for kernels to read from where they are.

    Args:
        stacks: stacks of one m and n. A stack of b matrices (experts) gives b layers. Factors are float16, bfloat16 or
            float32, on one device. Where one side mixes types, it is copied to float32; an A whose rows are not
            contiguous is copied once. Everything else is read in place, and kept alive by the table.
        device: where results go if no stack has any block; otherwise the device of the factors.

    Attributes:
        layers, m, n: L and the common shape.
        ranks: R of each layer.
        W: the largest of them.
        offsets: (L+1,) int64 on the device.
        d: (C,) float32 on the device, C = Σ R.
        P, Q: the two sides.

    Raises:
        ValueError: no stacks, different shapes, a dtype that no factor has, or factors on several devices.
    """

    def __init__(self, stacks: Sequence[Stack], device: torch.device | str | None = None) -> None:
        if not stacks:
            raise ValueError("a table needs at least one stack: got none")
        self.m, self.n = stacks[0].m, stacks[0].n
        for i, stack in enumerate(stacks):
            if (stack.m, stack.n) != (self.m, self.n):
                raise ValueError(
                    f"stack {i} has (m, n) = {(stack.m, stack.n)}, stack 0 {(self.m, self.n)}: "
                    "a table holds layers of one shape; make one for each shape"
                )
        self.device = _device_of(stacks, device)
        B, A = _one_dtype(stacks, "B"), _one_dtype(stacks, "A")
        A = [[a if a.stride(2) == 1 or self.n == 1 else a.contiguous() for a in row] for row in A]
        ranks = [stack.R for stack in stacks for _ in range(stack.batch)]
        d = torch.cat([torch.zeros(0), *(stack.d.float().cpu() for stack in stacks for _ in range(stack.batch))])
        self._fill(ranks, Places.of(stacks, B, column=2), Places.of(stacks, A, column=1), d.numpy(), (B, A))

    @classmethod
    def at(
        cls,
        shape: tuple[int, int],
        ranks: Sequence[int],
        places: tuple[Places, Places],
        d: np.ndarray,
        device: torch.device,
        kept: object,
    ) -> Table:
        """The table of factors whose places are known: of P and of Q, in the order of the layers and their clients.

        Args:
            shape: (m, n). ranks: R of each layer. d: (Σ R,) float32. kept: what keeps the factors alive.
            device: of the factors. The rows of Q's must be contiguous.
        """
        table = cls.__new__(cls)
        table.m, table.n, table.device = *shape, device
        table._fill(ranks, *places, d, kept)
        return table

    def _fill(self, ranks: Sequence[int], P: Places, Q: Places, d: np.ndarray, kept: object) -> None:
        self._kept = kept
        self.ranks = tuple(ranks)
        self.W = max(self.ranks, default=0)
        p, q = _Columns.of(P), _Columns.of(Q)
        arrays = [np.cumsum([0, *self.ranks]), p.address, p.stride, q.address, q.stride, _as_int64(d)]
        self.offsets, *sides, d_bits = _copied(arrays, self.device)
        self.d = d_bits.view(torch.float32)[: d.size]
        self.P = p.side("P", self.m, sides[0], sides[1])
        self.Q = q.side("Q", self.n, sides[2], sides[3])

    @property
    def layers(self) -> int:
        return len(self.ranks)

    def side(self, name: Literal["P", "Q"]) -> Side:
        """P or Q by name."""
        return self.P if name == "P" else self.Q

    def signature(self) -> Hashable:
        """Equal for tables that differ in ``inputs`` alone: kernels are launched with the same other arguments."""
        sides = [(x.dtype, x.run, x.bytes, x.wide) for x in (self.P, self.Q)]
        return self.m, self.n, self.ranks, self.device, *sides

    def inputs(self) -> list[Tensor]:
        """The tensors that kernels read."""
        return [self.offsets, self.d, self.P.address, self.P.stride, self.Q.address, self.Q.stride]

    def copied(self) -> Table:
        """The same with copies of ``inputs``, for others to be put there; it keeps no factors alive."""
        table = object.__new__(Table)
        table.__dict__.update(self.__dict__, _kept=None)
        table.offsets, table.d, p, p_stride, q, q_stride = (X.clone() for X in self.inputs())
        table.P = dataclasses.replace(self.P, address=p, stride=p_stride)
        table.Q = dataclasses.replace(self.Q, address=q, stride=q_stride)
        return table

    def groups(self, size: int) -> Iterator[tuple[slice, Table]]:
        """This table in groups of ``size`` layers; columns and W stay those of the whole."""
        for low in range(0, self.layers, size):
            part = object.__new__(Table)
            part.__dict__.update(self.__dict__)
            part.ranks = self.ranks[low : low + size]
            part.offsets = self.offsets[low : low + len(part.ranks) + 1]
            yield slice(low, low + len(part.ranks)), part


@dataclass(frozen=True)
class Places:
    """Where the factors of one side lie.

    Attributes:
        dtype: of all of them.
        rows: (F, 4) int64, for each factor: the address of its first entry in bytes; the steps, in elements, from one
            column to the next and from one entry of a column to the next; how many columns it has.
    """

    dtype: torch.dtype
    rows: np.ndarray

    @classmethod
    def of(cls, stacks: Sequence[Stack], factors: Sequence[Sequence[Tensor]], column: int) -> Places:
        """Of (b, ·, ·) factors whose dimension ``column`` counts columns."""
        rows = [
            place(x, e, column)
            for stack, clients in zip(stacks, factors, strict=True)
            for e in range(stack.batch)
            for x in clients
        ]
        dtype = next((x.dtype for clients in factors for x in clients), torch.float32)
        return cls(dtype, np.array(rows, dtype=np.int64).reshape(-1, 4))


def place(X: Tensor, expert: int, column: int) -> tuple[int, int, int, int]:
    """A row of ``Places`` for one matrix of the factor X (b, ·, ·) whose dimension ``column`` counts columns."""
    first = X.data_ptr() + expert * X.stride(0) * X.element_size()
    return first, X.stride(column), X.stride(3 - column), X.shape[column]


@dataclass(frozen=True)
class _Columns:
    """The columns of one side of all layers in order, on the host."""

    dtype: torch.dtype
    address: np.ndarray  # (C,) int64
    stride: np.ndarray  # (C,) int64
    run: int

    @classmethod
    def of(cls, places: Places) -> _Columns:
        dtype = places.dtype
        first, step, stride, r = places.rows.T
        within = np.arange(r.sum()) - np.repeat(np.cumsum(r) - r, r)
        widest = WIDEST_LOAD // dtype.itemsize
        # Neighbours only where the next column is the next element.
        runs = np.where(step == 1, widest, 1)
        return cls(
            dtype=dtype,
            address=np.repeat(first, r) + within * np.repeat(step, r) * dtype.itemsize,
            stride=np.repeat(stride, r),
            run=int(np.gcd.reduce(np.concatenate([first // dtype.itemsize, stride, r, runs, [widest]]))),
        )

    def side(self, name: Literal["P", "Q"], length: int, address: Tensor, stride: Tensor) -> Side:
        """The Side of these columns, once they are on the device."""
        run = self.run if name == "P" else 1
        # Of P, every run starts on a multiple of its own size; of Q, every row where it happens to.
        multiple = run * self.dtype.itemsize
        if name == "Q":
            multiple = int(np.gcd.reduce(np.append(self.address, WIDEST_LOAD)))
        reach = int(self.stride.max(initial=0)) * length
        return Side(name, length, self.dtype, address, stride, run, multiple, wide=reach >= 2**31)


def _device_of(stacks: Sequence[Stack], device: torch.device | str | None) -> torch.device:
    """The one device of all factors; ``device``, or the CPU, where there are none."""
    found = {X.device for stack in stacks for block in stack.blocks for X in (block.B, block.A)}
    wanted = None if device is None else torch.empty(0, device=device).device
    if len(found | ({wanted} - {None})) > 1:
        names = ", ".join(sorted(str(d) for d in found))
        asked = "" if wanted is None else f", and the table is to be on {wanted}"
        raise ValueError(f"the factors of a table are on {names}{asked}: move them to one device")
    return next(iter(found), wanted or torch.device("cpu"))


def _one_dtype(stacks: Sequence[Stack], factor: Literal["B", "A"]) -> list[list[Tensor]]:
    """All B or all A as they are, or copied to float32 where their types differ."""
    for i, stack in enumerate(stacks):
        for j, block in enumerate(stack.blocks):
            if (dtype := getattr(block, factor).dtype) not in ELEMENTS:
                raise ValueError(
                    f"{factor} of block {j} of stack {i} is {dtype}: expected float16, bfloat16 or float32; "
                    "cast it before the table is made"
                )
    factors = [[getattr(block, factor).detach() for block in stack.blocks] for stack in stacks]
    if len({x.dtype for clients in factors for x in clients}) <= 1:
        return factors
    return [[x.float() for x in clients] for clients in factors]


def _as_int64(d: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers, two in each int64."""
    return np.pad(d, (0, d.size % 2)).view(np.int64)


def _copied(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays on the device, by one copy from one pinned buffer; each starts on a multiple of 16 bytes."""
    starts = np.cumsum([0, *(a.size + a.size % 2 for a in arrays)])
    buffer = torch.empty(int(starts[-1]), dtype=torch.int64, pin_memory=device.type == "cuda")
    for array, start in zip(arrays, starts, strict=False):
        buffer.numpy()[start : start + array.size] = array
    # Torch's allocator of pinned memory keeps the buffer until the copy is done.
    moved = buffer.to(device, non_blocking=True)
    return [moved[start : start + array.size] for array, start in zip(arrays, starts, strict=False)]
