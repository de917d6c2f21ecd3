"""The plots' data: time against clients, rank and layer width."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import sweeps
from benchmarks.conftest import Suite
from benchmarks.machine import Limits


@pytest.mark.parametrize("axis", ["clients", "rank", "width"])
def test_sweep(axis: str, benchmark: Any, suite: Suite, limits: Limits) -> None:
    """pytest-benchmark's own figure is the whole sweep's; the medians by method and point are in extra_info."""
    found = benchmark.pedantic(sweeps.run, args=(axis, suite.quick, limits, suite.pause), rounds=1)
    benchmark.extra_info.update(kind="sweep", axis=axis, seconds=found)
