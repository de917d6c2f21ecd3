"""Packing: the factors of all layers of one shape side by side, gathered, scaled and cast in one pass.

    P[λ, i, c] and (d[c] ·) Q[λ, c, j], zero where c is beyond the R of layer λ        P (L, m, W), Q (L, W, n)

For libraries that want contiguous operands. Every factor is read once and written once; nothing is computed but the
optional product with d, in float32, before the cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.kernels._triton import ELEMENTS, launch, require_runnable, tl, triton
from flexlora_fast.kernels.configuration import configuration
from flexlora_fast.kernels.table import Side, Table
from flexlora_fast.kernels.tiles import column_pointers, layer_columns, load_factor

# A copy: not worth tuning. Tiles are long in the direction in which the side lies in memory.
CONFIGURATIONS = {
    "P": configuration(num_warps=4, num_stages=2, resident=4, BLOCK_I=64, BLOCK_C=32),
    "Q": configuration(num_warps=4, num_stages=2, resident=4, BLOCK_I=128, BLOCK_C=16),
}


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["offset_ptr"])
def pack_kernel(
    offset_ptr,  # [L+1] int64
    address_ptr,  # [C] int64
    stride_ptr,  # [C] int64
    d_ptr,  # [C] float32
    out_ptr,  # [L, length, W], or [L, W, length] where UNIT
    length,
    W,
    tiles,
    ELEMENT: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    BYTES: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_i, tiles_c = tl.cdiv(length, BLOCK_I), tl.cdiv(W, BLOCK_C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = (tile // tiles_c % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
        c = (tile % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        layer = (tile // tiles_c // tiles_i).to(tl.int64)
        first, R = layer_columns(offset_ptr, layer, RUN)
        pointers, strides = column_pointers(address_ptr, stride_ptr, first + c, c < R, ELEMENT, INDEX, RUN, BYTES)
        inside = (i[:, None] < length) & (c[None, :] < R)
        x = load_factor(pointers[None, :], strides[None, :], i[:, None], inside, INDEX, UNIT).to(tl.float32)
        if SCALED:
            x *= tl.load(d_ptr + first + c, mask=c < R, other=0.0)[None, :]
        if UNIT:
            offsets = (layer * W + c[None, :]) * length + i[:, None]
        else:
            offsets = (layer * length + i[:, None]) * W + c[None, :]
        tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=(i[:, None] < length) & (c[None, :] < W))


def pack(table: Table, dtype: torch.dtype = torch.float32, *, scale: bool = False) -> tuple[Tensor, Tensor]:
    """P (L, m, W) and Q (L, W, n), contiguous, padded with zeros.

    Args:
        table: L layers (m, n) of at most W columns.
        dtype: of the results: float16, bfloat16 or float32.
        scale: whether the rows of Q are multiplied by d, in float32, before the cast. Into 16 bits that costs accuracy:
            multiply intermediates instead where there are any.

    Raises:
        ValueError: any other dtype.
        BackendError: where the kernel cannot run: CPU tensors outside Triton's interpreter.
    """
    if dtype not in ELEMENTS:
        raise ValueError(f"pack: cannot pack into {dtype}: expected float16, bfloat16 or float32")
    require_runnable("pack", table.device, pack_kernel)
    P = torch.empty(table.layers, table.m, table.W, dtype=dtype, device=table.device)
    Q = torch.empty(table.layers, table.W, table.n, dtype=dtype, device=table.device)
    _pack(table, table.P, P, scaled=False)
    _pack(table, table.Q, Q, scaled=scale)
    return P, Q


def _pack(table: Table, F: Side, out: Tensor, *, scaled: bool) -> None:
    """Fill ``out`` with one side."""
    c = CONFIGURATIONS[F.name]
    tiles = table.layers * triton.cdiv(F.length, c["BLOCK_I"]) * triton.cdiv(table.W, c["BLOCK_C"])
    launch(
        pack_kernel, tiles, c, table.device,
        table.offsets, F.address, F.stride, table.d, out, F.length, table.W, **F.constants, SCALED=scaled,
    )  # fmt: skip
