"""What the Triton kernels are held to, on any device: in Triton's interpreter, and on a GPU.

    python -m tests.kernel_checks cpu|cuda CHECK...

Each check compares with float64, and with the torch twin in ``backends/reference.py``. They run in a process of their
own because Triton reads TRITON_INTERPRET when the kernels are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexlora_fast.backends import reference
from flexlora_fast.kernels import combine as combine_module
from flexlora_fast.kernels import contract as contract_module
from flexlora_fast.kernels import gram as gram_module
from flexlora_fast.kernels import project as project_module
from flexlora_fast.kernels.combine import combine
from flexlora_fast.kernels.configuration import configuration
from flexlora_fast.kernels.contract import contract
from flexlora_fast.kernels.gram import gram
from flexlora_fast.kernels.materialize import materialize
from flexlora_fast.kernels.pack import pack
from flexlora_fast.kernels.project import project, project_t
from flexlora_fast.kernels.table import Table
from flexlora_fast.stack import Block, Stack

# (m, n), then for each stack the ranks of its clients and its number of experts: rank 1, layers that no client has,
# ranks that are multiples of 8 (wide loads) and of nothing, several tiles with remainders both ways.
TABLES: list[tuple[int, int, list[tuple[list[int], int]]]] = [
    (64, 64, [([16, 16, 8], 1), ([8, 8], 1)]),
    (5, 123, [([1], 1), ([], 1), ([1, 4], 1)]),
    (123, 5, [([7], 1), ([2, 3, 70], 1)]),
    (65, 130, [([3, 8, 1], 1), ([33], 3)]),
    (130, 3, [([100], 1)]),
    (1, 1, [([1], 1)]),
    (7, 4, [([], 2), ([], 1)]),
]
WIDTHS = (1, 17, 40)
# Raised to float32 as they are loaded; bfloat16 too, in which Triton's interpreter cannot compute.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Data:
    """Seeded random stacks on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def stack(self, m: int, n: int, ranks: list[int], batch: int, dtype: torch.dtype) -> Stack:
        blocks = [
            Block(
                self.randn(batch, m, r, dtype=dtype),
                self.randn(batch, r, n, dtype=dtype),
                self.randn(r).double().cpu(),
            )
            for r in ranks
        ]
        return Stack(blocks, m, n, batch)

    def stacks(self, table: tuple[int, int, list[tuple[list[int], int]]], dtype: torch.dtype) -> list[Stack]:
        m, n, layers = table
        return [self.stack(m, n, ranks, batch, dtype) for ranks, batch in layers]


def on_host(stack: Stack) -> Stack:
    """A copy in the CPU's memory, where truth is computed."""
    return Stack([Block(b.B.cpu(), b.A.cpu(), b.d) for b in stack.blocks], stack.m, stack.n, stack.batch)


def exact(stacks: list[Stack]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """P (m, R), d (R,), Q (R, n) of every layer in float64."""
    return [
        (stack.packed_P(torch.float64)[e], stack.d, stack.packed_Q(torch.float64)[e])
        for stack in stacks
        for e in range(stack.batch)
    ]


def twins(op: Callable[..., Tensor], stacks: list[Stack], X: Tensor | None = None) -> Tensor:
    """The torch twin of an op over all layers."""
    results, low = [], 0
    for stack in stacks:
        part = () if X is None else (X[low : low + stack.batch],)
        results.append(op(stack, *part))
        low += stack.batch
    return torch.cat(results)


def close(result: Tensor, twin: Tensor, truth: Tensor, what: Any) -> None:
    """The error is at most twice the float32 twin's, both against float64."""
    assert result.shape == truth.shape and result.dtype == torch.float32, (what, result.shape, result.dtype)
    error, allowed = (result.cpu() - truth).norm(), (twin - truth).norm()
    assert error <= 2 * allowed + 1e-7 * truth.norm(), (what, float(error), float(allowed), float(truth.norm()))


def cases(data: Data) -> Iterator[tuple[list[Stack], Table, Any]]:
    """All tables in float32, two of them in 16 bits too; each must leave its factors as they were."""
    for shape in TABLES:
        for dtype in FLOATS if shape in TABLES[:2] else FLOATS[:1]:
            stacks = data.stacks(shape, dtype)
            before = [(b.B.clone(), b.A.clone(), b.d.clone()) for s in stacks for b in s.blocks]
            yield [on_host(stack) for stack in stacks], Table(stacks, data.device), (shape, dtype)
            after = [(b.B, b.A, b.d) for s in stacks for b in s.blocks]
            assert all(map(torch.equal, sum(before, ()), sum(after, ()))), f"{shape}: factors were modified"


def check_products(data: Data) -> None:
    for stacks, table, what in cases(data):
        for width in WIDTHS:
            X, Y = data.randn(table.layers, table.n, width), data.randn(table.layers, table.m, width)
            x, y, layers = X.cpu(), Y.cpu(), exact(stacks)
            truth = torch.stack([(P * d) @ (Q @ x.double()) for (P, d, Q), x in zip(layers, x, strict=True)])
            close(project(table, X), twins(reference.project, stacks, x), truth, ("project", width, what))
            truth = torch.stack([(Q.mT * d) @ (P.mT @ y.double()) for (P, d, Q), y in zip(layers, y, strict=True)])
            close(project_t(table, Y), twins(reference.project_t, stacks, y), truth, ("project_t", width, what))
            assert torch.equal(X.cpu(), x) and torch.equal(Y.cpu(), y), "operands were modified"


def check_halves(data: Data) -> None:
    for stacks, table, what in cases(data):
        X, Z = data.randn(table.layers, table.n, 17), data.randn(table.layers, table.W, 17)
        inner, outer = contract(table, X).cpu(), combine(table, Z).cpu()
        assert inner.shape == Z.shape, what
        for (P, d, Q), x, z, c, y in zip(exact(stacks), X.cpu(), Z.cpu(), inner, outer, strict=True):
            R = d.numel()
            assert not c[R:].any(), f"{what}: not zero beyond R = {R}"
            close(c[:R], d.float()[:, None] * (Q.float() @ x), d[:, None] * (Q @ x.double()), ("contract", what))
            close(y, P.float() @ z[:R], P @ z[:R].double(), ("combine", what))


def check_grams(data: Data) -> None:
    for stacks, table, what in cases(data):
        left, right = (G.cpu() for G in gram(table))
        assert left.shape == right.shape == (table.layers, table.W, table.W), what
        for (P, d, Q), p, q in zip(exact(stacks), left, right, strict=True):
            R = d.numel()
            assert torch.equal(p, p.mT) and torch.equal(q, q.mT), f"{what}: not symmetric"
            assert not p[R:].any() and not q[R:].any(), f"{what}: not zero beyond R = {R}"
            close(p[:R, :R], P.float().mT @ P.float(), P.mT @ P, ("PᵀP", what))
            close(q[:R, :R], Q.float() @ Q.float().mT, Q @ Q.mT, ("QQᵀ", what))


def check_dense(data: Data) -> None:
    for stacks, table, what in cases(data):
        result = materialize(table)
        truth = torch.stack([(P * d) @ Q for P, d, Q in exact(stacks)])
        twin = twins(reference.materialize, stacks)
        close(result, twin, truth, ("materialize", what))
        out = torch.ones_like(result)
        assert materialize(table, out) is out
        close(out, 1 + twin, 1 + truth, ("materialize into", what))


def check_packing(data: Data) -> None:
    for stacks, table, what in cases(data):
        # The interpreter cuts bits off where it makes bfloat16 numbers; a GPU rounds.
        for dtype in FLOATS if data.device != "cpu" else FLOATS[:2]:
            for scale in (False, True):
                P, Q = pack(table, dtype, scale=scale)
                P, Q = P.cpu(), Q.cpu()
                assert P.is_contiguous() and Q.is_contiguous() and P.dtype == Q.dtype == dtype, what
                low = 0
                for stack in stacks:
                    part, R = slice(low, low + stack.batch), stack.R
                    wanted = stack.Q * stack.d.float()[:, None] if scale else stack.Q
                    assert torch.equal(P[part, :, :R], stack.P.to(dtype)), ("P", what, dtype)
                    assert torch.equal(Q[part, :R], wanted.to(dtype)), ("Q", what, dtype, scale)
                    assert not P[part, :, R:].any() and not Q[part, R:].any(), ("padding", what)
                    low += stack.batch


def check_layouts(data: Data) -> None:
    """Factors of several dtypes, transposed, sliced, expanded: read in place or copied, never misread."""
    m, n, r = 70, 45, 9
    wide = data.randn(1, 2 * r, 3 * n)
    blocks = [
        Block(data.randn(1, r, m).mT, data.randn(1, n, r).mT, data.randn(r).double().cpu()),
        Block(data.randn(1, m, 4 * r)[:, :, 3 : r + 3], wide[:, ::2, n : 2 * n], data.randn(r).double().cpu()),
        Block(data.randn(1, m, 1).expand(1, m, r), data.randn(1, r, n), data.randn(r).double().cpu()),
        Block(data.randn(1, m, r, dtype=torch.float16), data.randn(1, r, n), data.randn(r).double().cpu()),
        Block(data.randn(1, m, r), data.randn(1, r, n, dtype=torch.bfloat16), data.randn(r).double().cpu()),
    ]
    for chosen in (blocks, blocks[:3]):
        table = Table([Stack(chosen, m, n)])
        stacks = [on_host(Stack(chosen, m, n))]
        X = data.randn(1, 23, n).mT
        x = X.cpu()
        P, d, Q = exact(stacks)[0]
        truth = ((P * d) @ (Q @ x[0].double()))[None]
        close(project(table, X), twins(reference.project, stacks, x), truth, "project")
        close(materialize(table), twins(reference.materialize, stacks), ((P * d) @ Q)[None], "materialize")
        close(gram(table)[1], (stacks[0].Q @ stacks[0].Q.mT), (Q @ Q.mT)[None], "gram")


def check_precisions(data: Data) -> None:
    """Each precision errs by about its own rounding and not more."""
    rounding = {"float32": 2.0**-23, "tf32x3": 2.0**-21, "tf32": 2.0**-10}
    dtypes = [torch.float32, torch.float16]
    if data.device != "cpu":  # the interpreter multiplies bfloat16 wrongly
        rounding |= {"bf16x3": 2.0**-22, "bf16": 2.0**-8}
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        stacks = data.stacks((65, 130, [([3, 8, 1], 1), ([33], 3)]), dtype)
        table = Table(stacks)
        X, Y = data.randn(4, 130, 17), data.randn(4, 65, 17)
        layers = exact([on_host(stack) for stack in stacks])
        x, y = X.double().cpu(), Y.double().cpu()
        for precision, unit in rounding.items():
            if precision == "bf16x3" and dtype != torch.bfloat16:
                continue
            results = project(table, X, precision=precision), project_t(table, Y, precision=precision)  # type: ignore[arg-type]
            dense = materialize(table, precision=precision)  # type: ignore[arg-type]
            grams = gram(table, precision=precision)  # type: ignore[arg-type]
            for e, (P, d, Q) in enumerate(layers):
                R = d.numel()
                W, size = (P * d) @ Q, (P.abs() * d.abs()) @ Q.abs()
                for name, result, truth, magnitude in (
                    ("project", results[0][e], W @ x[e], size @ x[e].abs()),
                    ("project_t", results[1][e], W.mT @ y[e], size.mT @ y[e].abs()),
                    ("materialize", dense[e], W, size),
                    ("PᵀP", grams[0][e, :R, :R], P.mT @ P, P.abs().mT @ P.abs()),
                    ("QQᵀ", grams[1][e, :R, :R], Q @ Q.mT, Q.abs() @ Q.abs().mT),
                ):
                    error = float(((result.cpu() - truth).abs() / magnitude).max())
                    assert error <= 4 * unit, (name, precision, dtype, error)
                    coarse = precision in {"tf32", "bf16"} and name in {"project", "project_t", "materialize"}
                    assert not coarse or error > unit / 1000, (name, precision, dtype, error, "nothing was rounded")


def check_bits(data: Data) -> None:
    """The same bits alone, among others, in another order, in small groups, and with parts in programs of their own."""
    if data.device == "cpu":  # small, for the interpreter: parts of 64
        m, n, ranks = 20, 150, [[9, 4], [70], [3], []]
        small = configuration(4, 3, 2, BLOCK_C=32, BLOCK_I=32, BLOCK_L=16, BLOCK_K=32, PART=64)
        for module, unused in ((contract_module, "BLOCK_I"), (combine_module, "BLOCK_K")):
            blocks = tuple(block for block in small.blocks if block[0] != unused)
            module.configurations = lambda *_, blocks=blocks: [replace(small, blocks=blocks)]  # type: ignore[assignment]
        blocks = tuple(block for block in small.blocks if block[0] not in {"BLOCK_I", "BLOCK_L"})
        gram_module.configurations = lambda *_: [replace(small, blocks=blocks)]  # type: ignore[assignment]
    else:
        # Wide loads alone, single elements beside a client of rank 3: other machine code, the same sums.
        m, n, ranks = 320, 3072, [[16, 8], [1104], [3], []]
    stacks = [data.stack(m, n, r, 1, torch.float32) for r in ranks]
    X, Y = data.randn(4, n, 16), data.randn(4, m, 16)

    def results(order: list[int]) -> dict[str, Tensor]:
        table = Table([stacks[i] for i in order], data.device)
        return {
            "project": project(table, X[order]),
            "project_t": project_t(table, Y[order]),
            "materialize": materialize(table),
            "left Gram": padded(gram(table)[0], sum(ranks[1])),
            "right Gram": padded(gram(table)[1], sum(ranks[1])),
        }

    def padded(G: Tensor, W: int) -> Tensor:
        return torch.nn.functional.pad(G, (0, W - G.shape[1]) * 2)

    together = results([0, 1, 2, 3])
    reordered, alone = results([2, 0, 3, 1]), [results([i]) for i in range(4)]
    for name in together:
        assert torch.equal(together[name][[2, 0, 3, 1]], reordered[name]), f"{name}: order changed bits"
        for i in range(4):
            assert torch.equal(together[name][i : i + 1], alone[i][name]), f"{name}: layer {i} alone differs"
    for modules, name, value in (
        ((contract_module, combine_module, gram_module), "split", lambda *_: True),
        ((contract_module, combine_module, gram_module), "split", lambda *_: False),
        ((project_module,), "l2_budget", lambda _: 1),
    ):
        kept = [(module, getattr(module, name)) for module in modules]
        for module in modules:
            setattr(module, name, value)
        other = results([0, 1, 2, 3])
        for module, original in kept:
            setattr(module, name, original)
        for key, result in together.items():
            assert torch.equal(result, other[key]), f"{key}: {name} changed bits"


CHECKS = {name.removeprefix("check_"): f for name, f in globals().copy().items() if name.startswith("check_")}

if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        CHECKS[wanted](Data(sys.argv[1]))
        print("held", wanted, flush=True)
