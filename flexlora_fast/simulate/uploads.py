"""Adapters on their way between clients and server: whole folders, and what they weigh."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from flexlora_fast import files
from flexlora_fast.adapter import Adapter
from flexlora_fast.methods.averages import update_norm
from flexlora_fast.methods.base import Contribution


def save(adapter: Adapter, folder: Path) -> None:
    """Write an adapter folder, whole or not at all."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    adapter.save(new)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    files.sync_folder(folder.parent)  # asynchronous rounds need it after a power cut


def norm(adapter: Adapter) -> float:
    """‖ΔW‖_F over all layers of what a client sends."""
    parts = (Contribution("", *adapter.factors(layer), adapter.scale(layer), 1.0) for layer in adapter.layers)
    return math.fsum(update_norm(part) ** 2 for part in parts) ** 0.5


def nbytes(adapter: Adapter) -> int:
    """Of an adapter's tensors."""
    return sum(tensor.nbytes for tensor in adapter.state_dict().values())
