"""Rounds whose factors come to the device while it solves them; here the CPU, in Triton's interpreter."""

from __future__ import annotations

import textwrap

import pytest

from tests.interpreter import needs_interpreter, run_interpreted

PRELUDE = """
import dataclasses, os, pathlib, sys, tempfile, threading
import torch
import flexlora_fast as ff
from flexlora_fast import memory, planning, streamed, together
from flexlora_fast.errors import AdapterError
from flexlora_fast.stored import Stored

SHAPES = {"x": (70, 50), "y": (70, 50), "z": (50, 70), "w": (70, 50)}
planned = planning.plan_layer
folder = pathlib.Path(tempfile.mkdtemp())

def client(i, layers, rank, dtype=torch.float32):
    g = torch.Generator().manual_seed(i)
    state = {}
    for layer in layers:
        m, n = SHAPES[layer]
        state[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, n, generator=g).to(dtype)
        state[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(m, rank, generator=g).to(dtype)
    return ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 8 + i}, client=f"c{i}")

def clients(dtype=torch.float32):
    made = [client(0, "xyzw", 12, dtype), client(1, "xz", 16, dtype), client(2, "yzw", 9, dtype),
            client(3, "xyzw", 20, dtype), client(4, "xyz", 3, dtype), client(5, "xyzw", 11, dtype)]
    return made

def prepared(kind, made, on_disk=(1, 3, 4), **options):
    '''A round of these clients, some of them in files, whose factors are streamed; and the same round the usual way.'''
    planning.plan_layer = planned
    usual = ff.Aggregator(rank=5, solver=kind, **options)
    for i, adapter in enumerate(made):
        usual.add(adapter, weight=1 + i, client=f"c{i}")
    agg = ff.Aggregator(rank=5, solver=kind, read="finish", **options)
    agg._stored = Stored()
    for i, adapter in enumerate(made):
        if i in on_disk:
            adapter.save(folder / f"c{i}")
        agg.add(folder / f"c{i}" if i in on_disk else adapter, weight=1 + i, client=f"c{i}")
    planning.plan_layer = lambda *a: dataclasses.replace(planned(*a), grouped=True)
    return agg, usual

def assert_alike(found, expected, kind):
    assert found.layers == expected.layers
    for name in expected.layers:
        f, g = found[name].factorization, expected[name].factorization
        assert f.solver == kind or found[name].total_rank < 37, (name, f.solver)
        assert torch.allclose(f.energy, g.energy, rtol=1e-6), (name, f.energy, g.energy)
        assert found[name].error(5) <= expected[name].error(5) * (1 + 1e-3)
        assert found[name].total_rank == expected[name].total_rank

def watched():
    '''Which of the two ways layers took.'''
    seen = []
    real = together._layers
    together._layers = lambda w, layers, pieces: (seen.append((w.streamed, len(layers))), real(w, layers, pieces))[1]
    return seen
"""


def run(code: str) -> None:
    done = run_interpreted(PRELUDE + textwrap.dedent(code) + "\nprint('right')\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1:] == ["right"]


@needs_interpreter
@pytest.mark.parametrize("kind", ["filtered", "dense"])
def test_a_round_from_files_and_memory(kind: str) -> None:
    run(f"""
        seen = watched()
        planning.STREAMED_COLUMNS = 24
        for missing in ("zero", "renormalize"):
            for dtype in (torch.float32, torch.float16):
                agg, usual = prepared({kind!r}, clients(dtype), missing=missing)
                found = agg.finish()
                ways, seen[:] = list(seen), []
                assert ways == [(True, 1), (True, 3)], ways
                planning.plan_layer = planned
                assert_alike(found, usual.finish(), {kind!r})
                seen.clear()
    """)


@needs_interpreter
@pytest.mark.parametrize("kind", ["filtered", "dense"])
def test_a_client_with_bad_values_is_named_and_the_round_goes_on(kind: str) -> None:
    run(f"""
        made = clients()
        state = made[3].state_dict()
        state["base_model.model.w.lora_B.weight"][4, 1] = torch.nan
        made[3] = ff.Adapter.from_state_dict(state, made[3].config, client="c3")
        agg, usual = prepared({kind!r}, [made[i] for i in (0, 1, 2, 4, 5)])
        agg.add(made[3].save(folder / "bad") or folder / "bad", weight=3, client="bad")
        try:
            agg.finish()
            raise SystemExit("nobody was refused")
        except AdapterError as error:
            assert (error.client, error.layer) == ("bad", "w") and "NaN" in str(error), error
        found = agg.finish()
        planning.plan_layer = planned
        assert_alike(found, usual.finish(), {kind!r})
    """)


@needs_interpreter
def test_a_file_that_is_cut_short_or_changed_is_named() -> None:
    run("""
        for change in ("cut", "touched"):
            agg, usual = prepared("filtered", clients())
            path = folder / "c3" / "adapter_model.safetensors"
            if change == "cut":
                path.write_bytes(path.read_bytes()[:-100])
            else:
                real = streamed.Stream.close
                streamed.Stream.close = lambda self: (path.write_bytes(path.read_bytes()), real(self))[1]
            try:
                agg.finish()
                raise SystemExit("nobody was refused")
            except AdapterError as error:
                assert error.client == "c3" and "changed" in str(error), error
            if change == "touched":
                streamed.Stream.close = real
            found = agg.finish()
            assert [r.client for r in found.refused] == ["c3"]
    """)


@needs_interpreter
def test_what_is_not_proved_is_solved_again() -> None:
    run("""
        from flexlora_fast.lowrank import filtered
        judged = filtered.judged
        calls = []
        def half(report, tol):
            excess, good = judged(report, tol)
            calls.append(len(good))
            return excess, good & (torch.arange(len(good)) % 2 == 0)
        for kind in ("filtered", "dense"):
            agg, usual = prepared(kind, clients())
            filtered.judged, calls[:] = half, []
            found = agg.finish()
            assert calls == [1, 3, 1], calls  # the middle one of three is tried again, and then solved alone
            filtered.judged = judged
            planning.plan_layer = planned
            expected = usual.finish()
            for name in expected.layers:
                assert found[name].error(5) <= expected[name].error(5) * (1 + 1e-3)
                assert torch.allclose(found[name].factorization.energy, expected[name].factorization.energy, rtol=1e-6)
    """)


@needs_interpreter
def test_an_error_in_the_middle_ends_the_round_and_not_the_process() -> None:
    """The reading thread waits for room that nobody gives up any more."""
    run("""
        memory.staged = lambda room: 4096 * 6
        agg, usual = prepared("dense", clients())
        planning.STREAMED_COLUMNS = 3
        def failing(self, out):
            raise RuntimeError("out of order")
        from flexlora_fast.backends.triton import Tabled
        real, Tabled.materialize = Tabled.materialize, failing
        try:
            agg.finish()
            raise SystemExit("no error")
        except RuntimeError as error:
            assert "out of order" in str(error)
        Tabled.materialize = real
        planning.STREAMED_COLUMNS = 24
        found = agg.finish()
        planning.plan_layer = planned
        assert_alike(found, usual.finish(), "dense")
    """)


@needs_interpreter
@pytest.mark.parametrize("folded", ["", "wxy"])
def test_nobody_waits_for_room_that_is_given_up_later(folded: str) -> None:
    """Two groups are begun, and what the first brought is there until it is asked for: beside it there is no room for
    another one as large, nor for all pieces of layers that are summed up.
    """
    run(f"""
        kinds = {{layer: "dense" if layer in {folded!r} else "filtered" for layer in SHAPES}}
        together.in_flight = lambda work: 1
        together.runs = lambda plans, of: iter([[plan] for plan in plans])
        memory.staged = lambda room: 50_000
        planning.STREAMED_COLUMNS = 24
        agg, usual = prepared("filtered", clients())
        planning.plan_layer = lambda name, having, of: dataclasses.replace(
            planned(name, having, dataclasses.replace(of, solver=kinds[name])), grouped=True
        )
        seen = watched()
        patience = threading.Timer(120, lambda: os._exit(1))
        patience.daemon = True
        patience.start()
        found = agg.finish()
        assert seen == [(True, 1)] * 4, seen
        planning.plan_layer = planned
        expected = usual.finish()
        for name in expected.layers:
            assert found[name].solver == kinds[name]
            assert found[name].error(5) <= expected[name].error(5) * (1 + 1e-3)
    """)
