"""round-7b from host memory and from files: its factors pass through a limit of the device's memory.

1,000 clients of rank 16 have 80 GB of factors, more than can be drawn in a minute: clients share the tensors of the 40
that are, so that ΔW has rank 640, and all the bytes cross PCIe nevertheless. The floor is the time that this takes at
the rate measured from pinned memory. What a round does when is looked at in a part of its layers, by torch's profiler.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import flexlora_fast as ff
from benchmarks import models
from benchmarks.gpu import ops, stage, timeline
from benchmarks.gpu.round import identical
from benchmarks.gpu.sizes import kept, streamed
from benchmarks.gpu.stage import NEEDS_GPU, Deadline, Options, Report, wall
from benchmarks.gpu.table import PICTURE
from benchmarks.models import ModelRound
from benchmarks.truth import Truth

# Bytes of the device that a round may use, and how many clients are drawn.
LIMIT = {False: 16 << 30, True: 64 << 20}
DRAWN = {False: 40, True: 4}
# The decoder's blocks whose layers are profiled: copies and kernels by the thousand, in a trace of a few megabytes.
PROFILED = {False: 4, True: 1}

State = dict[str, Tensor]


def drawn(round_: ModelRound, count: int, device: str) -> list[State]:
    """State dicts of the first clients, drawn on the device and brought to host memory."""
    few = dataclasses.replace(round_, ranks=round_.ranks[:count])
    return [{key: X.cpu() for key, X in state.items()} for state in models.drawn(few, device)]


def adapters(round_: ModelRound, states: Sequence[State]) -> list[ff.Adapter]:
    """One for each client of the round; clients share the states in turn."""
    made = [ff.Adapter.from_state_dict(state, models.config(round_, round_.ranks[0])) for state in states]
    return list(itertools.islice(itertools.cycle(made), len(round_.ranks)))


@contextmanager
def folders(round_: ModelRound, states: Sequence[State]) -> Iterator[list[Path]]:
    """A folder for each client, removed in the end; clients share their files by hard links.

    Written just now, the files are in the page cache.
    """
    with tempfile.TemporaryDirectory() as root:
        found = []
        for i, rank in enumerate(round_.ranks):
            folder = Path(root) / f"client-{i:05d}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps(models.config(round_, rank)))
            file = folder / "adapter_model.safetensors"
            if i < len(states):
                save_file(states[i], file)
            else:
                os.link(found[i % len(states)] / file.name, file)
            found.append(folder)
        yield found


def part(round_: ModelRound, states: Sequence[State], blocks: int) -> tuple[ModelRound, list[State]]:
    """The round and its states with the layers of the model's first decoder blocks only."""
    layers = tuple(layer for layer in round_.layers if int(layer[0].split(".")[2]) < blocks)
    keys = [f"base_model.model.{name}.lora_{side}.weight" for name, _, _ in layers for side in "AB"]
    return dataclasses.replace(round_, layers=layers), [{key: state[key] for key in keys} for state in states]


def peaks(call: Callable[[], object], device: str) -> dict[str, Any]:
    """Seconds of a call that begins with nothing cached, and the most memory that it took of the device."""
    if not device.startswith("cuda"):
        return {"first_seconds": wall(call, device), "peak_bytes": None, "reserved_bytes": None}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    seconds = wall(call, device)
    return {
        "first_seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() - allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved() - reserved,
    }


def floor_seconds(round_: ModelRound, ceilings: dict[str, Any]) -> float | None:
    """The least time in which all factors can cross PCIe, at the measured rate from pinned memory."""
    pcie = ceilings.get("pcie")
    return round_.bytes / pcie["to_device"] if isinstance(pcie, dict) else None


def excess(update: ff.GlobalUpdate, round_: ModelRound, states: Sequence[State], options: Options) -> dict[str, float]:
    """Of one of the smallest layers, by its name, in float64 on the device."""
    layer = min(round_.layers, key=lambda layer: layer[1] * layer[2])[0]
    shared = itertools.islice(itertools.cycle(states), len(round_.ranks))
    configs = [models.config(round_, rank) for rank in round_.ranks]
    clients = ops.client_factors(list(shared), configs, round_.weights(), layer)
    truth = Truth([(B.to(options.device), A.to(options.device), c) for B, A, c in clients])
    B, A, *_ = ops.answer(update, layer)
    return {layer: truth.excess(B, A, kept(options.quick))}


def measure_round(
    round_: ModelRound,
    sources: Sequence[ff.Adapter | Path],
    states: Sequence[State],
    options: Options,
    report: Report,
    name: str,
) -> None:
    """Fill ``report["rounds"][name]``: the time to take clients in, and twice the time from the last of them on.

    Clients in memory are checked as they come; files are read, checked and solved in one go at the end. ``states``:
    what the clients share in turn.
    """
    origin, read = ("host memory", "add") if isinstance(sources[0], ff.Adapter) else ("files", "finish")
    floor = floor_seconds(round_, options.found("ceilings"))
    row: dict[str, Any] = {"from": origin, "clients": len(round_.ranks), "layers": len(round_.layers), "R": round_.R}
    row |= {"k": kept(options.quick), "bytes": round_.bytes, "limit": LIMIT[options.quick], "floor_seconds": floor}
    report["rounds"][name] = row
    start = time.perf_counter()
    call = ops.streamed_round(
        sources, round_.weights(), kept(options.quick), options.device, LIMIT[options.quick], read
    )
    row["take_in_seconds"] = time.perf_counter() - start
    report.write()
    updates: list[ff.GlobalUpdate] = []
    row |= peaks(lambda: updates.append(call()), options.device)
    report.write()
    row["seconds"] = wall(lambda: updates.append(call()), options.device)
    row |= {"identical": identical(*updates), "solvers": Counter(layer.solver for layer in updates[0].values())}
    row["over_floor"] = None if floor is None else row["seconds"] / floor
    report.write()
    row["excess"] = excess(updates[0], round_, states, options)
    report.write()
    print(f"{name}: {row['seconds']:.4g} s", flush=True)


def measure_timeline(round_: ModelRound, states: Sequence[State], options: Options, report: Report) -> None:
    """Fill ``report["timeline"]`` and draw it: a part of the round's layers, with all of its clients."""
    some, few = part(round_, states, PROFILED[options.quick])
    about: dict[str, Any] = {"layers": len(some.layers), "clients": len(some.ranks), "bytes": some.bytes}
    report["timeline"] = about
    call = ops.streamed_round(
        adapters(some, few), some.weights(), kept(options.quick), options.device, LIMIT[options.quick], "add"
    )
    call()
    if not options.cuda:
        about["not_run"] = NEEDS_GPU
        return report.write()
    found = timeline.spans(timeline.recorded(call))
    about |= timeline.figures(found)
    report.write()
    title = f"{some.name}, {len(some.ranks):,} clients, {len(some.layers)} layers, {some.bytes / 1e9:.2g} GB"
    timeline.picture(found, options.out.with_name(PICTURE), f"{title}: from host memory to {options.device}")
    about["picture"] = PICTURE
    return report.write()


def predicted(report: Report, small: str, large: ModelRound) -> float:
    """Seconds that a larger round will take in all, by its bytes, from what a smaller one took.

    What only the small one's first run took, it took once for all: kernels compiled, memory pinned.
    """
    row = report["rounds"][small]
    return float((row["take_in_seconds"] + 2 * row["seconds"]) * large.bytes / row["bytes"])


def measure(options: Options, report: Report) -> None:
    """The small round from memory and from files, then the timeline of the large one and the large one itself.

    Of the last two, what would outlast the stage's time is not begun.
    """
    deadline = Deadline(0.85 * options.seconds)
    (small, few), (large, many) = streamed(options.quick).items()
    report["rounds"], report["not_run"] = {}, {}
    states = drawn(few, DRAWN[options.quick], options.device)
    report["drawn"] = len(states)
    with report.attempt(small):
        measure_round(few, adapters(few, states), states, options, report, small)
    in_files, half = f"{small}, files", states[: len(states) // 2]
    with report.attempt(in_files), folders(few, half) as paths:
        measure_round(few, paths, half, options, report, in_files)
    if "seconds" not in report["rounds"][small]:
        return
    some, _ = part(many, states, PROFILED[options.quick])
    rest: dict[str, tuple[ModelRound, Callable[[], None]]] = {
        "timeline": (some, lambda: measure_timeline(many, states, options, report)),
        large: (many, lambda: measure_round(many, adapters(many, states), states, options, report, large)),
    }
    for what, (round_, call) in rest.items():
        if (needed := predicted(report, small, round_)) > deadline.left:
            report["not_run"][what] = f"predicted {needed:.0f} s, {max(0, deadline.left):.0f} s left"
            report.write()
            continue
        with report.attempt(what):
            call()


if __name__ == "__main__":
    stage.run(measure)
