"""What the gate makes of every hostile file of ``tests/hostile.py``: ``python -m benchmarks.corpus``.

Each lies on disk and is uploaded by its path. Milliseconds: the median of ``--repeats`` refusals. Memory: how far the
resident memory of a process of its own rises above what it was just before the refusal (``VmHWM``, reset by
``/proc/self/clear_refs``), after a few other uploads; tracemalloc would not see torch's and the system's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save

from flexlora_fast.errors import RefusedError
from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME
from flexlora_fast.gate import RoundPolicy
from tests import hostile
from tests.footprint import Footprint

MEBI = 1 << 20


def uploads(folder: Path) -> Iterator[tuple[str, str, Any, str, int]]:
    """Kind, name, upload, expected code and bytes of every file, one at a time: the next may replace it."""
    good = save(hostile.tensors())
    for i, (name, (make, code)) in enumerate(hostile.WEIGHTS.items()):
        path = folder / f"w{i}.safetensors"
        path.write_bytes(make())
        yield "weights", name, path, code, path.stat().st_size
        path.unlink()
    for i, (name, (content, code)) in enumerate(hostile.CONFIGS.items()):
        path = folder / f"c{i}"
        path.mkdir()
        (path / WEIGHTS_NAME).write_bytes(good)
        (path / CONFIG_NAME).write_bytes(content)
        yield "config", name, path, code, len(content)
    for i, (name, (make_at, code)) in enumerate(hostile.PATHS.items()):
        (folder / f"p{i}").mkdir()
        yield "path", name, make_at(folder / f"p{i}" / "client"), code, 0


def refusal(policy: RoundPolicy, upload: Any) -> str:
    try:
        policy.admit(upload, client="mallory")
    except RefusedError as error:
        return str(error.code)
    return "admitted"


def rise(policy: RoundPolicy, upload: Any) -> int:
    """Bytes, measured in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for other in (b"", save({}), save(hostile.tensors()), hostile.WEIGHTS["infinity"][0]()):
                refusal(policy, other)
            footprint = Footprint()
            refusal(policy, upload)
            os.write(writing, str(footprint.rise()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return int(text)


def milliseconds(policy: RoundPolicy, upload: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        refusal(policy, upload)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def report(repeats: int) -> tuple[str, bool]:
    """The table, and whether every code is the expected one."""
    from importlib.metadata import version

    from benchmarks.machine import commit, cpu_name

    policy = RoundPolicy.from_adapter(
        hostile.reference().adapter(), ranks=(2, 4), max_layer_norm=1e3, max_norm=1e4, max_extra_norm=1e3
    )
    rows, right = [], True
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, upload, expected, size in uploads(Path(folder)):
            code = refusal(policy, upload)
            right &= code == expected
            said = code if code == expected else f"{code} (expected {expected})"
            rows.append((kind, name, size, said, milliseconds(policy, upload, repeats), rise(policy, upload) / MEBI))
    slowest, largest = max(row[4] for row in rows), max(row[5] for row in rows)
    lines = [
        "# Hostile files",
        "",
        f"`python -m benchmarks.corpus`: {len(rows)} files of `tests/hostile.py`, "
        f"{'each refused with the code expected of it' if right else '**not all with the expected code**'}; at most "
        f"{slowest:.1f} ms (median of {repeats}) and {largest:.1f} MiB. How it is measured: `benchmarks/corpus.py`.",
        "",
        f"Commit {commit()}, torch {version('torch')}, {cpu_name()}.",
        "",
        "| what | file | bytes | code | ms | MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {name} | {size:,} | {code} | {ms:.2f} | {mib:.1f} |" for kind, name, size, code, ms, mib in rows
    ]
    return "\n".join(lines) + "\n", right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the table, beside printing it")
    parser.add_argument("--repeats", type=int, default=25, help="refusals of each file whose time is taken")
    options = parser.parse_args()
    text, right = report(options.repeats)
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
