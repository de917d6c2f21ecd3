"""Tensors of a safetensors file, read by position when they are asked for.

Nothing is mapped (touched pages of a mapping count as resident memory), nothing is cached, and unless asked for no
descriptor stays open between reads: a round may hold ten thousand files. The format: 8 bytes of header length N, N
bytes of JSON from tensor name to dtype, shape and offsets, then the data without gaps
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flexlora_fast.errors import AdapterError, UnreadableError, shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
LONGEST_HEADER = 100_000_000  # bytes; what safetensors itself takes
_BUFFERS = 512  # in one system call; Linux takes 1024


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes ``start`` … ``stop`` of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Index:
    """A checked header. Files with the same header share one: clients of one model and rank have the same."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    begin: int  # where the data begins in the file
    digest: bytes

    @property
    def size(self) -> int:
        """Bytes that a file with this header has."""
        return self.begin + max((entry.stop for entry in self.entries.values()), default=0)


_indices: WeakValueDictionary[bytes, Index] = WeakValueDictionary()


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one file by name: names, shapes and dtypes are known, values are read at each access.

    ``hold`` keeps the file open: it may then be moved, replaced or removed while it is in use.

    Raises ``AdapterError`` where the file cannot be read or contradicts itself, and ``UnreadableError`` (at each
    access) where it is gone or has changed since.
    """

    __slots__ = ("_held", "_names", "_stamp", "index", "path")

    def __init__(self, path: str | os.PathLike[str], *, hold: bool = False) -> None:
        self.path = os.fspath(path)
        self._names: Mapping[str, str] | None = None
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._stamp = _stamp(os.fstat(file.fileno()))
                self.index = read_index(partial(os.pread, file.fileno()), self._stamp[1])
                self._held = Opened(os.dup(file.fileno())) if hold else None
        except (OSError, BadFileError) as error:
            raise AdapterError(
                f"{self.path!r} is not a readable safetensors file ({error}); have it sent again"
            ) from error

    def renamed(self, names: Mapping[str, str]) -> TensorFile:
        """The same file with ``names`` (new to old) to go by; tensors without a new name are left out."""
        other = object.__new__(TensorFile)
        other.path, other.index, other._names = self.path, self.index, names
        other._stamp, other._held = self._stamp, self._held
        return other

    @property
    def metadata(self) -> dict[str, str]:
        return self.index.metadata

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor; nothing is read."""
        return self.index.entries[name if self._names is None else self._names[name]]

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.entries if self._names is None else self._names)

    def __len__(self) -> int:
        return len(self.index.entries if self._names is None else self._names)

    def __contains__(self, name: object) -> bool:
        return name in (self.index.entries if self._names is None else self._names)

    def read(self, names: Iterable[str], *, keep: bool = False) -> dict[str, Tensor]:
        """Fresh tensors; neighbours in the file are read together, each byte once.

        ``keep``: they will stay for long, so they get memory pages of their own, together. Long-lived tensors between
        short-lived ones fragment the heap (8,192 tensors of 64 KiB, checked as they came: 1.6 times their size).
        """
        wanted = {name: self.entry(name) for name in names}
        tensors: dict[str, Tensor] = {}
        pending: list[tuple[int, memoryview]] = []  # by place in the file
        new = _Pages(wanted.values()).take if keep else _buffer
        for name, entry in sorted(wanted.items(), key=lambda item: item[1].start):
            tensors[name], view = _shaped(new(entry.nbytes), entry.dtype, entry.shape)
            if entry.nbytes:
                pending.append((entry.start, view))
        opened = self.opened()
        for start, views in _runs(pending):
            self._fill(opened.descriptor, start, views)
        return {name: tensors[name] for name in wanted}

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` … ``stop`` of a tensor, flattened."""
        entry = self.entry(name)
        width = entry.dtype.itemsize
        tensor, view = _shaped(_buffer((stop - start) * width), entry.dtype, (stop - start,))
        if stop > start:
            opened = self.opened()
            self._fill(opened.descriptor, entry.start + start * width, [view])
        return tensor

    def opened(self) -> Opened:
        """The open file, for as long as what is returned is kept; ``place`` says where in it a tensor lies.

        Raises ``UnreadableError`` where it is gone or has changed.
        """
        try:
            opened = self._held or Opened(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise UnreadableError(
                f"{self.path!r} cannot be read any more ({error.strerror}); a file must stay while it is in use"
            ) from error
        self.check(opened)
        return opened

    def check(self, opened: Opened) -> None:
        """Raise ``UnreadableError`` if the file has changed since its header was read."""
        if _stamp(os.fstat(opened.descriptor)) != self._stamp:
            raise UnreadableError(
                f"{self.path!r} has changed since it was opened; a file must stay as it is while it is in use"
            )

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies in the file: its first byte, and how many there are."""
        entry = self.entry(name)
        return self.index.begin + entry.start, entry.nbytes

    def _fill(self, descriptor: int, start: int, views: list[memoryview]) -> None:
        """Fill the buffers from byte ``start`` of the data on; a system call may bring less than asked for."""
        position, left = self.index.begin + start, list(views)
        while left:
            try:
                got = os.preadv(descriptor, left[:_BUFFERS], position)
            except OSError as error:
                raise UnreadableError(
                    f"{self.path!r} cannot be read ({error.strerror}); check the disk, or have it sent again"
                ) from error
            if got == 0:
                raise UnreadableError(f"{self.path!r} ends too early; have it sent again")
            position += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:
                left[0] = left[0][got:]


class Opened:
    """A descriptor that closes with the last one who holds it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _buffer(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def _shaped(buffer: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> tuple[Tensor, memoryview]:
    """A buffer of bytes as a tensor, and as what a file is read into."""
    return buffer.view(dtype).view(*shape) if shape else buffer.view(dtype).view(()), _bytes_of(buffer)


class _Pages:
    """One anonymous mapping that all tensors of a read share, each at a multiple of 64 bytes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        total = sum(_aligned(entry.nbytes) for entry in entries)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        pages: Any = mmap.mmap(-1, total, flags=flags) if total else bytearray(1)
        self._all, self._at = torch.frombuffer(pages, dtype=torch.uint8), 0

    def take(self, nbytes: int) -> Tensor:
        start = self._at
        self._at += _aligned(nbytes)
        return self._all[start : start + nbytes]


def _aligned(nbytes: int) -> int:
    return 64 * math.ceil(nbytes / 64)


def _bytes_of(buffer: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor."""
    array: Any = buffer.numpy()
    return memoryview(array)


def _runs(pending: list[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """Groups of buffers that lie side by side in the file."""
    at, views = 0, list[memoryview]()
    for start, view in pending:
        if views and start != at + sum(map(len, views)):
            yield at, views
            views = []
        if not views:
            at = start
        views.append(view)
    if views:
        yield at, views


# -- the header ---


class BadFileError(Exception):
    """What is wrong with a file."""


class LongHeaderError(BadFileError):
    """A header longer than the reader takes; none of it was read."""


def read_index(read: Callable[[int, int], bytes], size: int, longest: int = LONGEST_HEADER) -> Index:
    """The checked header of a file of ``size`` bytes.

    Args:
        read: as ``os.pread``: from (count, offset) to bytes, as many as come at once, none at the end.
        longest: bytes of header to take at most.

    Raises ``BadFileError`` for a header that is none, contradicts itself, or does not describe ``size`` bytes.
    """
    first = read(8, 0)
    if len(first) < 8:
        raise BadFileError(f"it has {size} bytes, and a header length alone takes 8")
    length = int.from_bytes(first, "little")
    if length > longest or 8 + length > size:
        kind = LongHeaderError if 8 + length <= size else BadFileError
        raise kind(f"its header would have {length} bytes, the file has {size}")
    header = bytearray()
    while len(header) < length:
        more = read(length - len(header), 8 + len(header))
        if not more:
            raise BadFileError("it ends within its header")
        header += more
    digest = hashlib.sha256(header).digest()
    index = _indices.get(digest)
    if index is None:
        index = _parse(bytes(header), digest)
        _indices[digest] = index
    if index.size != size:
        raise BadFileError(f"its header describes {index.size} bytes, the file has {size}")
    return index


def _parse(header: bytes, digest: bytes) -> Index:
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"its header is not JSON: {error}") from error
    if not isinstance(document, dict) or header[:1] != b"{":
        raise BadFileError("its header is no JSON object")
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFileError("its __metadata__ does not map names to text")
    entries = {name: _entry(name, fields) for name, fields in document.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            what = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise BadFileError(f"{name!r} at byte {entry.start} of the data {what}, which ends at {at}")
        at = entry.stop
    return Index(entries, metadata, 8 + len(header), digest)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=…)``: raises ``ValueError`` where an object has a name twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(name: str, fields: Any) -> Entry:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise BadFileError(f"{name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFileError(f"{name!r} has dtype {dtype!r}, which is not supported")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise BadFileError(f"{name!r} has shape {shown(shape, 80)} and data_offsets {shown(offsets, 80)}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise BadFileError(f"{name!r} has {offsets[1] - offsets[0]} bytes of data, but {dtype} {shape} takes {needed}")
    return Entry(DTYPES[dtype], tuple(shape), *offsets)


def _are_sizes(values: Any) -> bool:
    """A list of whole numbers that a file can have."""
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**62 for x in values)
    )


# -- writing ---


class TensorWriter:
    """A safetensors file written tensor by tensor, its header last: offsets and metadata need not be known before.

    Args:
        path: the file, replaced.
        room: bytes to leave for the header; unused ones become spaces, which the format allows.

    The caller writes tensors in an order that keeps each at a multiple of its element size, as mapping readers need.
    """

    def __init__(self, path: str | os.PathLike[str], room: int) -> None:
        self._room = 8 * math.ceil(room / 8)
        self._entries: dict[str, Any] = {}
        self._at = 0
        self._file = open(Path(path), "wb")  # noqa: SIM115 (closed by ``close``)
        self._file.seek(8 + self._room)

    @property
    def position(self) -> int:
        """Bytes of data so far."""
        return self._at

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        tensor = tensor.detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8)
        self._file.write(_bytes_of(raw))
        code = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
        stop = self._at + raw.numel()
        self._entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [self._at, stop]}
        self._at = stop

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and close."""
        header = json.dumps({"__metadata__": dict(metadata), **self._entries}).encode()
        if len(header) > self._room:
            raise ValueError(f"the header takes {len(header)} bytes, {self._room} were left for it")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self.close()

    def close(self) -> None:
        self._file.close()
