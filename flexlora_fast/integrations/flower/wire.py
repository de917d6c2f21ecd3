"""Tensors as Flower's arrays and back, bfloat16 included; what a stranger's arrays claim is checked before it is used.

Flower writes arrays with ``np.save``. NumPy has no bfloat16, so Flower refuses such tensors; here they travel as an
``Array`` whose serialization type says that its bytes are bfloat16 numbers.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from flexlora_fast.errors import RefusedError, shown
from flexlora_fast.gate import Reason, RoundPolicy

NUMPY = "numpy.ndarray"
BFLOAT16 = "flexlora_fast.bfloat16"  # little-endian, C order, no header

_DTYPES = {
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<f8": torch.float64,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<i2": torch.int16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}
_MOST_SIDES = 8
_LONGEST = 1024  # bytes of a .npy header; np.save writes 118 for arrays of few dimensions
# What np.save writes (numpy.lib.format, versions 1.0 and 2.0), and nothing else: it is never evaluated.
_NPY = re.compile(
    rb"\{'descr': '([<>|=][A-Za-z]\d{0,2})', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,19}, ?)*(?:\d{1,19})?)\), \} *\n"
)


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A state dict as an ``ArrayRecord``: as Flower makes it, and bfloat16 tensors bit for bit.

    >>> record = to_record({"B": torch.tensor([0.1], dtype=torch.bfloat16)})
    >>> from_record(record)
    {'B': tensor([0.1001], dtype=torch.bfloat16)}
    """
    arrays = {}
    for key, tensor in tensors.items():
        X = tensor.detach().cpu().contiguous()
        if X.dtype == torch.bfloat16:
            data = X.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
            arrays[key] = Array("bfloat16", tuple(X.shape), BFLOAT16, data)
        else:
            arrays[key] = Array(X.numpy())
    return ArrayRecord(arrays)


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record, whichever of the two ways each of them came; copies.

    Raises ``RefusedError`` (content, dtype, shape) for arrays that contradict themselves.
    """
    return {key: _decoded(key, array).tensor() for key, array in record.items()}


def upload_of(record: ArrayRecord, policy: RoundPolicy) -> bytes:
    """A stranger's arrays as the safetensors file that ``RoundPolicy.admit`` and ``Aggregator.add`` take.

    The gate checks names, shapes, dtypes and values of that file. Here it is made sure that nothing is built, and
    little read, of what the policy has no room for.

    Raises ``RefusedError``: unknown-tensor, file-size, content, dtype, shape.
    """
    known = set(policy.names)
    for key in record:
        if key not in known:
            raise RefusedError(
                f"tensor {shown(key)} is not expected",
                code=Reason.UNKNOWN_TENSOR,
                value=key,
                remedy="send what peft.get_peft_model_state_dict(model, save_embedding_layers=False) gives, alone",
            )
    size = sum(len(array.data) for array in record.values())
    room = policy.max_bytes + _LONGEST * len(record)
    if size > room:
        raise RefusedError(
            f"its arrays have {size} bytes, the policy takes {room}",
            code=Reason.FILE_SIZE,
            value=size,
            remedy="send the expected tensors alone, at a rank and dtype that the policy allows",
        )
    return safetensors.torch.save(from_record(record))


@dataclass(frozen=True)
class _Decoded:
    """The numbers of an array: little-endian, C order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    def tensor(self) -> Tensor:
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).reshape(self.shape)


def _decoded(key: str, array: Array) -> _Decoded:
    """What the array says that it is, if its bytes are just that."""
    if array.stype == BFLOAT16:
        dtype, shape, data, fortran = torch.bfloat16, tuple(map(int, array.shape)), array.data, False
        if sys.byteorder == "big":
            data = np.frombuffer(data, "<i2").astype(">i2").tobytes()
    elif array.stype == NUMPY:
        dtype, shape, data, fortran = _npy(key, array.data)
    else:
        raise _refusal(key, f"is serialized as {shown(array.stype)}", Reason.CONTENT, array.stype)
    name = str(dtype).removeprefix("torch.")
    if array.dtype != name:
        raise _refusal(key, f"says {shown(array.dtype)} and holds {name}", Reason.DTYPE, array.dtype)
    if tuple(array.shape) != shape or any(side < 0 for side in shape):
        raise _refusal(key, f"says shape {shown(array.shape)} and holds {shown(shape)}", Reason.SHAPE, array.shape)
    # Empty arrays too: torch multiplies the other sides for its strides.
    if len(shape) > _MOST_SIDES or math.prod(max(side, 1) for side in shape) >= 2**62:
        raise _refusal(key, f"has shape {shown(shape)}, which no tensor has", Reason.SHAPE, shape)
    if len(data) != math.prod(shape) * dtype.itemsize:  # Python's integers: no overflow
        raise _refusal(key, f"has {len(data)} bytes for {name} of shape {shown(shape)}", Reason.SHAPE, len(data))
    if fortran:
        ordered = np.frombuffer(data, np.dtype(f"V{dtype.itemsize}")).reshape(shape, order="F")
        data = ordered.tobytes(order="C")
    return _Decoded(dtype, shape, data)


def _npy(key: str, content: bytes) -> tuple[torch.dtype, tuple[int, ...], bytes, bool]:
    """dtype, shape, bytes and whether they are in Fortran order, of a ``.npy`` file."""
    version, start = content[6:8], {b"\x01\x00": 10, b"\x02\x00": 12}.get(content[6:8], 0)
    length = int.from_bytes(content[8:start], "little")
    header = content[start : start + length] if length <= _LONGEST else b""
    found = _NPY.fullmatch(header)
    if content[:6] != b"\x93NUMPY" or not start or found is None:
        raise _refusal(key, f"is no .npy file as np.save writes it (version {shown(version)})", Reason.CONTENT, header)
    dtype = _DTYPES.get(found[1].decode())
    if dtype is None:
        raise _refusal(key, f"has NumPy's dtype {shown(found[1])}", Reason.DTYPE, found[1])
    shape = tuple(int(side) for side in found[3].split(b",") if side.strip())
    return dtype, shape, content[start + length :], found[2] == b"True"


def _refusal(key: str, what: str, code: Reason, value: object) -> RefusedError:
    return RefusedError(
        f"array {shown(key)} {what}", code=code, value=value, remedy="send flower.to_record(state_dict) as its arrays"
    )
