"""What an aggregation method is: which blocks, with which column coefficients, make up a layer's ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from flexlora_fast.stack import Block


@dataclass(frozen=True)
class Contribution:
    """One client's part in one layer.

    Attributes:
        client: its name.
        A, B: (b, r, n) and (b, m, r), as sent.
        scale: s, with ΔW_i = s·B·A.
        weight: w, the client's share in this layer; the shares sum to at most 1.
    """

    client: str
    A: Tensor
    B: Tensor
    scale: float
    weight: float

    @property
    def rank(self) -> int:
        return self.A.shape[1]


class Method:
    """A rule that turns contributions into the blocks of a stack.

    Subclasses set the class attributes and implement :meth:`blocks`; registering them in ``methods.METHODS`` makes
    them available by name everywhere.

    Attributes:
        name: what ``method=`` takes.
        summary: one line on what it is for.
        output: "svd" hands out truncated SVDs of ΔW; "slice" hands out the first columns of the one averaged block
            as they are (methods that average factors keep their basis).
        gauge_invariant: whether (B·M, M⁻¹·A) gives the same result as (B, A).
        folds: whether the blocks of some clients are the same alone as among the others, so that ΔW can be summed up
            from groups of clients where a layer's factors do not fit in memory together.
        uniform: whether the blocks are the factors as sent, and every column of a client has the coefficient w·s.
        linear: whether weights go into P and Q linearly, or into d, so that what parts of a round give adds up to what
            the whole gives.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    output: ClassVar[Literal["svd", "slice"]] = "svd"
    gauge_invariant: ClassVar[bool] = True
    folds: ClassVar[bool] = False
    uniform: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        """The blocks whose sum Σ B·diag(d)·A is this method's ΔW for one layer."""
        raise NotImplementedError(f"{type(self).__name__} must implement blocks()")
