"""Products with ΔW and its transpose, without ΔW, for all layers of one shape.

    ΔW·X  = P·(d ∘ (Q·X))          X (n, l), Q·X (R, l), ΔW·X (m, l)
    ΔWᵀ·Y = Qᵀ·(d ∘ (Pᵀ·Y))        Y (m, l), Pᵀ·Y (R, l), ΔWᵀ·Y (n, l)

Each factor is read once. The intermediate of a layer needs all of Q before any of P can use it, which is more than one
multiprocessor holds: it stays in L2 instead. Layers are taken in groups whose intermediates (W × l each) fit a quarter
of L2, and all groups write to one buffer; so what ``contract.py`` writes, ``combine.py`` finds in L2, and the buffer is
overwritten before it is evicted. Grouping does not change any bit of the result.

Precisions, of every operation on a table:

    "float32"  float32 products and sums on the CUDA cores; factors are raised to float32 as they are loaded
    "bf16x3"   bfloat16 factors exactly as they are, times the other operand as the sum of three bfloat16 numbers, which
               hold its 24 bits: float32's accuracy at a third of bfloat16's rate. Only for bfloat16 factors
    "tf32x3"   float32 products from three TF32 products: about float32's accuracy, for any factors
    "tf32"     operands rounded to TF32's 10 bits (which hold 16-bit factors, normal ones, exactly)
    "bf16"     operands rounded to bfloat16, intermediates too; factors that are bfloat16 stay as they are

Sums are float32 in all of them, and coefficients are applied to float32 numbers.

Reference: FlexLoRA, arXiv 2402.11505, equation 3 (ΔW = Σ w_i·s_i·B_i·A_i), applied from right to left.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flexlora_fast.kernels._triton import require_runnable
from flexlora_fast.kernels.combine import combine
from flexlora_fast.kernels.configuration import Precision, check_precision
from flexlora_fast.kernels.contract import contract, contract_kernel
from flexlora_fast.kernels.operand import checked_operand, element
from flexlora_fast.kernels.table import Side, Table


def project(table: Table, X: Tensor, *, precision: Precision = "float32") -> Tensor:
    """ΔW·X = P·(d ∘ (Q·X)).

    Args:
        table: L layers (m, n).
        X: (L, n, l), float16, bfloat16 or float32, on the table's device.
        precision: see above.

    Returns:
        (L, m, l) float32; zero for a layer without clients.

    Raises:
        ValueError: X of another shape, dtype or device, an unknown precision, or one that the factors do not allow.
        BackendError: where the kernels cannot run: CPU tensors outside Triton's interpreter.
    """
    return _through("project", "X", table, X, table.Q, table.P, precision)


def project_t(table: Table, Y: Tensor, *, precision: Precision = "float32") -> Tensor:
    """ΔWᵀ·Y = Qᵀ·(d ∘ (Pᵀ·Y)).

    Args:
        table: L layers (m, n).
        Y: (L, m, l), float16, bfloat16 or float32, on the table's device.
        precision: see above.

    Returns:
        (L, n, l) float32; zero for a layer without clients.

    Raises:
        ValueError, BackendError: as ``project``.
    """
    return _through("project_t", "Y", table, Y, table.P, table.Q, precision)


def _through(op: str, name: str, table: Table, X: Tensor, inner: Side, outer: Side, precision: Precision) -> Tensor:
    """outer · (d ∘ (innerᵀ · X)), by groups of layers."""
    check_precision(op, precision, P=table.P.dtype, Q=table.Q.dtype)
    X = checked_operand(op, name, X, table, inner.length, precision)
    require_runnable(op, table.device, contract_kernel)
    width = X.shape[2]
    out = torch.empty(table.layers, outer.length, width, device=table.device)
    if table.W == 0:
        return out.zero_()
    size = max(1, l2_budget(table.device) // max(1, table.W * width * element(precision).itemsize))
    buffer = torch.empty(min(size, table.layers), table.W, width, dtype=element(precision), device=table.device)
    for layers, group in table.groups(size):
        Z = contract(group, X[layers], side=inner.name, precision=precision, out=buffer[: group.layers])
        combine(group, Z, side=outer.name, precision=precision, out=out[layers])
    return out


@cache
def l2_budget(device: torch.device) -> int:
    """Bytes of intermediates that stay in L2 beside the factors that stream through it: a quarter of it."""
    if device.type != "cuda":
        return 2**20
    return int(torch.cuda.get_device_properties(device).L2_cache_size) // 4
