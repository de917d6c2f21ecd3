"""A layer whose clients are spread over the ranks: each multiplies with its own, and the owner sees sums alone.

The owner's iteration is the one of ``lowrank``: it says what all multiply with, and every rank, itself among them,
gives its part of the product. So nothing but products needs all ranks, and what the owner decides is decided for all,
however their arithmetic differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexlora_fast.backends import cpu
from flexlora_fast.distributed.sharding import runs
from flexlora_fast.distributed.team import Stopped, Team
from flexlora_fast.errors import AdapterError, FlexLoRAError
from flexlora_fast.layer import LayerUpdate
from flexlora_fast.lowrank.accumulate import Accumulator
from flexlora_fast.lowrank.dense import from_triplets
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.krylov import Operator, block_krylov
from flexlora_fast.lowrank.plan import FLOAT32_TOL
from flexlora_fast.lowrank.random import stream
from flexlora_fast.lowrank.solve import in_range, rescaled
from flexlora_fast.planning import LayerPlan
from flexlora_fast.precision import full_precision
from flexlora_fast.stack import Block, Stack
from flexlora_fast.work import Work

_APPLY, _APPLY_T, _ENERGY, _END = range(4)
# Columns of ΔW that are summed up at a time for ‖ΔW‖_F: 32 MiB of a layer with 16,384 outputs, of which there are two:
# one on its way to the rank that squares it while the next one is multiplied.
_TILE = 512


@full_precision()
def begin(team: Team, work: Work, layer: LayerPlan, owner: int) -> Callable[[], LayerUpdate] | None:
    """Everything that takes all ranks. What the owner gets does the rest; the others get None.

    Errors are those of ``Work.solve_layer``, on all ranks.
    """
    mine = _clients_here(team, work, layer)
    if layer.spread == "dense":
        return _dense(team, work, layer, mine, owner)
    return _on_factors(team, work, layer, mine, owner)


def _clients_here(team: Team, work: Work, layer: LayerPlan) -> set[str]:
    name = layer.spec.name
    having = [client for client in work.clients if name in client.adapter.skeleton.specs]
    ranks = [client.adapter.skeleton.ranks[name] for client in having]
    return {having[i].name for i in runs(ranks, team.size)[team.rank]}


# -- as a dense ΔW ---


def _dense(team: Team, work: Work, layer: LayerPlan, mine: set[str], owner: int) -> Callable[[], LayerUpdate] | None:
    spec, of = layer.spec, work.settings
    total = Accumulator(spec.m, spec.n, spec.experts, of.device)

    def accumulate() -> Tensor | None:
        pieces = (read() for _, read in work.pieces_of(layer, mine))

        def take(stack: Stack) -> None:
            team.look()
            total.add(stack, spec.name)

        return work.each_stack(layer, pieces, take)

    bias = _bias(team.gather(team.run(accumulate)))
    exponents = [e for e in team.gather(total.exponent) if e is not None]
    total.settle(max(exponents, default=0))
    team.summed(total.matrix)
    if team.rank != owner:
        return None

    @full_precision()
    def solve() -> LayerUpdate:
        rank = min(layer.rank, layer.total_rank, spec.m, spec.n)
        result = total.solve(rank, tol=of.tol, seed=of.seed, name=spec.name)
        return LayerUpdate(spec, work.brought(result), layer.total_rank, None, bias)

    return solve


def _bias(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part.double() for part in parts if part is not None]
    return torch.stack(there).sum(dim=0).float() if there else None


# -- on the factors ---


def _on_factors(
    team: Team, work: Work, layer: LayerPlan, mine: set[str], owner: int
) -> Callable[[], LayerUpdate] | None:
    spec, of = layer.spec, work.settings
    stacks = list[Stack]()

    def read() -> Tensor | None:
        pieces = (read() for _, read in work.pieces_of(layer, mine))
        return work.each_stack(layer, pieces, stacks.append)

    bias = _bias(team.gather(team.run(read)))
    stack = Stack([block for stack in stacks for block in stack.blocks], spec.m, spec.n, spec.experts)
    stack, top = _in_range(team, stack, spec.name)

    def drive() -> Factorization | None:
        products = _Products(team, stack, owner, of.device, spec.name)
        if team.rank != owner:
            products.serve()
            return None
        failure = None
        try:
            result = _iterate(products, work, layer)
        except BaseException as error:
            failure = error
        if products.end():
            raise Stopped from failure  # NaN came from a rank that says why itself
        if failure is not None:
            raise failure
        return rescaled(result, top, spec.name)

    result = team.run(drive)
    return None if result is None else lambda: LayerUpdate(spec, work.brought(result), layer.total_rank, None, bias)


def _in_range(team: Team, stack: Stack, name: str) -> tuple[Stack, float]:
    """The ranks' stacks over a common power of two, where float32 products of some factors could leave their range."""

    def look() -> tuple[bool, float]:
        if not stack.blocks or in_range(stack, name):
            return True, 0.0
        return False, float(stack.equilibrated()[1].abs().max())

    fine, largest = team.run(look)
    found = team.gather((fine, largest))
    if all(fine for fine, _ in found):
        return stack, 1.0
    top = max(x for _, x in found)
    # Those in range are scaled by their coefficients alone; the others' columns and rows get unit length first.
    if fine:
        top = top or 1.0
        blocks = [Block(block.B, block.A, block.d / top) for block in stack.blocks]
        return Stack(blocks, stack.m, stack.n, stack.batch), top
    P, c, Q = stack.equilibrated()
    top = top or 1.0
    P = P * (c / top).unsqueeze(1)
    return Stack([Block(P.float(), Q.float(), torch.ones_like(stack.d))], stack.m, stack.n, stack.batch), top


def _iterate(products: _Products, work: Work, layer: LayerPlan) -> Factorization:
    spec, of = layer.spec, work.settings
    exact = of.certificate == "exact"
    op = Operator(
        spec.m,
        spec.n,
        spec.experts,
        products.apply,
        products.apply_t,
        products.energy() if exact else None,
        torch.float32,
        of.device,
    )
    depth = 1 if layer.spread == "subspace" else None
    key, rank = stream(of.seed, spec.name), min(layer.rank, layer.total_rank, spec.m, spec.n)
    triplets = block_krylov(op, rank, max(of.tol, FLOAT32_TOL), key, depth=depth)
    return from_triplets(triplets, layer.spread, key)


class _Products:
    """Products with the sum of the ranks' stacks, asked for by the owner and made by all.

    A rank that fails gives NaN for its part, so that no other waits for it; the owner stops there.
    """

    def __init__(self, team: Team, stack: Stack, owner: int, device: torch.device, name: str) -> None:
        self._team, self._stack, self._owner, self._device, self._name = team, stack, owner, device, name
        self._failure: Exception | None = None

    def apply(self, X: Tensor) -> Tensor:
        """ΔW·X (b, m, l) for X (b, n, l) float32."""
        return self._ask(_APPLY, X)

    def apply_t(self, Y: Tensor) -> Tensor:
        """ΔWᵀ·Y (b, n, l) for Y (b, m, l) float32."""
        return self._ask(_APPLY_T, Y)

    def energy(self) -> Tensor:
        """‖ΔW‖_F² (b,) float64, from ΔW's columns, some at a time: 2·m·n·R flops shared by the ranks."""
        return self._ask(_ENERGY, torch.zeros(0, device=self._device))

    def end(self) -> bool:
        """Have the others stop serving. Whether one of them has failed."""
        self._say(_END, torch.zeros(0))
        failed = self._team.gather(self._failure is not None)
        return any(failed[: self._owner] + failed[self._owner + 1 :])

    def serve(self) -> None:
        """Take part until the owner ends it. Raises what went wrong here."""
        while True:
            kind, *shape = self._heard()
            if kind == _END:
                break
            X = torch.zeros(shape, device=self._device)
            if kind != _ENERGY:
                self._team.copied(X, self._owner)
            self._team.summed(self._part(kind, X))
        self._team.gather(self._failure is not None)
        if self._failure is not None:
            raise self._failure

    def _ask(self, kind: int, X: Tensor) -> Tensor:
        self._say(kind, X)
        if kind != _ENERGY:
            self._team.copied(X.contiguous(), self._owner)
        total = self._team.summed(self._part(kind, X))
        if self._failure is not None:
            raise self._failure
        if not bool(torch.isfinite(total).all()):
            raise AdapterError(
                "products with its factors are not finite; look for a client with exploded factors", layer=self._name
            )
        return total

    def _say(self, kind: int, X: Tensor) -> None:
        self._team.copied(torch.tensor([kind, *X.shape, 0, 0, 0][:4]), self._owner)

    def _heard(self) -> list[int]:
        return self._team.copied(torch.zeros(4, dtype=torch.int64), self._owner).tolist()

    def _part(self, kind: int, X: Tensor) -> Tensor:
        """This rank's part of a product, float32, or of ‖ΔW‖_F², float64."""
        if kind == _ENERGY:
            return self._squares()
        stack = self._stack
        make: Callable[[Stack, Tensor], Tensor] = cpu.project if kind == _APPLY else cpu.project_t
        shape = (stack.batch, stack.m if kind == _APPLY else stack.n, X.shape[2])
        return self._tried(lambda: make(stack, X), shape)

    def _squares(self) -> Tensor:
        """Σ over the tiles of ΔW that this rank squares, (b,) float64; each rank has every so many-th."""
        stack, team = self._stack, self._team
        squares = torch.zeros(stack.batch, dtype=torch.float64, device=self._device)
        on_its_way: Callable[[], Tensor | None] | None = None

        def arrived(tile: Tensor | None) -> None:
            if tile is not None:
                squares.add_(torch.linalg.vector_norm(tile.flatten(1), dim=1, dtype=torch.float64).square())

        for i, lo in enumerate(range(0, stack.n, _TILE)):
            tile = self._columns(lo, min(lo + _TILE, stack.n))
            if on_its_way is not None:
                arrived(on_its_way())
            on_its_way = team.summed_at(tile, i % team.size)
        if on_its_way is not None:
            arrived(on_its_way())
        return squares

    def _columns(self, lo: int, hi: int) -> Tensor:
        """Columns of this rank's ΔW, (b, m, hi − lo) float32."""
        stack = self._stack
        blocks = [Block(block.B, block.A[:, :, lo:hi], block.d) for block in stack.blocks]
        tile = Stack(blocks, stack.m, hi - lo, stack.batch)
        return self._tried(lambda: cpu.materialize(tile), (stack.batch, stack.m, hi - lo))

    def _tried(self, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        try:
            return make().to(self._device).contiguous()
        except (FlexLoRAError, RuntimeError, MemoryError, ValueError) as error:
            self._failure = self._failure or error
            return torch.full(shape, float("nan"), device=self._device)
