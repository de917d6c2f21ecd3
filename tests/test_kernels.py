"""Triton kernels against float64 and their torch twins: in Triton's interpreter and, where there is one, on a GPU."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from flexlora_fast import kernels
from flexlora_fast.errors import BackendError
from flexlora_fast.stack import Block, Stack

HAS_TRITON = not (kernels.obstacle() or "").startswith("triton cannot be imported")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton has no wheel for this platform")

# In groups of about equal time: starting Python, torch and Triton takes longer than most checks.
CHECKS = [
    ["products"],
    ["halves", "grams", "dense"],
    ["precisions", "layouts"],
    ["bits", "packing"],
]


def release(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package; (0,) where it is not installed."""
    try:
        return Version(importlib.metadata.version(package)).release[:2]
    except importlib.metadata.PackageNotFoundError:
        return (0,)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python afresh: Triton reads its environment when the kernels are imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@needs_triton
@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 does not run with numpy 2.4: it takes one-element arrays for integers",
)
@pytest.mark.parametrize("checks", CHECKS, ids="-".join)
def test_kernels_hold_in_the_interpreter(checks):
    done = run_python("-m", "tests.kernel_checks", "cpu", *checks, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for check in checks for word in ("held", check)]


@needs_triton
def test_every_check_runs():
    done = run_python("-c", "from tests.kernel_checks import CHECKS; print(*CHECKS)", TRITON_INTERPRET="1")
    assert sorted(done.stdout.split()) == sorted(check for group in CHECKS for check in group), done.stderr


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("checks", CHECKS, ids="-".join)
def test_kernels_hold_on_the_gpu(checks):
    done = run_python("-m", "tests.kernel_checks", "cuda", *checks, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for check in checks for word in ("held", check)]


@pytest.mark.gpu
@needs_triton
def test_two_processes_give_the_same_bits_on_the_gpu():
    code = textwrap.dedent(
        """
        import hashlib, torch
        from flexlora_fast.kernels.gram import gram
        from flexlora_fast.kernels.materialize import materialize
        from flexlora_fast.kernels.project import project, project_t
        from flexlora_fast.kernels.table import Table
        from tests.kernel_checks import Data
        data = Data("cuda")
        table = Table([data.stack(1024, 3000, [16, 8, 40], 1, torch.bfloat16) for _ in range(5)])
        X, Y = data.randn(5, 3000, 48), data.randn(5, 1024, 48)
        for precision in ("float32", "bf16x3", "tf32x3", "tf32", "bf16"):
            results = [project(table, X, precision=precision), project_t(table, Y, precision=precision)]
            results += [materialize(table, precision=precision), *gram(table, precision=precision)]
            print(*(hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() for x in results))
        """
    )
    first, second = (run_python("-c", code, TRITON_INTERPRET="0") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout and first.stdout == second.stdout


def stack(m: int = 6, n: int = 5, r: int = 2, **kinds: torch.dtype) -> Stack:
    """A stack of one client, of ones."""
    B = torch.ones(1, m, r, dtype=kinds.get("B", torch.float32))
    A = torch.ones(1, r, n, dtype=kinds.get("A", torch.float32))
    return Stack([Block(B, A, torch.ones(r, dtype=torch.float64))], m, n)


@needs_triton
def test_tables_say_what_does_not_fit():
    from flexlora_fast.kernels.table import Table

    with pytest.raises(ValueError, match="at least one stack: got none"):
        Table([])
    with pytest.raises(ValueError, match=r"stack 1 has \(m, n\) = \(6, 7\), stack 0 \(6, 5\): .* make one for each"):
        Table([stack(), stack(n=7)])
    with pytest.raises(ValueError, match=r"B of block 0 of stack 1 is torch.float64: expected float16.* cast it"):
        Table([stack(), stack(B=torch.float64)])
    with pytest.raises(ValueError, match="are on cpu, and the table is to be on meta: move them to one device"):
        Table([stack()], device="meta")
    meta = Stack([Block(torch.ones(1, 6, 2), torch.ones(1, 2, 5, device="meta"), torch.ones(2))], 6, 5)
    with pytest.raises(ValueError, match="the factors of a table are on cpu, meta: move them"):
        Table([meta])


@needs_triton
def test_tables_read_factors_in_place_where_they_can():
    from flexlora_fast.kernels.table import Table

    plain = stack(m=64, n=32, r=16)
    table = Table([plain, Stack([], 64, 32, batch=2), stack(m=64, n=32, r=8)])
    (block,) = plain.blocks
    assert table.ranks == (16, 0, 0, 8) and table.W == 16 and table.layers == 4
    assert table.offsets.tolist() == [0, 16, 16, 16, 24]
    assert table.P.address[:16].tolist() == [block.B.data_ptr() + 4 * c for c in range(16)]
    assert table.Q.address[:16].tolist() == [block.A.data_ptr() + 4 * 32 * c for c in range(16)]
    assert (table.P.run, table.P.bytes, table.Q.bytes) == (4, 16, 16)  # 16-byte loads of float32
    assert table.P.aligned and table.Q.aligned
    odd = Table([plain, stack(m=64, n=32, r=6)])
    assert (odd.P.run, odd.P.bytes) == (2, 8) and not odd.P.aligned and odd.Q.aligned
    mixed = Table([plain, stack(m=64, n=32, r=8, A=torch.float16)])
    assert (mixed.P.dtype, mixed.Q.dtype) == (torch.float32, torch.float32)
    assert mixed.P.address[0] == block.B.data_ptr() and mixed.Q.address[0] == block.A.data_ptr()


@needs_triton
def test_operations_say_what_does_not_fit():
    from flexlora_fast.kernels.combine import combine
    from flexlora_fast.kernels.contract import contract
    from flexlora_fast.kernels.gram import gram
    from flexlora_fast.kernels.materialize import materialize
    from flexlora_fast.kernels.pack import pack
    from flexlora_fast.kernels.project import project, project_t
    from flexlora_fast.kernels.table import Table

    table = Table([stack(), stack(r=3)])
    with pytest.raises(ValueError, match=r"project: X is \(2, 6, 4\): expected \(2, 5, l\) for a table of 2 layers"):
        project(table, torch.ones(2, 6, 4))
    with pytest.raises(ValueError, match=r"project_t: Y is \(6, 4\): expected \(2, 6, l\)"):
        project_t(table, torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"combine: Z is \(2, 2, 4\): expected \(2, 3, l\).* at most 3 columns"):
        combine(table, torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match=r"project: X is torch.float64: expected float16"):
        project(table, torch.ones(2, 5, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"contract: out is \(2, 2, 4\).* expected \(2, 3, 4\), torch.float32, on cpu"):
        contract(table, torch.ones(2, 5, 4), out=torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match="project: X is on meta and the table on cpu: move them together"):
        project(table, torch.ones(2, 5, 4, device="meta"))
    with pytest.raises(ValueError, match="gram: precision 'half' does not exist: expected one of 'float32', 'bf16x3'"):
        gram(table, precision="half")
    with pytest.raises(ValueError, match=r"project: precision 'bf16x3' is for bfloat16 factors.* P is torch.float32"):
        project(table, torch.ones(2, 5, 4), precision="bf16x3")
    with pytest.raises(
        ValueError, match=r"out is \(2, 6, 4\), torch.float32, on cpu, contiguous: expected \(2, 6, 5\)"
    ):
        materialize(table, torch.ones(2, 6, 4))
    with pytest.raises(ValueError, match=r"with strides \(30, 1, 6\)"):
        materialize(table, torch.ones(2, 5, 6).mT)
    with pytest.raises(ValueError, match=r"pack: cannot pack into torch.float64"):
        pack(table, torch.float64)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_cpu_tensors_are_refused_outside_the_interpreter():
    from flexlora_fast.kernels.gram import gram
    from flexlora_fast.kernels.project import project
    from flexlora_fast.kernels.table import Table

    with pytest.raises(BackendError, match="project: the factors are on cpu, and Triton kernels run on a CUDA GPU"):
        project(Table([stack()]), torch.ones(1, 5, 4))
    with pytest.raises(BackendError, match=r"gram: the factors are on cpu.*TRITON_INTERPRET=1"):
        gram(Table([stack()]))


def test_without_triton_the_package_imports_and_says_what_is_missing():
    code = textwrap.dedent(
        """
        import sys
        sys.modules["triton"] = None  # `import triton` now raises ImportError
        from flexlora_fast import kernels
        print(kernels.obstacle())
        import flexlora_fast.kernels.materialize
        """
    )
    done = run_python("-c", code)
    assert "triton cannot be imported" in done.stdout and "pip install triton" in done.stdout
    assert "BackendError: the Triton kernels need Triton" in done.stderr


def test_obstacle_names_the_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if HAS_TRITON and os.environ.get("TRITON_INTERPRET") != "1":
        assert "no CUDA GPU" in (kernels.obstacle() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (kernels.obstacle() is None) == HAS_TRITON
