"""One call for all solvers: a stack and a rank in, certified leading triplets out."""

from __future__ import annotations

import dataclasses
from itertools import islice

import torch
from torch import Tensor

from flexlora_fast import threads
from flexlora_fast.backends import groups
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.lowrank import filtered, plan
from flexlora_fast.lowrank.core import Unresolved, solve_krylov
from flexlora_fast.lowrank.dense import solve_dense, solve_svd
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.gram import solve_gram
from flexlora_fast.lowrank.random import stream
from flexlora_fast.lowrank.subspace import solve_subspace
from flexlora_fast.stack import Block, Stack

# Factors whose entries leave this range are rescaled first: their product could overflow or vanish in float32.
RANGE = (1e-9, 1e9)
# And where their products with the coefficients leave this one: the squares of ΔW could.
_SUMS = (1e-14, 1e14)
_FLOAT32_MAX = torch.finfo(torch.float32).max
# Energy that float32 Grams may miss by their rounding alone, as a share.
_ROUNDED = 1e-6
# Layers predicted to take less, which is a few milliseconds with the overhead of calls, gain at most a seventh from a
# second thread (2048², R = 128: 4.9 ms against 5.6) and lose 8 ms where it sleeps (384², R = 76: 3.4 against 11.8).
_SHORT = 1.7e-3
# ‖ΔW‖_F beyond this has no float32 adapter.
LARGEST = 1e37


def solve(
    stack: Stack,
    rank: int,
    *,
    solver: str = "auto",
    tol: float = 1e-3,
    seed: int = 0,
    name: str = "",
    certificate: str = "exact",
) -> Factorization:
    """The best rank-``rank`` approximation of each matrix of the stack.

    Args:
        stack: b matrices (m, n) of stack width R.
        rank: columns wanted; min(rank, R, m, n) are returned.
        solver: one of ``plan.SOLVERS``, or "auto" for the planner's choice.
        tol: bound on the excess ‖ΔW−X‖_F/‖ΔW−ΔW_k‖_F − 1 of the iterative solvers.
        seed, name: address of the random test matrix.
        certificate: "exact" computes ‖ΔW‖_F²; "estimate" lets the solvers on the factors estimate what lies outside
            their subspace, with its standard error (``Factorization.energy_error``).

    Raises:
        AdapterError: a factor is not finite, or ΔW is too large for float32.
        OptionError: unknown solver or certificate, or a tol that is negative or NaN.
    """
    plan.check_solver(solver)
    plan.check_certificate(certificate)
    if not tol >= 0:
        raise OptionError(f"tol is {tol!r}; give a number ≥ 0 (0 asks for an exact solver)")
    k = min(rank, stack.R, stack.m, stack.n)
    key = stream(seed, name)
    if k == 0:
        return _empty(stack)
    shape = _shape(stack, k, tol, certificate)
    if solver == "auto":
        solver = plan.choose(shape, plan.constants_of(stack.device))
    with threads.single(stack.device.type == "cpu" and plan.seconds(shape, plan.default_constants())[solver] < _SHORT):
        scaled, factor = _rescaled(stack, name)
        result = _dispatch(scaled, k, key, solver, max(tol, plan.FLOAT32_TOL), certificate)
    return rescaled(result, factor, name)


def _shape(stack: Stack, k: int, tol: float, certificate: str) -> plan.Shape:
    return plan.Shape(stack.m, stack.n, stack.R, k, tol, stack.batch, certificate, stack.sixteen)


def rescaled(result: Factorization, factor: float, name: str) -> Factorization:
    """``factor`` times the result. Raises ``AdapterError`` where ΔW is too large for float32 adapters."""
    if factor != 1.0:
        error = None if result.energy_error is None else result.energy_error * factor**2
        result = dataclasses.replace(result, S=result.S * factor, energy=result.energy * factor**2, energy_error=error)
    check_norm(result, name)
    return result


def check_norm(result: Factorization, name: str) -> None:
    """Raise ``AdapterError`` where ΔW is too large for float32 adapters."""
    norm = float(result.energy.max().sqrt())
    if not norm < LARGEST:
        raise AdapterError(
            f"‖ΔW‖_F is {norm:.3g}, beyond what float32 factors can hold; look for a client with exploded factors",
            layer=name,
        )


def _dispatch(stack: Stack, k: int, key: int, solver: str, tol: float, certificate: str) -> Factorization:
    if solver == "filtered":
        for more in filtered.MORE if filtered.takes(stack.R, stack.m, stack.n, k) else ():
            found = filtered.launch(groups.of([stack]), [(key, b) for b in range(stack.batch)], k, tol, more)
            (result,) = filtered.collected(found, [stack.batch], tol)
            if result is not None:
                return result
        solver = "krylov"  # whatever it could not prove, this one looks at
    if solver == "svd":
        return solve_svd(stack, k, key)
    if solver == "krylov":
        try:
            return solve_krylov(stack, k, key, tol)
        except Unresolved as error:  # the result says which solver took over
            solver = _instead(stack, k, tol, certificate, error.share)
    if solver == "gram":
        return solve_gram(stack, k, key)
    if solver == "dense":
        return solve_dense(stack, k, key, tol)
    return solve_subspace(stack, k, key, tol, depth=1 if solver == "subspace" else None, certificate=certificate)


def _instead(stack: Stack, k: int, tol: float, certificate: str, share: float) -> str:
    """The solver to take where the Grams could not resolve ΔW by ``share`` of its energy.

    A Gram squares ΔW and rounds at 6e-8 of the factors' products. Where that cost hardly more than it always does, it
    is the rest that is small (most of ΔW has rank k): products with ΔW itself resolve it, and exact eigenvectors of
    R×R would cost ten times as much (4096², R = 3200, k = 8: 22 s against 2). More is lost where products cancel,
    and there only float64 helps.
    """
    if share > _ROUNDED:
        return "gram"
    costs = plan.seconds(_shape(stack, k, tol, certificate), plan.constants_of(stack.device))
    return min(("gram", "factored", "dense"), key=lambda name: costs[name])


def in_range(stack: Stack, name: str) -> bool:
    """Whether float32 products of the factors stay in its range. Raises ``AdapterError`` for NaN and infinities."""
    low, high = RANGE
    factors = [(_largest(block.B), _largest(block.A)) for block in stack.blocks]
    if not all(x <= _FLOAT32_MAX for pair in factors for x in pair):  # an iteration on NaN never ends
        raise AdapterError("a factor holds NaN, Inf or values beyond float32; refuse its client", layer=name)
    coefficients = iter(stack.d.abs().tolist())
    d = [max(islice(coefficients, block.d.numel())) for block in stack.blocks]
    small, large = _SUMS
    return (
        all(low < x < high for pair in factors for x in pair if x > 0)
        and all(x < high for x in d)
        and small < max((B * A * x for (B, A), x in zip(factors, d, strict=True)), default=1.0) < large
    )


def _largest(X: Tensor) -> float:
    """max |x|; NaN where an entry is."""
    low, high = torch.aminmax(X)
    return max(-float(low), float(high))


def _rescaled(stack: Stack, name: str) -> tuple[Stack, float]:
    """The stack, or one with unit columns and rows where float32 products of the factors could leave its range."""
    if in_range(stack, name):
        return stack, 1.0
    P, c, Q = stack.equilibrated()
    top = float(c.abs().max())
    if top == 0 or not top < float("inf"):
        return stack, 1.0
    batch = range(stack.batch)
    if any(not torch.equal(c[0], c[i]) for i in batch):  # experts differ in scale: keep d common, fold into P
        P, c = P * (c / top).unsqueeze(1), torch.full_like(c, top)
    block = Block(P.to(torch.float32), Q.to(torch.float32), c[0] / top)
    return Stack([block], stack.m, stack.n, stack.batch), top


def _empty(stack: Stack) -> Factorization:
    """ΔW = 0 by construction: no client brought a column."""
    b = stack.batch
    zero = torch.zeros(b, dtype=torch.float64)
    return Factorization(
        torch.zeros(b, stack.m, 0, dtype=torch.float32),
        torch.zeros(b, 0, dtype=torch.float64),
        torch.zeros(b, stack.n, 0, dtype=torch.float32),
        zero,
        "empty",
    )
