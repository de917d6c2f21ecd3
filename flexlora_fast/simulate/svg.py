"""matplotlib's figures as SVG inside a page: colours that follow the page's light or dark scheme, text that is text."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from flexlora_fast import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8  # colours; further lines take them again, dashed


@dataclass(frozen=True)
class Palette:
    """What a figure is drawn in: text and frames, grid lines, and one colour a series."""

    ink: str
    grid: str
    series: tuple[str, ...]


# For a picture by itself, on white: Okabe and Ito's colours.
PRINT = Palette("#202020", "#e4e4e4", plots.COLOURS)
# For a page: no colours but marks, each of which becomes the page's variable of that name.
_MARKS = {"#0a0001": "--ink", "#0a0002": "--grid"} | {f"#0a010{i}": f"--s{i}" for i in range(SERIES)}
PAGE = Palette("#0a0001", "#0a0002", tuple(f"#0a010{i}" for i in range(SERIES)))


def figure(
    width: float, height: float, palette: Palette, panels: int = 1, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, ``columns`` a row (default: all), sizes in inches; without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    made.patch.set_alpha(0)
    columns = columns or panels
    every = [made.add_subplot(-(-panels // columns), columns, i + 1) for i in range(panels)]
    for axes in every:
        axes.patch.set_alpha(0)
        axes.grid(True, color=palette.grid, lw=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=palette.ink, labelsize=9, length=3, width=0.7)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(palette.ink)
            spine.set_linewidth(0.7)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_color(palette.ink)
            text.set_fontsize(9)
    return made, every


def inline(made: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element; ``name`` keeps its ids apart from those of the page's others. What it shows
    is said by ``title``, to those who cannot see it.
    """
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        made.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|xlink:href="#|href="#|url\(#)', rf"\g<1>{name}-", text)
    for mark, variable in _MARKS.items():
        text = text.replace(mark, f"var({variable})")
    head, _, body = text.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)  # as wide as its place; viewBox keeps the proportions
    return f'{head} role="img" aria-label="{escape(title, quote=True)}">{body}'.strip()
