"""Time, excess and memory of every method on single layers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import layers, trained
from benchmarks.conftest import Suite
from benchmarks.machine import Limits
from benchmarks.workloads import FULL, QUICK

NAMES = [workload.name for workload in FULL]


@pytest.mark.parametrize("name", NAMES)
def test_layer(name: str, benchmark: Any, suite: Suite, limits: Limits) -> None:
    workload = next((w for w in (QUICK if suite.quick else FULL) if w.name == name), None)
    if workload is None:
        pytest.skip("not among the quick sizes")
    layers.measure(benchmark, workload, limits, suite.turns, suite.pause)


def test_trained(benchmark: Any, suite: Suite, limits: Limits) -> None:
    """A layer of adapters that were really trained."""
    workload = trained.workload(suite.data, train=not suite.quick)
    if workload is None:
        pytest.skip("no trained adapters; `make demo` or the full suite makes them")
    layers.measure(benchmark, workload, limits, suite.turns, suite.pause)
