"""``flexlora-fast methods``: what there is to choose from, and what each asks of clients."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from flexlora_fast import methods, named, tables
from flexlora_fast.cli_common import Json, print_json, show

FORMAT = "flexlora_fast.methods/1"


def show_methods(as_json: Json = False) -> None:
    """List the aggregation methods: what each is for, when to choose it, and what it asks of clients."""
    rows = [described(name) for name in methods.METHODS]
    if as_json:
        print_json({"format": FORMAT, "methods": rows})
    else:
        show(view(rows))


def described(name: str) -> dict[str, Any]:
    """One method as JSON-able values.

    name, summary, use, source, clients: as of :class:`~flexlora_fast.methods.Method`; settings: their defaults by name;
    mixed_ranks; output; trains; merges: whether clients add to their frozen weights.
    """
    method = methods.METHODS[name]
    return {
        "name": name,
        "summary": method.summary,
        "use": method.use,
        "source": method.source,
        "clients": method.clients,
        "settings": named.settings(method),
        "mixed_ranks": method.mixed,
        "output": method.output,
        "trains": list(method.trains),
        "merges": method.merges,
    }


def view(rows: list[dict[str, Any]]) -> RenderableType:
    """A table of names and traits, and under it what does not fit one."""
    columns = ["method", "mixed ranks", "settings", "clients must", "source"]
    lines = [
        [
            row["name"],
            "yes" if row["mixed_ranks"] else "no",
            ", ".join(f"{key}={value}" for key, value in row["settings"].items()) or "–",
            row["clients"] or "–",
            row["source"],
        ]
        for row in rows
    ]
    told = [Text(f"{row['name']}: {row['summary']}.\n    Choose it {row['use']}.") for row in rows]
    return Group(tables.table("Methods", columns, lines, left=columns), Text(), *told)
