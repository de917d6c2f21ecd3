"""Options of the suite, the machine's limits, and what goes into the results file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layers, machine
from benchmarks.machine import Limits


@dataclass(frozen=True)
class Suite:
    """How the suite is run: sizes, turns of each alternation, and the folder for inputs on disk."""

    quick: bool
    data: Path

    @property
    def turns(self) -> int:
        return 2 if self.quick else 5

    @property
    def pause(self) -> float:
        return 0.01 if self.quick else layers.SETTLE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes: the whole suite in about a minute")
    parser.addoption("--data", type=Path, default=Path(".bench-data"), help="folder for inputs on disk (9 GB)")


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    data = pytestconfig.getoption("--data") / ("quick" if pytestconfig.getoption("--quick") else "full")
    data.mkdir(parents=True, exist_ok=True)
    return Suite(pytestconfig.getoption("--quick"), data)


_measured: list[Limits] = []


@pytest.fixture(scope="session")
def limits(suite: Suite) -> Iterator[Limits]:
    """Measured before the first benchmark and again after the last: a machine that slowed down shows."""
    before = machine.measure(512, 1 << 24) if suite.quick else machine.measure()
    _measured[:] = [before]
    yield before
    _measured.append(machine.measure(512, 1 << 24) if suite.quick else machine.measure())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Nothing about whose machine it is; what it can do instead."""
    machine_info.clear()
    if _measured:
        machine_info.update(machine.describe(_measured[0]))
        machine_info["limits_after"] = machine.describe(_measured[-1])["limits"]


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info["id"] = machine.commit()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["quick"] = bool(config.getoption("--quick"))
