"""A round before its defence: the Gram matrix of its clients, the rule's judgement, and what it means for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexlora_fast import values
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import Admission
from flexlora_fast.defence.base import Defence, Judgement, Verdict, norms_of
from flexlora_fast.defence.gram import gram_of
from flexlora_fast.errors import EmptyRoundError, FlexLoRAError, OptionError
from flexlora_fast.incremental import KeptGrams
from flexlora_fast.planning import Settings
from flexlora_fast.work import Client, Work

_REFERENCE = "the server's reference"
# A factor nearer to 1 than this is one, and so is the ratio of two changes of weights.
_SAME = 1e-9


def judge(
    defence: Defence,
    clients: Sequence[Client],
    settings: Settings,
    grams: KeptGrams,
    admission: Admission,
    measure: Callable[[Work, bool], Tensor] = gram_of,
) -> list[Verdict]:
    """Set share and factor of every client, in place, as the rule says; the share of a rejected one is 0.

    All values of clients that were not looked at yet are checked on the way.

    Args:
        clients: in canonical order, their shares summing to 1.
        grams: takes what the solvers can use again.
        admission: what the round has settled, which the rule's reference must fit.
        measure: gives the Gram matrix of the clients of a work, or its diagonal alone, as ``gram_of``.

    Raises:
        AdapterError: naming a client with bad values; or the reference, where it does not fit.
        OptionError: the rule does not fit so many clients, or breaks its protocol. EmptyRoundError: all are rejected.
    """
    for client in clients:
        client.factor = 1.0
    judged = [*clients, *_reference(defence, clients, admission)]
    gram = measure(Work(judged, settings, grams), not getattr(defence, "norms_only", False))
    for client in clients:
        if not client.checked:
            check_extras(client)
    weights = torch.tensor([client.share for client in clients], dtype=torch.float64)
    judgement = defence.judge(gram.clone(), weights.clone())
    _check(judgement, defence, len(clients))
    verdicts = _verdicts(judgement, clients, norms_of(gram))
    if not bool((judgement.shares > 0).any()):
        first = verdicts[0]
        raise EmptyRoundError(
            f"defence {str(defence)!r} rejects all {len(clients)} clients, the first, {first.client!r}: "
            f"{first.reason or 'no reason given'}; look at these clients, or choose another rule"
        )
    for client, verdict in zip(clients, verdicts, strict=True):
        client.share, client.factor = verdict.share, verdict.factor
    _warn_of_extras(defence, [client for client in clients if client.share > 0])
    return verdicts


def _reference(defence: Defence, clients: Sequence[Client], admission: Admission) -> list[Client]:
    """The rule's reference as one more client, in the Gram alone."""
    adapter: Adapter | None = defence.reference
    if adapter is None:
        return []
    name = _REFERENCE
    while any(client.name == name for client in clients):
        name += "'"
    try:
        admission.check(name, adapter)
    except FlexLoRAError as error:
        raise error.at(client=name) from None
    return [Client(name, adapter, 1.0, adapter, checked=False)]


def check_extras(client: Client) -> None:
    """Look at what is no low-rank pair. Raises ``AdapterError`` for values that are not finite."""
    for key, tensor in client.adapter.extras.items():
        values.check_finite(tensor, key, client=client.name)
    client.checked = True  # its factors were looked at for the Gram


def _check(judgement: Judgement, defence: Defence, K: int) -> None:
    """Raise ``OptionError`` for a rule that breaks its protocol."""
    for what, value in (("shares", judgement.shares), ("factors", judgement.factors)):
        if value.shape != (K,) or not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise OptionError(f"defence {defence.name!r} gave {what} {value}; they must be {K} finite numbers ≥ 0")
    total = float(judgement.shares.sum())
    if total != 0 and abs(total - 1) > 1e-6:
        raise OptionError(
            f"defence {defence.name!r} gave shares that sum to {total!r}; they must sum to 1, or all be 0"
        )
    if len(judgement.reasons) != K:
        raise OptionError(f"defence {defence.name!r} gave {len(judgement.reasons)} reasons for {K} clients")


def _verdicts(judgement: Judgement, clients: Sequence[Client], norms: Tensor) -> list[Verdict]:
    weights = [client.share for client in clients]
    shares, factors = judgement.shares.tolist(), judgement.factors.tolist()
    # Where some are rejected the others' shares grow alike: that is no judgement of them.
    ratios = [share / weight for share, weight in zip(shares, weights, strict=True) if share > 0]
    alike = bool(ratios) and max(ratios) - min(ratios) <= _SAME * max(ratios)
    verdicts = []
    for i, client in enumerate(clients):
        if shares[i] * factors[i] == 0:
            status = "rejected"
        elif factors[i] < 1 - _SAME:
            status = "clipped"
        else:
            status = "accepted" if alike and factors[i] <= 1 + _SAME else "reweighted"
        norm, reason = float(norms[i]), judgement.reasons[i]
        factor = factors[i] if status != "rejected" else 0.0
        verdicts.append(Verdict(client.name, norm, weights[i], shares[i], factor, status, reason))
    return verdicts


def _warn_of_extras(defence: Defence, clients: Sequence[Client]) -> None:
    keys = sorted({key for client in clients for key in client.adapter.skeleton.extra_keys})
    if keys:
        warnings.warn(
            f"defence {defence.name!r} judges low-rank updates alone: {len(keys)} other trained tensors, such as "
            f"{keys[0]!r}, are averaged as they come, with the shares that it gives",
            stacklevel=4,
        )
