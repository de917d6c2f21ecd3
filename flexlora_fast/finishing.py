"""The last part of a round: layers read ahead, solved, and handed on, to memory or to a file, while others run."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast import extras, files, outcome, storage
from flexlora_fast.config import Config
from flexlora_fast.progress import track
from flexlora_fast.readahead import ReadAhead
from flexlora_fast.skeleton import Form
from flexlora_fast.update import ClientRecord, GlobalUpdate, LayerUpdate
from flexlora_fast.work import Client, Work

Look = Callable[[], None]


def _on() -> None:
    """Nothing stands in the way of the next layer."""


def to_memory(work: Work, frame: GlobalUpdate, budget: int, progress: bool | None, look: Look = _on) -> GlobalUpdate:
    """``frame`` with the layers and extras of the round. ``look``: called after each layer; what it raises stops it."""
    layers: dict[str, LayerUpdate] = {}
    start = time.perf_counter()
    solve_layers(work, budget, lambda layer: layers.__setitem__(layer.name, layer), progress, look)
    layers = dict(sorted(layers.items()))
    solved = time.perf_counter()
    averages = {key: _extra(key, work) for key in _forms(work)}
    seconds = frame.seconds | {"layers": solved - start, "extras": time.perf_counter() - solved}
    return dataclasses.replace(frame, layer_updates=layers, extras=averages, seconds=seconds)


def to_file(
    work: Work, frame: GlobalUpdate, budget: int, progress: bool | None, out: Path, timed: bool, look: Look = _on
) -> GlobalUpdate:
    """The same, each layer written to ``out`` as soon as it is solved. The file appears whole or not at all.

    ``timed``: whether wall times go into the file, which then differs from run to run.
    """
    seconds: dict[str, float] = {}

    def write(to: str) -> None:
        specs, forms = [layer.spec for layer in work.plans], _forms(work)
        with storage.UpdateWriter(to, specs, forms, storage.about(frame)) as writer:
            start = time.perf_counter()
            solve_layers(work, budget, writer.add, progress, look)
            solved = time.perf_counter()
            for key in writer.extras:
                writer.add_extra(key, _extra(key, work))
            seconds.update(frame.seconds | {"layers": solved - start, "extras": time.perf_counter() - solved})
            writer.finish(seconds if timed else {})

    out.parent.mkdir(parents=True, exist_ok=True)
    files.replace(out, write)
    return dataclasses.replace(storage.load(out), seconds=seconds)


def _forms(work: Work) -> dict[str, Form]:
    """Of the tensors averaged here that are no low-rank pairs; in a private round the policy's, whoever came."""
    forms = extras.forms(work.clients) if work.release is None else work.release.of.forms
    return {key: form for key, form in forms.items() if work.only is None or key in work.only}


def _extra(key: str, work: Work) -> Tensor:
    if work.release is not None:
        return extras.released(key, work.clients, work.release)
    return extras.average(key, work.clients, work.settings.coordinates)


def solve_layers(
    work: Work, budget: int, take: Callable[[LayerUpdate], None], progress: bool | None, look: Look
) -> None:
    """Every layer in order: read ahead within ``budget`` bytes, solved here, and taken in a thread of its own."""
    with ExitStack() as stack:
        stream = stack.enter_context(work.stream()) if work.streamed else None
        writer = stack.enter_context(ThreadPoolExecutor(1, "flexlora_fast-write"))
        pieces = stack.enter_context(ReadAhead(work.pieces(stream), budget))
        if stream is not None:
            stack.callback(stream.close)  # first of all: the reading thread may wait for room that nobody gives up
        pending: Future[None] | None = None
        updates = work.solved(pieces)
        for _ in track(work.plans, "layers", progress):
            update = outcome.limited(work.settings.method, next(updates))
            if pending is not None:
                pending.result()  # at most one layer waits, and an error stops the round
            pending = writer.submit(take, update)
            look()
        if pending is not None:
            pending.result()


def record(client: Client) -> ClientRecord:
    """What the update remembers of a client; clients of one skeleton share its config and ranks."""
    skeleton = client.source.skeleton
    return ClientRecord(
        client.name, client.share, skeleton.config, skeleton.ranks, tuple(skeleton.extra_keys), skeleton.dtype
    )


def template(clients: Sequence[Client]) -> dict[str, Any]:
    """The first client's config, widened to target every layer of the round, with every client's extras."""
    skeletons = list({id(client.source.skeleton): client.source.skeleton for client in clients}.values())
    paths = {spec.pattern_name for skeleton in skeletons for spec in skeleton.specs.values()}
    return widened([skeleton.config for skeleton in skeletons], paths)


def widened(configs_of: Sequence[Config], paths: set[str]) -> Config:
    """The first config, widened to target all paths, with everybody's extras."""
    widened = copy.deepcopy(configs_of[0])
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        values = [config.get(key) for config in configs_of]
        if all(value == values[0] for value in values):
            continue
        if all(value is None or isinstance(value, list) for value in values):
            widened[key] = sorted({item for value in values for item in value or []})
        else:  # regexes or "all-linear" beside lists: name the modules themselves
            widened[key] = sorted(paths)
    if any(config.get("lora_bias") for config in configs_of):
        widened["lora_bias"] = True
    if not all(configs.targets(widened, path) for path in paths):  # clients chose by other rules, layer by layer
        widened |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        if not all(configs.targets(widened, path) for path in paths):
            widened["target_modules"] = sorted(paths)
    return widened
