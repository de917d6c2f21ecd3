"""Who has which rows: a Dirichlet label skew, an even split, or the partition that the data has by nature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexlora_fast.errors import OptionError


def dirichlet(
    labels: Sequence[int] | np.ndarray, clients: int, alpha: float, seed: int | Sequence[int], smallest: int = 64
) -> list[np.ndarray]:
    """Split examples over clients with a label skew; returns each client's indices, sorted.

    Each class is shared out in proportions drawn from Dirichlet(``alpha``) (Hsu et al., arXiv 1909.06335, in the
    per-class form of Yurochkin et al., arXiv 1905.12022), so clients differ in size and in mixture. Draws in which
    a client has fewer than ``smallest`` examples are repeated, as is usual: it could not fill a batch.

    Raises ``OptionError`` where that cannot be, or no draw of many is such.
    """
    classes = np.asarray(labels)
    if clients * smallest > len(classes):
        raise OptionError(
            f"{len(classes)} examples cannot give {clients} clients {smallest} each; take fewer clients, or a smaller "
            "clients.smallest"
        )
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    for _ in range(10_000):
        owner = np.empty(len(classes), dtype=np.int64)
        for rows in members:
            order = generator.permutation(rows)
            shares = generator.dirichlet(np.full(clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
            owner[order] = np.repeat(np.arange(clients), np.diff([0, *cuts, len(rows)]))
        if np.bincount(owner, minlength=clients).min() >= smallest:
            return _by_owner(owner, clients)
    raise OptionError(
        f"no Dirichlet({alpha}) draw gives {clients} clients {smallest} examples each; take a larger alpha or fewer "
        "clients"
    )


def iid(rows: int, clients: int, seed: int | Sequence[int]) -> list[np.ndarray]:
    """Split ``rows`` examples evenly at random; sizes differ by one at most. Raises ``OptionError`` for too few."""
    if rows < clients:
        raise OptionError(f"{rows} examples cannot give {clients} clients one each; take fewer clients")
    order = np.random.default_rng(seed).permutation(rows)
    return [np.sort(part) for part in np.array_split(order, clients)]


def natural(owners: np.ndarray, number: int | None, smallest: int) -> dict[str, np.ndarray]:
    """The rows of each client by name, sorted by name: those with ``smallest`` rows at least, of these the ``number``
    largest (of equals those that sort first).

    Args:
        owners: (N,) the name of each row's client.

    Raises:
        OptionError: less clients than ``number``.
    """
    names, codes, counts = np.unique(owners, return_inverse=True, return_counts=True)
    there = np.flatnonzero(counts >= smallest)
    if len(there) < (number or 1):
        raise OptionError(
            f"{len(there)} of {len(names)} clients have {smallest} rows or more, and {number or 1} are asked for; "
            "lower clients.number or clients.smallest"
        )
    kept = np.sort(there[np.argsort(-counts[there], kind="stable")][:number])
    parts = _by_owner(codes, len(names))
    return {str(names[i]): parts[i] for i in kept}


def _by_owner(owner: np.ndarray, owners: int) -> list[np.ndarray]:
    """The sorted indices of each owner: one pass, however many there are."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=owners))[:-1])
