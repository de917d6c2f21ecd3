"""The Gram matrix of the clients' updates from their factors: ⟨ΔW_i, ΔW_j⟩ = s_i·s_j·Σ (B_iᵀB_j)∘(A_iA_jᵀ).

No dense update is formed. A layer's two Grams are R×R float32, products of 16-bit factors exact; everything after them
is float64. (B·M, M⁻¹·A) gives the same numbers as (B, A), to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexlora_fast import threads
from flexlora_fast.backends import cpu, reference
from flexlora_fast.lowrank import plan
from flexlora_fast.lowrank.solve import RANGE, in_range
from flexlora_fast.planning import LayerPlan
from flexlora_fast.precision import full_precision
from flexlora_fast.stack import Block, Stack
from flexlora_fast.work import Piece, Work

# Entries of a Gram that are multiplied in float64 at a time.
_ENTRIES = 1 << 16
# ‖ΔW_i‖² below this share of the sum of its terms' magnitudes has lost more than two digits to cancellation: factors
# can be large and their product small. A client could hide behind that error, so such a layer is done in float64.
_CANCELLED = 1e-2
# Columns of clients that are multiplied together where only ‖ΔW_i‖ is asked for: enough for full speed, and of the
# products among them, most of which nobody wants, few beside those with all R.
_TOGETHER = 128


@full_precision()
def gram_of(work: Work, pairs: bool = True) -> Tensor:
    """G_ij = ⟨ΔW_i, ΔW_j⟩ summed over all layers, (K, K) float64, for the clients of ``work`` in their order.

    Without ``pairs`` G_ii alone, the rest zero: (m+n)·Σr_i² flops a layer instead of (m+n)·R², but where the layer's
    solver will want its Grams.

    With the scales s, without weights; a client without a layer counts as zero there; lora_B.bias is an update like
    any. One layer at a time; of one that is folded, two pieces of its clients at a time.

    Raises ``AdapterError`` naming client and layer for bad values of clients that are not checked.
    """
    index = {client.name: i for i, client in enumerate(work.clients)}
    total = np.zeros((len(index), len(index)))
    for layer in work.plans:
        pieces = [read for _, read in work.pieces_of(layer)]
        precise = list[bool]()  # by piece, whether it takes float64
        for i, read in enumerate(pieces):
            rows = _side(work, layer, read(), index)
            if not pairs and not _wanted(work, layer, rows.stack):
                for part in _parts(rows):
                    _add(total, part, part, _own(work, part, layer)[0])
                continue
            inner, again = _own(work, rows, layer)
            precise.append(again)
            _add(total, rows, rows, inner)
            for j in range(i if pairs else 0):
                columns = _side(work, layer, pieces[j](), index)
                products = _products64 if again or precise[j] else _products
                _add(total, rows, columns, _summed(*products(rows.stack, columns.stack), rows, columns))
    gram = torch.from_numpy((total + total.T) / 2)  # an entry and its mirror image may be summed up in two orders
    return gram if pairs else gram.diagonal().diag()


@dataclass(frozen=True)
class _Side:
    """Some clients of one layer: their factors, s (k,), their places in the Gram, and s·bias (k, m) if any."""

    clients: list[str]
    stack: Stack
    scales: np.ndarray
    places: list[int]
    bias: Tensor | None

    @cached_property
    def ranks(self) -> list[int]:
        return [block.d.numel() for block in self.stack.blocks]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first column of each client."""
        return np.cumsum([0, *self.ranks[:-1]])


def _side(work: Work, layer: LayerPlan, piece: Piece, index: dict[str, int]) -> _Side:
    spec = layer.spec
    checked = work.checked(spec, piece)
    ones = {rank: torch.ones(rank, dtype=torch.float64) for rank in {c.rank for c in checked}}
    blocks = [Block(c.B, c.A, ones[c.rank]) for c in checked]  # the scales come in at the end
    bias = None
    if any(b is not None for b in piece.biases):
        bias = torch.zeros(len(checked), spec.m, dtype=torch.float64)
        for i, (c, b) in enumerate(zip(checked, piece.biases, strict=True)):
            if b is not None:
                bias[i] = c.scale * b.double().cpu()
    names = [c.client for c in checked]
    stack = Stack(blocks, spec.m, spec.n, spec.experts)
    return _Side(names, stack, np.array([c.scale for c in checked]), [index[name] for name in names], bias)


def _parts(side: _Side) -> Iterator[_Side]:
    """The clients of a side, some at a time."""
    spans, width = list[list[int]](), _TOGETHER
    for i, rank in enumerate(side.ranks):
        width += rank
        if width > _TOGETHER:
            spans.append([])
            width = rank
        spans[-1].append(i)
    for span in spans:
        part = slice(span[0], span[-1] + 1)
        stack = Stack(side.stack.blocks[part], side.stack.m, side.stack.n, side.stack.batch)
        bias = None if side.bias is None else side.bias[part]
        yield _Side(side.clients[part], stack, side.scales[part], side.places[part], bias)


def _add(total: np.ndarray, rows: _Side, columns: _Side, inner: np.ndarray) -> None:
    """Add what one layer gives for these clients, (k₁, k₂), and its mirror image where they are others."""
    if rows.bias is not None and columns.bias is not None:
        # Not by NumPy, whose BLAS has threads of its own that keep torch's waiting; and on one, so that bits stay.
        with threads.single():
            inner = inner + (rows.bias @ columns.bias.mT).numpy()
    total[np.ix_(rows.places, columns.places)] += inner
    if rows is not columns:
        total[np.ix_(columns.places, rows.places)] += inner.T


def _own(work: Work, side: _Side, layer: LayerPlan) -> tuple[np.ndarray, bool]:
    """⟨ΔW_i, ΔW_j⟩ among the clients of a piece, (k, k), and whether it took products in float64. The Grams are kept
    where the layer's solver will want them.
    """
    name = layer.spec.name
    known = _known(work, side, name)
    left, right = (G.cpu() for G in known or cpu.gram(side.stack))
    lengths = _lengths(left, right)
    if lengths is not None or in_range(side.stack, name):
        inner = _summed(left, right, side, side)
        if not _cancels(left, right, lengths, side, inner.diagonal()):
            if known is None and work.grams is not None and _wanted(work, layer, side.stack):
                work.grams.keep(name, side.clients, side.ranks, left, right)
            return inner, False
    return _summed(*_products64(side.stack, side.stack), side, side), True


def _wanted(work: Work, layer: LayerPlan, stack: Stack) -> bool:
    """Whether the layer will be solved from its Grams, as far as that is known before anybody is rejected."""
    of = work.settings
    if layer.folded or not of.method.folds or stack.batch > 1 or not cpu.takes(stack):
        return False
    kept = min(layer.rank, stack.R, stack.m, stack.n)
    shape = plan.Shape(stack.m, stack.n, stack.R, kept, of.tol, 1, of.certificate, stack.sixteen)
    return (plan.choose(shape) if of.solver == "auto" else of.solver) in ("krylov", "filtered")


def _known(work: Work, side: _Side, name: str) -> tuple[Tensor, Tensor] | None:
    """The Grams that grew as clients arrived."""
    if work.grams is None:
        return None
    return work.grams.known(name, [(c, b.B, b.A) for c, b in zip(side.clients, side.stack.blocks, strict=True)])


def _lengths(left: Tensor, right: Tensor) -> np.ndarray | None:
    """‖b_c‖·‖a_c‖ (b, R) float64 of every column and row, or None where a norm is outside what float32 squares well."""
    squares = np.stack([G.diagonal(dim1=-2, dim2=-1).numpy() for G in (left, right)]).astype(np.float64)
    low, high = RANGE
    # NaN is outside too
    return np.sqrt(squares[0] * squares[1]) if ((squares > low**2) & (squares < high**2)).all() else None


def _products(rows: Stack, columns: Stack) -> tuple[Tensor, Tensor]:
    return cpu.cross_gram(rows.blocks, columns.blocks)


def _products64(rows: Stack, columns: Stack) -> tuple[Tensor, Tensor]:
    P, Q = rows.packed_P(torch.float64), rows.packed_Q(torch.float64)
    if rows is columns:
        return reference.gram_of(P), reference.gram_of(Q.mT)
    return P.mT @ columns.packed_P(torch.float64), Q @ columns.packed_Q(torch.float64).mT


def _cancels(left: Tensor, right: Tensor, lengths: np.ndarray | None, side: _Side, squares: np.ndarray) -> bool:
    """Whether ‖ΔW_i‖² (k,) of some client is small beside the terms that it is the sum of."""
    least = squares / _CANCELLED
    suspects = np.arange(len(squares))
    if lengths is not None:  # |⟨b_c, b_d⟩·⟨a_c, a_d⟩| is at most the product of lengths: that settles most at once
        most = np.square(np.add.reduceat(lengths, side.starts, axis=1)).sum(axis=0)
        suspects = np.flatnonzero(~(least >= side.scales**2 * most))
    one, two = left.numpy(), right.numpy()
    for i in suspects.tolist():
        own = slice(side.starts[i], side.starts[i] + side.ranks[i])
        terms = np.abs(one[:, own, own] * two[:, own, own]).sum(dtype=np.float64)
        if not float(least[i]) >= float(side.scales[i]) ** 2 * terms:
            return True
    return False


def _summed(left: Tensor, right: Tensor, rows: _Side, columns: _Side) -> np.ndarray:
    """s_i·s_j·Σ left∘right over the matrices and over each pair of clients' columns, (k₁, k₂) float64.

    By NumPy, whose sums do not depend on the number of threads, in slabs of rows that stay in cache. Of one side with
    itself only what is right of a slab's first client is looked at, and mirrored.
    """
    same, starts = rows is columns, columns.starts
    result = np.zeros((rows.stack.R, len(columns.places)))
    height = max(1, _ENTRIES // max(1, columns.stack.R))
    for one, two in zip(left.cpu().numpy(), right.cpu().numpy(), strict=True):
        for lo in range(0, rows.stack.R, height):
            first = int(np.searchsorted(starts, lo, side="right")) - 1 if same else 0
            part = slice(lo, lo + height), slice(int(starts[first]), None)
            product = one[part].astype(np.float64) * two[part]
            result[part[0], first:] += np.add.reduceat(product, starts[first:] - starts[first], axis=1)
    inner = np.add.reduceat(result, rows.starts, axis=0)
    if same:
        inner = np.triu(inner) + np.triu(inner, 1).T
    return inner * rows.scales[:, None] * columns.scales
