"""Reading ahead: in order, within its budget, and never a thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from flexlora_fast.readahead import ReadAhead


def left_over() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flexlora_fast")]


@pytest.mark.parametrize("budget", [0, 1, 10, 10**9])
def test_order_and_budget(budget: int) -> None:
    alive = 0
    most = 0

    def job(i: int) -> Callable[[], int]:
        def read() -> int:
            nonlocal alive, most
            alive += 10
            most = max(most, alive)
            return i

        return read

    got = []
    with ReadAhead([(10, job(i)) for i in range(50)], budget) as results:
        for result in results:
            got.append(result)
            time.sleep(1e-4)
            alive -= 10
    assert got == list(range(50))
    assert most <= max(budget, 10) + 10  # one is dropped a moment before its bytes are given back
    assert not left_over()


def test_it_reads_while_the_last_result_is_used() -> None:
    started = threading.Event()
    with ReadAhead([(1, lambda: 0), (1, started.set), (1, lambda: 2)], budget=2) as results:
        assert next(results) == 0
        assert started.wait(10)


def test_an_error_comes_where_the_result_would_have_come() -> None:
    def fail() -> int:
        raise ValueError("no such luck")

    def jobs() -> Iterator[tuple[int, Callable[[], int]]]:
        yield 1, lambda: 1
        yield 1, fail
        raise AssertionError("never asked for")

    with ReadAhead(jobs(), budget=100) as results:
        assert next(results) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="no such luck"):
                next(results)
    assert not left_over()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_early_stops_the_thread(error: type[BaseException]) -> None:
    """Whether it waits for room, or has read everything."""
    for budget in (1, 1000):
        with pytest.raises(error), ReadAhead([(1, lambda: 0)] * 100, budget) as results:
            next(results)
            raise error
        assert not left_over()
