"""PEFT's adapter folder on disk: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from flexlora_fast.config import Config
from flexlora_fast.errors import AdapterError, UnsupportedAdapterError
from flexlora_fast.files import replace
from flexlora_fast.tensorfile import TensorFile

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


def read(path: str | os.PathLike[str], client: str | None = None) -> tuple[TensorFile, Config]:
    """The tensors (in the file, read when used) and the unchecked config of a PEFT folder."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise AdapterError(
            f"{str(folder)!r} {what}; pass the folder with {CONFIG_NAME} and {WEIGHTS_NAME}", client=client
        )
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        if (folder / "adapter_model.bin").exists():
            raise UnsupportedAdapterError(
                f"{str(folder / 'adapter_model.bin')!r} is a pickle, and opening a client's pickle can run "
                "its code; have the client save with save_pretrained(..., safe_serialization=True)",
                client=client,
            )
        raise AdapterError(f"{str(folder)!r} has no {WEIGHTS_NAME}; save it with peft's save_pretrained", client=client)
    config = _read_config(folder / CONFIG_NAME, client)
    try:
        return TensorFile(weights), config
    except AdapterError as error:
        raise error.at(client=client) from None


def holds(path: str | os.PathLike[str], file: str) -> bool:
    """Whether this weights file is the folder's own."""
    return os.path.realpath(os.path.join(path, WEIGHTS_NAME)) == os.path.realpath(file)


def _read_config(path: Path, client: str | None) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{str(path)!r} cannot be read as JSON ({error}); save it with peft's save_pretrained",
            client=client,
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{str(path)!r} holds a {type(config).__name__}, not an object; save it with peft's save_pretrained",
            client=client,
        )
    return config


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Config) -> None:
    """Write both files, each of which appears complete or not at all."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / WEIGHTS_NAME, lambda to: save_file(_unshared(tensors), to, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True)
    replace(folder / CONFIG_NAME, lambda to: Path(to).write_text(text, encoding="utf-8"))


def content_of(tensors: Mapping[str, Tensor]) -> bytes:
    """What ``write`` would have in its weights file."""
    return save(_unshared(tensors), metadata={"format": "pt"})


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, no two of which share memory: safetensors refuses aliases (tied weights)."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and storage not in seen
        result[key] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage)
    return result
