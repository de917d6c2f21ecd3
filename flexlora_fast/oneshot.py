"""A whole round in one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.defence import Coordinates, Defence
from flexlora_fast.errors import FlexLoRAError, WeightError
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.gate.entrance import Source
from flexlora_fast.methods import Method
from flexlora_fast.privacy import Privacy
from flexlora_fast.progress import track
from flexlora_fast.update import GlobalUpdate


def aggregate(
    adapters: Iterable[Source],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | None = None,
    method: str | Method = "flexlora",
    solver: str = "auto",
    tol: float = 1e-3,
    device: str | torch.device | None = None,
    seed: int = 0,
    *,
    clients: Sequence[str] | None = None,
    missing: Literal["zero", "renormalize"] = "zero",
    certificate: Literal["exact", "estimate"] = "exact",
    memory_limit: int | str | None = None,
    out: str | os.PathLike[str] | None = None,
    policy: RoundPolicy | None = None,
    progress: bool | None = None,
    defence: str | Defence | Coordinates | None = None,
    privacy: Privacy | None = None,
    reference: Adapter | str | os.PathLike[str] | None = None,
) -> GlobalUpdate:
    """Aggregate a round of LoRA adapters of any mix of ranks: :class:`Aggregator` fed in a loop.

    Args:
        adapters: adapters, or paths of PEFT adapter folders; with a ``policy`` also those of safetensors files, or
            their bytes.
        weights: one finite number ≥ 0 for each adapter, in their order or by client name (default: all equal).
        clients: names, in the order of ``adapters`` (default: the adapter's own, or its path).
        out: as for :meth:`Aggregator.finish`. The rest as for :class:`Aggregator`.

    Files are read once, layer by layer while earlier layers are solved (``read="finish"``).

    Returns:
        The :class:`GlobalUpdate`.

    Raises:
        What :meth:`Aggregator.add` and :meth:`Aggregator.finish` raise: one bad adapter stops the call. Feed an
        ``Aggregator`` yourself to go on without it. With a ``defence`` bad values do not stop it. With a ``policy``
        no client does: the refused are in the update's ``refused``.

    >>> import torch, flexlora_fast as ff
    >>> def client(rank):
    ...     state = {"base_model.model.fc.lora_A.weight": torch.randn(rank, 6),
    ...              "base_model.model.fc.lora_B.weight": torch.randn(5, rank)}
    ...     return ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 16})
    >>> update = ff.aggregate([client(1), client(4)], weights=[100, 300])
    >>> update["fc"].S.shape, update.adapter(rank=2).rank("fc")
    (torch.Size([4]), 2)
    """
    round_ = Aggregator(
        rank,
        method,
        solver,
        tol,
        device,
        seed,
        missing=missing,
        certificate=certificate,
        memory_limit=memory_limit,
        read="finish",
        policy=policy,
        progress=progress,
        defence=defence,
        privacy=privacy,
        reference=reference,
    )
    fill(round_, adapters, weights, clients)
    return round_.finish(out)


def fill(
    round_: Aggregator,
    adapters: Iterable[Source],
    weights: Sequence[float] | Mapping[str, float] | None,
    clients: Sequence[str] | None,
) -> None:
    """Add adapters to a round, as ``aggregate`` takes them."""
    adapters = list(adapters)
    for option, values in (("weights", weights), ("clients", clients)):
        if values is not None and len(values) != len(adapters):
            raise WeightError(f"{len(values)} {option} for {len(adapters)} adapters; give one for each")
    for i, adapter in enumerate(track(adapters, "clients", round_.progress)):
        name = clients[i] if clients is not None else round_.name_for(adapter)
        if isinstance(weights, Mapping) and name not in weights:
            raise WeightError(f"weights has no entry for it; it has {sorted(weights)[:5]} …", client=name)
        share = 1.0 if weights is None else weights[name] if isinstance(weights, Mapping) else weights[i]
        with contextlib.suppress(*([] if round_.policy is None else [FlexLoRAError])):  # noted in round_.refused
            round_.add(adapter, share, client=name)
