"""The planner's choice against every solver in its reach, on every workload."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import planner, trained
from benchmarks.conftest import Suite
from benchmarks.workloads import FULL, QUICK


@pytest.mark.parametrize("name", [workload.name for workload in (*FULL, *planner.BETWEEN)])
def test_regret(name: str, benchmark: Any, suite: Suite) -> None:
    workloads = (QUICK[0], planner.BETWEEN[0]) if suite.quick else (*FULL, *planner.BETWEEN)
    workload = next((w for w in workloads if w.name == name), None)
    if workload is None:
        pytest.skip("not among the quick sizes")
    found = benchmark.pedantic(planner.regret, args=(workload, suite.turns, suite.pause), rounds=1)
    benchmark.extra_info.update(kind="planner", **found.as_dict())


def test_regret_trained(benchmark: Any, suite: Suite) -> None:
    workload = trained.workload(suite.data, train=not suite.quick)
    if workload is None:
        pytest.skip("no trained adapters; `make demo` or the full suite makes them")
    found = benchmark.pedantic(planner.regret, args=(workload, suite.turns, suite.pause), rounds=1)
    benchmark.extra_info.update(kind="planner", **found.as_dict())
