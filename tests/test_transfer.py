"""What streams are told, by a device that only writes it down; and that nothing of it concerns the CPU."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexlora_fast.backends import transfer
from flexlora_fast.backends.transfer import Turns, moved, so_far

CUDA = SimpleNamespace(type="cuda")
CPU = torch.device("cpu")


class Streams:
    """torch.cuda, as far as streams go."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current = self.stream("main")

    def stream(self, name: str) -> Any:
        made = SimpleNamespace(device=CUDA, name=name, events=0)

        def record_event() -> str:
            made.events += 1
            self.calls.append(f"{name} records {made.events}")
            return f"{name} {made.events}"

        made.record_event = record_event
        made.wait_event = lambda event: self.calls.append(f"{name} waits for {event}")
        made.wait_stream = lambda other: self.calls.append(f"{name} waits for stream {other.name}")
        return made

    @contextmanager
    def on(self, stream: Any) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    side = made.stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(transfer, "own", lambda device: SimpleNamespace(apart=side))
    return made


def test_results_are_waited_for_apart_from_what_came_later(streams: Streams) -> None:
    apart = so_far(CUDA)  # type: ignore[arg-type]
    streams.calls.append("more work for main")
    with apart():
        assert streams.current.name == "side"
    assert streams.current.name == "main"
    assert streams.calls == [
        "main records 1", "more work for main", "side waits for main 1", "main waits for stream side",
    ]  # fmt: skip


def test_the_stream_is_whole_again_after_an_error(streams: Streams) -> None:
    with pytest.raises(ValueError), so_far(CUDA)():  # type: ignore[arg-type]
        raise ValueError
    assert streams.calls[-1] == "main waits for stream side"


def test_own_streams_are_taken_once_and_are_never_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands out 32 streams in turn: what takes one now and then meets its own again."""
    given = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (device, next(given) % 32))
    transfer.own.cache_clear()
    devices = [torch.device("cuda", i) for i in (0, 1)]
    try:
        for device in devices:
            for _ in range(40):
                transfer.own(torch.device("cuda", device.index))
                torch.cuda.Stream(device)
            own = transfer.own(device)
            streams = {own.apart, own.recording, *own.copying}
            assert len(streams) == 4 and {of for of, _ in streams} == {device}
        assert next(given) == 2 * (4 + 40)
    finally:
        transfer.own.cache_clear()


def test_memory_is_used_in_turn(streams: Streams) -> None:
    turns = Turns(CUDA)  # type: ignore[arg-type]
    with turns:
        streams.calls.append("main")
    with streams.on(streams.stream("other")), turns:
        streams.calls.append("other")
    assert streams.calls == ["main", "main records 1", "other waits for main 1", "other", "other records 1"]


def test_on_the_cpu_nothing_is_told_to_anybody(streams: Streams) -> None:
    with so_far(CPU)(), Turns(CPU):
        pass
    X = torch.arange(3)
    assert moved(X, CPU) is X and streams.calls == []
