"""Arrays of other libraries (CuPy, NumPy, JAX …) as tensors over the same memory, by DLPack.

The protocol: https://data-apis.org/array-api/latest/design_topics/data_interchange.html. torch passes its current
stream to the producer, which has it wait for what still writes the array, and holds the producer's memory for as long
as a tensor over it lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flexlora_fast.errors import AdapterError
from flexlora_fast.layouts import split_key


class Array(Protocol):
    """What DLPack calls a producer: a tensor of torch, an array of CuPy, NumPy or JAX."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


def as_tensors(state_dict: Mapping[str, Array], client: str | None) -> dict[str, Tensor]:
    """The arrays of a state dict as tensors, none of them copied; tensors as they are.

    Raises ``AdapterError`` for what is no state dict, and for an array that cannot be shared with torch, by its name.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise AdapterError("the state dict must map names to tensors", client=client)
    return {name: _as_tensor(value, name, client) for name, value in state_dict.items()}


def _as_tensor(value: Any, name: str, client: str | None) -> Tensor:
    if isinstance(value, Tensor):
        return value
    layer, slot = split_key(name)
    try:
        return _shared(value)
    except _NotShared as reason:
        what = f"{name!r} is a {_kind(value)}, {reason}"
        raise AdapterError(what, client=client, layer=layer if slot else None) from reason.__cause__


class _NotShared(Exception):
    """Why an array cannot be a tensor, and what to do."""


def _shared(value: Any) -> Tensor:
    if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
        raise _NotShared(
            "not a tensor; give a torch tensor or an array with __dlpack__ (CuPy, NumPy, JAX), or remove it from the "
            "state dict"
        )
    strides = getattr(value, "strides", None)
    if isinstance(strides, tuple) and any(stride < 0 for stride in strides):  # torch 2.13 would end the process
        raise _NotShared(f"whose strides {strides} run backwards, as no tensor's do; copy it (ascontiguousarray)")
    try:
        if isinstance(value, np.ndarray) and value.dtype.name == "bfloat16":  # of ml_dtypes; NumPy does not export it
            return torch.from_dlpack(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(value)
    except Exception as error:  # producers raise whatever they like; that, too, is only a reason
        raise _NotShared(
            f"which torch cannot share by DLPack ({type(error).__name__}: {error}); give it as float32, float16 or "
            "bfloat16, in the memory of the CPU or of a GPU that torch sees"
        ) from error


def _kind(value: Any) -> str:
    """The type, as its library calls it, and the dtype where there is one.

    >>> _kind("text"), _kind(np.zeros(2))
    ('str', 'numpy.ndarray of float64')
    """
    library = type(value).__module__.partition(".")[0]
    kind = type(value).__qualname__ if library == "builtins" else f"{library}.{type(value).__qualname__}"
    dtype = getattr(value, "dtype", None)
    return kind if dtype is None else f"{kind} of {dtype}"
