"""How numbers, names and tables are printed: on a terminal, as plain text and as Markdown."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Energies nearer to one than this are float32 rounding (see ``LayerUpdate.error``), and print as all of it.
_ALL = 1 - 1e-8


def clean(text: object) -> str:
    """Text that is safe to print: names come from clients, and an escape sequence in one could rewrite a terminal.

    >>> clean("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def number(value: float | None) -> str:
    """Four significant digits; an absent value is a dash.

    >>> number(1234.5678), number(0.00001234), number(2.1), number(8), number(None)
    ('1235', '1.234e-05', '2.100', '8', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return str(int(value)) if value == int(value) and abs(value) < 1e6 else f"{value:#.4g}".rstrip(".")


def percent(share: float | None) -> str:
    """A share as per cent, which says 100 only of all of it, and 0 only of nothing.

    >>> percent(0.5), percent(0.99999), percent(1.0), percent(1e-5), percent(None)
    ('50.0%', '>99.9%', '100%', '<0.1%', '–')
    """
    if share is None or not math.isfinite(share):
        return "–"
    if share >= _ALL:
        return "100%"
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if share >= 0.9995 else f"{100 * share:.1f}%"


def count(n: int, word: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def span(values: Iterable[Any]) -> str:
    """``low–high`` of what is printed, or the one value."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) > 1 and all(isinstance(value, int) for value in distinct):
        return f"{min(distinct)}–{max(distinct)}"
    return str(distinct[0]) if len(distinct) == 1 else f"{len(distinct)} kinds"


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that counts: layers.2 before layers.10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def spread(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly chosen, with the first and the last.

    >>> spread(list(range(10)), 4)
    [0, 3, 6, 9]
    """
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    left: Sequence[str] = (),
    implied: Mapping[str, str] | None = None,
) -> Table:
    """A rich table of cleaned cells, numbers to the right; columns named in ``left`` hold words.

    A column that says what ``implied`` has for it in every row is left out: terminals are narrow.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    implied = implied or {}
    # Text, not str: rich would read [brackets] in a name as markup
    cells = [[cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row] for row in rows]
    shown = [i for i, name in enumerate(columns) if {row[i].plain for row in cells} != {implied.get(name)}]
    result = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i in shown:
        words = columns[i] in left
        result.add_column(
            Text(columns[i]),
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
            min_width=min(16, max(len(row[i]) for row in cells)) if cells and words else 3,
        )
    for row in cells:
        result.add_row(*(row[i] for i in shown))
    return result


def plain(*parts: RenderableType, width: int = 160) -> str:
    """Rendered without colour, at a fixed width, lines without trailing blanks."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False, force_terminal=False)
    for part in parts:
        console.print(part, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def markdown(tables: Iterable[Table]) -> str:
    """GitHub Markdown: each table under its title."""
    from rich import box

    parts = []
    for each in tables:
        title, each.title, each.box = each.title, None, box.MARKDOWN
        # '|' ends a cell in Markdown; no line may wrap, so the width has no practical end
        for column in each.columns:
            column._cells = [_escaped(cell) for cell in column._cells]
        parts.append(f"## {title}\n\n{plain(each, width=100_000).strip()}\n")
    return "\n".join(parts)


def _escaped(cell: Any) -> Any:
    from rich.text import Text

    return Text(cell.plain.replace("|", "\\|")) if isinstance(cell, Text) else cell
