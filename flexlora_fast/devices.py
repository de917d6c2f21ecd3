"""Devices that a round may compute on."""

from __future__ import annotations

import torch

from flexlora_fast.errors import BackendError


def known(device: str | torch.device | None) -> torch.device:
    """The device that ``device=`` names, with its index; the CPU for None.

    Raises ``BackendError`` for one that is not there or cannot compute in float64.
    """
    try:
        chosen = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"device {device!r} is none that torch knows: {error}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' was asked for, but torch sees no GPU; `flexlora-fast doctor` says more")
    try:  # "meta", a GPU that is not there, or one without the float64 that certificates need
        probe = torch.ones(1, dtype=torch.float64, device=chosen)
        probe.item()
    except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        raise BackendError(f"device {device!r} cannot compute here: {error}") from error
    return probe.device  # with its index, as tensors name it: "cuda" is not equal to "cuda:0"
