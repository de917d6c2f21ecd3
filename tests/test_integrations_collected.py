"""What `make test-integrations` runs is seldom run: whether it can be imported at all is tested with all else."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in (Path(__file__).parent / "integrations").glob("test_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_integration_tests_is_imported(name: str) -> None:
    importlib.import_module(f"tests.integrations.{name}")  # skips itself where its framework is not there
