"""From the pickles that old versions of PEFT saved to safetensors. For files that you trust: no gate is in front."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlora_fast import folder as folders
from flexlora_fast import outputs
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, OptionError, sentence, shown
from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME
from flexlora_fast.tensorfile import DTYPES

PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_REMEDY = "save the adapter anew with peft's save_pretrained"


def convert(source: Path, target: Path) -> Adapter:
    """Write the adapter in folder ``source`` to the new folder ``target``, as safetensors; it appears whole or not.

    The file is read by ``torch.load(weights_only=True)`` alone. That is no boundary (CVE-2025-32434, CVE-2026-24747):
    it is for files of your own.

    Raises ``OptionError`` where ``target`` exists, ``AdapterError`` for a file that cannot be read, holds anything but
    plain, dense tensors, each with a memory of its own, or does not make an adapter.
    """
    if target.exists() or target.is_symlink():
        raise OptionError(f"{str(target)!r} exists; give a folder that does not")
    found = [source / name for name in PICKLES if (source / name).is_file()]
    if len(found) != 1 or (source / WEIGHTS_NAME).exists():
        held = [path.name for path in found] + [WEIGHTS_NAME] * (source / WEIGHTS_NAME).exists()
        raise AdapterError(
            f"{str(source)!r} has {' and '.join(held) or 'no weights'}; give a folder with one of {', '.join(PICKLES)}"
        )
    if not (source / CONFIG_NAME).is_file():
        raise AdapterError(f"{str(source)!r} has no {CONFIG_NAME}; {_REMEDY}")
    state = _read(found[0])
    with outputs.staged(target) as new:
        folders.write(new, state, {})
        shutil.copyfile(source / CONFIG_NAME, new / CONFIG_NAME)
        Adapter.load(new)
    return Adapter.load(target)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # The unpickler meets damage with whatever comes: AssertionError, IndexError, TypeError …
        what = sentence(error) or type(error).__name__
        raise AdapterError(f"{str(path)!r} is not a file of plain tensors ({what}); {_REMEDY}") from error
    if not isinstance(state, Mapping):
        raise AdapterError(f"{str(path)!r} holds a {type(state).__name__}, not a state dict; {_REMEDY}")
    if not state:
        raise AdapterError(f"{str(path)!r} holds no tensor; {_REMEDY}")
    owners: dict[int, str] = {}
    for name, tensor in state.items():
        obstacle = _obstacle(name, tensor, owners)
        if obstacle is not None:
            raise AdapterError(f"{str(path)!r}: {shown(name)} {obstacle}; {_REMEDY}")
    return {name: tensor.detach() for name, tensor in state.items()}


def _obstacle(name: Any, tensor: Any, owners: dict[int, str]) -> str | None:
    """Why this entry is no plain tensor, if it is none. Nothing is copied before: a view may claim terabytes."""
    if not isinstance(name, str):
        return "is no name"
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"is not dense ({'quantized' if tensor.is_quantized else tensor.layout})"
    if tensor.is_meta:
        return "has a shape, but no values (it was saved from the meta device)"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if tensor.dtype not in DTYPES.values():
        return f"is {tensor.dtype}, which safetensors files do not have"
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        return (
            f"claims {tensor.numel() * tensor.element_size():,} bytes of shape {tuple(tensor.shape)}, and has {held:,}"
        )
    if held:
        other = owners.setdefault(tensor.untyped_storage().data_ptr(), name)
        if other != name:
            return f"shares its memory with {shown(other)}"
    return None
