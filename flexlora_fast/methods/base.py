"""What an aggregation method is: which blocks, with which column coefficients, make up a layer's ΔW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from flexlora_fast import named
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.stack import Block, Stack

Solve = Callable[[Stack, int], Factorization]


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


@dataclass(frozen=True)
class Base:
    """What clients add to a layer's frozen weight: the product of one or two matrices (b, …) float32.

    ``error``: ‖·‖_F of what was cut off from it, float64.
    """

    factors: tuple[Tensor, ...]
    error: float = 0.0


class Method:
    """A rule that turns contributions into the blocks of a stack.

    Subclasses set the class attributes and implement :meth:`blocks`; registering them in ``methods.METHODS`` makes
    them available by name everywhere. One with settings is a frozen dataclass whose fields they are.

    Attributes:
        name: what ``method=`` takes.
        summary: one line on what it is for. use: when to choose it. source: who proposed it, and where.
        clients: what clients must do beside training and loading adapters; empty for nothing.
        output: "svd" hands out truncated SVDs of ΔW; "slice" hands out the first columns of averaged factors as they
            are (methods that average factors keep their basis); "fresh" hands out new adapters (B = 0, A random by
            seed, layer and client), since the frozen weights take all of ΔW.
        trains: the factors that clients train; what is not there is frozen, and goes out as it came.
        merges: whether every client adds something to its frozen weights after the round (``GlobalUpdate.merge_into``).
        mixed: whether clients may have different ranks.
        gauge_invariant: whether (B·M, M⁻¹·A) gives the same result as (B, A).
        stacked: whether the blocks have all clients' columns, Σ r_i of them; else one has max r_i.
        folds: whether the blocks of some clients are the same alone as among the others and are all that is needed of
            them, so that ΔW can be summed up from groups of clients where a layer's factors do not fit in memory
            together.
        uniform: whether ΔW is all that is needed, the blocks are the factors as sent, and every column of a client has
            the coefficient w·s.
        linear: whether weights go into P and Q linearly, or into d, so that what parts of a round give adds up to what
            the whole gives.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    use: ClassVar[str] = ""
    source: ClassVar[str] = ""
    clients: ClassVar[str] = ""
    output: ClassVar[Literal["svd", "slice", "fresh"]] = "svd"
    trains: ClassVar[tuple[str, ...]] = ("A", "B")
    merges: ClassVar[bool] = False
    mixed: ClassVar[bool] = True
    gauge_invariant: ClassVar[bool] = True
    stacked: ClassVar[bool] = True
    folds: ClassVar[bool] = False
    uniform: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def __str__(self) -> str:
        """As ``method=`` would take it, settings that are not the default included."""
        return named.spelled(self)

    def blocks(self, contributions: Sequence[Contribution]) -> list[Block]:
        """The blocks whose sum Σ B·diag(d)·A is this method's ΔW for one layer.

        Raises ``OptionError``, naming a client, where contributions do not fit the method; the caller adds the layer.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement blocks()")

    def averages(self, contributions: Sequence[Contribution], stack: Stack) -> tuple[Tensor, Tensor]:
        """B̄ (b, m, r) and Ā (b, r, n) float32 that a method with ``output = "slice"`` hands out; ``stack``: of
        ``blocks``.
        """
        return stack.P, stack.Q

    def base(self, contributions: Sequence[Contribution], stack: Stack, solve: Solve) -> Base | None:
        """What clients add to the frozen weight, of a method that ``merges``; ``solve(stack, rank)`` gives certified
        triplets.
        """
        return None

    def limit(self, f: Factorization) -> int | None:
        """The most columns that adapters get, by the spectrum; None for as many as are asked for."""
        return None
