"""How measurements are written down: Markdown tables, numbers in readable units, and sections of the README.

Imports nothing, so that a report can be made where the libraries that were measured are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Check(NamedTuple):
    """A target and what was measured; ``reached`` is None where nothing was."""

    name: str
    target: str
    measured: str
    reached: bool | None


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(value: float) -> str:
    """Three digits, in the unit that reads best.

    >>> seconds(0.0123), seconds(12.34)
    ('12.3 ms', '12.3 s')
    """
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.0f} MiB"


def percent(value: float | None) -> str:
    """Two digits, or all of a hundred.

    >>> percent(0.0123), percent(0.999), percent(None)
    ('1.2 %', '100 %', '–')
    """
    if value is None:
        return "–"
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def target_table(checks: Sequence[Check]) -> str:
    said = {True: "yes", False: "**no**", None: "–"}
    return markdown(
        ["", "target", "measured", "reached"],
        [[check.name, check.target, check.measured, said[check.reached]] for check in checks],
    )


def splice(readme: str, text: str, begin: str, end: str) -> str:
    """The README with ``text`` between the two markers; nothing else of it is touched."""
    before, rest = readme.split(begin)
    return before + begin + "\n" + text + "\n" + end + rest.split(end)[1]
