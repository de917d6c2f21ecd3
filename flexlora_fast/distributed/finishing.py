"""The last part of a round on several ranks: each solves its share, and the first makes one update of all."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flexlora_fast import extras, files, finishing, outcome, storage
from flexlora_fast.distributed import parts, spread
from flexlora_fast.distributed.sharding import balanced, owned, owners
from flexlora_fast.distributed.team import Team
from flexlora_fast.planning import LayerPlan
from flexlora_fast.update import GlobalUpdate, LayerUpdate
from flexlora_fast.work import Work

PART = "part.safetensors"


def finish(
    team: Team, work: Work, frame: GlobalUpdate, budget: int, progress: bool | None, out: Path | None
) -> GlobalUpdate | None:
    """As ``finishing.to_memory`` or ``to_file``, by all ranks: the update on the first, None on the others.

    With ``out`` each rank's layers wait in a file where temporary files go; else in memory.
    """
    start = time.perf_counter()
    alone = [plan for plan in work.plans if not plan.spread]
    forms = extras.forms(work.clients)
    home = owners(team, alone, work.settings)
    home |= team.first(balanced({key: float(form.nbytes) for key, form in forms.items()}, team.size))
    mine = dataclasses.replace(work, only=owned(home, team.rank))
    with _place(out is not None) as part_file:

        def solve() -> GlobalUpdate:
            if part_file is None:
                return finishing.to_memory(mine, frame, budget, progress, team.look)
            return finishing.to_file(mine, frame, budget, progress, part_file, True, team.look)

        part = team.run(solve)
        joint = _jointly(team, work, [plan for plan in work.plans if plan.spread], home)
        order = [plan.spec.name for plan in work.plans] + storage.in_order(forms)
        items = _Items(part, joint)
        whole = dataclasses.replace(frame, seconds=frame.seconds | {"layers": time.perf_counter() - start})
        return team.run(lambda: _brought(team, work, whole, {name: home[name] for name in order}, items, out))


def _jointly(team: Team, work: Work, plans: list[LayerPlan], home: dict[str, int]) -> dict[str, LayerUpdate]:
    """Those of the layers that all ranks solve together whose owner this one is; the owners are added to ``home``."""
    solved: dict[str, LayerUpdate] = {}
    for lo in range(0, len(plans), team.size):  # one for each to own: what does not take all ranks is done side by side
        jobs = dict[str, Callable[[], LayerUpdate]]()
        for rank, plan in enumerate(plans[lo : lo + team.size]):
            home[plan.spec.name] = rank
            job = spread.begin(team, work, plan, rank)
            if job is not None:
                jobs[plan.spec.name] = job
        solved |= team.run(partial(_done, work, jobs))
    return solved


def _done(work: Work, jobs: Mapping[str, Callable[[], LayerUpdate]]) -> dict[str, LayerUpdate]:
    return {name: outcome.limited(work.settings.method, job()) for name, job in jobs.items()}


def _brought(
    team: Team,
    work: Work,
    frame: GlobalUpdate,
    home: Mapping[str, int],
    items: Mapping[str, Any],
    out: Path | None,
) -> GlobalUpdate | None:
    if team.rank:
        parts.bring(team, home, items, _nowhere)
        return None
    if out is None:
        found: dict[str, Any] = {}
        parts.bring(team, home, items, found.__setitem__)
        layers = {name: found.pop(name) for name in sorted(plan.spec.name for plan in work.plans)}
        return dataclasses.replace(frame, layer_updates=layers, extras=dict(sorted(found.items())))
    begun = False

    def write(to: str) -> None:
        nonlocal begun
        specs = [plan.spec for plan in work.plans]
        with storage.UpdateWriter(to, specs, extras.forms(work.clients), storage.about(frame)) as writer:

            def take(name: str, item: LayerUpdate | Tensor) -> None:
                if isinstance(item, LayerUpdate):
                    writer.add(item)
                else:
                    writer.add_extra(name, item)

            begun = True
            parts.bring(team, home, items, take)
            writer.finish(frame.seconds)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(out, write)
    except Exception:
        if not begun:  # the others send all the same
            parts.bring(team, home, items, _nowhere)
        raise
    return storage.load(out)


def _nowhere(name: str, item: Any) -> None:
    """What arrives has no use any more."""


class _Items(Mapping[str, Any]):
    """Layers and averages by name, read from their file only when they are asked for."""

    def __init__(self, part: GlobalUpdate, joint: Mapping[str, LayerUpdate]) -> None:
        self._sources: list[Mapping[str, Any]] = [joint, part.layer_updates, part.extras]

    def __getitem__(self, name: str) -> Any:
        for source in self._sources:
            if name in source:
                return source[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for source in self._sources for name in source)

    def __len__(self) -> int:
        return sum(map(len, self._sources))


@contextmanager
def _place(needed: bool) -> Iterator[Path | None]:
    """A file for this rank's part, which goes with the block; None where it is not needed."""
    if not needed:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="flexlora-") as folder:
        yield Path(folder) / PART
