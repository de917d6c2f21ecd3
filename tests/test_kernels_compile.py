"""Triton kernels compiled for GPUs that are not here: nothing spills, and the persistent grids fit."""

from __future__ import annotations

import os
import re

import pytest
import torch

from tests.test_kernels import needs_triton

TARGETS = [80, 90, 100]

pytestmark = [
    needs_triton,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler"),
]


def compile_all(variants, target, *, aligned, record_property):
    """Compile and record; fail for everything that spills or does not fit at once."""
    from flexlora_fast.kernels.report import fits

    problems = []
    for variant in variants:
        taken = variant.resources(target, aligned=aligned)
        record_property(variant.name, f"{taken.registers} registers, {taken.shared} shared, {taken.spilled} spilled")
        print(f"sm_{target} {variant.name}: {taken}")
        if taken.spilled:
            problems.append(f"{variant.name} spills {taken.spilled} bytes")
        if aligned and not fits(variant, taken, target):
            problems.append(f"{variant.name}: {variant.chosen.resident} programs do not fit a multiprocessor: {taken}")
    assert not problems


@pytest.mark.parametrize("case", [("float32", torch.float32), ("bf16x3", torch.bfloat16)], ids=lambda c: c[0])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target, case, record_property):
    from flexlora_fast.kernels import report

    variants = report.first_of_each(report.variants([case], [64]))
    assert len(variants) >= 8
    compile_all(variants, target, aligned=True, record_property=record_property)


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_every_best_guess_compiles_without_spills(target, aligned, record_property):
    from flexlora_fast.kernels import report

    compile_all(report.first_of_each(report.variants()), target, aligned=aligned, record_property=record_property)


def dots(code: str) -> list[tuple[str, str]]:
    """The result of each product in Triton's intermediate code, and what it adds to."""
    return re.findall(r"(%\w+) = tt\.dot %\w+, %\w+, (%\w+)", code)


def test_products_that_add_to_each_other_start_from_zero():
    """From the sum of the step before, Triton miscompiles them for Blackwell (triton-lang/triton issue 10821)."""
    from flexlora_fast.kernels import report
    from flexlora_fast.kernels.compiled import compiled

    chains = 0
    for v in report.first_of_each(report.variants([("bf16x3", torch.bfloat16)], [64])):
        code = compiled(v.kernel, v.types, v.constants, v.chosen, 100, aligned=True).asm["ttir"]
        results = dict(dots(code))
        for result, start in results.items():
            if start in results or result not in results.values():
                continue  # not the first of several
            chains += 1
            assert re.search(rf"{start} = arith\.constant dense<0\.0", code), v.name
    assert chains >= 5  # contract and combine of both sides, materialize


def test_sizes_of_one_compile():
    """At a launch Triton turns integers that are 1 into constants, which kernels must not treat as tensors."""
    from flexlora_fast.kernels import report
    from flexlora_fast.kernels.compiled import compiled

    sizes = {"length", "width", "W", "m", "n", "rows", "columns"}
    for v in report.first_of_each(report.variants([("float32", torch.float32)], [16])):
        kept = {parameter.name for parameter in v.kernel.params if parameter.do_not_specialize}
        names = sizes & set(v.kernel.arg_names) - kept
        assert names, v.name
        constants = dict(v.constants) | dict.fromkeys(names, 1)
        compiled(v.kernel, v.types, constants, v.chosen.for_alignment(False), 90, aligned=False)


def test_the_report_names_what_spills(monkeypatch):
    from rich.console import Console

    from flexlora_fast.kernels import report
    from flexlora_fast.kernels.compiled import Resources

    (packing, *_) = [v for v in report.variants([("float32", torch.float32)], [64]) if v.name.startswith("pack P")]
    console = Console(record=True, width=200)
    assert report.report([packing], [90], console) == []
    shown = console.export_text()
    assert "pack P float32" in shown and "sm_90" in shown and " / 0" in shown
    monkeypatch.setattr(report.Variant, "resources", lambda *_: Resources(255, 1024, 64))
    assert report.report([packing], [90], console) == ["pack P float32 on sm_90"]


def test_the_triangle_has_every_tile_once():
    from flexlora_fast.kernels.gram import triangle_tile

    def where(condition, x, y):
        return x if condition else y

    # The kernel's own arithmetic, on Python's integers.
    import types

    plain = triangle_tile.fn
    tile = types.FunctionType(plain.__code__, {"tl": types.SimpleNamespace(where=where)})
    for count in range(1, 9):
        indices = range(-(-count // 2) * (count + 1))
        tiles = [tile(index, count) for index in indices]
        found = [(row, column) for row, column in tiles if row >= 0]
        assert sorted(found) == [(row, column) for row in range(count) for column in range(row, count)]
