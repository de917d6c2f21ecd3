"""One layer of a global update: its certified leading triplets, and what clients make of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora_fast.errors import RankError
from flexlora_fast.factors import Split, pad, split_triplets
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.random import signs, stream


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW of one layer as its leading singular triplets, with their certificate.

    Attributes:
        spec: names and shapes of the layer.
        factorization: U (E, m, k), S (E, k), V (E, n, k), energy (E,); E is 1 but for MoE experts.
        total_rank: R, the sum of the clients' ranks in this layer; min(m, n) where they are secret (``secure``).
        averaged: for methods that average factors (``output = "slice"``), their B̄ (E, m, r) and Ā (E, r, n), whole:
            adapters are then their first columns instead of singular triplets.
        bias: Σ w·s·(lora_B.bias) (m,), where clients train one.
        inherited: in a merged update, a bound of ‖·‖_F of what the updates it was made of had left out of ΔW. All
            else here is of what they kept: ``norm`` is within ``inherited`` of ‖ΔW‖_F, and ``error`` has it in it.
        base: for methods whose clients add a part of ΔW to their frozen weight (``merges``), that part: matrices
            (E, m, c) and (E, c, n) whose product it is, or one (E, m, n) where that is smaller. Without ``averaged`` it
            is all of ΔW, and adapters are new ones (``fresh``).
        base_error: ‖·‖_F of what was cut off from ``base``.
        frozen: the averaged A is the clients' own, which they do not train: it goes out unchanged, whatever the scale.
        limit: the most columns that an adapter gets, however many are asked for (FLoRIST); None where there is no such.
    """

    spec: LayerSpec
    factorization: Factorization
    total_rank: int
    averaged: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    inherited: float = 0.0
    base: tuple[Tensor, ...] | None = None
    base_error: float = 0.0
    frozen: bool = False
    limit: int | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def S(self) -> Tensor:
        """The kept spectrum, float64, descending: (k,), or (E, k) for the experts of a MoE layer."""
        S = self.factorization.S
        return S if self.spec.kind == "moe" else S[0]

    @property
    def merges(self) -> bool:
        """Whether clients add something to their frozen weight here."""
        return self.base is not None

    @property
    def fresh(self) -> bool:
        """Whether the frozen weight takes all of ΔW, and adapters begin anew."""
        return self.merges and self.averaged is None

    @property
    def rank(self) -> int:
        """k, the largest rank an adapter can be cut to."""
        return self.averaged[1].shape[1] if self.any_rank and self.averaged else self.factorization.S.shape[1]

    @property
    def energy(self) -> float:
        """‖ΔW‖_F² (over all experts), float64."""
        return float(self.factorization.energy.sum())

    @property
    def energy_error(self) -> float:
        """Standard error of ``energy`` where it was estimated (``certificate="estimate"``); 0 where it was computed."""
        error = self.factorization.energy_error
        return 0.0 if error is None else float(error.square().sum().sqrt())

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return self.energy**0.5

    @property
    def solver(self) -> str:
        return self.factorization.solver

    @property
    def iterations(self) -> int:
        return self.factorization.iterations

    @property
    def excess(self) -> float:
        """Estimated excess of the rank-k result; 0 where the solver is exact."""
        return self.factorization.excess

    @property
    def complete(self) -> bool:
        """Whether the triplets hold all of ΔW, so that any higher rank is as good."""
        return self.factorization.S.shape[1] >= min(self.total_rank, self.spec.m, self.spec.n)

    @property
    def any_rank(self) -> bool:
        """Whether adapters of any rank can be made: nothing was cut off that a higher one would hold."""
        return self.complete or self.merges or self.limit is not None

    def given(self, rank: int) -> int:
        """The rank of an adapter that ``rank`` was asked for: the same, or ``limit`` where that is less."""
        return rank if self.limit is None else min(rank, self.limit)

    def error(self, rank: int) -> float:
        """‖ΔW − ΔW_rank‖_F of the adapter of that rank (and what goes into the frozen weight, where there is
        such): √(‖ΔW‖_F² − Σ_{j≤rank} σ_j²). An upper bound of it in a merged update with ``inherited``, and where
        ``base`` and the adapter were both cut.

        Resolved down to about 1e-8·‖ΔW‖ for exact solvers and 5e-4·‖ΔW‖ for those that iterate in float32; its
        standard error is energy_error / (2·error) where the energy was estimated.
        Raises ``RankError`` beyond what is kept, unless nothing was cut off.
        """
        return self.cut_off(rank) + self.inherited + self.base_error

    def cut_off(self, rank: int) -> float:
        """‖·‖_F of what an adapter of that rank leaves out of what is known here: ``error`` but for ``inherited`` and
        ``base_error``.
        """
        self.check_rank(rank, lowest=0)
        if self.fresh:
            return 0.0
        if self.averaged:
            return self._slice_error(rank)
        kept = float(self.factorization.S[:, :rank].square().sum())
        return max(0.0, self.energy - kept) ** 0.5

    def energy_kept(self, rank: int) -> float:
        """The share of ‖ΔW‖_F² that an adapter of that rank holds (with what goes into the frozen weight), 0…1 (1
        where ΔW is zero); of what was kept of it, where there is something ``inherited``.
        """
        return 1.0 - self.cut_off(rank) ** 2 / self.energy if self.energy else 1.0

    def check_rank(self, rank: int, lowest: int = 1) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise RankError(f"rank {rank!r} is no integer", layer=self.name)
        if rank < lowest:
            raise RankError(f"rank {rank} is below {lowest}", layer=self.name)
        if not self.any_rank and rank > self.rank:
            raise RankError(
                f"rank {rank} is more than the {self.rank} triplets this update keeps; "
                f"aggregate again with rank={rank} or more",
                layer=self.name,
            )

    def _slice_error(self, rank: int) -> float:
        """‖B̄·Ā − B̄[:, :rank]·Ā[:rank]‖_F: the norm of the columns cut off, from their Grams in float64."""
        assert self.averaged is not None
        B, A = (X.double() for X in self.averaged)
        B, A = B[:, :, rank:], A[:, rank:]
        return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0)) ** 0.5

    def base_delta(self) -> Tensor | None:
        """What clients add to the frozen weight, (E, m, n) float32; None where that is nothing."""
        if self.base is None:
            return None
        return self.base[0] if len(self.base) == 1 else self.base[0] @ self.base[1]

    def factors(self, rank: int, split: Split, seed: int = 0, client: str = "") -> tuple[Tensor, Tensor]:
        """A (E, rank, n) and B (E, m, rank), float32, with B·A = ΔW_rank; the scale is not in them.

        Columns beyond the rank of ΔW hold no update but stay trainable: one factor is zero, the other has unit
        rows (as LoRA's own initialisation has).
        Where the frozen weight takes all, they are those of a new adapter, which ``seed`` and ``client`` address.
        """
        self.check_rank(rank)
        if self.fresh:
            return self._begun(rank, split, stream(seed, f"{self.name}/{client}"))
        key = stream(seed, self.name)
        if self.averaged:
            B, A = self.averaged
            return pad(A[:, :rank], B[:, :, :rank], rank, "B" if self.frozen else split, key)
        A, B = split_triplets(self.factorization, rank, split)
        return pad(A, B, rank, split, key)

    def _begun(self, rank: int, split: Split, key: int) -> tuple[Tensor, Tensor]:
        """One factor zero (B, but for split "A"), the other of random signs with the variance 1/(3·n) that PEFT's
        initialisation has, uniform on ±1/√n. On the CPU.
        """
        E, m, n = self.spec.experts, self.spec.m, self.spec.n
        if split == "A":
            return torch.zeros(E, rank, n), (signs(rank, m, key, batch=E) / (3 * m) ** 0.5).mT
        return signs(rank, n, key, batch=E) / (3 * n) ** 0.5, torch.zeros(E, m, rank)
