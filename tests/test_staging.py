"""Tensors on their way to a device: the right bytes, bounded memory, and nothing overwritten that is still to be read.

The device is a simulated one, whose copies and events come late and in any order, driven by Python and by the
extension; the CPU, where everything is done at once; and a GPU where there is one.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.errors import OptionError
from flexlora_fast.gather import MEMORY, Ranges, ReadError
from flexlora_fast.staging import ALIGNMENT, SLOTS, Arrival, Staging
from tests.simulated import PATIENCE, Simulated

needs_extension = pytest.mark.skipif(_native.extension is None, reason=f"no native extension: {_native.reason}")
DRIVERS = [
    pytest.param(False, id="python"),
    pytest.param(True, id="native", marks=needs_extension),
]
Contents = list[bytes]


class Source:
    """Files and memory with random bytes, from which batches of ranges are drawn."""

    def __init__(self, folder: Path, seed: int = 0, size: int = 40_000) -> None:
        self._random = random.Random(seed)
        self._bytes = [self._random.randbytes(size) for _ in range(3)]
        self._files = []
        for i, content in enumerate(self._bytes):
            (folder / str(i)).write_bytes(content)
            self._files.append(os.open(folder / str(i), os.O_RDONLY))
        self._memory = [np.frombuffer(content, np.uint8) for content in self._bytes]

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def draw(self, most: int, count: int | None = None) -> tuple[Ranges, Contents]:
        """Ranges that take ``most`` bytes at most when aligned, some of them empty, some neighbours."""
        rows, contents, left = [], [], most
        for _ in range(self._random.randint(0, 12) if count is None else count):
            which, inside = self._random.randrange(3), self._random.random() < 0.5
            nbytes = min(self._random.choice([0, 1, 127, 128, 129, 1000, 5000]), left // ALIGNMENT * ALIGNMENT)
            start = self._random.randrange(len(self._bytes[which]) - nbytes)
            left -= -(-nbytes // ALIGNMENT) * ALIGNMENT
            address = self._memory[which].ctypes.data
            rows.append((MEMORY, address + start, nbytes) if inside else (self._files[which], start, nbytes))
            contents.append(self._bytes[which][start : start + nbytes])
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
        return Ranges(*columns), contents


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    made = Source(tmp_path)
    yield made
    made.close()


def same(arrival: Arrival, buffer: Tensor, contents: Contents) -> bool:
    raw = buffer.numpy().tobytes()
    return all(
        at % ALIGNMENT == 0 and raw[at : at + len(content)] == content
        for at, content in zip(arrival.offsets.tolist(), contents, strict=True)
    )


def in_thread(run: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """A running thread, and what it raises."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread, errors


# -- what arrives ---


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slot", [128, 512, 8192])
def test_what_arrives_is_what_was_asked_for(source: Source, slot: int, threads: int) -> None:
    with Staging("cpu", host_bytes=SLOTS * slot, device_bytes=20_000, threads=threads) as staging:
        for _ in range(30):
            ranges, contents = source.draw(20_000)
            arrival = staging.bring(ranges)
            arrival.wait()
            assert same(arrival, arrival.buffer, contents)
            assert (
                arrival.nbytes == arrival.buffer.numel() == sum(-(-len(c) // ALIGNMENT) * ALIGNMENT for c in contents)
            )
            arrival.release()


@pytest.mark.parametrize("native", DRIVERS)
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_overwritten_before_it_was_read(seed: int, native: bool, source: Source) -> None:
    """Copies, reads and events in a random order; arrivals of all sizes, released in a random order."""
    draw, order = random.Random(seed), random.Random(seed + 100)
    jobs = [source.draw(draw.choice([300, 3000, 6000])) for _ in range(40)]
    arrived: list[Arrival] = []
    there = threading.Semaphore(0)
    right: list[bool] = []
    with (
        Simulated(seed, through_native=native) as device,
        Staging(device, host_bytes=SLOTS * 256, device_bytes=18_000, threads=2) as staging,
    ):

        def read() -> None:
            for ranges, _ in jobs:
                arrived.append(staging.bring(ranges))
                there.release()

        thread, errors = in_thread(read)
        held: list[Arrival] = []
        for i, (_, contents) in enumerate(jobs):
            assert there.acquire(timeout=PATIENCE)
            arrival = arrived[i]
            arrival.wait()
            device.give(lambda a=arrival, c=contents: right.append(same(a, a.buffer, c)))  # type: ignore[misc]
            held.append(arrival)
            if len(held) == 2 or i == len(jobs) - 1:
                for arrival in order.sample(held, len(held)):
                    arrival.release()
                held = []
        thread.join(PATIENCE)
        assert not errors
        assert device.allocated == [18_000 // ALIGNMENT * ALIGNMENT] + [256] * SLOTS, "all of it at the start"
    assert right == [True] * len(jobs)


@pytest.mark.parametrize("native", DRIVERS)
def test_many_threads_may_bring(native: bool, source: Source) -> None:
    jobs = [source.draw(2000) for _ in range(60)]
    right: list[bool] = []
    with (
        Simulated(through_native=native) as device,
        Staging(device, host_bytes=SLOTS * 256, device_bytes=8000, threads=2) as staging,
    ):

        def read(part: list[tuple[Ranges, Contents]]) -> None:
            for ranges, contents in part:
                arrival = staging.bring(ranges)
                arrival.wait()
                device.give(lambda a=arrival, c=contents: right.append(same(a, a.buffer, c)))  # type: ignore[misc]
                arrival.release()

        threads = [in_thread(lambda i=i: read(jobs[i::5])) for i in range(5)]  # type: ignore[misc]
        for thread, errors in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive() and not errors
    assert right == [True] * len(jobs)


# -- room ---


@pytest.mark.parametrize("native", DRIVERS)
def test_bring_waits_until_there_is_room(native: bool) -> None:
    """Until the oldest is released, and until the device has got to that."""
    memory = np.zeros(1024, np.uint8)
    whole = Ranges(np.array([MEMORY]), np.array([memory.ctypes.data]), np.array([1024]))
    with (
        Simulated(through_native=native) as device,
        Staging(device, host_bytes=SLOTS * 256, device_bytes=1024) as staging,
    ):
        first = staging.bring(whole)
        came: list[Arrival] = []
        thread, errors = in_thread(lambda: came.append(staging.bring(whole)))
        thread.join(0.2)
        assert thread.is_alive(), "it is not released"
        first.wait()
        device.hold(True)
        first.release()
        thread.join(0.2)
        assert thread.is_alive(), "the device has not got to its end"
        device.hold(False)
        thread.join(PATIENCE)
        assert len(came) == 1 and not errors
        with pytest.raises(RuntimeError, match="was released before"):
            first.release()
        came[0].release()


def test_more_than_there_is_is_an_error() -> None:
    memory = np.zeros(3000, np.uint8)
    ranges = Ranges(np.array([MEMORY] * 2), np.array([memory.ctypes.data] * 2), np.array([1000, 3000]))
    with Staging("cpu", host_bytes=SLOTS * 128, device_bytes=4095) as staging:
        with pytest.raises(OptionError, match=r"take 0.0 MiB \(4096 bytes\).*device_bytes is .*\(3968\).*raise it"):
            staging.bring(ranges)
        staging.bring(Ranges(*(x[:1] for x in vars(ranges).values()))).release()
    with pytest.raises(OptionError, match="host_bytes is 1000 and device_bytes 4096; give 1024 and 128 at least"):
        Staging("cpu", host_bytes=1000, device_bytes=4096)


def test_a_third_always_fits_beside_one_other(source: Source) -> None:
    """As ``bring`` promises: in the steady state one arrival is computed with while the next comes."""
    with Staging("cpu", host_bytes=SLOTS * 512, device_bytes=12_288, threads=1) as staging:
        before = staging.bring(source.draw(4096)[0])
        for _ in range(200):
            arrivals: list[Arrival] = []
            thread, errors = in_thread(lambda to=arrivals: to.append(staging.bring(source.draw(4096)[0])))  # type: ignore[misc]
            thread.join(PATIENCE)
            assert len(arrivals) == 1 and not errors
            before.release()
            before = arrivals[0]


# -- what goes wrong ---


@pytest.mark.parametrize("native", DRIVERS)
def test_what_cannot_be_read_is_named_and_the_next_is_right(native: bool, source: Source, tmp_path: Path) -> None:
    with (
        Simulated(through_native=native) as device,
        Staging(device, host_bytes=SLOTS * 256, device_bytes=20_000, threads=2) as staging,
    ):
        right: list[bool] = []
        for turn in range(12):
            ranges, contents = source.draw(16_000, count=6)
            bad = turn % 7
            (tmp_path / "short").write_bytes(b"x" * 2000)
            short = os.open(tmp_path / "short", os.O_RDONLY)
            broken = [np.insert(x, bad, y) for x, y in zip(vars(ranges).values(), (short, 0, 2001), strict=True)]
            with pytest.raises(ReadError, match="ends too early") as caught:
                staging.bring(Ranges(*broken))
            assert caught.value.index == bad and caught.value.errno == 0
            os.close(short)
            arrival = staging.bring(ranges)
            arrival.wait()
            device.give(lambda a=arrival, c=contents: right.append(same(a, a.buffer, c)))  # type: ignore[misc]
            arrival.release()
    assert right == [True] * 12


@needs_extension
def test_a_device_that_refuses_is_an_error(source: Source) -> None:
    ranges, contents = source.draw(4000, count=8)
    with (
        Simulated(through_native=True) as device,
        Staging(device, host_bytes=SLOTS * 256, device_bytes=8000) as staging,
    ):
        device.refuse = 700
        with pytest.raises(RuntimeError, match="CUDA's error 700"):
            staging.bring(ranges)
        device.refuse = 0
        arrival = staging.bring(ranges)
        arrival.wait()
        right: list[bool] = []
        device.give(lambda: right.append(same(arrival, arrival.buffer, contents)))
        arrival.release()
    assert right == [True]


@pytest.mark.parametrize("native", DRIVERS)
def test_leaving_ends_the_wait_of_others(native: bool) -> None:
    memory = np.zeros(1024, np.uint8)
    ranges = Ranges(np.array([MEMORY]), np.array([memory.ctypes.data]), np.array([1024]))
    with Simulated(through_native=native) as device:
        with Staging(device, host_bytes=SLOTS * 256, device_bytes=1024) as staging:
            staging.bring(ranges)
            threads = [in_thread(lambda: staging.bring(ranges)) for _ in range(3)]
        for thread, errors in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
            assert [type(error) for error in errors] == [RuntimeError] and "closed" in str(errors[0])
        with pytest.raises(RuntimeError, match="closed"):
            staging.bring(ranges)


# -- on a GPU ---


@pytest.mark.gpu
def test_on_a_gpu(source: Source) -> None:
    """Through several slots and round the ring; the kernels that read are slower than the copies."""
    jobs = [source.draw(6000) for _ in range(200)]
    seen: list[tuple[Arrival, Tensor]] = []
    with Staging("cuda", host_bytes=SLOTS * 1024, device_bytes=18_000) as staging:
        before = torch.cuda.memory_allocated()
        for ranges, _ in jobs:
            arrival = staging.bring(ranges)
            arrival.wait()
            torch.cuda._sleep(100_000)
            seen.append((arrival, arrival.buffer.clone()))
            arrival.release()
        copies = sum(-(-copy.numel() // 512) * 512 for _, copy in seen)
        assert torch.cuda.memory_allocated() - before <= copies
    for (arrival, copy), (_, contents) in zip(seen, jobs, strict=True):
        assert same(arrival, copy.cpu(), contents)
