"""ΔW = P·diag(d)·Q, the dense updates of all layers of one shape, added to what is there.

    ΔW[i, j] = Σ_c P[i, c] · d[c] · Q[c, j]        P (m, R), d (R,), Q (R, n), ΔW (m, n)

A tile of ΔW walks along the layer's R columns in order, BLOCK_C addresses at a time. Entries of P are raised to float32
and multiplied by d there, and the sum is float32. Tiles are taken in columns of GROUP rows, so that the programs at
work at one time share few rows of P and columns of Q, which stay in L2.

Reference: FlexLoRA, arXiv 2402.11505, equation 3 (the weighted sum of the clients' B_i·A_i, stacked).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.kernels._triton import launch, require_runnable, tl, triton
from flexlora_fast.kernels.configuration import FMA_ODD, Configuration, Precision, best, check_precision, configuration
from flexlora_fast.kernels.operand import checked_out
from flexlora_fast.kernels.table import Table
from flexlora_fast.kernels.tiles import column_pointers, layer_columns, load_factor, multiply

# Rows of tiles in a column of tiles: see the docstring above.
GROUP = 8


@triton.jit
def grouped_tile(index, tiles_i, tiles_j, GROUP: tl.constexpr):
    """Row and column of tile ``index``: down GROUP rows, then to the next column, then to the next GROUP rows."""
    band = index // (GROUP * tiles_j)
    height = tl.minimum(tiles_i - band * GROUP, GROUP)
    within = index % (GROUP * tiles_j)
    return band * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["offset_ptr"])
def materialize_kernel(
    offset_ptr,  # [L+1] int64
    P_address_ptr,  # [C] int64
    P_stride_ptr,  # [C] int64
    Q_address_ptr,  # [C] int64
    Q_stride_ptr,  # [C] int64
    d_ptr,  # [C] float32
    out_ptr,  # [L, m, n] float32
    m,
    n,
    tiles,
    P_ELEMENT: tl.constexpr,
    P_INDEX: tl.constexpr,
    P_UNIT: tl.constexpr,
    P_RUN: tl.constexpr,
    P_BYTES: tl.constexpr,
    Q_ELEMENT: tl.constexpr,
    Q_INDEX: tl.constexpr,
    Q_UNIT: tl.constexpr,
    Q_RUN: tl.constexpr,
    Q_BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = grouped_tile(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
        layer = (tile // (tiles_m * tiles_n)).to(tl.int64)
        i = row * BLOCK_M + tl.arange(0, BLOCK_M)
        j = column * BLOCK_N + tl.arange(0, BLOCK_N)
        first, R = layer_columns(offset_ptr, layer, P_RUN)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, R, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            P_pointers, P_strides = column_pointers(
                P_address_ptr, P_stride_ptr, first + c, c < R, P_ELEMENT, P_INDEX, P_RUN, P_BYTES
            )
            Q_pointers, Q_strides = column_pointers(
                Q_address_ptr, Q_stride_ptr, first + c, c < R, Q_ELEMENT, Q_INDEX, Q_RUN, Q_BYTES
            )
            d = tl.load(d_ptr + first + c, mask=c < R, other=0.0)
            p = load_factor(
                P_pointers[None, :], P_strides[None, :], i[:, None], (i[:, None] < m) & (c[None, :] < R),
                P_INDEX, P_UNIT,
            )  # fmt: skip
            q = load_factor(
                Q_pointers[:, None], Q_strides[:, None], j[None, :], (c[:, None] < R) & (j[None, :] < n),
                Q_INDEX, Q_UNIT,
            )  # fmt: skip
            total = multiply(p.to(tl.float32) * d[None, :], q, total, PRECISION, True)
        # int64: a vocabulary of 256,000 times a width of 16,384 has more entries than an int32 can count.
        offsets = (layer * m + i[:, None]) * n + j[None, :]
        inside = (i[:, None] < m) & (j[None, :] < n)
        if ADD:
            total += tl.load(out_ptr + offsets, mask=inside, other=0.0)
        tl.store(out_ptr + offsets, total, mask=inside)


def configurations(precision: Precision) -> list[Configuration]:
    """Candidates; the first is the best guess."""
    if precision == "float32":
        # Sums on CUDA cores hold whole operand tiles in registers: deeper tiles spill.
        shapes = [(64, 64, 16, 8, 3, 2, FMA_ODD), (64, 64, 16, 4, 3, 3), (128, 64, 16, 8, 3, 1)]
    elif precision in {"tf32", "tf32x3"}:
        shapes = [(64, 64, 16, 4, 3, 2), (64, 64, 32, 8, 3, 1), (128, 64, 32, 8, 3, 1)]
    else:
        shapes = [(64, 64, 32, 4, 3, 3), (64, 128, 32, 8, 3, 1), (128, 128, 32, 8, 3, 1)]
    return [configuration(*launch, BLOCK_M=i, BLOCK_N=j, BLOCK_C=c) for i, j, c, *launch in shapes]


def materialize(
    table: Table,
    out: Tensor | None = None,
    *,
    precision: Precision = "float32",
    chosen: Configuration | None = None,
) -> Tensor:
    """The dense ΔW of every layer, or ``out`` with them added: clients may come in several tables.

    Args:
        table: L layers (m, n).
        out: (L, m, n) float32, contiguous, on the table's device.
        precision: see ``project.py``. "bf16x3" needs bfloat16 in Q only. "bf16" rounds P·diag(d), and "tf32" rounds it
            to 10 bits: here alone do coefficients meet rounded numbers, because there is no intermediate to apply them
            to (for bf16 that is 5e-5 of excess, as measured for coefficients folded into bfloat16 factors).
        chosen: tile sizes to use in place of the tuned ones.

    Returns:
        (L, m, n) float32, ``out`` where it is given; zero for a layer without clients.

    Raises:
        ValueError: ``out`` of another shape, dtype, layout or device, or a precision that the factors do not allow.
        BackendError: where the kernel cannot run: CPU tensors outside Triton's interpreter.
    """
    check_precision("materialize", precision, Q=table.Q.dtype)
    add = out is not None
    out = checked_out("materialize", out, (table.layers, table.m, table.n), torch.float32, table.device)
    require_runnable("materialize", table.device, materialize_kernel)
    if out.numel() == 0 or table.W == 0:
        return out if add else out.zero_()
    c = chosen or best("materialize", configurations(precision), table.device, table.Q.dtype, precision)
    c = c.for_alignment(table.P.aligned and table.Q.aligned)
    tiles = table.layers * triton.cdiv(table.m, c["BLOCK_M"]) * triton.cdiv(table.n, c["BLOCK_N"])
    P, Q = table.P, table.Q
    sides = {f"{side.name}_{name}": value for side in (P, Q) for name, value in side.constants.items()}
    launch(
        materialize_kernel, tiles, c, table.device,
        table.offsets, P.address, P.stride, Q.address, Q.stride, table.d, out, table.m, table.n,
        **sides, PRECISION=precision, ADD=add, GROUP=GROUP,
    )  # fmt: skip
    return out
