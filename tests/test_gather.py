"""Ranges of files and memory copied into one buffer: the extension and its twin in Python give the same."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flexlora_fast import _native
from flexlora_fast.gather import MEMORY, Ranges, ReadError, gather, twin

Gather = Callable[[Ranges, np.ndarray, torch.Tensor], None]
WAYS: list[object] = [pytest.param(twin, id="twin")]
WAYS += [
    pytest.param(
        lambda ranges, target, out, threads=threads: gather(ranges, target, out, threads),
        id=f"native, {threads} threads",
        marks=pytest.mark.skipif(_native.extension is None, reason=f"no native extension: {_native.reason}"),
    )
    for threads in (1, 2, 7)
]
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    """A function that makes a file and opens it."""
    descriptors: list[int] = []

    def make(content: bytes) -> int:
        path = tmp_path / str(len(descriptors))
        path.write_bytes(content)
        descriptors.append(os.open(path, os.O_RDONLY))
        return descriptors[-1]

    yield make
    for descriptor in descriptors:
        os.close(descriptor)


def ranges_of(rows: list[tuple[int, int, int]]) -> Ranges:
    """From (descriptor, start, nbytes) of each."""
    return Ranges(*np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy())


def int64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@every_way
@pytest.mark.parametrize("seed", range(8))
def test_the_bytes_are_those_asked_for(seed: int, way: Gather, opened: Callable[[bytes], int]) -> None:
    """Neighbours and not, empty, long (above what is read at a time), in files and memory; the rest stays as it was."""
    draw = random.Random(seed)
    contents = [draw.randbytes(draw.choice([1, 4096, 3_000_001])) for _ in range(4)]
    files, memory = [opened(content) for content in contents], [np.frombuffer(x, np.uint8) for x in contents]
    rows, target, expected, at = [], [], bytearray(), 0
    for _ in range(40):
        which, inside = draw.randrange(4), draw.random() < 0.4
        size = len(contents[which])
        start, nbytes = draw.randrange(size + 1), draw.choice([0, 1, 100, 5000, 2_500_000])
        nbytes = min(nbytes, size - start)
        for part in sorted({0, nbytes // 3, nbytes}):  # two neighbours, and an empty one
            begin, stop = (0, part) if part <= nbytes // 3 else (nbytes // 3, nbytes)
            address = memory[which].ctypes.data + start + begin
            rows.append((MEMORY, address, stop - begin) if inside else (files[which], start + begin, stop - begin))
            target.append(at)
            expected += contents[which][start + begin : start + stop]
            at += stop - begin
        gap = draw.choice([0, 0, 128])
        expected += b"\xee" * gap
        at += gap
    out = torch.full((at + 5,), 0xEE, dtype=torch.uint8)
    way(ranges_of(rows), int64(*target), out)
    assert out.numpy().tobytes() == bytes(expected) + b"\xee" * 5


@every_way
def test_nothing_is_a_request_too(way: Gather) -> None:
    way(ranges_of([]), int64(), torch.empty(0, dtype=torch.uint8))
    out = torch.zeros(3, dtype=torch.uint8)
    way(ranges_of([(MEMORY, 0, 0), (12345, -7, 0)]), int64(3, 0), out)
    assert out.tolist() == [0, 0, 0]


@every_way
def test_a_read_that_brings_less_is_continued(way: Gather) -> None:
    """Files of the kernel give a page at a time, whatever is asked for."""
    path = Path("/proc/kallsyms")
    if not path.exists():
        pytest.skip("no file here that is read in small pieces")
    nbytes = 150_000
    with path.open("rb") as file:
        assert len(os.pread(file.fileno(), nbytes, 0)) < nbytes
        out = torch.zeros(nbytes, dtype=torch.uint8)
        way(ranges_of([(file.fileno(), 0, nbytes)]), int64(0), out)
        assert out.numpy().tobytes() == path.read_bytes()[:nbytes]


# -- what cannot be read ---


@every_way
@pytest.mark.parametrize("cut", [0, 1, 299_999, 300_000, 300_001, 999_999])
def test_the_range_at_which_a_file_ends_is_named(way: Gather, cut: int, opened: Callable[[bytes], int]) -> None:
    """Ten neighbours that are read in one go, an empty one in front of each."""
    descriptor = opened(bytes(1_000_000))
    os.truncate(f"/proc/self/fd/{descriptor}", cut)
    rows, target = [], []
    for i in range(10):
        rows += [(descriptor, 77, 0), (descriptor, i * 100_000, 100_000)]
        target += [i * 100_000] * 2
    with pytest.raises(ReadError, match="the file ends too early") as caught:
        way(ranges_of(rows), int64(*target), torch.empty(1_000_000, dtype=torch.uint8))
    assert caught.value.index == 2 * (cut // 100_000) + 1 and caught.value.errno == 0


@every_way
def test_the_first_of_several_failures_is_named(way: Gather, opened: Callable[[bytes], int]) -> None:
    """Whichever thread comes first: 200 ranges of 200 KB, of which one after another is bad."""
    good, short = opened(bytes(200_000)), opened(bytes(199_999))
    out = torch.empty(200 * 200_000, dtype=torch.uint8)
    target = np.arange(200, dtype=np.int64) * 200_000
    for first in (0, 1, 50, 51, 199):
        rows = [(short if i >= first else good, 0, 200_000) for i in range(200)]
        with pytest.raises(ReadError) as caught:
            way(ranges_of(rows), target, out)
        assert caught.value.index == first


@every_way
def test_a_closed_descriptor_and_a_folder_are_errors(
    way: Gather, tmp_path: Path, opened: Callable[[bytes], int]
) -> None:
    good = opened(b"12345678")
    folder, gone = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    os.close(gone)
    for bad, number in ((gone, errno.EBADF), (folder, errno.EISDIR)):
        with pytest.raises(ReadError, match=os.strerror(number)) as caught:
            way(ranges_of([(good, 0, 8), (bad, 0, 8)]), int64(0, 8), torch.empty(16, dtype=torch.uint8))
        assert (caught.value.index, caught.value.errno) == (1, number)
    os.close(folder)


BAD: dict[str, tuple[tuple[int, int, int], int]] = {
    "behind the end": ((MEMORY, 4096, 5), 4),
    "far behind the end": ((MEMORY, 4096, 1), 2**62),
    "in front": ((MEMORY, 4096, 1), -1),
    "longer than all": ((MEMORY, 4096, 2**63 - 1), 0),
    "negative length": ((MEMORY, 4096, -1), 0),
    "negative offset": ((0, -1, 4), 0),
    "no address": ((MEMORY, 0, 4), 0),
    "no descriptor": ((-2, 4096, 4), 0),
    "past all files": ((2**31, 4096, 4), 0),
    "past the largest file": ((0, 2**63 - 4, 8), 0),
}


@every_way
@pytest.mark.parametrize(("row", "target"), BAD.values(), ids=BAD.keys())
def test_a_bad_range_is_refused_before_anything_is_read(way: Gather, row: tuple[int, int, int], target: int) -> None:
    content, out = np.full(8, 7, np.uint8), torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"range 1 of {row[2]} bytes, from {row[1]} of descriptor {row[0]}, would go"):
        way(ranges_of([(MEMORY, content.ctypes.data, 2), row]), int64(0, target), out)
    assert out.tolist() == [0] * 8


@every_way
def test_bad_arguments_are_refused(way: Gather) -> None:
    ranges, out = ranges_of([(MEMORY, 4096, 0)] * 2), torch.zeros(8, dtype=torch.uint8)
    for target in (int64(0), int64(0, 0, 0), int64(0, 0).reshape(2, 1)):
        with pytest.raises(ValueError, match="expected"):
            way(ranges, target, out)
    for buffer in (out.float(), out[::2], torch.empty(8, dtype=torch.uint8, device="meta")):
        with pytest.raises(ValueError, match="expected contiguous bytes on the CPU"):
            way(ranges, int64(0, 0), buffer)
    with pytest.raises(ValueError, match=r"start is float64 of shape \(2,\): expected int64 \(2,\)"):
        Ranges(int64(0, 0), np.zeros(2), int64(0, 0))
    with pytest.raises(ValueError, match=r"nbytes is int64 of shape \(1,\): expected int64 \(2,\)"):
        Ranges(int64(0, 0), int64(0, 0), int64(0))


@pytest.mark.skipif(_native.extension is None, reason=f"no native extension: {_native.reason}")
@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_a_bad_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads}"):
        gather(ranges_of([]), int64(), torch.empty(0, dtype=torch.uint8), threads)


def test_without_the_extension_the_twin_reads(monkeypatch: pytest.MonkeyPatch, opened: Callable[[bytes], int]) -> None:
    monkeypatch.setattr(_native, "extension", None)
    out = torch.zeros(3, dtype=torch.uint8)
    gather(ranges_of([(opened(b"abc"), 0, 3)]), int64(0), out, 4)
    assert out.numpy().tobytes() == b"abc"
