"""HetLoRA: the zero-padded average weighted by norms, and its clients' pruning of their own ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora_fast.errors import IncompatibleAdapterError, OptionError
from flexlora_fast.methods.averages import update_norm
from flexlora_fast.methods.base import Contribution
from flexlora_fast.methods.fedit import FedIT

if TYPE_CHECKING:
    from flexlora_fast.adapter import Adapter


class HetLoRA(FedIT):
    """The zero-padded average with weights ∝ w_i·‖ΔW_i‖_F, and each client sent the first columns of its rank.

    Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024
    (arXiv 2401.06432), "sparsity-weighted aggregation": p_i = ‖S_i‖/Σ‖S_j‖ with S_i the singular values of B_i·A_i.
    The data weight w_i is kept as a factor, so that a client of weight 0 counts as absent; with equal data weights
    the rule is the published one. Rank self-pruning is the clients' part: :func:`pruning_penalty` in their loss,
    :func:`pruned_rank` after training.
    """

    name = "hetlora"
    summary = "zero-padded average weighted by each update's norm, cut by slicing; for comparison"
    use = "as a baseline for mixed ranks that needs no SVD"
    source = "Cho et al., EMNLP 2024, arXiv 2401.06432"
    clients = "may prune their own ranks: a penalty in the loss, then pruned_rank"
    linear = False

    def weights(self, contributions: Sequence[Contribution]) -> list[float]:
        total = sum(c.weight for c in contributions)
        raw = [c.weight * update_norm(c) for c in contributions]
        norm = sum(raw)
        if norm == 0:  # every update is zero: nothing to weigh by
            return [c.weight for c in contributions]
        return [total * value / norm for value in raw]


def kept_columns(rank: int, gamma: float) -> int:
    """⌊γ·r⌋, at least 1: the columns that pruning leaves. Raises ``OptionError`` for a γ outside (0, 1)."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < 1:
        raise OptionError(f"gamma is {gamma!r}; give a number > 0 and < 1, the share of the rank that pruning leaves")
    return max(1, math.floor(gamma * rank + 1e-9))


def pruning_penalty(model: Any, gamma: float, adapter_name: str = "default") -> Tensor:
    """Σ_layers ‖B[:, γr:]‖_F·‖A[γr:]‖_F of a live PEFT model: the term that HetLoRA's clients add to their loss, times
    a factor λ. A scalar with a gradient, 0 where every rank is 1.

    The trainer's side of it: ``loss = loss + lam * pruning_penalty(model, gamma)``. Source: as of :class:`HetLoRA`,
    "rank self-pruning".

    Raises ``OptionError`` for a γ outside (0, 1), ``AdapterError`` for a model without that adapter.
    """
    from flexlora_fast import live

    ranks = live.ranks(model, adapter_name)
    terms = []
    for layer, module in live.lora_layers(getattr(model, "_orig_mod", model), adapter_name).items():
        A, B, _ = live.parameters(module, adapter_name)
        keep = kept_columns(ranks[layer], gamma)
        if keep == ranks[layer]:
            continue
        experts = A.shape[0] // ranks[layer]
        # As a checkpoint has them (PEFT's ParamWrapper): A expert after expert, B rank after rank.
        a = A.reshape(experts, ranks[layer], -1)[:, keep:]
        b = B.reshape(B.shape[0], ranks[layer], -1)[:, keep:]
        terms.append(_norm(a) * _norm(b))
    device = next(model.parameters()).device
    return torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)


def _norm(X: Tensor) -> Tensor:
    """‖X‖_F whose gradient at 0 is 0: that of the root is infinite."""
    square = X.float().square().sum()
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)


def pruned_rank(adapter: Adapter, gamma: float, before: Adapter) -> int:
    """The rank that a client of HetLoRA goes on with: ⌊γ·r⌋ where local training made the last columns smaller, else r.

    Args:
        adapter: as trained. before: the same client's adapter as the round began, of the same ranks.
        gamma: the share of the rank that pruning leaves, in (0, 1).

    The last columns are measured by Σ_layers s·‖B[:, γr:]‖_F·‖A[γr:]‖_F, as in :func:`pruning_penalty`. The adapter of
    that rank is its first columns: ``flexlora_fast.truncation.truncated``. Source: as of :class:`HetLoRA`.

    Raises:
        OptionError: a γ outside (0, 1), or layers of several ranks, of which one number cannot tell.
        IncompatibleAdapterError: the two have other layers or ranks.
    """
    ranks = {layer: adapter.rank(layer) for layer in adapter.layers}
    for layer in sorted({*adapter.layers, *before.layers}):
        here = [X.rank(layer) if layer in X.layers else None for X in (adapter, before)]
        if here[0] != here[1]:
            raise IncompatibleAdapterError(
                f"rank {here[0]} after training and {here[1]} before it; give the same client's adapters of one round",
                client=adapter.client,
                layer=layer,
            )
    found = sorted(set(ranks.values()))
    if len(found) != 1:
        raise OptionError(f"the adapter has ranks {found}; prune adapters of one rank for all layers")
    keep = kept_columns(found[0], gamma)
    return keep if keep < found[0] and _tail(adapter, keep) < _tail(before, keep) else found[0]


def _tail(adapter: Adapter, keep: int) -> float:
    total = 0.0
    for layer in adapter.layers:
        A, B = (X.double() for X in adapter.factors(layer))
        total += abs(adapter.scale(layer)) * float(A[:, keep:].norm() * B[:, :, keep:].norm())
    return total
