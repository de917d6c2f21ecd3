"""What becomes of a solved layer: factors that are handed out, what goes into frozen weights, ranks that are cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from flexlora_fast.errors import FlexLoRAError
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.methods import Contribution, Method
from flexlora_fast.methods.base import Solve
from flexlora_fast.stack import Stack


def stack_of(method: Method, spec: LayerSpec, contributions: Sequence[Contribution]) -> Stack:
    """The stack of a layer. Raises what the method has against the contributions, with the layer's name."""
    try:
        blocks = method.blocks(contributions)
    except FlexLoRAError as error:
        raise error.at(layer=spec.name) from None
    return Stack(blocks, spec.m, spec.n, spec.experts)


def of_contributions(
    method: Method,
    spec: LayerSpec,
    contributions: Sequence[Contribution],
    rank: int,
    solve: Solve,
    known: Callable[[Stack], None],
    bias: Tensor | None,
    inherited: float = 0.0,
) -> LayerUpdate:
    """A layer whose contributions are all here, solved.

    ``solve``: gives a stack's leading triplets, on the device where results are kept. ``known``: tells the stack what
    is known of it already.
    """
    stack = stack_of(method, spec, contributions)
    known(stack)
    update = LayerUpdate(spec, solve(stack, rank), stack.R, None, bias, inherited)
    if method.output == "slice":
        B, A = method.averages(contributions, stack)
        averaged = B.cpu(), A.cpu()  # whole: the error of a slice is what it leaves behind
        update = dataclasses.replace(update, averaged=averaged, frozen="A" not in method.trains)
    base = method.base(contributions, stack, solve)
    if base is not None:
        update = dataclasses.replace(update, base=tuple(X.contiguous() for X in base.factors), base_error=base.error)
    return update


def limited(method: Method, update: LayerUpdate) -> LayerUpdate:
    """The update cut to as many columns as the method gives out at most."""
    limit = method.limit(update.factorization)
    if limit is None:
        return update
    f = update.factorization
    U, S, V = f.U[:, :, :limit].contiguous(), f.S[:, :limit].contiguous(), f.V[:, :, :limit].contiguous()
    return dataclasses.replace(update, factorization=dataclasses.replace(f, U=U, S=S, V=V), limit=limit)
