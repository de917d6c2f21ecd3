"""Triton kernels: run in Triton's interpreter against float64, and compiled for GPUs that are not here."""

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

HAS_TRITON = not (kernels.obstacle() or "").startswith("triton cannot be imported")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton has no wheel for this platform")


def release(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package; (0,) where it is not installed."""
    try:
        return Version(importlib.metadata.version(package)).release[:2]
    except importlib.metadata.PackageNotFoundError:
        return (0,)


# (m, n, R): one tile exactly, several tiles with remainders both ways, rank 1, and no rank at all.
SHAPES = [(64, 64, 16), (5, 123, 1), (123, 5, 7), (65, 130, 33), (130, 3, 100), (1, 1, 1), (7, 4, 0)]

CHECK = textwrap.dedent(
    """
    import sys
    import torch
    from flexlora_fast.kernels.materialize import materialize

    m, n, R, dtype = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(m, R, generator=generator).to(dtype)
    Q = torch.randn(n, R, generator=generator).to(dtype).t()  # not contiguous
    d = torch.randn(R, generator=generator, dtype=torch.float64)
    P_before, Q_before, d_before = P.clone(), Q.clone(), d.clone()
    exact = (P.double() * d) @ Q.double()
    twin = (P.float() * d.float()) @ Q.float()
    result = materialize(P, d, Q)
    assert result.shape == (m, n) and result.dtype == torch.float32, (result.shape, result.dtype)
    assert torch.equal(P, P_before) and torch.equal(Q, Q_before) and torch.equal(d, d_before)
    error, twin_error = (result - exact).norm(), (twin - exact).norm()
    assert error <= 2 * twin_error + 1e-7 * exact.norm(), (float(error), float(twin_error), float(exact.norm()))
    """
)


def check_code(shapes: list[tuple[int, int, int]], dtype: str) -> str:
    """CHECK for all shapes in one process: starting Python and torch takes longer than the kernels."""
    steps = [f"sys.argv[1:] = ['{m}', '{n}', '{R}', '{dtype}']\n{CHECK}" for m, n, R in shapes]
    return "\n".join(["import sys", *steps, f"print('checked', {len(shapes)})"])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter: Triton reads its environment when the kernels are imported."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@needs_triton
@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 does not run with numpy 2.4: it takes one-element arrays for integers",
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_materialize_matches_float64_in_the_interpreter(dtype):
    done = run_python(check_code(SHAPES, dtype), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["checked", str(len(SHAPES))]


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """Registers, stack and local bytes of one compiled kernel, as the disassembler that Triton brings reports them."""
    import triton

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    usage = next(line for line in report.splitlines() if "REG:" in line)
    pairs = (field.split(":") for field in usage.split() if field.count(":") == 1)
    return {name: int(value) for name, value in pairs if value.isdigit()}


@needs_triton
@pytest.mark.parametrize("element", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_materialize_compiles_without_spills(capability, element, tmp_path, record_property):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flexlora_fast.kernels import materialize as module

    tile = {"BLOCK_M": module.BLOCK_M, "BLOCK_N": module.BLOCK_N, "BLOCK_R": module.BLOCK_R}
    pointers = {"P_ptr": f"*{element}", "Q_ptr": f"*{element}", "d_ptr": "*fp32", "out_ptr": "*fp32"}
    # Strides and sizes unspecialised: the version with the most registers.
    signature = {name: "i32" for name in module.materialize_kernel.arg_names} | pointers
    signature |= {name: "constexpr" for name in tile}
    compiled = triton.compile(
        ASTSource(fn=module.materialize_kernel, signature=signature, constexprs=tile),
        target=GPUTarget("cuda", capability, 32),
        options=module.OPTIONS,
    )
    usage = resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    for name in ("REG", "STACK", "LOCAL"):
        record_property(name, usage[name])
    print(f"sm_{capability} {element}: {usage['REG']} registers, {compiled.metadata.shared} bytes shared")
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"spills: {usage}"
    # 99 KiB is what one block may have on every GPU from sm_80 on; more than half would leave one block an SM.
    assert compiled.metadata.shared <= 99 * 1024 // 2


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_materialize_matches_float64_on_the_gpu(dtype):
    shapes = [*SHAPES, (1024, 4096, 1600)]
    code = check_code(shapes, dtype).replace("torch.Generator()", "torch.Generator('cuda')")
    done = run_python(f"import torch\ntorch.set_default_device('cuda')\n{code}", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["checked", str(len(shapes))]


@needs_triton
def test_cpu_tensors_are_refused_outside_the_interpreter():
    code = """
import torch
from flexlora_fast.kernels.materialize import materialize
materialize(torch.ones(2, 1), torch.ones(1), torch.ones(1, 2))
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert "BackendError: materialize: P is on cpu, and Triton kernels run on a CUDA GPU" in done.stderr


@needs_triton
@pytest.mark.parametrize(
    ("P", "d", "Q", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), torch.ones(4, 5), r"P \(2, 3\), d \(3,\) and Q \(4, 5\) do not fit"),
        (torch.ones(2, 3), torch.ones(2), torch.ones(3, 5), r"d \(2,\)"),
        (torch.ones(3), torch.ones(3), torch.ones(3, 5), r"P \(3,\)"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), torch.ones(3, 5), "are on cpu, meta and cpu"),
        (torch.ones(2, 3).double(), torch.ones(3), torch.ones(3, 5), "P is torch.float64: expected float16"),
    ],
)
def test_what_does_not_fit_is_quoted(P, d, Q, message):
    from flexlora_fast.kernels.materialize import materialize

    with pytest.raises(ValueError, match=message):
        materialize(P, d, Q)


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
    done = run_python(code)
    assert "triton cannot be imported" in done.stdout and "pip install triton" in done.stdout
    assert "BackendError: the Triton kernels need Triton" in done.stderr


def test_obstacle_names_the_missing_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if HAS_TRITON and os.environ.get("TRITON_INTERPRET") != "1":
        assert "no CUDA GPU" in (kernels.obstacle() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (kernels.obstacle() is None) == HAS_TRITON
