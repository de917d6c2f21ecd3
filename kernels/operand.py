"""What goes into a kernel and comes out: checked, thin operands in the type that their precision multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora_fast.kernels._triton import ELEMENTS
from flexlora_fast.kernels.configuration import Precision
from flexlora_fast.kernels.table import Table


def element(precision: Precision) -> torch.dtype:
    """The type of thin operands and intermediates: what "bf16" rounds them to anyway moves half the bytes."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def require_int32(op: str, what: str, entries: int) -> None:
    """Raise ValueError where a layer's matrix has more entries than the kernels count."""
    if entries >= 2**31:
        raise ValueError(f"{op}: {what} has {entries} entries a layer: at most {2**31 - 1} fit; take fewer columns")


def checked_operand(op: str, name: str, X: Tensor, table: Table, rows: int, precision: Precision) -> Tensor:
    """X (L, rows, l), contiguous and in the type of ``precision``; ValueError where it does not fit the table."""
    if X.dim() != 3 or X.shape[:2] != (table.layers, rows):
        raise ValueError(
            f"{op}: {name} is {tuple(X.shape)}: expected ({table.layers}, {rows}, l) for a table of {table.layers} "
            f"layers of (m, n) = {(table.m, table.n)} and at most {table.W} columns"
        )
    if X.dtype not in ELEMENTS:
        raise ValueError(f"{op}: {name} is {X.dtype}: expected float16, bfloat16 or float32")
    if X.device != table.device:
        raise ValueError(f"{op}: {name} is on {X.device} and the table on {table.device}: move them together")
    require_int32(op, name, rows * X.shape[2])
    return X.detach().to(element(precision)).contiguous()


def checked_out(
    op: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``out``, or a new tensor; ValueError where it is not what the kernel writes."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else f"with strides {out.stride()}"
        raise ValueError(
            f"{op}: out is {tuple(out.shape)}, {out.dtype}, on {out.device}, {layout}: "
            f"expected {shape}, {dtype}, on {device}, contiguous"
        )
    return out
