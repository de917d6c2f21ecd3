"""Small layers keep to one thread, and leave torch's setting as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flexlora_fast import threads
from flexlora_fast.errors import AdapterError
from flexlora_fast.lowrank import solve as solving
from tests.test_solvers import stack_of


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_single_is_undone_whatever_happens() -> None:
    with threads.single():
        assert torch.get_num_threads() == 1
    with threads.single(False):
        assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="x"), threads.single():
        raise ValueError("x")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("m", "n", "columns", "expected"), [(60, 50, 20, 1), (1200, 1000, 120, 2)])
def test_threads_by_the_size_of_the_layer(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, columns: int, expected: int
) -> None:
    seen: list[int] = []
    dispatch = solving._dispatch

    def spy(*arguments: object) -> object:
        seen.append(torch.get_num_threads())
        return dispatch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(solving, "_dispatch", spy)
    solving.solve(stack_of(torch.ones(columns), m, n), 100)
    assert seen == [expected] and torch.get_num_threads() == 2


def test_a_refused_layer_gives_the_threads_back() -> None:
    stack = stack_of(torch.ones(20), 60, 50)
    stack.blocks[0].B[0, 0, 0] = torch.nan
    with pytest.raises(AdapterError):
        solving.solve(stack, 5)
    assert torch.get_num_threads() == 2
