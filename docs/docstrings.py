"""Docstrings as Markdown: doctests in fences, so that ``>>>`` is no quotation, and Sphinx's roles as plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|mod|attr):`~?([^`]+)`")


def as_markdown(text: str) -> str:
    lines: list[str] = []
    inside = False
    for line in _ROLE.sub(lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", text).split("\n"):
        if not inside and line.startswith(">>> "):
            lines += ["", "```pycon"]
            inside = True
        elif inside and not line.strip():  # a doctest ends at an empty line
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Docstrings(griffe.Extension):
    """What mkdocstrings is told to load (mkdocs.yml)."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
