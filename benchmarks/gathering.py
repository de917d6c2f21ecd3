"""How fast this host brings clients' tensors together for a device: ``python -m benchmarks.gathering [--quick]``.

2,000 files in the page cache, and the same bytes in memory, of which every tensor is wanted: against one thread's and
all threads' copies of memory, and against reading the files from one end to the other. What a device would do is left
out: one that takes everything at once stands in for it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import best_seconds, cpu_name
from benchmarks.text import markdown
from flexlora_fast import _native
from flexlora_fast.gather import MEMORY, Ranges
from flexlora_fast.staging import SLOTS, Staging
from flexlora_fast.streams import Event, Host, Native

TENSOR = 131_072  # bytes: rank 16 of 4,096 in bfloat16
TENSORS = 4  # of each client: A and B of two layers
FULL, QUICK = 2000, 200  # clients
SLOT, QUICK_SLOT = 64 << 20, 4 << 20
_PIECE = 2 << 20  # bytes that a plain read asks for


class Nowhere(Host):
    """A device that takes everything at once: glibc's ``pthread_spin_destroy`` does nothing and answers 0."""

    def native(self, events: Sequence[Event]) -> Native | None:  # type: ignore[override]
        address = ctypes.cast(ctypes.CDLL(None).pthread_spin_destroy, ctypes.c_void_p).value or 0
        return Native((address,) * 3, [1, 1], [1] * len(events))

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Taken."""


class ByPython(Nowhere):
    """The same, slot by slot from Python."""

    def native(self, events: Sequence[Event]) -> None:  # type: ignore[override]
        """Not by the extension."""


def write(folder: Path, clients: int) -> list[Path]:
    """One file a client, written once."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}" for i in range(clients)]
    content = np.random.default_rng(0).bytes(TENSORS * TENSOR)
    for path in paths:
        if not path.exists() or path.stat().st_size != len(content):
            path.write_bytes(content)
    return paths


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[int]]:
    files = [os.open(path, os.O_RDONLY) for path in paths]
    yield files
    for file in files:
        os.close(file)


def ranges_of(sources: Sequence[int], first: Sequence[int], every: int) -> Ranges:
    """Every tensor of each client, or every second, from byte ``first`` of its source."""
    places = np.arange(0, TENSORS, every, dtype=np.int64) * TENSOR
    start = (np.asarray(first, dtype=np.int64)[:, None] + places).ravel()
    descriptor = np.repeat(np.asarray(sources, dtype=np.int64), places.size)
    return Ranges(descriptor, start, np.full(start.size, TENSOR, dtype=np.int64))


@contextmanager
def busy() -> Iterator[None]:
    """Beside a thread that computes in Python all the time."""
    ended = threading.Event()

    def compute() -> None:
        while not ended.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    yield
    ended.set()
    thread.join()


def plain_read(files: Sequence[int], threads: int) -> None:
    """All files from one end to the other."""

    def read(part: Sequence[int]) -> None:
        buffer = memoryview(bytearray(_PIECE))
        for file in part:
            at = 0
            while got := os.preadv(file, [buffer], at):
                at += got

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [files[i::threads] for i in range(threads)]))


def measure(clients: int, slot: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of what was timed: its name, seconds, bytes and tensors."""
    rows: list[dict[str, Any]] = []
    total = clients * TENSORS * TENSOR
    memory = torch.ones(total, dtype=torch.uint8)
    first = (memory.data_ptr() + np.arange(clients) * (TENSORS * TENSOR)).tolist()
    in_memory = [ranges_of([MEMORY] * clients, first, every) for every in (1, 2)]

    def add(name: str, call: Callable[[], object], nbytes: int = total) -> None:
        rows.append({"name": name, "seconds": best_seconds(call, 3), "bytes": nbytes, "tensors": nbytes // TENSOR})

    def stage(name: str, ranges: Ranges, slot: int = slot, way: type[Host] = Nowhere) -> None:
        """One arrival."""
        nbytes = len(ranges) * TENSOR
        device = way(torch.device("cpu"))
        with Staging(device, host_bytes=SLOTS * slot, device_bytes=nbytes, threads=threads) as staging:
            add(f"staged from {name}", lambda: staging.bring(ranges).release(), nbytes)

    out = torch.empty(slot, dtype=torch.uint8)
    before = torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        add(f"copies of memory, {count} threads", lambda: [out[: x.numel()].copy_(x) for x in memory.split(slot)])
    torch.set_num_threads(before)
    with opened(write(folder, clients)) as files:
        in_files = [ranges_of(files, [0] * clients, every) for every in (1, 2)]
        add(f"plain reads, {threads} threads", lambda: plain_read(files, threads))
        for where, ranges in (("files", in_files), ("memory", in_memory)):
            stage(where, ranges[0])
            stage(f"{where}, every second", ranges[1])
        small = slot // 16
        stage("files, slots of a sixteenth", in_files[0], small)
        with busy():
            stage("files, slots of a sixteenth, beside Python", in_files[0], small)
            stage("files, slots of a sixteenth, beside Python, slot by slot from it", in_files[0], small, ByPython)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """GB/s, µs a tensor, and times the rates of the plain ways."""
    rates = {row["name"]: row["bytes"] / row["seconds"] for row in rows}
    copies = max(rate for name, rate in rates.items() if name.startswith("copies"))
    reads = next(rate for name, rate in rates.items() if name.startswith("plain"))
    body = [
        [
            row["name"],
            f"{rates[row['name']] / 1e9:.2f}",
            f"{row['seconds'] / row['tensors'] * 1e6:.1f}",
            f"{rates[row['name']] / copies:.2f}",
            f"{rates[row['name']] / reads:.2f}",
        ]
        for row in rows
    ]
    return markdown(["", "GB/s", "µs a tensor", "× the copies", "× the plain reads"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} clients in place of {FULL}")
    parser.add_argument("--threads", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--data", type=Path, default=Path(".bench-data"), help="folder for the files (1 GB)")
    parser.add_argument("--json", type=Path, help="also leave the rows here")
    args = parser.parse_args()
    if _native.extension is None:
        parser.error(f"this measures the extension, and there is none: {_native.reason}")
    clients, slot = (QUICK, QUICK_SLOT) if args.quick else (FULL, SLOT)
    rows = measure(clients, slot, args.threads, args.data / "gathering")
    print(f"{cpu_name()}, {args.threads} threads, {clients} files of {TENSORS} tensors of {TENSOR} bytes\n")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
