"""Numbers of the host, moved to a device that is kept waiting by nobody."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(X: Tensor, device: torch.device) -> Tensor:
    """A few numbers of the host on the device, without waiting for it.

    Copies of memory that is not pinned wait until the stream is done with all that it was given before.
    """
    return X.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else X.to(device)
