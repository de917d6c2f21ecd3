"""Averages of what is not a low-rank pair: heads, biases, token rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora_fast import values
from flexlora_fast.defence.coordinates import Coordinates, tile_rows
from flexlora_fast.errors import AdapterError
from flexlora_fast.privacy.mechanism import Release
from flexlora_fast.skeleton import Form
from flexlora_fast.work import Client

# Elements averaged at a time: no client's head, which may be the largest tensor of a model, is in memory whole.
_CHUNK = 1 << 20


def forms(clients: Sequence[Client]) -> dict[str, Form]:
    """Shape and dtype of each average, by state-dict key, sorted; the dtype is the first client's."""
    found: dict[str, Form] = {}
    for skeleton in {id(c.adapter.skeleton): c.adapter.skeleton for c in clients}.values():
        for key in skeleton.extra_keys:
            found.setdefault(key, skeleton.forms[key])
    return dict(sorted(found.items()))


def average(key: str, clients: Sequence[Client], rule: Coordinates | None = None) -> Tensor:
    """Σ w·t over the clients that have t, w renormalised to them; float64 sum, the first client's dtype.

    With a ``rule``, what it makes of each entry instead of the sum.

    These are whole weights (a head, biases, token rows), not updates: counting an absent one as zero would shrink it.
    Raises ``AdapterError`` naming the client for values that are not finite.
    """
    having = [client for client in clients if key in client.adapter.skeleton.forms]
    total = math.fsum(client.share for client in having)
    form = having[0].adapter.skeleton.forms[key]
    result = torch.empty(form.shape, dtype=form.dtype)
    flat = result.view(-1)
    chunk = _CHUNK if rule is None else tile_rows(1, len(having))
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        if rule is None:
            mean = torch.zeros(stop - start, dtype=torch.float64)
            for client in having:
                mean += client.share / total * _values(client, key, start, stop).double().cpu()
        else:
            shares = torch.tensor([client.share / total for client in having], dtype=torch.float64)
            parts = [_values(client, key, start, stop).double().cpu() for client in having]
            mean = rule.combine(torch.stack(parts, dim=-1), shares)
        flat[start:stop] = cast(mean, form.dtype)
    return result


def cast(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """A mean in the dtype of what it is of; whole numbers are rounded."""
    return (mean if dtype.is_floating_point else mean.round()).to(dtype)


def released(key: str, clients: Sequence[Client], release: Release) -> Tensor:
    """The reference's values, moved by the noised and clipped differences of the clients' from them; its dtype.

    float64 sums. Raises ``AdapterError`` naming the client whose file cannot be read.
    """
    reference, form = release.of.reference, release.of.forms[key]
    assert reference is not None
    result = torch.empty(form.shape, dtype=form.dtype)
    flat = result.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        stop = min(start + _CHUNK, flat.numel())
        before, moved = reference.flat_extra(key, start, stop).double().cpu(), torch.zeros(stop - start).double()
        for client in clients:
            moved += client.share * client.factor * (_values(client, key, start, stop).double().cpu() - before)
        flat[start:stop] = (before + release.released(f"extra/{key}", moved, start)).to(form.dtype)
    return result


def _values(client: Client, key: str, start: int, stop: int) -> Tensor:
    try:
        part = client.adapter.flat_extra(key, start, stop)
        if not client.checked:
            values.check_finite(part, key)
    except AdapterError as error:
        raise error.at(client=client.name) from None
    return part
