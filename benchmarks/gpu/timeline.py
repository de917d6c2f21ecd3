"""What a device did when: copies and kernels from a trace of torch's profiler, how much they overlapped, a picture.

A trace is what ``export_chrome_trace`` writes: events with times in microseconds, those of the device with their stream
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# By the trace's category, and for copies by its name: what is a lane of its own in the picture, and its colour.
IN, OUT, OTHER, KERNEL = "copies to the device", "copies to the host", "other copies", "kernels"
_COLOURS = {IN: "#0072B2", OUT: "#56B4E9", OTHER: "#7F7F7F", KERNEL: "#D55E00"}

Interval = tuple[float, float]


class Span(NamedTuple):
    """One copy or kernel: ``start`` and ``end`` in seconds, ``bytes`` of a copy."""

    kind: str
    stream: int
    start: float
    end: float
    bytes: int = 0


def spans(trace: dict[str, Any]) -> list[Span]:
    """What ran on the device, by start; times begin at the first of them."""
    found = []
    for event in trace["traceEvents"]:
        kind = _kind(event)
        if kind is not None:
            about = event.get("args", {})
            start, length = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
            found.append(Span(kind, int(about["stream"]), start, start + length, int(about.get("bytes", 0))))
    found.sort(key=lambda span: span.start)
    zero = found[0].start if found else 0.0
    return [span._replace(start=span.start - zero, end=span.end - zero) for span in found]


def _kind(event: dict[str, Any]) -> str | None:
    if event.get("ph") != "X":
        return None
    if event.get("cat") == "kernel":
        return KERNEL
    if event.get("cat") != "gpu_memcpy":
        return None
    return IN if "HtoD" in event["name"] else OUT if "DtoH" in event["name"] else OTHER


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as intervals that are apart, by start.

    >>> merged([(2, 3), (0, 1), (0.5, 2)])
    [(0, 3)]
    """
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def common(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Seconds that lie in both, each ``merged``.

    >>> common([(0, 2), (3, 5)], [(1, 4)])
    2
    """
    total: float = 0
    i = j = 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def figures(found: Sequence[Span]) -> dict[str, Any]:
    """Numbers of a timeline.

    ``seconds``: from its first event to the end of its last. ``copy_seconds``, ``kernel_seconds``: in which anything is
    copied to the device, and any kernel runs. ``copies_overlapped``, ``kernels_overlapped``: the share of each in which
    the other goes on as well. ``idle``: the share of all in which neither does. ``rate``: bytes/s while copying.
    ``streams``: by kind, how many.
    """
    by_kind = {kind: merged((x.start, x.end) for x in found if x.kind == kind) for kind in (IN, KERNEL)}
    copying, computing = length(by_kind[IN]), length(by_kind[KERNEL])
    both = common(by_kind[IN], by_kind[KERNEL])
    whole = max((span.end for span in found), default=0.0)
    moved = sum(span.bytes for span in found if span.kind == IN)
    return {
        "seconds": whole,
        "copy_seconds": copying,
        "kernel_seconds": computing,
        "copies_overlapped": both / copying if copying else None,
        "kernels_overlapped": both / computing if computing else None,
        "idle": 1 - (copying + computing - both) / whole if whole else None,
        "copies": sum(span.kind == IN for span in found),
        "kernels": sum(span.kind == KERNEL for span in found),
        "bytes": moved,
        "rate": moved / copying if copying else None,
        "streams": {kind: len({x.stream for x in found if x.kind == kind}) for kind in _COLOURS},
    }


def lanes(found: Sequence[Span]) -> dict[tuple[str, int], list[Interval]]:
    """Intervals by kind and stream: copies first, then kernels."""
    by_lane: dict[tuple[str, int], list[Interval]] = defaultdict(list)
    for span in found:
        by_lane[span.kind, span.stream].append((span.start, span.end))
    order = {kind: place for place, kind in enumerate(_COLOURS)}
    return {lane: merged(by_lane[lane]) for lane in sorted(by_lane, key=lambda lane: (order[lane[0]], lane[1]))}


def picture(found: Sequence[Span], out: Path, title: str) -> None:
    """A lane for each kind and stream, time to the right; its kind is the suffix of ``out`` (png, svg).

    Without pyplot: it needs no display.
    """
    from matplotlib.figure import Figure

    rows = lanes(found)
    figure = Figure(figsize=(10, 1.2 + 0.45 * max(1, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    for place, ((kind, _), intervals) in enumerate(rows.items()):
        bars = [(1e3 * start, 1e3 * (end - start)) for start, end in intervals]
        axes.broken_barh(bars, (place - 0.4, 0.8), color=_COLOURS[kind], linewidth=0)
    axes.set_yticks(range(len(rows)), [f"{kind}, stream {stream}" for kind, stream in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=110)


def recorded(call: Callable[[], object]) -> dict[str, Any]:
    """The trace of one call, which waits for the device before and after."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return dict(json.loads(file.read_text()))
