"""The stack of one layer: all clients' factors side by side, ΔW = P·diag(d)·Q."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One pair of factors of a stack: usually one client's.

    Attributes:
        B: (b, m, r), any floating dtype. ``b`` counts matrices of one shape (experts of a MoE layer), else 1.
        A: (b, r, n), any floating dtype.
        d: (r,) float64, the coefficient of each column: ΔW gets B·diag(d)·A.
    """

    B: Tensor  # (b, m, r)
    A: Tensor  # (b, r, n)
    d: Tensor  # (r,)

    def __post_init__(self) -> None:
        b, _, r = self.B.shape
        if self.A.shape[:2] != (b, r) or self.d.shape != (r,):
            raise ValueError(
                f"block shapes disagree: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}, d {tuple(self.d.shape)}; "
                "expected (b, m, r), (b, r, n), (r,)"
            )


class Stack:
    """A table of blocks in canonical client order, with the packed forms that the solvers read.

    P = [B_1 … B_K] is (b, m, R), Q = [A_1; …; A_K] is (b, R, n), d is (R,), R = Σ r_i.
    The blocks themselves are never modified. ``grams``: gives PᵀP and QQᵀ (b, R, R) float32, for the caller to keep,
    where they are known already.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        m: int,
        n: int,
        batch: int = 1,
        grams: Callable[[], tuple[Tensor, Tensor] | None] | None = None,
    ) -> None:
        self.blocks = [block for block in blocks if block.d.numel()]
        self.grams = grams
        self.m, self.n, self.batch = m, n, batch
        for block in self.blocks:
            got = (block.B.shape[0], block.B.shape[1], block.A.shape[2])
            if got != (batch, m, n):
                raise ValueError(f"block of shape (b, m, n) = {got} in a stack of {(batch, m, n)}")

    @property
    def R(self) -> int:
        return sum(block.d.numel() for block in self.blocks)

    @cached_property
    def d(self) -> Tensor:
        """(R,) float64."""
        return torch.cat([block.d for block in self.blocks]) if self.blocks else torch.zeros(0, dtype=torch.float64)

    @cached_property
    def P(self) -> Tensor:
        """(b, m, R) float32."""
        return self.packed_P(torch.float32)

    @cached_property
    def Q(self) -> Tensor:
        """(b, R, n) float32."""
        return self.packed_Q(torch.float32)

    def packed_P(self, dtype: torch.dtype) -> Tensor:
        """[B_1 … B_K], (b, m, R), a new tensor."""
        empty = torch.zeros(self.batch, self.m, 0, dtype=dtype, device=self.device)
        return torch.cat([empty, *(block.B.to(dtype) for block in self.blocks)], dim=2)

    def packed_Q(self, dtype: torch.dtype) -> Tensor:
        """[A_1; …; A_K], (b, R, n), a new tensor."""
        empty = torch.zeros(self.batch, 0, self.n, dtype=dtype, device=self.device)
        return torch.cat([empty, *(block.A.to(dtype) for block in self.blocks)], dim=1)

    @property
    def sixteen(self) -> bool:
        """Whether all factors are bfloat16."""
        return all(X.dtype == torch.bfloat16 for block in self.blocks for X in (block.B, block.A))

    @property
    def device(self) -> torch.device:
        return self.blocks[0].B.device if self.blocks else torch.device("cpu")

    def equilibrated(self) -> tuple[Tensor, Tensor, Tensor]:
        """ΔW = P̂·diag(c)·Q̂ in float64, with unit columns in P̂ and unit rows in Q̂.

        Returns P̂ (b, m, R), c (b, R), Q̂ (b, R, n). The scaling takes a badly balanced pair (1e6·B, 1e-6·A) out of
        the Gram matrices, where it would square.
        """
        P, Q = self.packed_P(torch.float64), self.packed_Q(torch.float64)
        p = torch.linalg.vector_norm(P, dim=1)  # (b, R)
        q = torch.linalg.vector_norm(Q, dim=2)  # (b, R)
        c = self.d.to(P.device) * p * q
        p = torch.where(p > 0, p, torch.ones_like(p))
        q = torch.where(q > 0, q, torch.ones_like(q))
        return P.div_(p.unsqueeze(1)), c, Q.div_(q.unsqueeze(2))
