"""Factors that wait for their round in a GPU's memory: where they lie is noted as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexlora_fast.adapter import Adapter
from flexlora_fast.backends.group import Group
from flexlora_fast.backends.transfer import moved
from flexlora_fast.places import Chosen, Note, Outline

if TYPE_CHECKING:
    from flexlora_fast.kernels.table import Table


class Resident:
    """The clients of a round whose factors are all in the memory of ``device``, in a form that tables take at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._notes: dict[str, Note] = {}
        self._chosen: dict[object, Chosen] = {}  # of the round that asks now: it asks for one group of layers at a time

    def take(self, name: str, adapter: Adapter) -> None:
        """Note where a client's factors lie. One that has anything unusual is left to the usual way."""
        note = self._note(adapter)
        if note is not None:
            self._notes[name] = note
            self._chosen.clear()

    def drop(self, name: str) -> None:
        """Forget a client."""
        self._notes.pop(name, None)
        self._chosen.clear()

    def has(self, names: Sequence[str]) -> bool:
        """Whether all these clients are here, with factors of the same two dtypes."""
        here = [self._notes.get(name) for name in names]
        return None not in here and len({note.outline.dtypes for note in here if note}) == 1

    def _note(self, adapter: Adapter) -> Note | None:
        from flexlora_fast.kernels.table import place

        outline = None if adapter.on_disk else Outline.of(adapter.skeleton)
        if outline is None:
            return None
        places = []
        for layer in outline.rows:
            A, B = adapter.factors(layer)
            if A.device != self.device or B.device != self.device or A.stride(2) != 1:
                return None
            places.append((place(B, 0, 2), place(A, 0, 1)))
        return Note(adapter, outline, np.array(places, dtype=np.int64).transpose(1, 0, 2))

    def table(
        self, shape: tuple[int, int], layers: Sequence[str], names: Sequence[str], shares: Any, renormalize: bool
    ) -> tuple[Table, np.ndarray]:
        """The table of layers of one shape, and d (L, W) float64 as a ``Group`` has it.

        Args:
            names: clients in canonical order. shares: their weights, normalised (K,).
            renormalize: whether a client without a layer leaves its share there to the others.
        """
        key = (tuple(names), tuple(shares), renormalize)
        if key not in self._chosen:
            self._chosen.clear()
            self._chosen[key] = Chosen([self._notes[name] for name in names], shares, renormalize)
        chosen = self._chosen[key]
        return chosen.of(layers).table(shape, self.device, [note.adapter for note in chosen.notes])

    def group(
        self, shape: tuple[int, int], layers: Sequence[str], names: Sequence[str], shares: Any, renormalize: bool
    ) -> Group:
        """The group of that table; arguments as for ``table``."""
        from flexlora_fast.backends.triton import Tabled

        table, d = self.table(shape, layers, names, shares, renormalize)
        return Tabled(table, moved(torch.from_numpy(d), table.device))
