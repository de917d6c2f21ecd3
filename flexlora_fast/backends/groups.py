"""Which implementation of ``group.Group`` computes where, and why."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

from flexlora_fast.backends.group import Group, Packed
from flexlora_fast.backends.triton import Tabled
from flexlora_fast.kernels import obstacle
from flexlora_fast.stack import Stack


def of(stacks: Sequence[Stack]) -> Group:
    """The group of these stacks, on the device of their factors.

    Triton's kernels on a GPU; torch's products of packed copies elsewhere, and (with a warning, once) on a GPU without
    Triton. A kernel that fails raises: nothing slower takes over in silence.
    """
    device = next((stack.device for stack in stacks if stack.blocks), None)
    if device is None or device.type != "cuda":
        return Packed(stacks)
    if (reason := obstacle()) is not None:
        _warn(reason)
        return Packed(stacks)
    return Tabled.of(stacks)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"rounds on this GPU copy all factors and multiply them with torch in float32, several times slower than "
        f"Triton's kernels would: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
