"""The ops of both backends against float64 on weird shapes: each at least as good as plain float32 torch."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from flexlora_fast import _native
from flexlora_fast.backends import cpu, reference
from flexlora_fast.lowrank.dense import dense_energy
from flexlora_fast.lowrank.gram import core_of
from flexlora_fast.lowrank.subspace import factor_energy
from flexlora_fast.stack import Block, Stack
from tests import where

# (m, n, ranks of the blocks, b): prime, thin, single and wide; the last has more columns than one Gram tile or group.
SHAPES = [
    (5, 123, (1, 2), 1),
    (123, 5, (3,), 1),
    (1, 1, (1, 1), 1),
    (1, 17, (4, 9), 1),
    (31, 1, (2,), 3),
    (37, 29, (1, 2, 7, 30), 1),
    (16, 24, (5, 3), 4),
    (40, 33, (400, 500, 200), 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def stack_of(shape: tuple[int, int, tuple[int, ...], int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Stack:
    m, n, ranks, batch = shape
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        Block(
            torch.randn(batch, m, r, generator=generator).to(dtype),
            torch.randn(batch, r, n, generator=generator).to(dtype),
            torch.randn(r, generator=generator, dtype=torch.float64),
        )
        for r in ranks
    ]
    return Stack(blocks, m, n, batch)


def placed(stack: Stack, ops: ModuleType) -> Stack:
    """The stack where ``ops`` computes: the extension on the CPU, plain torch wherever the tests do."""
    return where.moved(stack) if ops is reference else stack


def exact(stack: Stack) -> Tensor:
    """ΔW in float64."""
    return sum(((b.B.double() * b.d) @ b.A.double() for b in stack.blocks), torch.zeros((), dtype=torch.float64))


def assert_near(got: Tensor, truth: Tensor, size: Tensor | float) -> None:
    """Within float32 rounding of what was summed: ``size`` is the norm of the terms."""
    assert got.shape == truth.shape and torch.isfinite(got).all()
    assert float((got.cpu().double() - truth).norm()) <= 1e-6 * float(size)


def mass(stack: Stack) -> float:
    return float(sum((b.B.double() * b.d).norm() * b.A.double().norm() for b in stack.blocks))


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestTwins:
    def test_materialize(self, shape: tuple, dtype: torch.dtype, ops: ModuleType) -> None:
        stack = stack_of(shape, dtype)
        there = placed(stack, ops)
        got = ops.materialize(there)
        assert got.dtype == torch.float32 and got.device == there.device
        assert_near(got, exact(stack), mass(stack))
        out = got.clone()
        assert ops.materialize(there, out) is out
        assert_near(out, 2 * exact(stack), 2 * mass(stack))

    def test_project(self, shape: tuple, dtype: torch.dtype, ops: ModuleType) -> None:
        """Coefficients reach float32 intermediates: folded into 16-bit factors they would cost 1e-3 here."""
        stack = stack_of(shape, dtype if dtype != torch.float64 else torch.float32)
        X, Y = torch.randn(stack.batch, stack.n, 3), torch.randn(stack.batch, stack.m, 2)
        there = placed(stack, ops)
        assert_near(ops.project(there, X.to(there.device)), exact(stack) @ X.double(), mass(stack) * X.norm())
        assert_near(ops.project_t(there, Y.to(there.device)), exact(stack).mT @ Y.double(), mass(stack) * Y.norm())

    def test_gram(self, shape: tuple, dtype: torch.dtype, ops: ModuleType) -> None:
        stack = stack_of(shape, dtype if dtype != torch.float64 else torch.float32)
        PP, QQ = (G.cpu() for G in ops.gram(placed(stack, ops)))
        P, Q = stack.P.double(), stack.Q.double()
        assert_near(PP, P.mT @ P, P.norm() ** 2)
        assert_near(QQ, Q @ Q.mT, Q.norm() ** 2)
        assert torch.allclose(PP, PP.mT, rtol=1e-5, atol=1e-5) and PP.dtype == torch.float32
        assert ops is reference or not cpu.usable("float32") or (torch.equal(PP, PP.mT) and torch.equal(QQ, QQ.mT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestOps:
    def test_energies(self, shape: tuple, dtype: torch.dtype) -> None:
        """Three ways to ‖ΔW‖_F²: from factor Grams, from the dense matrix, from the float64 core."""
        stack = stack_of(shape, dtype)
        truth = exact(stack).square().sum(dim=(1, 2))
        parts = [
            ((b.B.double() * b.d).norm(dim=1) * b.A.double().norm(dim=2)).square().sum(dim=1) for b in stack.blocks
        ]
        size = float(sum(part.sum() for part in parts))
        assert_near(factor_energy(stack), truth, size)
        assert_near(dense_energy(reference.materialize(stack)), truth, size)
        if stack.R < 50:  # the core takes part only where R is small; here also where its Grams are singular
            torch.testing.assert_close(core_of(stack).energy, truth, rtol=1e-9, atol=1e-9)

    def test_equilibrated(self, shape: tuple, dtype: torch.dtype) -> None:
        stack = stack_of(shape, dtype)
        before = stack.P.clone(), stack.Q.clone()
        P, c, Q = stack.equilibrated()
        torch.testing.assert_close((P * c.unsqueeze(1)) @ Q, exact(stack), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(P.norm(dim=1), torch.ones_like(c), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(Q.norm(dim=2), torch.ones_like(c), rtol=1e-12, atol=1e-12)
        assert torch.equal(stack.P, before[0]) and torch.equal(stack.Q, before[1])


@pytest.mark.parametrize("tile", [1, 2, 3, 512])
def test_tiles_do_not_show(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiled Grams and energies at every remainder of R, in float64."""
    whole = stack_of(SHAPES[5])
    energy = factor_energy(whole)
    monkeypatch.setattr(reference, "_GRAM_TILE", tile)
    for columns in range(1, 9):
        X = torch.randn(2, 11, columns, dtype=torch.float64)
        torch.testing.assert_close(reference.gram_of(X), X.mT @ X, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor_energy(whole), energy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 3, 7, 10_000])
def test_groups_do_not_show(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(SHAPES[5], torch.bfloat16)
    monkeypatch.setattr(reference, "_GROUP_COLUMNS", columns)
    assert_near(reference.materialize(stack), exact(stack), mass(stack))


def test_nothing_to_add_is_zero() -> None:
    stack = Stack([Block(torch.ones(2, 3, 0), torch.ones(2, 0, 4), torch.ones(0, dtype=torch.float64))], 3, 4, 2)
    assert stack.R == 0 and stack.d.dtype == torch.float64
    assert torch.equal(reference.materialize(stack), torch.zeros(2, 3, 4))
    assert stack.P.shape == (2, 3, 0) and stack.Q.shape == (2, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "columns"), [(1, 1), (5, 5), (123, 5), (40, 17)])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_orthonormalize(condition: float, m: int, columns: int, dtype: torch.dtype) -> None:
    """An orthonormal basis of the same span, of columns of any size and nearly parallel ones."""
    generator = torch.Generator().manual_seed(m)
    U = torch.linalg.qr(torch.randn(2, m, columns, generator=generator, dtype=torch.float64))[0]
    W = torch.linalg.qr(torch.randn(2, columns, columns, generator=generator, dtype=torch.float64))[0]
    tilt = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), columns, dtype=torch.float64)
    Y = ((U * tilt) @ W * torch.logspace(-12, 12, columns, dtype=torch.float64)).to(dtype)
    X = reference.orthonormalize(Y)
    assert X.dtype == dtype
    eye = torch.eye(columns, dtype=dtype)
    assert (X.mT @ X - eye).abs().max() <= 100 * torch.finfo(dtype).eps
    unit = (Y / Y.norm(dim=1, keepdim=True)).double()
    outside = unit - X.double() @ (X.double().mT @ unit)
    assert outside.norm() <= 1e3 * torch.finfo(dtype).eps


def test_orthonormalize_of_dependent_and_zero_columns() -> None:
    """What is not there comes out as zero, never as noise or NaN."""
    x = torch.randn(9, generator=torch.Generator().manual_seed(2))
    Y = torch.stack([x, x, torch.zeros(9), -x], dim=1)[None]
    X = reference.orthonormalize(Y)
    assert torch.isfinite(X).all()
    singular = torch.linalg.svdvals(X[0])
    torch.testing.assert_close(singular, torch.tensor([1.0, 0, 0, 0]), rtol=1e-5, atol=1e-5)
    assert not reference.orthonormalize(torch.zeros(1, 5, 3)).any()


def test_eigh_small_is_descending() -> None:
    C = torch.randn(3, 6, 6, dtype=torch.float64)
    C = C @ C.mT
    values, vectors = reference.eigh_small(C)
    assert (values.diff(dim=1) <= 0).all()
    torch.testing.assert_close(C @ vectors, vectors * values.unsqueeze(1))
    many = torch.eye(200, dtype=torch.float64)[None]
    assert torch.equal(reference.eigh_small(many)[0], torch.ones(1, 200, dtype=torch.float64))


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """As if there were no extension, or no instructions for some of its products."""
    if missing == "the extension":
        monkeypatch.setattr(_native, "extension", None)
        return
    if not cpu.usable("float32"):
        pytest.skip("the extension multiplies nothing here")

    class Some:
        calls: ClassVar[list[str]] = []

        @staticmethod
        def can_multiply(precision: str) -> bool:
            return precision not in missing

        @staticmethod
        def matmul(*arguments: object) -> Tensor:
            Some.calls.append(str(arguments[4]))
            assert arguments[4] not in missing
            return _original.matmul(*arguments)

    _original = _native.extension
    monkeypatch.setattr(_native, "extension", Some)


def products(dtype: torch.dtype) -> dict[str, Tensor]:
    """All that the compiled backend does, in one example."""
    stack = stack_of((70, 50, (2, 30, 40), 2), dtype)
    X, Y = torch.ones(2, 50, 3), torch.ones(2, 70, 3)
    A, B = [b.B[0] for b in stack.blocks], [b.A[0] for b in stack.blocks]
    out = torch.ones(70, 50)
    cpu.matmul(A, B, out=out, scale=stack.d)
    found = {
        "materialize": cpu.materialize(stack),
        "added": cpu.materialize(stack, torch.ones(2, 70, 50)),
        "project": cpu.project(stack, X),
        "project_t": cpu.project_t(stack, Y),
        "table": cpu.matmul(A, B, scale=stack.d),
        "out": out,
        "rows": cpu.matmul([a.mT for a in A], A[0], joined=(0, 0)),
        "one": cpu.matmul(A[0], B[0], precision="bfloat16"),
        "symmetric": cpu.matmul(A[0].mT, A[0], symmetric=True),
    }
    return found | dict(zip(("PP", "QQ"), cpu.gram(stack), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("missing", ["the extension", "bfloat16", "float32 and bfloat16"])
def test_what_is_missing_is_made_up_for_in_float32(
    missing: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never by emulated bfloat16 products, nor by rounded operands."""
    native = products(dtype)
    without(monkeypatch, missing)
    assert not cpu.usable("bfloat16") and cpu.usable("float32") == (missing == "bfloat16")
    for name, got in products(dtype).items():
        assert got.dtype == torch.float32
        rounded = name == "one" and dtype != torch.bfloat16
        torch.testing.assert_close(got, native[name], rtol=3e-2 if rounded else 1e-5, atol=0.1 if rounded else 1e-3)


def test_the_extension_takes_only_what_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.takes(stack_of((7, 5, (2, 3), 4), torch.float16)) == cpu.usable("float32")
    for stack in (stack_of((7, 5, (2, 3), 1), torch.float64), Stack([], 7, 5)):
        assert not cpu.takes(stack)
        assert torch.equal(cpu.materialize(stack), reference.materialize(stack))
    meta = torch.ones(3, 2, device="meta"), torch.ones(2, 3, device="meta")
    assert cpu.matmul(*meta).device.type == "meta"
    stack = stack_of((7, 5, (2, 3), 1))
    monkeypatch.setattr(_native, "extension", None)
    assert torch.equal(cpu.materialize(stack), reference.materialize(stack))


def test_compiled_products_of_empty_stacks() -> None:
    stack = Stack([Block(torch.ones(2, 3, 0), torch.ones(2, 0, 4), torch.ones(0, dtype=torch.float64))], 3, 4, 2)
    assert torch.equal(cpu.materialize(stack), torch.zeros(2, 3, 4))
    assert torch.equal(cpu.project(stack, torch.ones(2, 4, 5)), torch.zeros(2, 3, 5))
    assert [g.shape for g in cpu.gram(stack)] == [(2, 0, 0)] * 2
