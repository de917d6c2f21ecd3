"""Where the factors of a round's clients lie: noted as they come, and chosen by layers at its end.

A round of 1,000 clients and 224 layers has 448,000 factors. Whatever is done for each of them in Python takes longer
than moving and multiplying it; so what does not depend on the others is noted when a client arrives, what clients of
one skeleton have in common is noted once, and what is left for the end are a few operations on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch

from flexlora_fast.adapter import Adapter
from flexlora_fast.skeleton import Skeleton

if TYPE_CHECKING:
    from flexlora_fast.kernels.table import Table

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Rows(dict[str, int]):
    """The row of each layer in a client's arrays; clients with the same layers share one."""


@dataclass(frozen=True, eq=False)
class Outline:
    """What the clients of one skeleton have in common, by layer, in the order of ``rows``.

    Attributes:
        dtypes: of B and of A.
        scales: (layers,) float64.
        nbytes: (2, layers) int64 of B and of A.
        places: (2, layers, 4) int64 as ``kernels.table.Places`` has them, of B (m, r) and A (r, n) as they lie in a
            file: rows one after another. The first number is 0.
    """

    rows: Rows
    dtypes: tuple[torch.dtype, torch.dtype]
    scales: np.ndarray
    nbytes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, skeleton: Skeleton) -> Outline | None:
        """None where anything is unusual: experts, a bias of B, float64, dtypes that differ between layers."""
        if skeleton not in _outlines:
            _outlines[skeleton] = cls._made(skeleton)
        return _outlines[skeleton]

    @classmethod
    def _made(cls, skeleton: Skeleton) -> Outline | None:
        specs = skeleton.specs
        forms = [(skeleton.forms[spec.b_key], skeleton.forms[spec.a_key]) for spec in specs.values()]
        dtypes = {(B.dtype, A.dtype) for B, A in forms}
        usual = not skeleton.bias_keys and all(spec.experts == 1 for spec in specs.values())
        if not usual or len(dtypes) != 1 or not set(*dtypes) <= set(_DTYPES):
            return None
        names = tuple(specs)
        rows = _rows.get(names)
        if rows is None:
            rows = _rows[names] = Rows({layer: i for i, layer in enumerate(names)})
        ranks = [skeleton.ranks[layer] for layer in names]
        places = (
            [(0, 1, r, r) for r in ranks],
            [(0, spec.n, 1, r) for r, spec in zip(ranks, specs.values(), strict=True)],
        )
        return cls(
            rows,
            dtypes.pop(),
            np.array([skeleton.scales[layer] for layer in names]),
            np.array([(B.nbytes, A.nbytes) for B, A in forms], dtype=np.int64).T,
            np.array(places, dtype=np.int64),
        )


_outlines: WeakKeyDictionary[Skeleton, Outline | None] = WeakKeyDictionary()
_rows: WeakValueDictionary[tuple[str, ...], Rows] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Note:
    """Where one client's factors lie.

    ``places``: (2, layers, 4) as in its outline, the first numbers filled in: addresses, or offsets in a file.
    """

    adapter: Adapter
    outline: Outline
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class _Alike:
    """Clients with the same layers: their places in the round, and their arrays side by side."""

    clients: np.ndarray  # (k,)
    rows: Rows
    places: np.ndarray  # (2, layers, k, 4)
    nbytes: np.ndarray  # (2, layers, k)
    scales: np.ndarray  # (layers, k)


class Chosen:
    """The notes of a round's clients in canonical order, from which the places in some layers are taken.

    Args:
        shares: the clients' weights, normalised (K,).
        renormalize: whether a client without a layer leaves its share there to the others.
    """

    def __init__(self, notes: Sequence[Note], shares: Sequence[float] | np.ndarray, renormalize: bool) -> None:
        self.notes, self.shares = list(notes), np.asarray(shares, dtype=np.float64)
        self.renormalize = renormalize
        alike: dict[int, list[int]] = {}
        for i, note in enumerate(notes):
            alike.setdefault(id(note.outline.rows), []).append(i)
        self._alike = []
        for clients in alike.values():
            here = [notes[i] for i in clients]
            self._alike.append(
                _Alike(
                    np.array(clients),
                    here[0].outline.rows,
                    np.stack([note.places for note in here], axis=2),
                    np.stack([note.outline.nbytes for note in here], axis=2),
                    np.stack([note.outline.scales for note in here], axis=1),
                )
            )

    def of(self, layers: Sequence[str]) -> Selection:
        """What the clients have in these layers, which are of one shape."""
        L, K = len(layers), len(self.notes)
        present = np.zeros((L, K), dtype=bool)
        places, nbytes = np.zeros((2, L, K, 4), dtype=np.int64), np.zeros((2, L, K), dtype=np.int64)
        scales = np.zeros((L, K))
        for alike in self._alike:
            rows = np.array([alike.rows.get(layer, -1) for layer in layers], dtype=np.int64)
            i, k = np.ix_(np.flatnonzero(rows >= 0), alike.clients)
            rows = rows[rows >= 0]
            present[i, k], scales[i, k] = True, alike.scales[rows]
            places[:, i, k], nbytes[:, i, k] = alike.places[:, rows], alike.nbytes[:, rows]
        weights = np.where(present, self.shares, 0.0)
        if self.renormalize:
            total = weights.sum(axis=1, keepdims=True)
            weights = weights / np.where(total > 0, total, 1.0)
        dtypes = self.notes[0].outline.dtypes
        return Selection(dtypes, present, places, nbytes, weights * scales)


@dataclass(frozen=True, eq=False)
class Selection:
    """What K clients have in L layers of one shape.

    Attributes:
        dtypes: of B and of A.
        present: (L, K), which clients have which layers. What the others' numbers below are means nothing.
        places: (2, L, K, 4) int64 of B and of A, as ``kernels.table.Places`` has them.
        nbytes: (2, L, K) int64.
        coefficients: (L, K) float64, weight times scale.
    """

    dtypes: tuple[torch.dtype, torch.dtype]
    present: np.ndarray
    places: np.ndarray
    nbytes: np.ndarray
    coefficients: np.ndarray

    def at(self, layers: Sequence[int]) -> Selection:
        """Some of the layers, by their places."""
        i = np.asarray(layers, dtype=np.int64)
        return Selection(self.dtypes, self.present[i], self.places[:, i], self.nbytes[:, i], self.coefficients[i])

    def table(self, shape: tuple[int, int], device: torch.device, kept: Any) -> tuple[Table, np.ndarray]:
        """The table of layers of ``shape`` (m, n) whose factors lie on ``device``, kept alive by ``kept``; and d (L, W)
        float64 as a ``Group`` has it.
        """
        from flexlora_fast.kernels.table import Places, Table

        r = np.where(self.present, self.places[0, :, :, 3], 0)  # (L, K)
        ranks = r.sum(axis=1)
        d = np.repeat(self.coefficients.ravel(), r.ravel())
        padded = np.zeros((len(ranks), int(ranks.max(initial=0))))
        padded[np.arange(padded.shape[1]) < ranks[:, None]] = d
        P, Q = (Places(dtype, side[self.present]) for dtype, side in zip(self.dtypes, self.places, strict=True))
        return Table.at(shape, ranks.tolist(), (P, Q), d.astype(np.float32), device, kept), padded
