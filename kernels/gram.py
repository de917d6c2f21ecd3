"""The two Gram matrices of every layer of one shape, each computed in one triangle only.

    G_P = PᵀP,  G_Q = QQᵀ        G[a, b] = Σ_i F[i, a] · F[i, b],  F = P (m, R) or Qᵀ (n, R), G (R, R)

A tile is BLOCK_C × BLOCK_C entries on or above the diagonal, written twice: as it is, and mirrored. So the result is
symmetric to the bit. The addresses of both runs of columns are loaded once; the sum over rows is cut into parts of PART
rows as in ``contract.py``.

Reference: ‖ΔW‖_F² = ⟨PᵀP ∘ dd', QQᵀ⟩ and the spectrum of ΔW from the two Grams: Halko, Martinsson and Tropp, SIAM
Review 53 (2011), section 5.1, with the factors in the place of the orthonormal bases.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flexlora_fast.kernels._triton import launch, require_runnable, tl, triton
from flexlora_fast.kernels.configuration import (
    FMA_ODD,
    Configuration,
    Precision,
    best,
    check_precision,
    configuration,
    padded,
)
from flexlora_fast.kernels.operand import require_int32
from flexlora_fast.kernels.parts import scratch, split, sum_parts
from flexlora_fast.kernels.table import Table
from flexlora_fast.kernels.tiles import column_pointers, layer_columns, load_factor, multiply


@triton.jit
def triangle_tile(index, tiles_c):
    """Row and column, row ≤ column, of tile ``index`` of a triangle; row −1 for the few indices without a tile.

    Rows k and tiles_c − 1 − k of the triangle have tiles_c + 1 tiles together: one row of a rectangle.
    """
    k, b = index // (tiles_c + 1), index % (tiles_c + 1)
    upper = b < tiles_c - k
    row = tl.where(upper, k, tiles_c - 1 - k)
    column = tl.where(upper, k + b, b - 1)
    # With an odd number of rows the middle one would come twice.
    return tl.where((row == k) & (b >= tiles_c - k), -1, row), column


@triton.jit(do_not_specialize=["layers", "tiles"], do_not_specialize_on_alignment=["offset_ptr"])
def gram_kernel(
    offset_ptr,  # [L+1] int64
    address_ptr,  # [C] int64
    stride_ptr,  # [C] int64
    G_ptr,  # [L, W, W], or the parts of it [parts, L, W, W], float32
    layers,
    length,
    W,
    tiles,
    ELEMENT: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,  # each part is a tile
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
):
    tiles_c, parts = tl.cdiv(W, BLOCK_C), tl.cdiv(length, PART)
    in_triangle = tl.cdiv(tiles_c, 2) * (tiles_c + 1)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rest = tile
        low, high = 0, parts
        if SPLIT:
            low, rest = rest % parts, rest // parts
            high = low + 1
        row, column = triangle_tile(rest % in_triangle, tiles_c)
        layer = (rest // in_triangle).to(tl.int64)
        first, R = layer_columns(offset_ptr, layer, RUN)
        a = row * BLOCK_C + tl.arange(0, BLOCK_C)
        b = column * BLOCK_C + tl.arange(0, BLOCK_C)
        inside_a, inside_b = (a < R) & (row >= 0), b < R
        pointers_a, strides_a = column_pointers(
            address_ptr, stride_ptr, first + a, inside_a, ELEMENT, INDEX, RUN, BYTES
        )
        pointers_b, strides_b = column_pointers(
            address_ptr, stride_ptr, first + b, inside_b, ELEMENT, INDEX, RUN, BYTES
        )
        # Tiles beyond this layer's columns are zero without a look at any.
        high = tl.where((column * BLOCK_C < R) & (row >= 0), high, low)
        total = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
        for part in range(low, high):
            in_part = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
            for start in range(part * PART, tl.minimum(part * PART + PART, length), BLOCK_K):
                i = start + tl.arange(0, BLOCK_K)
                F_a = load_factor(
                    pointers_a[:, None], strides_a[:, None], i[None, :],
                    inside_a[:, None] & (i[None, :] < length), INDEX, UNIT,
                )  # fmt: skip
                F_b = load_factor(
                    pointers_b[None, :], strides_b[None, :], i[:, None],
                    (i[:, None] < length) & inside_b[None, :], INDEX, UNIT,
                )  # fmt: skip
                in_part = multiply(F_a, F_b, in_part, PRECISION, False)
            total += in_part
        G_layer = G_ptr + layer * W * W
        if SPLIT:
            G_layer += tl.cast(low, tl.int64) * layers * W * W
        # On the diagonal, products of rounded operands need not be symmetric: only one triangle of the tile is kept.
        upper = (a[:, None] <= b[None, :]) & (b[None, :] < W) & (row >= 0)
        tl.store(G_layer + (a[:, None] * W + b[None, :]), total, mask=upper)
        lower = (b[:, None] > a[None, :]) & (b[:, None] < W) & (row >= 0)
        tl.store(G_layer + (b[:, None] * W + a[None, :]), tl.trans(total), mask=lower)


def configurations(precision: Precision, length: int) -> list[Configuration]:
    """Candidates for sums over ``length`` rows; the first is the best guess."""
    if precision == "float32":
        # Sums on CUDA cores hold whole operand tiles in registers: deeper tiles spill.
        shapes = [(64, 16, 8, 3, 2, FMA_ODD), (32, 16, 4, 3, 4)]
    elif precision in {"tf32", "tf32x3"}:
        shapes = [(64, 16, 8, 3, 1), (64, 32, 8, 3, 1), (128, 32, 8, 3, 1)]
    else:
        shapes = [(64, 64, 8, 3, 2), (128, 32, 8, 3, 1), (128, 64, 8, 3, 1)]
    return [
        configuration(*launch, BLOCK_C=c, BLOCK_K=min(k, padded(length)), PART=part)
        for part in (1024, 4096)
        for c, k, *launch in shapes
    ]


def gram(table: Table, *, precision: Precision = "float32") -> tuple[Tensor, Tensor]:
    """The Grams PᵀP and QQᵀ of every layer.

    Args:
        table: L layers of at most W columns.
        precision: see ``project.py``. Factors of one side are multiplied with each other: where they are bfloat16, both
            "bf16" and "bf16x3" multiply them exactly; where they are 16 bits of any kind, so does "tf32".

    Returns:
        PᵀP and QQᵀ, each (L, W, W) float32, exactly symmetric, zero beyond a layer's own R.

    Raises:
        ValueError: an unknown precision, or one that the factors do not allow.
        BackendError: where the kernel cannot run: CPU tensors outside Triton's interpreter.
    """
    check_precision("gram", precision, P=table.P.dtype, Q=table.Q.dtype)
    return gram_of(table, "P", precision=precision), gram_of(table, "Q", precision=precision)


def gram_of(
    table: Table,
    side: Literal["P", "Q"],
    *,
    precision: Precision = "float32",
    chosen: Configuration | None = None,
) -> Tensor:
    """One of the two, (L, W, W), with ``chosen`` tile sizes in place of the tuned ones; otherwise as ``gram``."""
    F = table.side(side)
    check_precision("gram", precision, **{side: F.dtype})
    require_int32("gram", "G", table.W * table.W)
    require_runnable("gram", table.device, gram_kernel)
    if precision == "bf16x3":
        precision = "bf16"
    out = torch.empty(table.layers, table.W, table.W, device=table.device)
    if out.numel() == 0 or F.length == 0:
        return out.zero_()
    c = chosen or best("gram " + side, configurations(precision, F.length), table.device, F.dtype, precision)
    c = c.for_alignment(F.aligned)
    parts, tiles_c = triton.cdiv(F.length, c["PART"]), triton.cdiv(table.W, c["BLOCK_C"])
    tiles = table.layers * triton.cdiv(tiles_c, 2) * (tiles_c + 1)
    in_parts = split(tiles, parts, c, table.device)
    target = scratch(parts, out) if in_parts else out
    launch(
        gram_kernel, tiles * parts if in_parts else tiles, c, table.device,
        table.offsets, F.address, F.stride, target, table.layers, F.length, table.W,
        **F.constants, PRECISION=precision, SPLIT=in_parts,
    )  # fmt: skip
    if in_parts:
        sum_parts(table, target, out, scaled=False)
    return out
