"""A defence's verdicts as a table: the clients it trusts least by name, the others in sums where they are many; and
the clients that were refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexlora_fast import tables
from flexlora_fast.tables import count, number, percent

if TYPE_CHECKING:
    from rich.table import Table

    from flexlora_fast.defence import Verdict

STATUSES = ("rejected", "clipped", "reweighted", "accepted")


def verdict_table(defence: str | None, verdicts: Sequence[Verdict], listed: int | None) -> Table:
    """What a defence made of each client, those that lost most of their weight first.

    ``listed``: how many clients are shown by name (None: all). Beyond it there is a line for each verdict with what the
    others have together; accepted ones are not named then.
    """
    ordered = sorted(verdicts, key=_trust)
    shown = ordered
    if listed is not None and len(ordered) > listed:
        shown = [verdict for verdict in ordered if verdict.status != "accepted"][:listed]
    rows = [
        [v.client, v.status, number(v.norm), percent(v.weight), percent(v.share), number(v.factor), v.reason]
        for v in shown
    ]
    names = {verdict.client for verdict in shown}
    for status in STATUSES:
        others = [v for v in ordered if v.status == status and v.client not in names]
        if others:
            rows.append(_together(others, len(others) < sum(v.status == status for v in ordered)))
    more = f" ({len(shown)} of {len(ordered)} clients by name)" if len(shown) < len(ordered) else ""
    return tables.table(
        f"Defence {defence}{more}",
        ["client", "verdict", "‖ΔW‖_F", "weight", "share", "factor", "reason"],
        rows,
        left=["client", "verdict", "reason"],
        implied={"reason": ""},
    )


def tally(verdicts: Sequence[Verdict]) -> str:
    """``: 4 accepted, 1 rejected``; nothing where the rule gives no verdicts."""
    counts = Counter(verdict.status for verdict in verdicts)
    told = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    return f": {told}" if told else ""


def _trust(verdict: Verdict) -> tuple[int, float, float]:
    """Sort key: by verdict, by how much of the weight is left, and of the rejected the longest first."""
    left = (
        verdict.share * verdict.factor / verdict.weight if verdict.weight else 0.0
    )  # a tiny weight may be rounded to 0
    return STATUSES.index(verdict.status), left, -verdict.norm


def _together(verdicts: Sequence[Verdict], more: bool) -> list[str]:
    """One row for several clients: their number, the range of norms and factors, and the sums of weights."""
    norms, factors = ([getattr(v, name) for v in verdicts] for name in ("norm", "factor"))
    return [
        f"{count(len(verdicts), 'client')}{' more' if more else ''}",
        verdicts[0].status,
        _range(norms),
        percent(math.fsum(v.weight for v in verdicts)),
        percent(math.fsum(v.share for v in verdicts)),
        _range(factors),
        "",
    ]


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low}…{high}"


def refusal_table(refused: Sequence[Any]) -> Table:
    """Clients that were refused, with the reason (which need not repeat the client's name)."""
    rows = [[r.client, r.reason.removeprefix(f"client {r.client!r}").lstrip(",: ")] for r in refused]
    return tables.table("Refused", ["client", "reason"], rows, left=["client", "reason"])
