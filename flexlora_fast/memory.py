"""How much memory a round may use, and a model of what each way to solve a layer needs.

The model counts what lives at the same time at the worst moment, in bytes, beside the factors as they were read. It is
meant to be a little above the truth; ``tests/test_memory.py`` holds it against measured peaks.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path

import torch

from flexlora_fast.errors import OptionError
from flexlora_fast.lowrank.plan import Shape

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")}
_UNITS |= {f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")}
# Columns that are added to a dense ΔW at once: enough for full GEMM speed, and a fixed number, so that results do not
# depend on the limit.
PIECE_COLUMNS = 1024


def parse_limit(limit: int | str | None) -> int:
    """Bytes from a number or a text with a unit; None gives ``default_limit``.

    Raises ``OptionError`` for anything else.

    >>> parse_limit("2GiB"), parse_limit("512 MB"), parse_limit(4096)
    (2147483648, 512000000, 4096)
    """
    if limit is None:
        return default_limit()
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", limit, re.ASCII)
        if found and found[2].lower() in _UNITS and len(found[1]) < 20:
            limit = int(float(found[1]) * _UNITS[found[2].lower()])
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise OptionError(f"memory_limit is {limit!r}; give bytes or a text such as '2GiB' or '512MB'")
    return limit


def default_limit() -> int:
    """Half of this machine's memory, or of what its control group allows: the same from run to run."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total // 2


def free(device: torch.device) -> int:
    """Bytes of a device's memory that are free for a round."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return default_limit()


def room(device: torch.device, limit: int | str | None) -> int:
    """Bytes of the device's memory that a round may take: what is free, and no more than ``limit`` where it is given.

    Raises ``OptionError`` as ``parse_limit`` does.
    """
    if device.type == "cpu":
        return parse_limit(limit)
    there = free(device) * 9 // 10  # the rest is lost between torch's blocks
    return there if limit is None else min(there, parse_limit(limit))


def staged(room: int) -> int:
    """The share of a device's memory for factors on their way there."""
    return room // 4


def show(nbytes: float) -> str:
    """Bytes for people.

    >>> show(2 * 1024**3), show(300_000)
    ('2.0 GiB', '0.3 MiB')
    """
    return f"{nbytes / 1024**3:.1f} GiB" if nbytes >= 1024**3 else f"{nbytes / 1024**2:.1f} MiB"


def scratch(solver: str, shape: Shape) -> int:
    """Peak bytes of a solve of ``shape`` with all factors at hand, beside the factors and the result."""
    m, n, R, k, s = shape.m, shape.n, max(shape.R, 1), shape.k, shape.short
    packed = 8 * (m + n) * R + 8 * max(m, n) * R  # both sides in float64, and one more while it is made
    out = 16 * (m + n) * k
    basis = math.ceil(4 * 4 * (m + n) * shape.basis(s))
    if solver == "filtered":
        total = packed + 8 * 4 * R * R + 40 * (R + max(m, n)) * (k + 16) + out
    elif solver == "svd" or (solver == "gram" and s <= R):
        side = {"svd": 8 * (2 * m * n + 4 * s * s), "gram": 8 * (m * n + 5 * s * s)}[solver]
        total = packed + side + out
    elif solver in ("gram", "krylov"):
        total = packed + 8 * 10 * R * R + out
    elif solver == "dense":
        total = 4 * m * n + 4 * (m + n) * min(R, PIECE_COLUMNS) + basis + out
    else:
        total = packed // 2 + basis + 8 * R * R + out
    return shape.batch * total


def scratch_noised(solver: str, shape: Shape) -> int:
    """Peak bytes of solving a noised matrix ("dense", "factored" or "subspace"), beside what makes it."""
    if solver == "dense":
        return scratch(solver, shape)
    both = shape.m + shape.n
    columns = shape.basis(shape.short) if solver == "factored" else 1.2 * shape.k + 10
    return shape.batch * (math.ceil(16 * both * columns) + 16 * both * shape.k)


def scratch_folded(shape: Shape, widest: int) -> int:
    """Peak bytes of accumulating ΔW piece by piece and solving it, beside the pieces as they were read.

    ``widest``: the largest rank of one client.
    """
    columns = min(max(shape.R, 1), PIECE_COLUMNS + widest)
    return scratch("dense", shape) + shape.batch * 4 * (shape.m + shape.n) * columns


def piece_bytes(nbytes: int, total_rank: int, widest: int, piece: int = PIECE_COLUMNS) -> int:
    """Bytes of the largest piece of a layer whose factors take ``nbytes`` in all: their share by columns.

    Doubled, since the clients of one piece may send a wider dtype than the average.
    """
    columns = min(total_rank, piece + widest)
    return min(nbytes, 2 * math.ceil(nbytes * columns / max(total_rank, 1)))
