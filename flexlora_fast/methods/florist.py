"""FLoRIST: FlexLoRA's sum, cut where the spectrum holds enough of the energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexlora_fast.errors import OptionError
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.methods.flexlora import FlexLoRA


@dataclass(frozen=True)
class FLoRIST(FlexLoRA):
    """ΔW as FlexLoRA's, and in each layer adapters of at most p columns: the fewest with Σ_{j≤p} σ_j² ≥ τ·‖ΔW‖_F².

    Source: Ramesh et al., "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of
    Large Language Models", MLSys 2026 (arXiv 2506.09199). A client gets min(its own rank, p) columns. Experts of a MoE
    layer have one p, by the energy of all of them. Where τ asks for more columns than the round keeps (``rank``,
    default: the largest that a client has), nothing is cut.

    Args:
        tau: τ, the share of the energy to keep, in (0, 1].
    """

    tau: float = 0.9

    name = "florist"
    summary = "exact sum; an energy threshold tau chooses each layer's rank, for shorter downloads (mixed ranks)"
    use = "where updates have far fewer useful directions than the clients' ranks"
    source = "Ramesh et al., MLSys 2026, arXiv 2506.09199"
    clients = "train at the rank of the adapter they get, which may be below their own"

    def __post_init__(self) -> None:
        number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        if not number or not 0 < self.tau <= 1:
            raise OptionError(f"florist: tau is {self.tau!r}; give a number > 0 and ≤ 1")

    def limit(self, f: Factorization) -> int | None:
        """p, or None where the columns that are kept hold less than τ."""
        energy = float(f.energy.sum())
        if not energy:  # a first round, where nothing was learnt: the spectrum does not tell
            return None
        squares = f.S.square().sum(dim=0)
        # From the end, where the small ones are: sums from the front would not resolve them.
        beyond = squares.flip(0).cumsum(0).flip(0) - squares + max(0.0, energy - float(squares.sum()))
        enough = torch.nonzero(beyond <= (1 - self.tau) * energy * (1 + 1e-9))
        return int(enough[0]) + 1 if enough.numel() else None
