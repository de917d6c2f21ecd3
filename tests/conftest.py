"""What all tests share: no network, reproducible hypothesis runs, GPU tests only where there is a GPU.

``--device cuda`` has the checks of contract, solvers and ops compute there; the data of a test and the float64 truth
stay on the CPU.
"""

from __future__ import annotations

import os

# Before anything imports transformers: a test that reaches for the network fails at once instead of hanging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from tests import where

# A failure must come back on the next run, and a busy machine must not fail a test for its time alone.
hypothesis.settings.register_profile("flexlora_fast", derandomize=True, deadline=None)
hypothesis.settings.load_profile("flexlora_fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where contract, solvers and ops are checked: cpu, cuda, cuda:1 …")


def pytest_configure(config: pytest.Config) -> None:
    where.DEVICE = torch.device(config.getoption("--device"))
    if where.DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch sees no CUDA GPU; leave the option away to test on the CPU")


def pytest_report_header() -> str:
    return f"contract, solvers and ops on: {where.DEVICE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh, seeded CPU generator: a test's data depends on that test alone."""
    return torch.Generator().manual_seed(20240225)
