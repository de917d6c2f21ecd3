"""Host functions of the CUDA kernels in csrc/cuda, one an operation: arguments checked, geometry, launch.

The geometry (grid, block, dynamic shared memory) is here alone, whichever way the kernels were compiled
(``launcher``); the formulas are those at the top of each kernel's file. Every function waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast.backends.launcher import launch

_THREADS = 256
_MOST_BLOCKS = 65535  # of a grid's second extent


def signs(addresses: Sequence[tuple[int, int]], rows: int, cols: int, *, device: torch.device) -> Tensor:
    """Matrices (len(addresses), rows, cols) of ±1 in float32: ``lowrank.random.signs_of``, bit for bit.

    Raises ``ValueError`` where a matrix has 2³² entries or more.
    """
    quads = rows * -(-cols // 4)
    if quads >= 1 << 30:
        raise ValueError(f"signs of {rows} rows and {cols} columns: a matrix must have less than 2^32 entries")
    out = torch.empty(len(addresses), rows, cols, device=device)
    if out.numel() == 0:
        return out
    pairs = torch.tensor(list(addresses), dtype=torch.int64).to(device)
    grid = (len(addresses), min(-(-quads // _THREADS), _MOST_BLOCKS))
    launch("flexlora_signs", grid, (_THREADS,), (pairs, rows, cols, out), device=device)
    return out
