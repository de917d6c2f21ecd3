"""Groups whose shapes come again: what is recorded, when, and that results are those of launching each kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexlora_fast.backends.group import Packed
from flexlora_fast.lowrank import filtered, replayed
from flexlora_fast.lowrank.filtered import Found
from flexlora_fast.lowrank.replayed import Replays
from flexlora_fast.precision import full_precision
from flexlora_fast.stack import Stack
from tests.test_filtered import K, group
from tests.test_solvers import stack_of

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SCHEDULE = (2, 3)


class Recorder:
    """Stands for CUDA graphs on the CPU: what was recorded is computed anew into the same results, when asked to."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.beside: list[Any] = []

    def __call__(
        self, run: Callable[[], Found], device: torch.device, beside: Any
    ) -> tuple[Found, Callable[[], None], Any]:
        self.recorded += 1
        self.beside.append(beside)
        found = run()
        for part in "USV":  # a graph computes nothing while it is recorded
            getattr(found, part).fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            new = run()
            for part in ("U", "S", "V", "report"):
                getattr(found, part).copy_(getattr(new, part))

        return found, replay, (0, self.recorded) if beside is None else beside


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(replayed, "record", recorder)
    return recorder


def compute(group: Any, start: torch.Tensor) -> Found:
    return filtered.leading_triplets(filtered.Grams(group), K, start, SCHEDULE)


def start(seed: int, width: int = 160, layers: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, width, K + 16, generator=generator)


def stacks_of(width: int) -> Stack:
    """R = ``width`` in layers of two shapes."""
    return stack_of(torch.ones(width) / torch.arange(1.0, width + 1), 210, 170, width)


def assert_same(found: Found, expected: Found) -> None:
    for part in ("U", "S", "V", "report"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    assert (found.products, found.solver) == (expected.products, expected.solver)


def test_the_second_of_a_kind_is_recorded_and_each_gets_its_own_results(recorder: Recorder) -> None:
    replays = Replays()
    with full_precision():
        stacks, _ = group()
        packed = [Packed([stack]) for stack in stacks[:5]]
        expected = [compute(g, start(i)) for i, g in enumerate(packed)]
        found = [replays.found(g, start(i), compute, "key") for i, g in enumerate(packed)]
    for f, e in zip(found, expected, strict=True):
        assert_same(f, e)
    assert (recorder.recorded, recorder.replayed) == (1, 4)


def test_other_shapes_and_other_steps_are_recorded_apart(recorder: Recorder) -> None:
    replays = Replays()
    with full_precision():
        narrow, wide = Packed([stacks_of(80)]), Packed([stacks_of(90)])
        for key in ("short", "long"):
            for g in (narrow, wide, narrow):
                assert_same(replays.found(g, start(0, g.W), compute, key), compute(g, start(0, g.W)))
    assert (recorder.recorded, recorder.replayed) == (2, 2)
    assert recorder.beside == [None, (0, 1)]
    recorded = [entry for entry in replays._known.values() if entry is not None]
    assert len(recorded) == 2 and recorded[0].turns is recorded[1].turns, "two graphs in one memory, at the same time"


def test_inputs_of_a_recorded_group_are_its_own(recorder: Recorder) -> None:
    replays = Replays()
    with full_precision():
        stack = stacks_of(80)
        first, second = Packed([stack]), Packed([stack])
        for g in (first, second):
            replays.found(g, start(0, 80), compute, "key")
        second._P.fill_(torch.nan)
        assert_same(replays.found(first, start(0, 80), compute, "key"), compute(first, start(0, 80)))


def test_the_least_recently_used_goes_first(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "_MOST", 2)
    replays = Replays()
    with full_precision():
        groups = {width: Packed([stacks_of(width)]) for width in (80, 90, 100)}
        for width in (80, 80, 90, 90, 80, 100, 80, 90, 90):  # 90 goes for 100, and 100 for 90
            replays.found(groups[width], start(0, width), compute, "key")
    assert (recorder.recorded, recorder.replayed) == (3, 5)


def test_large_groups_are_launched_kernel_by_kernel(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "_MOST_BYTES", 8 * 80**2)
    replays = Replays()
    with full_precision():
        for width in (80, 80, 81, 81):
            replays.found(Packed([stacks_of(width)]), start(0, width), compute, "key")
    assert recorder.recorded == 1


def test_recording_that_fails_warns_once_and_results_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(run: Callable[[], Found], device: torch.device, beside: Any) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error")

    monkeypatch.setattr(replayed, "record", failing)
    replays, packed = Replays(), Packed([stacks_of(80)])
    with full_precision():
        expected = compute(packed, start(0, 80))
        replays.found(packed, start(0, 80), compute, "key")
        with pytest.warns(RuntimeWarning, match="CUDA graph failed.*not permitted when stream is capturing"):
            assert_same(replays.found(packed, start(0, 80), compute, "key"), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(replays.found(packed, start(0, 80), compute, "key"), expected)


def test_tables_of_one_signature_differ_in_their_inputs_alone() -> None:
    pytest.importorskip("triton", reason="tables are Triton's")
    from flexlora_fast.kernels.table import Table

    tables = [Table([stacks_of(80), stack_of(torch.rand(80), 210, 170, seed)]) for seed in (1, 2)]
    assert tables[0].signature() == tables[1].signature() and hash(tables[0].signature())
    assert not tables[0].P.address.equal(tables[1].P.address)
    copied = tables[0].copied()
    for mine, theirs in zip(copied.inputs(), tables[0].inputs(), strict=True):
        assert mine.equal(theirs) and mine.data_ptr() != theirs.data_ptr()
    for mine, theirs in zip(copied.inputs(), tables[1].inputs(), strict=True):
        mine.copy_(theirs)
    assert copied.P.address.equal(tables[1].P.address) and copied.Q.stride.equal(tables[1].Q.stride)
    assert copied._kept is None and tables[0]._kept is not None
    half = [type(b)(b.B.half(), b.A.half(), b.d) for b in stacks_of(80).blocks]
    others = [[stacks_of(80)], [stacks_of(80), stacks_of(90)], [Stack(half, 210, 170)] * 2]
    assert len({tables[0].signature(), *(Table(stacks).signature() for stacks in others)}) == 4


# -- what torch is told ---


class Cuda:
    """torch.cuda, as far as recording goes: streams by name, current ones by device, and what was done in which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.current, self.calls, self.fails = {"cuda:0": "main 0", "cuda:1": "main 1"}, list[str](), fails
        self.device = "cuda:0"
        graph = SimpleNamespace(replay=lambda: self.calls.append("replay"), pool=lambda: (0, 7))
        own = SimpleNamespace(recording=self.stream("cuda:1", "recording 1"))
        monkeypatch.setattr(replayed, "own", lambda device: own)
        for name, stand_in in (
            ("CUDAGraph", lambda: graph), ("graph", self.graph), ("stream", self.on_stream), ("device", self.on_device),
            ("current_stream", lambda device: self.stream(str(device), self.current[str(device)])),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def stream(self, device: str, name: str) -> Any:
        return SimpleNamespace(device=device, name=name)

    def note(self, what: str) -> None:
        self.calls.append(f"{what} on {self.current[self.device]}")

    @contextmanager
    def on_device(self, device: torch.device) -> Any:
        before, self.device = self.device, str(device)
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def on_stream(self, stream: Any) -> Any:
        before, self.current[stream.device] = self.current[stream.device], stream.name
        try:
            yield
        finally:
            self.current[stream.device] = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        assert self.device == stream.device and capture_error_mode == "thread_local"
        self.current[stream.device] = stream.name
        self.note(f"begin in {pool}")
        try:
            yield
        finally:
            if self.fails:  # as torch, which leaves its stream behind
                raise RuntimeError("operation failed due to a previous error")
            self.note("end")
            self.current[stream.device] = "main 1"


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_is_recorded_on_the_device_of_its_group_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A stream of another device would record nothing, and replaying nothing gives the results of before."""
    cuda, there = Cuda(monkeypatch, fails), torch.device("cuda", 1)
    run: Any = lambda: cuda.note("kernels")  # noqa: E731
    if fails:
        with pytest.raises(RuntimeError, match="previous error"):
            replayed.record(run, there, None)
    else:
        _, replay, pool = replayed.record(run, there, (0, 3))  # type: ignore[arg-type]
        replay()
        assert pool == (0, 7)
        assert cuda.calls == [
            "kernels on main 1", "begin in (0, 3) on recording 1", "kernels on recording 1", "end on recording 1",
            "replay",
        ]  # fmt: skip
    assert (cuda.device, cuda.current) == ("cuda:0", {"cuda:0": "main 0", "cuda:1": "main 1"})


# -- on a GPU ---


@gpu
@needs_gpu
def test_graphs_of_two_groups_take_turns_in_one_memory() -> None:
    from flexlora_fast.backends import groups

    def there(width: int, seed: int) -> Any:
        stack = stack_of(torch.arange(1.0, width + 1).rsqrt(), 210, 170, seed)
        return groups.of([Stack([type(b)(b.B.cuda(), b.A.cuda(), b.d) for b in stack.blocks], 210, 170)])

    replays, other = Replays(), torch.cuda.Stream()
    with full_precision():
        made = [(there(width, seed), start(seed, width).cuda()) for seed in range(4) for width in (100, 160)]
        expected = [compute(*one) for one in made]
        found = []
        for i, one in enumerate(made):
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other if i % 3 else torch.cuda.current_stream()):
                found.append(replays.found(*one, compute, "key"))
        torch.cuda.synchronize()
    for f, e in zip(found, expected, strict=True):
        assert_same(f, e)
    assert replays.obstacle is None
    recorded = [entry for entry in replays._known.values() if entry is not None]
    assert len(recorded) == 2 and recorded[0].pool == recorded[1].pool


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_gives_what_its_kernels_give(dtype: torch.dtype) -> None:
    from flexlora_fast.backends import groups

    there = []
    for seed in range(4):
        stack = stack_of(torch.arange(1.0, 161.0).rsqrt(), 210, 170, seed)
        blocks = [type(b)(b.B.to("cuda", dtype), b.A.to("cuda", dtype), b.d) for b in stack.blocks]
        there.append(groups.of([Stack(blocks, 210, 170)]))
    replays = Replays()
    with full_precision():
        for i, g in enumerate(there):
            found = replays.found(g, start(i).cuda(), compute, "key")
            assert_same(found, compute(g, start(i).cuda()))
    assert replays.obstacle is None
