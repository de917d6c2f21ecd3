"""Groups whose shapes come again: what is recorded, when, and that results are those of launching each kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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

    def __call__(self, run: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        self.recorded += 1
        found = run()
        for part in "USV":  # a graph computes nothing while it is recorded
            getattr(found, part).fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            new = run()
            for part in ("U", "S", "V", "report"):
                getattr(found, part).copy_(getattr(new, part))

        return found, replay


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
    def failing(run: Callable[[], Found]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

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


# -- on a GPU ---


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
