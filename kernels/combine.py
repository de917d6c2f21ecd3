"""The second half of a product with ΔW: Y = P·Z, or Qᵀ·Z, for all layers of one shape: combinations of columns.

    Y[i, :] = Σ_c F[i, c] · Z[c, :]        F = P (m, R) or Qᵀ (n, R), Z (R, l), Y (m or n, l)

A tile of Y is BLOCK_I rows by BLOCK_L columns; it walks along the layer's R columns, BLOCK_C addresses at a time, so
that ranks of several clients share one step of the tensor cores: none is wasted on clients of rank 4. The sum over R is
cut into parts of PART columns as in ``contract.py``.

Reference: FlexLoRA, arXiv 2402.11505, equation 3 (ΔW = Σ w_i·s_i·B_i·A_i), applied from right to left.
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
from flexlora_fast.kernels.operand import checked_operand, checked_out, require_int32
from flexlora_fast.kernels.parts import scratch, split, sum_parts
from flexlora_fast.kernels.table import Table
from flexlora_fast.kernels.tiles import column_pointers, layer_columns, load_factor, multiply


@triton.jit(do_not_specialize=["layers", "W", "tiles"], do_not_specialize_on_alignment=["offset_ptr"])
def combine_kernel(
    offset_ptr,  # [L+1] int64
    address_ptr,  # [C] int64
    stride_ptr,  # [C] int64
    Z_ptr,  # [L, W, l]
    Y_ptr,  # [L, length, l], or the parts of it [parts, L, length, l]
    layers,
    length,
    W,
    width,
    tiles,
    ELEMENT: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,  # each part is a tile
    BLOCK_I: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PART: tl.constexpr,
):
    tiles_l, tiles_i = tl.cdiv(width, BLOCK_L), tl.cdiv(length, BLOCK_I)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        columns_Z = (tile % tiles_l) * BLOCK_L + tl.arange(0, BLOCK_L)
        rest = tile // tiles_l
        part_tile = 0
        if SPLIT:
            parts = tl.cdiv(W, PART)
            part_tile, rest = rest % parts, rest // parts
        i = (rest % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
        layer = (rest // tiles_i).to(tl.int64)
        first, R = layer_columns(offset_ptr, layer, RUN)
        low, high = 0, tl.cdiv(R, PART)
        if SPLIT:
            low, high = part_tile, tl.minimum(part_tile + 1, high)
        Z_layer = Z_ptr + layer * W * width
        total = tl.zeros((BLOCK_I, BLOCK_L), dtype=tl.float32)
        for part in range(low, high):
            in_part = tl.zeros((BLOCK_I, BLOCK_L), dtype=tl.float32)
            for start in range(part * PART, tl.minimum(part * PART + PART, R), BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                pointers, strides = column_pointers(
                    address_ptr, stride_ptr, first + c, c < R, ELEMENT, INDEX, RUN, BYTES
                )
                inside = (i[:, None] < length) & (c[None, :] < R)
                F = load_factor(pointers[None, :], strides[None, :], i[:, None], inside, INDEX, UNIT)
                Z = tl.load(
                    Z_layer + (c[:, None] * width + columns_Z[None, :]),
                    mask=(c[:, None] < R) & (columns_Z[None, :] < width),
                    other=0.0,
                )
                in_part = multiply(F, Z, in_part, PRECISION, False)
            total += in_part
        Y_layer = Y_ptr + layer * length * width
        if SPLIT:
            Y_layer += tl.cast(part_tile, tl.int64) * layers * length * width
        tl.store(
            Y_layer + (i[:, None] * width + columns_Z[None, :]),
            total,
            mask=(i[:, None] < length) & (columns_Z[None, :] < width),
        )


def configurations(precision: Precision, length: int, width: int) -> list[Configuration]:
    """Candidates for results of ``length`` rows and ``l`` columns; the first is the best guess."""
    L = padded(width)
    if precision == "float32":
        # Sums on CUDA cores hold whole operand tiles in registers: deeper tiles spill.
        shapes = [(64, L, 16, 4, 3, 4)] if L <= 32 else [(64, 64, 16, 8, 3, 2, FMA_ODD), (32, 64, 16, 4, 3, 4)]
    elif precision in {"tf32", "tf32x3"}:
        shapes = [(64, min(L, 64), 16, 4, 3, 2), (64, min(L, 64), 32, 8, 4, 1), (128, min(L, 64), 32, 8, 3, 1)]
    elif precision == "bf16x3":
        shapes = [(64, min(L, 64), 32, 4, 3, 2), (64, min(L, 64), 32, 8, 3, 1), (128, L, 32, 8, 3, 1)]
    else:
        shapes = [(64, min(L, 64), 32, 4, 3, 3), (64, min(L, 64), 32, 8, 3, 2), (128, L, 32, 8, 3, 1)]
    return [
        configuration(*launch, BLOCK_I=min(i, padded(length)), BLOCK_L=w, BLOCK_C=c, PART=part)
        for part in (1024, 4096)
        for i, w, c, *launch in shapes
    ]


def combine(
    table: Table,
    Z: Tensor,
    *,
    side: Literal["P", "Q"] = "P",
    precision: Precision = "float32",
    out: Tensor | None = None,
    chosen: Configuration | None = None,
) -> Tensor:
    """Y = P·Z, or Qᵀ·Z for side "Q": what ``contract`` gives becomes a product with ΔW or its transpose.

    Args:
        table: L layers (m, n) of at most W columns.
        Z: (L, W, l), float16, bfloat16 or float32; rows beyond a layer's own R are not read.
        side: which factors to multiply with.
        precision: see ``project.py``.
        out: (L, m, l), or (L, n, l) for side "Q", float32 and contiguous: where to put Y.
        chosen: tile sizes to use in place of the tuned ones.

    Returns:
        Y (L, m, l), or (L, n, l), float32.

    Raises:
        ValueError: Z of another shape, dtype or device, an unknown precision, or one that the factors do not allow.
        BackendError: where the kernel cannot run: CPU tensors outside Triton's interpreter.
    """
    F = table.side(side)
    check_precision("combine", precision, **{F.name: F.dtype})
    Z = checked_operand("combine", "Z", Z, table, table.W, precision)
    width = Z.shape[2]
    require_int32("combine", "the result", F.length * width)
    out = checked_out("combine", out, (table.layers, F.length, width), torch.float32, table.device)
    require_runnable("combine", table.device, combine_kernel)
    if out.numel() == 0 or table.W == 0:
        return out.zero_()
    candidates = configurations(precision, F.length, width)
    c = chosen or best("combine " + F.name, candidates, table.device, F.dtype, precision, padded(width))
    c = c.for_alignment(F.aligned and width % 16 == 0)
    parts = triton.cdiv(table.W, c["PART"])
    tiles = table.layers * triton.cdiv(F.length, c["BLOCK_I"]) * triton.cdiv(width, c["BLOCK_L"])
    in_parts = split(tiles, parts, c, table.device)
    target = scratch(parts, out) if in_parts else out
    launch(
        combine_kernel, tiles * parts if in_parts else tiles, c, table.device,
        table.offsets, F.address, F.stride, Z, target, table.layers, F.length, table.W, width,
        **F.constants, PRECISION=precision, SPLIT=in_parts,
    )  # fmt: skip
    if in_parts:
        sum_parts(table, target, out, scaled=False)
    return out
