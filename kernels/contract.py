"""The first half of a product with ΔW: Z = d ∘ (Q·X), or d ∘ (Pᵀ·Y), for all layers of one shape.

    Z[c, :] = d[c] · Σ_i F[i, c] · X[i, :]        F = Qᵀ (n, R) or P (m, R), X (n or m, l), Z (R, l)

A tile of Z is BLOCK_C columns of the table by BLOCK_L columns of X. Its column addresses are loaded once; then it walks
along the rows, which for Q are contiguous and for P come in neighbouring columns. Tiles that read the same columns
follow each other, so that for l > BLOCK_L the factors are read from memory once and then from L2.

The sum has a fixed shape: parts of PART rows, each summed in order, the parts added in order. Where a table has too few
tiles for the GPU, other programs compute the parts and ``parts.py`` adds them: the same sum, bit for bit.

Reference: FlexLoRA, arXiv 2402.11505, equation 3 (ΔW = Σ w_i·s_i·B_i·A_i), applied from right to left.
"""

from __future__ import annotations

from typing import Literal

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
from flexlora_fast.kernels.operand import checked_operand, checked_out, element, require_int32
from flexlora_fast.kernels.parts import scratch, split, sum_parts
from flexlora_fast.kernels.table import Side, Table
from flexlora_fast.kernels.tiles import column_pointers, layer_columns, load_factor, multiply


@triton.jit(do_not_specialize=["layers", "W", "tiles"], do_not_specialize_on_alignment=["offset_ptr"])
def contract_kernel(
    offset_ptr,  # [L+1] int64
    address_ptr,  # [C] int64
    stride_ptr,  # [C] int64
    d_ptr,  # [C] float32
    X_ptr,  # [L, length, l]
    Z_ptr,  # [L, W, l], or the parts of it [parts, L, W, l]
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
    SPLIT: tl.constexpr,  # each part is a tile, and d is left to sum_parts
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
):
    tiles_l, tiles_c, parts = tl.cdiv(width, BLOCK_L), tl.cdiv(W, BLOCK_C), tl.cdiv(length, PART)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        columns_X = (tile % tiles_l) * BLOCK_L + tl.arange(0, BLOCK_L)
        rest = tile // tiles_l
        low, high = 0, parts
        if SPLIT:
            low, rest = rest % parts, rest // parts
            high = low + 1
        c = (rest % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        layer = (rest // tiles_c).to(tl.int64)
        first, R = layer_columns(offset_ptr, layer, RUN)
        pointers, strides = column_pointers(address_ptr, stride_ptr, first + c, c < R, ELEMENT, INDEX, RUN, BYTES)
        X_layer = X_ptr + layer * length * width
        # Tiles beyond this layer's columns are zero without a look at X.
        high = tl.where((rest % tiles_c) * BLOCK_C < R, high, low)
        total = tl.zeros((BLOCK_C, BLOCK_L), dtype=tl.float32)
        for part in range(low, high):
            in_part = tl.zeros((BLOCK_C, BLOCK_L), dtype=tl.float32)
            for start in range(part * PART, tl.minimum(part * PART + PART, length), BLOCK_K):
                i = start + tl.arange(0, BLOCK_K)
                inside = (c[:, None] < R) & (i[None, :] < length)
                F = load_factor(pointers[:, None], strides[:, None], i[None, :], inside, INDEX, UNIT)
                X = tl.load(
                    X_layer + (i[:, None] * width + columns_X[None, :]),
                    mask=(i[:, None] < length) & (columns_X[None, :] < width),
                    other=0.0,
                )
                in_part = multiply(F, X, in_part, PRECISION, False)
            total += in_part
        if SPLIT:
            Z_layer = Z_ptr + (tl.cast(low, tl.int64) * layers + layer) * W * width
        else:
            Z_layer = Z_ptr + layer * W * width
            total *= tl.load(d_ptr + first + c, mask=c < R, other=0.0)[:, None]
        tl.store(
            Z_layer + (c[:, None] * width + columns_X[None, :]),
            total.to(Z_ptr.dtype.element_ty),
            mask=(c[:, None] < W) & (columns_X[None, :] < width),
        )


def configurations(precision: Precision, length: int, width: int) -> list[Configuration]:
    """Candidates for sums over ``length`` rows and ``l`` columns of X; the first is the best guess."""
    L = padded(width)
    if precision == "float32":
        # Sums on CUDA cores hold whole operand tiles in registers: deeper tiles spill.
        shapes = [(64, L, 16, 4, 3, 4)] if L <= 32 else [(64, 64, 16, 8, 3, 2, FMA_ODD), (32, 64, 16, 4, 3, 4)]
    elif precision in {"tf32", "tf32x3"}:
        shapes = [(64, min(L, 64), 16, 4, 3, 2), (64, min(L, 64), 32, 8, 4, 1), (128, min(L, 64), 32, 8, 3, 1)]
    elif precision == "bf16x3":
        shapes = [
            (64, min(L, 64), 32, 8, 3, 2),
            (64, min(L, 64), 32, 4, 3, 3),
            (128, min(L, 64), 32, 8, 3, 1),
            (64, L, 32, 8, 3, 1),
        ]
    else:
        shapes = [(64, min(L, 64), 64, 8, 3, 2), (64, L, 64, 8, 3, 1), (128, min(L, 64), 64, 8, 3, 1)]
    return [
        configuration(*launch, BLOCK_C=c, BLOCK_L=w, BLOCK_K=min(k, padded(length)), PART=part)
        for part in (1024, 4096)
        for c, w, k, *launch in dict.fromkeys(shapes)
    ]


def contract(
    table: Table,
    X: Tensor,
    *,
    side: Literal["P", "Q"] = "Q",
    precision: Precision = "float32",
    out: Tensor | None = None,
    chosen: Configuration | None = None,
) -> Tensor:
    """Z = d ∘ (Q·X), or d ∘ (Pᵀ·X) for side "P".

    Args:
        table: L layers (m, n) of at most W columns.
        X: (L, n, l), or (L, m, l) for side "P"; float16, bfloat16 or float32.
        side: which factors to multiply with.
        precision: see ``project.py``.
        out: (L, W, l) of the type below, contiguous: where to put Z.
        chosen: tile sizes to use in place of the tuned ones.

    Returns:
        Z (L, W, l) float32 (bfloat16 for precision "bf16"), zero beyond a layer's own R.

    Raises:
        ValueError: X of another shape, dtype or device, an unknown precision, or one that the factors do not allow.
        BackendError: where the kernel cannot run: CPU tensors outside Triton's interpreter.
    """
    F = table.side(side)
    check_precision("contract", precision, **{F.name: F.dtype})
    X = checked_operand("contract", "X", X, table, F.length, precision)
    width = X.shape[2]
    require_int32("contract", "the result", table.W * width)
    out = checked_out("contract", out, (table.layers, table.W, width), element(precision), table.device)
    require_runnable("contract", table.device, contract_kernel)
    if out.numel() == 0 or F.length == 0:
        return out.zero_()
    candidates = configurations(precision, F.length, width)
    c = chosen or best("contract " + F.name, candidates, table.device, F.dtype, precision, padded(width))
    _contract(table, F, X, out, precision, c.for_alignment(F.aligned and width % 16 == 0))
    return out


def _contract(table: Table, F: Side, X: Tensor, out: Tensor, precision: Precision, c: Configuration) -> None:
    """Launch the kernel, in parts where there are too few tiles."""
    width = X.shape[2]
    parts = triton.cdiv(F.length, c["PART"])
    tiles = table.layers * triton.cdiv(table.W, c["BLOCK_C"]) * triton.cdiv(width, c["BLOCK_L"])
    in_parts = split(tiles, parts, c, table.device)
    target = scratch(parts, out) if in_parts else out
    launch(
        contract_kernel, tiles * parts if in_parts else tiles, c, table.device,
        table.offsets, F.address, F.stride, table.d, X, target, table.layers, F.length, table.W, width,
        **F.constants, PRECISION=precision, SPLIT=in_parts,
    )  # fmt: skip
    if in_parts:
        sum_parts(table, target, out, scaled=True)
