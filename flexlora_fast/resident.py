"""Factors that wait for their round in a GPU's memory: where they lie is noted as they come.

A round of 100 clients and 224 layers has 44,800 factors. Making stacks of them, and a table of those, takes Python
longer than the GPU takes for the whole round; so what does not depend on the others is done when a client arrives, and
what is left for the end are a few operations on arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexlora_fast.adapter import Adapter
from flexlora_fast.backends.group import Group
from flexlora_fast.lowrank.cores import Core, Grams
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.grouped import How, alone
from flexlora_fast.stack import Stack

if TYPE_CHECKING:
    from flexlora_fast.kernels.table import Table

_SIXTEEN_AND_MORE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Arrival:
    """One client's factors: ``rows`` (2, layers, 4), of B and of A, as ``kernels.table.Places`` has them."""

    adapter: Adapter
    rows: np.ndarray
    dtypes: tuple[torch.dtype, torch.dtype]
    layers: dict[str, int]  # the place of each layer in ``rows``
    scales: np.ndarray  # (layers,) float64


class Resident:
    """The clients of a round whose factors are all in the memory of ``device``, in a form that tables take at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._arrivals: dict[str, _Arrival] = {}

    def take(self, name: str, adapter: Adapter) -> None:
        """Note where a client's factors lie. One that has anything unusual is left to the usual way."""
        arrival = self._arrival(adapter)
        if arrival is not None:
            self._arrivals[name] = arrival

    def drop(self, name: str) -> None:
        """Forget a client."""
        self._arrivals.pop(name, None)

    def has(self, names: Sequence[str]) -> bool:
        """Whether all these clients are here, with factors of the same two dtypes."""
        here = [self._arrivals.get(name) for name in names]
        return None not in here and len({arrival.dtypes for arrival in here if arrival}) == 1

    def _arrival(self, adapter: Adapter) -> _Arrival | None:
        from flexlora_fast.kernels.table import place

        specs = adapter.skeleton.specs
        if adapter.on_disk or adapter.skeleton.bias_keys or any(spec.experts > 1 for spec in specs.values()):
            return None
        rows, dtypes = [], set()
        for layer in specs:
            A, B = adapter.factors(layer)
            if A.device != self.device or B.device != self.device or A.stride(2) != 1:
                return None
            dtypes.add((B.dtype, A.dtype))
            rows.append((place(B, 0, 2), place(A, 0, 1)))
        if len(dtypes) != 1 or not set(*dtypes) <= set(_SIXTEEN_AND_MORE):
            return None
        layers = {layer: i for i, layer in enumerate(specs)}
        scales = np.array([adapter.skeleton.scales[layer] for layer in specs])
        return _Arrival(adapter, np.array(rows, dtype=np.int64).transpose(1, 0, 2), dtypes.pop(), layers, scales)

    def table(
        self, shape: tuple[int, int], layers: Sequence[str], names: Sequence[str], shares: Any, renormalize: bool
    ) -> tuple[Table, np.ndarray]:
        """The table of layers of one shape, and d (L, W) float64 as a ``Group`` has it.

        Args:
            names: clients in canonical order. shares: their weights, normalised (K,).
            renormalize: whether a client without a layer leaves its share there to the others.
        """
        from flexlora_fast.kernels.table import Places, Table

        arrivals = [self._arrivals[name] for name in names]
        index = np.array([[arrival.layers.get(layer, -1) for arrival in arrivals] for layer in layers])  # (L, K)
        index = index.reshape(len(layers), len(arrivals))
        present = index >= 0
        rows = np.stack([arrival.rows[:, index[:, k]] for k, arrival in enumerate(arrivals)], axis=2)  # (2, L, K, 4)
        scales = np.stack([arrival.scales[index[:, k]] for k, arrival in enumerate(arrivals)], axis=1)  # (L, K)
        weights = np.where(present, np.asarray(shares, dtype=np.float64), 0.0)
        if renormalize:
            total = weights.sum(axis=1, keepdims=True)
            weights = weights / np.where(total > 0, total, 1.0)
        r = np.where(present, rows[0, :, :, 3], 0)  # (L, K)
        ranks = r.sum(axis=1)
        d = np.repeat((weights * scales).ravel(), r.ravel())
        padded = np.zeros((len(layers), int(ranks.max(initial=0))))
        padded[np.arange(padded.shape[1]) < ranks[:, None]] = d
        P, Q = (Places(dtype, side[present]) for dtype, side in zip(arrivals[0].dtypes, rows, strict=True))
        kept = [arrival.adapter for arrival in arrivals]
        return Table.at(shape, ranks.tolist(), (P, Q), d.astype(np.float32), self.device, kept), padded


@dataclass(frozen=True)
class ResidentLayers:
    """``lowrank.grouped.Layers`` of one shape; ``usual`` makes the stack of one that needs a closer look."""

    resident: Resident
    m: int
    n: int
    layers: Sequence[str]
    ranks: Sequence[int]
    names: Sequence[str]
    shares: Sequence[float]
    renormalize: bool
    usual: Callable[[int], Stack]

    @property
    def batches(self) -> list[int]:
        return [1] * len(self.layers)

    def group(self, places: Sequence[int]) -> Group:
        from flexlora_fast.backends.triton import Tabled

        layers = [self.layers[i] for i in places]
        table, d = self.resident.table((self.m, self.n), layers, self.names, self.shares, self.renormalize)
        return Tabled(table, torch.from_numpy(d).to(self.resident.device))

    def core(self, places: Sequence[int]) -> Core:
        return Grams(self.group(places))

    def alone(self, place: int, rank: int, how: How) -> Factorization:
        return alone(self.usual(place), place, rank, how)
