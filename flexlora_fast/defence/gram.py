"""The Gram matrix of the clients' updates from their factors: ⟨ΔW_i, ΔW_j⟩ = s_i·s_j·Σ (B_iᵀB_j)∘(A_iA_jᵀ).

No dense update is formed. A layer's two Grams are R×R float32, products of 16-bit factors exact; everything after them
is float64. (B·M, M⁻¹·A) gives the same numbers as (B, A), to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexlora_fast.backends import cpu, reference
from flexlora_fast.lowrank.solve import in_range
from flexlora_fast.planning import LayerPlan
from flexlora_fast.precision import full_precision
from flexlora_fast.stack import Block, Stack
from flexlora_fast.work import Piece, Work

# Entries of a Gram that are multiplied in float64 at a time.
_ENTRIES = 1 << 16
# ‖ΔW_i‖² below this share of the sum of its terms' magnitudes has lost more than two digits to cancellation: factors
# can be large and their product small. A client could hide behind that error, so such a layer is done in float64.
_CANCELLED = 1e-2


@full_precision()
def gram_of(work: Work) -> Tensor:
    """G_ij = ⟨ΔW_i, ΔW_j⟩ summed over all layers, (K, K) float64, for the clients of ``work`` in their order.

    With the scales s, without weights; a client without a layer counts as zero there; lora_B.bias is an update like
    any. One layer at a time; of one that is folded, two pieces of its clients at a time.

    Raises ``AdapterError`` naming client and layer for bad values of clients that are not checked.
    """
    index = {client.name: i for i, client in enumerate(work.clients)}
    total = torch.zeros(len(index), len(index), dtype=torch.float64)
    for layer in work.plans:
        pieces = [read for _, read in work.pieces_of(layer)]
        precise = list[bool]()  # by piece, whether it takes float64
        for i, read in enumerate(pieces):
            rows = _side(work, layer, read(), index)
            inner, again = _own(work, rows, layer.spec.name, work.settings.method.folds and not layer.folded)
            precise.append(again)
            _add(total, rows, rows, inner)
            for j in range(i):
                columns = _side(work, layer, pieces[j](), index)
                products = _products64 if again or precise[j] else _products
                _add(total, rows, columns, _summed(*products(rows.stack, columns.stack), rows, columns))
    return (total + total.mT) / 2  # an entry and its mirror image are summed up in two orders


@dataclass(frozen=True)
class _Side:
    """Some clients of one layer: their factors, s (k,), their places in the Gram, and s·bias (k, m)."""

    clients: list[str]
    stack: Stack
    scales: Tensor
    places: list[int]
    bias: Tensor

    @property
    def starts(self) -> np.ndarray:
        """The first column of each client."""
        ranks = [block.d.numel() for block in self.stack.blocks]
        return np.cumsum([0, *ranks[:-1]])


def _side(work: Work, layer: LayerPlan, piece: Piece, index: dict[str, int]) -> _Side:
    spec = layer.spec
    checked = work.checked(spec, piece)
    blocks = [Block(c.B, c.A, torch.full((c.rank,), c.scale, dtype=torch.float64)) for c in checked]
    bias = torch.zeros(len(checked), spec.m, dtype=torch.float64)
    for i, (c, b) in enumerate(zip(checked, piece.biases, strict=True)):
        if b is not None:
            bias[i] = c.scale * b.double().cpu()
    names, scales = [c.client for c in checked], torch.tensor([c.scale for c in checked], dtype=torch.float64)
    stack = Stack(blocks, spec.m, spec.n, spec.experts)
    return _Side(names, stack, scales, [index[name] for name in names], bias)


def _add(total: Tensor, rows: _Side, columns: _Side, inner: Tensor) -> None:
    """Add what one layer gives for these clients, (k₁, k₂), and its mirror image where they are others."""
    inner = inner + rows.bias @ columns.bias.mT
    total[np.ix_(rows.places, columns.places)] += inner
    if rows is not columns:
        total[np.ix_(columns.places, rows.places)] += inner.mT


def _own(work: Work, side: _Side, name: str, keep: bool) -> tuple[Tensor, bool]:
    """⟨ΔW_i, ΔW_j⟩ among the clients of a piece, (k, k), and whether it took products in float64.

    ``keep``: whether the layer's solver may want the Grams as well.
    """
    if in_range(side.stack, name):
        known = _known(work, side, name)
        left, right = (G.cpu() for G in known or cpu.gram(side.stack))
        inner = _summed(left, right, side, side)
        if not _cancels(left, right, side, inner.diagonal()):
            if keep and known is None and work.grams is not None and cpu.takes(side.stack) and side.stack.batch == 1:
                ranks = [block.d.numel() for block in side.stack.blocks]
                work.grams.keep(name, side.clients, ranks, left, right)
            return inner, False
    return _summed(*_products64(side.stack, side.stack), side, side), True


def _known(work: Work, side: _Side, name: str) -> tuple[Tensor, Tensor] | None:
    """The Grams that grew as clients arrived."""
    if work.grams is None:
        return None
    return work.grams.known(name, [(c, b.B, b.A) for c, b in zip(side.clients, side.stack.blocks, strict=True)])


def _products(rows: Stack, columns: Stack) -> tuple[Tensor, Tensor]:
    return cpu.cross_gram(rows.blocks, columns.blocks)


def _products64(rows: Stack, columns: Stack) -> tuple[Tensor, Tensor]:
    P, Q = rows.packed_P(torch.float64), rows.packed_Q(torch.float64)
    if rows is columns:
        return reference.gram_of(P), reference.gram_of(Q.mT)
    return P.mT @ columns.packed_P(torch.float64), Q @ columns.packed_Q(torch.float64).mT


def _cancels(left: Tensor, right: Tensor, side: _Side, squares: Tensor) -> bool:
    """Whether ‖ΔW_i‖² (k,) of some client is small beside the terms that it is the sum of."""
    one, two = left.numpy(), right.numpy()
    stops = [*side.starts[1:].tolist(), side.stack.R]
    for i, (lo, hi) in enumerate(zip(side.starts.tolist(), stops, strict=True)):
        terms = np.abs(one[:, lo:hi, lo:hi] * two[:, lo:hi, lo:hi]).sum(dtype=np.float64)
        if float(squares[i]) < _CANCELLED * float(side.scales[i]) ** 2 * terms:
            return True
    return False


def _summed(left: Tensor, right: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """s_i·s_j·Σ left∘right over the matrices and over each pair of clients' columns, (k₁, k₂) float64.

    By NumPy, whose sums do not depend on the number of threads, in slabs of rows that stay in cache.
    """
    result = np.zeros((rows.stack.R, len(columns.places)))
    height = max(1, _ENTRIES // max(1, columns.stack.R))
    for one, two in zip(left.cpu(), right.cpu(), strict=True):
        for lo in range(0, rows.stack.R, height):
            part = slice(lo, lo + height)
            product = one[part].numpy().astype(np.float64) * two[part].numpy()
            result[part] += np.add.reduceat(product, columns.starts, axis=1)
    inner = torch.from_numpy(np.add.reduceat(result, rows.starts, axis=0))
    return inner * rows.scales.unsqueeze(1) * columns.scales
