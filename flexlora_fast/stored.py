"""Clients whose factors lie in files or in host memory when their round ends: what a device fetches them from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from flexlora_fast import files
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError
from flexlora_fast.gather import MEMORY, Ranges, ReadError
from flexlora_fast.places import Chosen, Note, Outline, Selection
from flexlora_fast.skeleton import Skeleton
from flexlora_fast.staging import Arrival, Staging, aligned
from flexlora_fast.tensorfile import Opened, TensorFile

if TYPE_CHECKING:
    from flexlora_fast.kernels.table import Table


class Stored:
    """The clients of a round whose factors can be fetched without a look at each of them."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def take(self, name: str, adapter: Adapter) -> None:
        """Note where a client's factors lie. One that has anything unusual is left to the usual way."""
        outline = Outline.of(adapter.skeleton)
        if outline is None:
            return
        places = _in_file(adapter, outline) if adapter.on_disk else _in_memory(adapter, outline)
        if places is not None:
            self._notes[name] = Note(adapter, outline, places)

    def drop(self, name: str) -> None:
        """Forget a client."""
        self._notes.pop(name, None)

    def has(self, names: Sequence[str]) -> bool:
        """Whether all these clients are here, with factors of the same two dtypes."""
        here = [self._notes.get(name) for name in names]
        return None not in here and len({note.outline.dtypes for note in here if note}) == 1

    def opened(self, names: Sequence[str], shares: Sequence[float] | np.ndarray, renormalize: bool) -> Reading:
        """These clients in canonical order, to be read from in a ``with`` block; arguments as for ``Chosen``."""
        return Reading(list(names), Chosen([self._notes[name] for name in names], shares, renormalize))


_offsets: WeakKeyDictionary[Skeleton, np.ndarray] = WeakKeyDictionary()


def _in_file(adapter: Adapter, outline: Outline) -> np.ndarray:
    """The same array for all files of one header, which skeletons of files stand for."""
    places = _offsets.get(adapter.skeleton)
    if places is None:
        file = adapter.tensors
        assert isinstance(file, TensorFile)
        places = outline.places.copy()
        for i, spec in enumerate(adapter.skeleton.specs.values()):
            places[:, i, 0] = file.place(spec.b_key)[0], file.place(spec.a_key)[0]
        _offsets[adapter.skeleton] = places
    return places


def _in_memory(adapter: Adapter, outline: Outline) -> np.ndarray | None:
    """None where a factor is not in the host's memory, or not in one piece."""
    tensors, addresses = adapter.tensors, []
    for spec in adapter.skeleton.specs.values():
        B, A = tensors[spec.b_key], tensors[spec.a_key]
        if not (_plain(B) and _plain(A)):
            return None
        addresses.append((B.data_ptr(), A.data_ptr()))
    places = outline.places.copy()
    places[:, :, 0] = np.array(addresses, dtype=np.int64).T
    return places


def _plain(X: Tensor) -> bool:
    return X.is_cpu and X.is_contiguous()


class Reading:
    """A round's clients while they are read from: their files are open, each once.

    All at the same time: to open 1,000 files again for every few layers would take longer than to read from them.

    Raises ``OptionError`` on entering where the process may not open so many, and ``AdapterError`` naming the client
    for a file that is gone or has changed.
    """

    def __init__(self, names: Sequence[str], chosen: Chosen) -> None:
        self._names, self._chosen = names, chosen
        self._opened: list[Opened | None] = []

    def __enter__(self) -> Reading:
        adapters = [note.adapter for note in self._chosen.notes]
        files.allow_open(sum(adapter.on_disk for adapter in adapters))
        for name, adapter in zip(self._names, adapters, strict=True):
            file = adapter.tensors
            try:
                self._opened.append(file.opened() if isinstance(file, TensorFile) else None)
            except AdapterError as error:
                self._opened = []
                raise error.at(client=name) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened = []

    def check(self) -> None:
        """Raise ``AdapterError`` naming the client whose file has changed since it was opened: what was read of it may
        be of two versions.
        """
        for name, note, opened in zip(self._names, self._chosen.notes, self._opened, strict=True):
            file = note.adapter.tensors
            if isinstance(file, TensorFile) and opened is not None:
                try:
                    file.check(opened)
                except AdapterError as error:
                    raise error.at(client=name) from None

    def of(self, layers: Sequence[str]) -> Wanted:
        """The clients' factors in layers of one shape."""
        selection = self._chosen.of(layers)
        K = len(self._names)
        descriptors = np.array([MEMORY if x is None else x.descriptor for x in self._opened], dtype=np.int64)
        # Client by client as in its file: neighbours there are read in one go. (2, L, K) -> (K, L·2)
        start, nbytes = (x.transpose(2, 1, 0).reshape(K, -1) for x in (selection.places[..., 0], selection.nbytes))
        present = np.repeat(selection.present.T, 2, axis=1)
        order = np.argsort(start, axis=1, kind="stable")
        client, factor = np.arange(K)[:, None].repeat(order.shape[1], axis=1), order
        kept = present[client, factor]
        client, factor = client[kept], factor[kept]
        ranges = Ranges(descriptors[client], start[client, factor], nbytes[client, factor])
        return Wanted(self, list(layers), selection, ranges, client, factor)


@dataclass(frozen=True, eq=False)
class Wanted:
    """All clients' factors in some layers of one shape.

    ``ranges``: of the N factors there are. ``client``, ``factor``: whose each of them is, and which: B of layer i is
    2i, A is 2i + 1.
    """

    reading: Reading
    layers: list[str]
    selection: Selection
    ranges: Ranges
    client: np.ndarray
    factor: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that they take."""
        return int(aligned(self.ranges.nbytes).sum())

    def bring(self, staging: Staging) -> Arrival:
        """``Staging.bring``, called from a thread that reads.

        Raises ``AdapterError`` naming client and layer for what cannot be read.
        """
        try:
            return staging.bring(self.ranges)
        except ReadError as error:
            i = int(self.client[error.index])
            name, file = self.reading._names[i], self.reading._chosen.notes[i].adapter.tensors
            assert isinstance(file, TensorFile)
            raise AdapterError(
                f"{file.path!r} cannot be read ({error.strerror}); check the disk, or have it sent again",
                client=name,
                layer=self.layers[self.factor[error.index] // 2],
            ) from error

    def pieces(self, columns: int) -> list[Wanted]:
        """The same in pieces of neighbouring clients, as many as have so many columns together, summed over layers."""
        ranks = np.where(self.selection.present, self.selection.places[0, :, :, 3], 0).sum(axis=0)  # (K,)
        before = np.cumsum(ranks) - ranks
        pieces, first = [], 0
        while first < len(ranks):
            stop = int(np.searchsorted(before, before[first] + columns))
            pieces.append(self._part(first, stop))
            first = stop
        return pieces

    def _part(self, first: int, stop: int) -> Wanted:
        """Clients ``first`` … ``stop`` of the round alone."""
        K = self.selection.present.shape[1]
        present = self.selection.present & (first <= np.arange(K)) & (np.arange(K) < stop)
        mine = (first <= self.client) & (self.client < stop)
        ranges = Ranges(self.ranges.descriptor[mine], self.ranges.start[mine], self.ranges.nbytes[mine])
        selection = dataclasses.replace(self.selection, present=present)
        return Wanted(self.reading, self.layers, selection, ranges, self.client[mine], self.factor[mine])

    def table(
        self, shape: tuple[int, int], arrival: Arrival, places: Sequence[int] | None = None
    ) -> tuple[Table, np.ndarray]:
        """The table of these layers, of ``shape`` (m, n), from where they were brought to, and d (L, W) float64 as a
        ``Group`` has it; of those at ``places`` alone where given.
        """
        layer, side = np.divmod(self.factor, 2)
        there = self.selection.places.copy()
        there[side, layer, self.client, 0] = arrival.buffer.data_ptr() + arrival.offsets
        brought = dataclasses.replace(self.selection, places=there)
        chosen = brought if places is None else brought.at(places)
        return chosen.table(shape, arrival.buffer.device, arrival)
