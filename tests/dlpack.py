"""A DLPack producer of our own: what it is asked and when its memory is let go can be seen.

The structures are those of dlpack.h 0.8, which every consumer takes (https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

# DLDataTypeCode and bits by dtype; DLDeviceType by torch's name.
_TYPES = {torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.float64: (2, 64)}
DEVICES = {"cpu": 1, "cuda": 2}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

# What consumers hold, by the address of its structure: the producer may be gone before them.
_exports: dict[int, tuple[Producer, Tensor, _Managed, Any]] = {}


class Producer:
    """An array of some other library, over the memory of a tensor.

    ``streams``: what consumers passed, in order. ``deleted``: how many of them have let go. ``order``: what the
    producer does when it is given a stream (a real one has that stream wait for its own).
    """

    def __init__(self, tensor: Tensor, order: Any = lambda stream: None) -> None:
        self.tensor, self.order = tensor, order
        self.streams: list[Any] = []
        self.deleted = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return DEVICES[self.tensor.device.type], self.tensor.device.index or 0

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.streams.append(stream)
        self.order(stream)
        tensor = self.tensor
        sizes = ctypes.c_int64 * tensor.ndim
        code, bits = _TYPES[tensor.dtype]
        shared = _Tensor(tensor.data_ptr(), *self.__dlpack_device__(), tensor.ndim, code, bits, 1)
        shared.shape, shared.strides = sizes(*tensor.shape), sizes(*tensor.stride())
        managed = _Managed(shared, None, _delete)
        address = ctypes.addressof(managed)
        _exports[address] = (self, tensor, managed, (shared.shape, shared.strides))
        return _new_capsule(address, b"dltensor", None)


@_Deleter
def _delete(managed: Any) -> None:
    producer, *_ = _exports.pop(ctypes.addressof(managed.contents))
    producer.deleted += 1
