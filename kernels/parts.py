"""The fixed sum of parts: out = Σ_s parts[s], in the order of s, with the coefficients where they are due.

    out[λ, i, j] = d[λ, i] · ((parts[0, λ, i, j] + parts[1, λ, i, j]) + …)

A long sum is cut into parts of a fixed length. With many tiles, one program computes all parts of a tile and adds them;
with too few to fill the GPU, each part is a tile of its own in a scratch buffer, and this kernel adds them in the same
order: the same bits, whatever the GPU. There are no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.kernels._triton import launch, programs, tl, triton
from flexlora_fast.kernels.configuration import Configuration, configuration
from flexlora_fast.kernels.table import Table
from flexlora_fast.kernels.tiles import layer_columns

# Elementwise and small: not worth tuning.
CONFIGURATION = configuration(num_warps=4, num_stages=2, resident=4, BLOCK_I=16, BLOCK_J=64)


@triton.jit(do_not_specialize=["layers", "parts", "tiles"], do_not_specialize_on_alignment=["offset_ptr"])
def sum_parts_kernel(
    offset_ptr,  # [L+1] int64
    d_ptr,  # [C] float32
    parts_ptr,  # [parts, L, rows, columns] float32
    out_ptr,  # [L, rows, columns]
    layers,
    parts,
    rows,
    columns,
    tiles,
    SCALED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tiles_i, tiles_j = tl.cdiv(rows, BLOCK_I), tl.cdiv(columns, BLOCK_J)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        j = (tile % tiles_j) * BLOCK_J + tl.arange(0, BLOCK_J)
        i = (tile // tiles_j % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
        layer = tile // tiles_j // tiles_i
        inside = (i[:, None] < rows) & (j[None, :] < columns)
        offsets = (layer.to(tl.int64) * rows + i[:, None]) * columns + j[None, :]
        total = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
        for part in range(parts):
            step = tl.cast(part, tl.int64) * layers * rows * columns
            total += tl.load(parts_ptr + step + offsets, mask=inside, other=0.0)
        if SCALED:
            first, R = layer_columns(offset_ptr, layer, 1)
            total *= tl.load(d_ptr + first + i, mask=i < R, other=0.0)[:, None]
        tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


def split(tiles: int, parts: int, chosen: Configuration, device: torch.device) -> bool:
    """Whether parts should be tiles of their own: only where there are several, and tiles for half a GPU at most."""
    return parts > 1 and tiles * 2 <= programs(chosen, device)


def scratch(parts: int, out: Tensor) -> Tensor:
    """A buffer for the parts of ``out``."""
    return torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)


def sum_parts(table: Table, parts: Tensor, out: Tensor, *, scaled: bool) -> None:
    """out (L, rows, columns) = the sum of parts (S, L, rows, columns) float32, its rows times d where ``scaled``."""
    count, layers, rows, columns = parts.shape
    tiles = layers * triton.cdiv(rows, CONFIGURATION["BLOCK_I"]) * triton.cdiv(columns, CONFIGURATION["BLOCK_J"])
    launch(
        sum_parts_kernel, tiles, CONFIGURATION, out.device,
        table.offsets, table.d, parts, out, layers, count, rows, columns, SCALED=scaled,
    )  # fmt: skip
