"""What clients of an asynchronous round started from, and what they changed of it.

All starts of one version are prefixes of its columns: they are one block with a coefficient for each column. What was
sent in half precision is a block of its own, rounded as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast import combining
from flexlora_fast.adapter import Adapter
from flexlora_fast.combining import Part
from flexlora_fast.factors import copy_as, descale
from flexlora_fast.stack import Block
from flexlora_fast.update import GlobalUpdate, LayerUpdate

# Shares sum to 1 to rounding: what is left of a column that they take away again is nothing.
_NOTHING = 1e-12


@dataclass(frozen=True, eq=False)
class Start:
    """A client's adapter, the version that it started from (None: ΔW = 0), η·s(τ), the dtype that it was sent (None:
    its own), and p_i.
    """

    adapter: Adapter
    version: GlobalUpdate | None
    factor: float
    dtype: torch.dtype | None
    share: float = 0.0

    @property
    def c(self) -> float:
        """η·p·s(τ)."""
        return self.factor * self.share

    def sent_as(self, layer: str) -> torch.dtype:
        return self.dtype or self.adapter.skeleton.forms[self.adapter.spec(layer).a_key].dtype

    def sent(self, layer: str) -> Block:
        """−c times what it was sent of a layer, rounded as it was."""
        assert self.version is not None
        update, scale, dtype = self.version[layer], self.adapter.scale(layer), self.sent_as(layer)
        A, B = update.factors(self.adapter.rank(layer), "B", self.version.seed)
        A, B = descale(A, B, scale, "B", sliced=update.averaged is not None)
        d = torch.full((A.shape[1],), -self.c * scale, dtype=torch.float64)
        return Block(copy_as(B, dtype), copy_as(A, dtype), d)


def parts(layer: str, starts: Sequence[Start], current: GlobalUpdate | None) -> list[Part]:
    """What is added up in one layer: the clients' adapters, and of each version what is left of it."""
    having = [start for start in starts if layer in start.adapter.skeleton.specs]
    found = [combining.part(start.adapter, layer, start.c) for start in having if start.c]
    versions = {id(v): v for v in [current, *(start.version for start in having)] if v is not None and layer in v}
    for version in versions.values():
        theirs = [start for start in having if start.version is version and start.c]
        whole = [start for start in theirs if start.sent_as(layer) in (torch.float32, torch.float64)]
        found.append(_columns(version[layer], version is current, whole))
        biased = [start.c for start in theirs if layer in start.adapter.skeleton.bias_keys]
        left = math.fsum([float(version is current), *(-c for c in biased)])
        bias = version[layer].bias
        rounded = [start.sent(layer) for start in theirs if start not in whole]
        found.append(Part(rounded, 1, None if bias is None or abs(left) < _NOTHING else left * bias.double()))
    return found


def _columns(update: LayerUpdate, is_current: bool, starts: Sequence[Start]) -> Part:
    """The columns of a version that are left: once for the current one, less those that clients started from."""
    blocks = []
    for B, A in combining.kept(update):
        ranks = [(update.given(start.adapter.rank(update.name)), start.c) for start in starts]
        left = [
            math.fsum([float(is_current), *(-c for rank, c in ranks if rank > column)]) for column in range(A.shape[1])
        ]
        d = torch.tensor(left, dtype=torch.float64)
        some = d.abs() > _NOTHING
        if bool(some.any()):
            blocks.append(Block(B[:, :, some], A[:, some], d[some]))
    return Part(blocks, update.rank if is_current else 1)


def extras(starts: Sequence[Start], current: GlobalUpdate | None) -> dict[str, Tensor]:
    """What is no low-rank pair: moved by the clients' changes, or their average where there is none to change."""
    before = {} if current is None else current.extras
    found = {}
    for key in sorted({*before, *(key for start in starts for key in start.adapter.extras)}):
        having = [start for start in starts if key in start.adapter.extras]
        if key in before:
            terms = [(1.0, before[key], "the current version")]
            for start in having:
                assert start.version is not None
                terms.append((start.c, start.adapter.extras[key], start.adapter.client or "a client"))
                terms.append((-start.c, start.version.extras[key], "the version that it started from"))
            found[key] = combining.summed(key, terms).to(before[key].dtype)
        else:
            total = math.fsum(start.share for start in having)
            mean = [
                (start.share / total, start.adapter.extras[key], start.adapter.client or "a client") for start in having
            ]
            found[key] = combining.summed(key, mean)
    return found
