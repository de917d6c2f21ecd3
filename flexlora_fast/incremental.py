"""Grams that grow as clients arrive, so that little is left to do when the last one is there.

Weights come in after the Grams (they scale rows and columns), so what is computed for a client stays right whoever
comes later; and an entry of a Gram is summed in an order of its own, so the result is the same bit for bit as from all
clients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.backends import cpu
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.stack import Block

# Columns that wait until they are multiplied together: with fewer, each client would read all factors before it again.
_PENDING = 128
# Rows that are added to a Gram that is full: a quarter of what it has.
_GROWTH = 4


@dataclass
class _Layer:
    """Factors of one layer in the order of arrival, and the Grams of those before ``done`` columns."""

    spec: LayerSpec
    dtype: torch.dtype
    blocks: list[Block] = field(default_factory=list)
    columns: dict[str, range] = field(default_factory=dict)
    versions: dict[str, tuple[int, int]] = field(default_factory=dict)
    total: int = 0
    live: int = 0  # columns of clients that did not go
    done: int = 0
    done_blocks: int = 0
    left: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    right: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def take(self, client: str, B: Tensor, A: Tensor) -> None:
        rank = A.shape[1]
        self.blocks.append(Block(B, A, torch.ones(rank, dtype=torch.float64)))
        self.columns[client] = range(self.total, self.total + rank)
        self.versions[client] = (B._version, A._version)
        self.total += rank
        self.live += rank

    def advance(self) -> None:
        """Compute what the columns since ``done`` add to the Grams."""
        if self.done == self.total:
            return
        if self.total > self.left.shape[0]:
            size = self.total + self.total // _GROWTH
            self.left, self.right = _grown(self.left, self.done, size), _grown(self.right, self.done, size)
        for G, new in zip(
            (self.left, self.right), cpu.cross_gram(self.blocks, self.blocks[self.done_blocks :]), strict=True
        ):
            G[: self.total, self.done : self.total] = new[0]
            G[self.done : self.total, : self.done] = new[0, : self.done].mT
        self.done, self.done_blocks = self.total, len(self.blocks)

    def forget(self, client: str) -> None:
        """Answer for this client no more. Its columns stay, unused, until they are the larger part."""
        columns = self.columns.pop(client, None)
        if columns is None:
            return
        del self.versions[client]
        self.live -= len(columns)
        if self.total > 2 * self.live:
            self._compact()

    def _compact(self) -> None:
        """Let go of the factors, rows and columns of the clients that went: one may come and go for ever."""
        live = {columns.start for columns in self.columns.values()}
        starts = accumulate((block.A.shape[1] for block in self.blocks), initial=0)
        there = [start in live for start in starts][:-1]
        self.done_blocks = sum(there[: self.done_blocks])
        self.blocks = [block for block, stays in zip(self.blocks, there, strict=True) if stays]
        index = [x for columns in self.columns.values() for x in columns if x < self.done]
        self.left, self.right = (G[index][:, index] for G in (self.left, self.right))
        self.done, self.total = len(index), 0
        for client, columns in self.columns.items():
            self.columns[client] = range(self.total, self.total + len(columns))
            self.total += len(columns)

    def has(self, client: str, B: Tensor, A: Tensor) -> bool:
        """Whether a client's factors are here, and nobody wrote to them since."""
        return self.versions.get(client) == (B._version, A._version)

    @property
    def nbytes(self) -> int:
        return 2 * self.left.numel() * self.left.element_size()


class KeptGrams:
    """Grams that a round computed before it is solved, within ``limit`` bytes, behind those of a ``table``.

    A layer's are handed over once: after that they are the solver's.
    """

    def __init__(self, table: GramTable | None, limit: int) -> None:
        self._table, self._limit, self.nbytes = table, limit, 0
        self._layers: dict[str, tuple[dict[str, range], Tensor, Tensor]] = {}

    def keep(self, name: str, clients: Sequence[str], ranks: Sequence[int], left: Tensor, right: Tensor) -> None:
        """Keep PᵀP and QQᵀ (1, R, R) of these clients' factors, if there is room."""
        nbytes = left.nbytes + right.nbytes
        if self.nbytes + nbytes > self._limit:
            return
        stops = list(accumulate(ranks))
        columns = [range(stop - rank, stop) for stop, rank in zip(stops, ranks, strict=True)]
        self._layers[name] = (dict(zip(clients, columns, strict=True)), left, right)
        self.nbytes += nbytes

    def drop(self) -> None:
        """Let go of what was kept."""
        self._layers, self.nbytes = {}, 0

    def known(self, name: str, factors: Sequence[tuple[str, Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """The table's alone."""
        return None if self._table is None else self._table.of(name, factors)

    def of(self, name: str, factors: Sequence[tuple[str, Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """As ``GramTable.of``: for some of the clients, in this order."""
        found = self.known(name, factors)
        if found is not None or name not in self._layers:
            return found
        columns, left, right = self._layers.pop(name)
        self.nbytes -= left.nbytes + right.nbytes
        if list(columns) == [client for client, _, _ in factors]:
            return left, right
        index = torch.tensor([column for client, _, _ in factors for column in columns[client]])
        left, right = (G.index_select(1, index).index_select(2, index) for G in (left, right))
        return left, right


def _grown(G: Tensor, used: int, size: int) -> Tensor:
    larger = G.new_empty(size, size)
    larger[:used, :used] = G[:used, :used]
    return larger


class GramTable:
    """The Grams of every layer worth it, within ``limit`` bytes; beyond it, it lets go of all of them.

    ``wanted(spec, columns, sixteen)`` says whether a layer with that many columns will be solved from its Grams.
    """

    def __init__(self, limit: int, wanted: Callable[[LayerSpec, int, bool], bool]) -> None:
        self._limit, self._wanted = limit, wanted
        self._layers: dict[str, _Layer] | None = {}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers.values()) if self._layers else 0

    def drop(self) -> None:
        """Let go of everything; what comes later is not taken either."""
        self._layers = None

    def take(self, client: str, adapter: Adapter) -> None:
        """Take a client whose tensors are in memory and checked, and compute what is due."""
        if self._layers is None:
            return
        for name in adapter.layers:
            A, B = adapter.factors(name)
            if name not in self._layers:
                self._layers[name] = _Layer(adapter.spec(name), A.dtype)
            layer = self._layers[name]
            if A.dtype != layer.dtype or B.dtype != layer.dtype or layer.spec.experts != 1:
                return self.drop()  # products of mixed types are not the same in another order
            if A.is_inference() or B.is_inference():
                return self.drop()  # made in inference mode, where whoever writes to them leaves no trace
            layer.take(client, B, A)
        for layer in self._layers.values():
            due = layer.total - layer.done >= _PENDING
            if due and self._wanted(layer.spec, layer.total, layer.dtype == torch.bfloat16):
                layer.advance()
        if self.nbytes > self._limit:
            self.drop()

    def forget(self, client: str) -> None:
        """Answer for this client no more: another of its name may come."""
        for layer in (self._layers or {}).values():
            layer.forget(client)

    def of(self, name: str, factors: Sequence[tuple[str, Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """PᵀP and QQᵀ (1, R, R) of a layer for these clients' B and A, in this order; None where not all are here."""
        layer = (self._layers or {}).get(name)
        if layer is None or layer.done == 0 or not all(layer.has(*factor) for factor in factors):
            return None
        layer.advance()
        index = torch.tensor([column for client, _, _ in factors for column in layer.columns[client]])
        left, right = (
            G[: layer.total].index_select(0, index).index_select(1, index) for G in (layer.left, layer.right)
        )
        return left.unsqueeze(0), right.unsqueeze(0)
