"""Which implementation of ``group.Group`` computes where."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora_fast.backends.group import Group, Packed
from flexlora_fast.stack import Stack


def of(stacks: Sequence[Stack]) -> Group:
    """The group of these stacks, on the device of their factors."""
    return Packed(stacks)
