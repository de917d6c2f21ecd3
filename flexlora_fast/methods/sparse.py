"""Sparse updates: random masks that are addressed, not sent, and averages of what was trained in them.

A mask is addressed by (seed, layer, entry). The masks of one seed are nested: clients of a higher density train all
entries of one of a lower density, and more.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flexlora_fast import files, values
from flexlora_fast.admission import is_weight, normalised
from flexlora_fast.errors import AdapterError, EmptyRoundError, IncompatibleAdapterError, OptionError, WeightError
from flexlora_fast.lowrank.random import numbers, stream
from flexlora_fast.precision import full_precision
from flexlora_fast.tensorfile import TensorFile, TensorWriter

FORMAT = "flexlora_fast.sparse_delta/1"
_CHUNK = 1 << 16  # entries hashed at a time: they stay in cache
_LAYERS = 1024  # whose positions are kept


@dataclass(frozen=True)
class Mask:
    """Which entries of each weight are trained: each with probability ``density``, decided by (seed, layer, entry).

    Attributes:
        seed: the same for all clients of a federation, whatever their densities.
        density: a number from 0 to 1.
        density_pattern: other densities by layer, matched as PEFT matches ``rank_pattern``.

    Raises ``OptionError`` for a seed that is no integer, a density outside [0, 1] and a pattern that is no regular
    expression.

    >>> mask = Mask(0, 0.1, {"up_proj": 0.5})
    >>> mask.density_of("layers.0.up_proj"), len(mask.positions("layers.0.up_proj", 40, 50))
    (0.5, 982)
    """

    seed: int
    density: float
    density_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(f"the seed is {self.seed!r}; give an integer")
        for what, value in {"density": self.density, **self.density_pattern}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise OptionError(f"the density {what!r} is {value!r}; give a number from 0 to 1")
        for pattern in self.density_pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(f"density_pattern {pattern!r} is no regular expression ({error})") from None

    def density_of(self, layer: str) -> float:
        """The density of a layer: the first pattern that matches, or ``density``."""
        for pattern, density in self.density_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return float(density)
        return float(self.density)

    def positions(self, layer: str, m: int, n: int) -> Tensor:
        """(nnz,) int64, ascending: i·n + j of the trained entries (i, j) of an (m, n) weight."""
        return positions(self.seed, layer, m, n, self.density_of(layer))


@lru_cache(maxsize=_LAYERS)
def positions(seed: int, layer: str, m: int, n: int, density: float) -> Tensor:
    """(nnz,) int64, ascending; those of a lower density are among them. Kept for later calls: do not write to it."""
    key, below = stream(seed, f"mask/{layer}"), math.ceil(density * 2**53)
    starts = range(0, m * n, _CHUNK) if density else ()
    found = [start + (numbers(key, start, min(start + _CHUNK, m * n)) < below).nonzero().flatten() for start in starts]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class SparseLayer:
    """Trained entries of one (m, n) weight: ``values`` (nnz,), any floating dtype, at the positions of ``density``."""

    m: int
    n: int
    density: float
    values: Tensor


@dataclass(frozen=True, eq=False)
class SparseDelta(Mapping[str, Tensor]):
    """What a client trained in the sparse stage, or the average of many: dense (m, n) float32 by layer name.

    Only values are held, saved and sent: bytes ∝ nnz. ``seed``, with each layer's density, says where they belong.

    Raises ``AdapterError`` for a number of values that is not the mask's, and for NaN and infinities.
    """

    seed: int
    parts: dict[str, SparseLayer]
    client: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", dict(sorted(self.parts.items())))
        for layer, part in self.parts.items():
            if not (part.values.is_floating_point() and part.values.shape == self.positions(layer).shape):
                raise AdapterError(
                    f"there are {tuple(part.values.shape)} values of {part.values.dtype}; the mask of seed {self.seed} "
                    f"and density {part.density:g} has {len(self.positions(layer))} entries of {part.m}×{part.n}: "
                    "train with the server's mask",
                    client=self.client,
                    layer=layer,
                )
            values.check_finite(part.values, "values", client=self.client, layer=layer)

    @classmethod
    def of(cls, mask: Mask, dense: Mapping[str, Tensor], client: str | None = None) -> SparseDelta:
        """The entries in ``mask`` of dense changes (m, n) by layer; their dtypes."""
        parts = {}
        for layer, D in dense.items():
            if D.ndim != 2:
                raise AdapterError(f"its shape is {tuple(D.shape)}; give a matrix (m, n)", client=client, layer=layer)
            m, n = D.shape
            picked = D.detach().reshape(-1)[mask.positions(layer, m, n).to(D.device)]
            parts[layer] = SparseLayer(m, n, mask.density_of(layer), picked)
        return cls(mask.seed, parts, client)

    def positions(self, layer: str) -> Tensor:
        """(nnz,) int64, ascending: i·n + j of each value."""
        part = self.parts[layer]
        return positions(self.seed, layer, part.m, part.n, part.density)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(part.values.nbytes for part in self.parts.values())

    def __getitem__(self, layer: str) -> Tensor:
        part = self.parts[layer]
        flat = torch.zeros(part.m * part.n)
        flat[self.positions(layer)] = part.values.float().cpu()
        return flat.view(part.m, part.n)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def at(self, layer: str, density: float) -> Tensor:
        """The layer's values at the mask of another density: fewer of them, or zeros for those that are not here."""
        part = self.parts[layer]
        wanted, here = positions(self.seed, layer, part.m, part.n, density), self.positions(layer)
        if density <= part.density:
            return part.values[torch.searchsorted(here, wanted)]
        return part.values.new_zeros(len(wanted)).index_copy_(0, torch.searchsorted(wanted, here), part.values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whole or not at all. Returns the path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {layer: [part.m, part.n, part.density] for layer, part in self.parts.items()}
        metadata = {"format": FORMAT, "delta": json.dumps({"seed": self.seed, "layers": about})}
        room = 2 * len(json.dumps(metadata)) + sum(2 * len(layer) + 200 for layer in about) + 1024

        def write(to: str) -> None:
            writer = TensorWriter(to, room)
            try:  # wide elements first, so that each lies at a multiple of its size
                for layer in sorted(about, key=lambda layer: -self.parts[layer].values.itemsize):
                    writer.add(layer, self.parts[layer].values)
                writer.finish(metadata)
            finally:
                writer.close()

        files.replace(target, write)
        return target

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        client: str | None = None,
        *,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> SparseDelta:
        """Read what ``save`` wrote, into memory.

        ``shapes``: (m, n) of the layers that it may have. Give it for files of strangers: finding the positions of a
        mask is work ∝ m·n, which a file could claim to be anything.

        Raises ``AdapterError`` for any other file, ``IncompatibleAdapterError`` for layers that are not in ``shapes``.
        """
        file = TensorFile(path)
        if file.metadata.get("format") != FORMAT:
            raise AdapterError(
                f"{os.fspath(path)} is no {FORMAT} file; send what SparseDelta.save wrote", client=client
            )
        try:
            about = json.loads(file.metadata["delta"])
            facts = {layer: (int(m), int(n), float(density)) for layer, (m, n, density) in about["layers"].items()}
            parts = {layer: SparseLayer(*fact, file[layer]) for layer, fact in facts.items()}
            seed = int(about["seed"])
            sizes = all(part.m > 0 and part.n > 0 and 0 <= part.density <= 1 for part in parts.values())
        except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            what = f"{os.fspath(path)} is damaged ({type(error).__name__}: {error}); have it sent again"
            raise AdapterError(what, client=client) from error
        if not sizes:
            raise AdapterError(f"{os.fspath(path)} names impossible shapes; have it sent again", client=client)
        for layer, part in parts.items():
            if shapes is not None and shapes.get(layer) != (part.m, part.n):
                what = f"it has {part.m}×{part.n}, the model {shapes.get(layer)}; train the server's model"
                raise IncompatibleAdapterError(what, client=client, layer=layer)
        return cls(seed, parts, client)


@full_precision()
def average(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    missing: Literal["zero", "renormalize"] = "zero",
) -> SparseDelta:
    """Σ w_i·Θ_i over the clients, entry by entry, w normalised to sum 1; float64 sums, float32 out.

    Each layer comes out at the highest density that one of them has there. ``missing``: an entry that a client does not
    train counts as zero ("zero", as for adapters), or is averaged over those that do ("renormalize"). Over several
    rounds of clients of mixed densities "zero" shrinks, each time, what only some train: take "renormalize" there.
    Clients that have names are added in their order, whatever the order they came in.

    Raises ``EmptyRoundError``, ``WeightError``, and ``IncompatibleAdapterError`` for other seeds or shapes.
    """
    if missing not in ("zero", "renormalize"):
        raise OptionError(f"missing {missing!r} is neither 'zero' nor 'renormalize'")
    shares = _shares(deltas, weights)
    for i, (delta, _) in enumerate(shares):
        if delta.seed != shares[0][0].seed:
            what = f"its mask has seed {delta.seed}, another {shares[0][0].seed}; all clients need the server's"
            raise IncompatibleAdapterError(what, client=delta.client or f"number {i}")
    layers = sorted({layer for delta, _ in shares for layer in delta})
    return SparseDelta(shares[0][0].seed, {layer: _mean(layer, shares, missing) for layer in layers})


def _shares(deltas: Sequence[SparseDelta], weights: Sequence[float] | None) -> list[tuple[SparseDelta, float]]:
    """Those of positive weight with their shares, in the order of their names."""
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if not deltas:
        raise EmptyRoundError("there are no sparse updates; give at least one")
    if len(weights) != len(deltas) or not all(map(is_weight, weights)):
        raise WeightError(f"weights are {weights!r} for {len(deltas)} sparse updates; give each a finite number ≥ 0")
    if not any(weights):
        raise WeightError(f"the weights of {len(deltas)} sparse updates sum to 0; they must sum to > 0")
    triples = zip(deltas, weights, normalised(weights), strict=True)
    having = [(delta, share) for delta, weight, share in triples if weight > 0]
    return sorted(having, key=lambda pair: pair[0].client or "")


def _mean(layer: str, shares: Sequence[tuple[SparseDelta, float]], missing: str) -> SparseLayer:
    having = [(delta, share) for delta, share in shares if layer in delta]
    first = having[0][0].parts[layer]
    for delta, _ in having:
        part = delta.parts[layer]
        if (part.m, part.n) != (first.m, first.n):
            raise IncompatibleAdapterError(
                f"it has {part.m}×{part.n}, another client {first.m}×{first.n}; all must train the same base model",
                client=delta.client,
                layer=layer,
            )
    density = max(delta.parts[layer].density for delta, _ in having)
    every = positions(having[0][0].seed, layer, first.m, first.n, density)
    total, weight = torch.zeros(len(every), dtype=torch.float64), torch.zeros(len(every), dtype=torch.float64)
    for delta, share in having:
        at = torch.searchsorted(every, delta.positions(layer))
        total.index_add_(0, at, share * delta.parts[layer].values.double().cpu())
        weight[at] += share
    if missing == "renormalize":
        total /= weight
    return SparseLayer(first.m, first.n, density, total.float())
