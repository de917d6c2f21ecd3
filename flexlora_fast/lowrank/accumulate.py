"""ΔW summed up from stacks that come one after another: for rounds whose factors do not fit in memory together."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from flexlora_fast.backends import cpu
from flexlora_fast.lowrank.dense import solve_matrix
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.plan import FLOAT32_TOL
from flexlora_fast.lowrank.random import stream
from flexlora_fast.lowrank.solve import check_norm, in_range
from flexlora_fast.stack import Stack

_ROWS = 256  # of ΔW at a time where a piece needs float64


class Accumulator:
    """D = 2^-e·Σ P·diag(d)·Q in float32 over the stacks given to ``add``.

    e is 0 but for factors that float32 products could not hold; the sum itself is exact to float32 rounding.
    """

    def __init__(self, m: int, n: int, batch: int = 1, device: torch.device | None = None) -> None:
        self._D = torch.zeros(batch, m, n, dtype=torch.float32, device=device)
        self._exponent: int | None = None

    def add(self, stack: Stack, name: str = "") -> None:
        """Add one stack's ΔW. Raises ``AdapterError`` for factors that are not finite."""
        if not stack.blocks:
            return
        if in_range(stack, name):
            self.settle(0)
            assert self._exponent is not None
            factor = math.ldexp(1.0, -self._exponent)
            blocks = [dataclasses.replace(block, d=block.d * factor) for block in stack.blocks] if factor != 1 else None
            cpu.materialize(Stack(blocks, stack.m, stack.n, stack.batch) if blocks else stack, out=self._D)
            return
        P, c, Q = stack.equilibrated()
        top = float(c.abs().max())
        if top == 0:
            return
        self.settle(math.frexp(top)[1])
        assert self._exponent is not None
        c = c * math.ldexp(1.0, -self._exponent)
        for lo in range(0, stack.m, _ROWS):
            rows = slice(lo, lo + _ROWS)
            self._D[:, rows] += ((P[:, rows] * c.unsqueeze(1)) @ Q).to(torch.float32)

    def take(self, D: Tensor) -> None:
        """Have D (b, m, n) float32 for the sum, with e = 0; it is kept, not copied."""
        self._D, self._exponent = D, 0

    def settle(self, exponent: int) -> None:
        """Have the common exponent at least this large."""
        if self._exponent is not None and exponent > self._exponent:
            self._D *= math.ldexp(1.0, max(self._exponent - exponent, -1000))
        self._exponent = exponent if self._exponent is None else max(exponent, self._exponent)

    def solve(self, rank: int, *, tol: float, seed: int, name: str) -> Factorization:
        """The best rank-``rank`` approximation of the sum, as ``lowrank.solve`` gives it with solver "dense".

        Raises ``AdapterError`` where ΔW is too large for float32.
        """
        result = solve_matrix(self._D, rank, stream(seed, name), max(tol, FLOAT32_TOL))
        factor = math.ldexp(1.0, self._exponent or 0)
        result = dataclasses.replace(result, S=result.S * factor, energy=result.energy * factor**2)
        check_norm(result, name)
        return result

    @property
    def exponent(self) -> int | None:
        """e; None while nothing was added."""
        return self._exponent

    @property
    def matrix(self) -> Tensor:
        """2^-e·ΔW (b, m, n)."""
        return self._D
