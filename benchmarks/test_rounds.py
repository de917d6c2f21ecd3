"""Whole rounds from files to a file: time against floors, peak memory, and how cost grows with the clients."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import models, rounds
from benchmarks.conftest import Suite
from benchmarks.machine import Limits

MEMORY_LIMIT = {"round-7b": "2GiB", "round-tiny": "1GiB", "scale": "1GiB"}


@pytest.mark.parametrize("name", ["round-tiny", "round-7b"])
def test_round(name: str, benchmark: Any, suite: Suite, limits: Limits) -> None:
    """pytest-benchmark's own figure is the cold round."""
    round_ = (models.QUICK if suite.quick else models.FULL)[name]
    folders = models.write(round_, suite.data)
    rounds.measure(benchmark, round_, folders, limits, MEMORY_LIMIT[name])


def test_scale(benchmark: Any, suite: Suite) -> None:
    """One layer, more and more clients, one memory limit."""
    round_ = (models.QUICK if suite.quick else models.FULL)["scale"]
    folders = models.write(round_, suite.data)
    points = {}

    def run() -> None:
        for clients in models.SCALE_CLIENTS[suite.quick]:
            points[str(clients)] = rounds.scale(round_, folders, clients, MEMORY_LIMIT["scale"])

    benchmark.pedantic(run, rounds=1)
    shape = {"m": round_.layers[0][1], "n": round_.layers[0][2], "r": round_.k}
    benchmark.extra_info.update(kind="scale", memory_limit=MEMORY_LIMIT["scale"], shape=shape, points=points)
