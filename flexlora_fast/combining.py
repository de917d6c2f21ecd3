"""Sums of adapters and updates with coefficients of any sign: ΔW = Σ c_j·ΔW_j by the same stack and solvers.

Nothing dense is formed: the columns of all terms lie side by side with c_j among their coefficients. With X_j what an
update keeps of its ΔW_j, the result X satisfies ‖ΔW − X‖_F ≤ ‖Σ c_j·X_j − X‖_F + Σ |c_j|·‖ΔW_j − X_j‖_F, where every
term is known: the last sum is the layers' ``inherited``, as in a merge.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlora_fast import devices, extras, finishing, values
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import check_configs, check_geometries
from flexlora_fast.config import Config
from flexlora_fast.errors import EmptyRoundError, IncompatibleAdapterError, OptionError, RankError, WeightError
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.plan import check_solver
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.precision import full_precision
from flexlora_fast.stack import Block, Stack
from flexlora_fast.update import GlobalUpdate, LayerUpdate

Source = Adapter | GlobalUpdate
Coefficient = Callable[[str], float]

# An energy that was estimated is taken this many standard errors larger.
_STANDARD_ERRORS = 3
_CHUNK = 1 << 20  # elements of a head added up at a time


@full_precision()
def combine(
    terms: Sequence[tuple[float, Source]],
    rank: int | None = None,
    solver: str = "auto",
    tol: float = 1e-3,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> GlobalUpdate:
    """The update ΔW = Σ c_j·ΔW_j: differences, extrapolations and mixtures of adapters and updates of any ranks.

    It hands out adapters, is saved and reported like any other (it knows no clients: ask for ``adapter(rank=…)`` or
    ``adapter(config=…)``). ``update[layer].error(rank)`` bounds ‖ΔW − ΔW_rank‖_F, with what the terms had left out of
    their own ΔW_j in it. Updates that average factors (FedIT …) count with B̄·Ā, those that merge into the frozen weight
    with all of their ΔW. The order of the terms does not matter, bit for bit.

    What is no low-rank pair is combined with the same coefficients, Σ c_j·t_j. A head or a bias is a weight and no
    change of one: coefficients that sum to 1 give a mixture of heads, others something that is no head by itself (with
    1 and −1, the difference of two). A term without a layer, or without a tensor, counts as zero there.

    Args:
        terms: coefficients, finite and of any sign (0 equals absent), each with an :class:`Adapter` or
            :class:`GlobalUpdate`.
        rank: columns to keep in each layer (default: the most that one of the terms has there; give the sum of ranks
            to keep all).
        solver, tol, seed, device: as for ``ff.aggregate``. Layers are read, solved and let go one by one.

    Raises:
        EmptyRoundError: no terms. WeightError: a coefficient that is no finite number, or none that is not 0.
        RankError: a rank below 1. OptionError: a term that is neither, or of a private round.
        IncompatibleAdapterError: other base models, layers or shapes. AdapterError: NaN, or ΔW beyond float32.

    >>> import torch, flexlora_fast as ff
    >>> def adapter(seed):
    ...     A, B = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(seed))
    ...     state = {"base_model.model.fc.lora_A.weight": A, "base_model.model.fc.lora_B.weight": B.mT}
    ...     return ff.Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 4})
    >>> old, new = adapter(0), adapter(1)
    >>> further = ff.combine([(1.5, new), (-0.5, old)], rank=4)
    >>> bool(torch.allclose(further.delta("fc"), 1.5 * new.delta("fc") - 0.5 * old.delta("fc"), atol=1e-4))
    True
    """
    given = [Term(_name(i, source), source, _constant(i, c)) for i, (c, source) in enumerate(_checked(terms))]
    private = next((t.name for t in given if isinstance(t.source, GlobalUpdate) and t.source.privacy is not None), None)
    if private is not None:
        raise OptionError(
            f"{private} is of a private round, and what it costs beside the others is not known here; combine adapters "
            "made from it, which may go out"
        )
    how = How(rank, solver, tol, seed, devices.usable(device))
    present = [term for term in given if term.of("") != 0]
    if not present:
        raise WeightError(f"all {len(given)} coefficients are 0; give one that is not")
    return combined(present, how)


# -- for those whose coefficients differ from layer to layer ---


@dataclass(frozen=True)
class How:
    """How sums are solved; as for :func:`combine`."""

    rank: int | None = None
    solver: str = "auto"
    tol: float = 1e-3
    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (no call that could differ from time to time)

    def __post_init__(self) -> None:
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise RankError(f"rank is {self.rank!r}; give an integer ≥ 1, or None for the most that one term has")
        if not (isinstance(self.tol, int | float) and self.tol >= 0):
            raise OptionError(f"tol is {self.tol!r}; give a number ≥ 0 (0 asks for an exact solver)")
        check_solver(self.solver)


@dataclass(frozen=True)
class Term:
    """An adapter or update, by its name in errors; ``of`` gives its coefficient by layer, and by key of an extra.

    ``state``: whether it stands for what it keeps, so that what it once left out is no error of the sum.
    """

    name: str
    source: Source
    of: Coefficient
    state: bool = False

    def part(self, layer: str) -> Part | None:
        """Its part of the sum; None where it has none."""
        c = self.of(layer) if layer in self.source.layers else 0.0
        if c == 0:
            return None
        found = part(self.source, layer, c)
        return dataclasses.replace(found, left_out=0.0, whole=None) if self.state else found


@dataclass(frozen=True)
class Part:
    """c·ΔW of one layer as columns. ``bias``: (m,) float64, c in it. ``left_out``: ‖·‖_F of what is missing in them.
    ``rank``: columns that an adapter of it has. ``whole``: the layer itself where c is 1.
    """

    blocks: list[Block]
    rank: int
    bias: Tensor | None = None
    left_out: float = 0.0
    whole: LayerUpdate | None = None


def combined(terms: Sequence[Term], how: How) -> GlobalUpdate:
    """The sum of terms that fit each other. Raises as :func:`combine` does."""
    check(terms)
    layers = {}
    for layer, spec in specs_of(terms).items():
        layers[layer] = solved(spec, parts_of(terms, layer), how)
    sums = {}
    for key in sorted({key for term in terms for key in term.source.extras}):
        having = [(term.of(key), term.source.extras[key], term.name) for term in terms if key in term.source.extras]
        sums[key] = summed(key, having)
    configs = sorted((_config(term.source) for term in terms), key=lambda config: json.dumps(config, sort_keys=True))
    paths = {update.spec.pattern_name for update in layers.values()}
    template = finishing.widened(configs, paths)
    return GlobalUpdate(layers, extras=sums, method="combination", seed=how.seed, template=template)


def check(terms: Sequence[Term]) -> None:
    """Raise ``IncompatibleAdapterError`` for terms of other base models, or other shapes of one layer."""
    check_configs([(term.name, _config(term.source)) for term in terms])
    check_geometries((term.name, _spec(term.source, layer)) for term in terms for layer in term.source.layers)


def specs_of(terms: Sequence[Term]) -> dict[str, LayerSpec]:
    """Of all their layers, sorted."""
    found: dict[str, LayerSpec] = {}
    for term in terms:
        for layer in term.source.layers:
            found.setdefault(layer, _spec(term.source, layer))
    return dict(sorted(found.items()))


def parts_of(terms: Sequence[Term], layer: str) -> list[Part]:
    """What the terms bring to one layer."""
    return [found for term in terms if (found := term.part(layer)) is not None]


def part(source: Source, layer: str, c: float) -> Part:
    """c·ΔW of a layer that the source has. Raises ``AdapterError`` for an adapter's NaN and infinities."""
    if isinstance(source, Adapter):
        A, B, bias = source.factors_and_bias(layer)
        keys, scale = source.skeleton.keys_of(layer), source.scale(layer)
        values.check_layer(A, B, bias, scale, keys=keys, client=source.client or "", layer=layer)
        columns = torch.full((A.shape[1],), c * scale, dtype=torch.float64)
        return Part([Block(B, A, columns)], A.shape[1], None if bias is None else c * scale * bias.double().cpu())
    update = source[layer]
    blocks = [Block(B, A, torch.full((A.shape[1],), c, dtype=torch.float64)) for B, A in kept(update)]
    bias = None if update.bias is None else c * update.bias.double().cpu()
    # What goes into the frozen weight, a frozen A and a limit are how a method hands ΔW out, and no part of a sum.
    plain = not (update.merges or update.frozen or update.limit is not None)
    whole = update if c == 1 and plain else None
    return Part(blocks, columns_of(source, layer), bias, abs(c) * left_out(update), whole)


def columns_of(update: GlobalUpdate, layer: str) -> int:
    """Columns that a sum keeps of a layer: as many as its adapters have, or, where a method cut those, as its clients
    came with.
    """
    one = update[layer]
    return one.rank if one.limit is None else max([one.rank, *(c.ranks.get(layer, 0) for c in update.clients)])


def kept(layer: LayerUpdate) -> list[tuple[Tensor, Tensor]]:
    """Pairs B (E, m, r) and A (E, r, n), float32, whose products add up to all that an update keeps of its layer."""
    pairs = [] if layer.averaged is None else [layer.averaged]
    if layer.base is not None and len(layer.base) == 1:
        dense = layer.base[0]
        pairs.append((dense, torch.eye(dense.shape[2]).repeat(len(dense), 1, 1)))
    elif layer.base is not None:
        pairs.append((layer.base[0], layer.base[1]))
    if pairs:
        return pairs
    f = layer.factorization
    # S is split between the two: singular values beyond float32 would not fit into one of them.
    root = f.S.sqrt()
    return [((f.U.double() * root.unsqueeze(1)).float(), (f.V.double() * root.unsqueeze(1)).mT.float())]


def left_out(layer: LayerUpdate) -> float:
    """A bound of ‖ΔW − X‖_F for what ``kept`` gives of a layer: of nothing (0), or as its certificate says."""
    known = layer.inherited + layer.base_error
    if layer.merges or layer.averaged is not None or layer.complete:
        return known
    beyond = layer.energy + _STANDARD_ERRORS * layer.energy_error - float(layer.factorization.S.square().sum())
    return known + max(0.0, beyond) ** 0.5


def solved(spec: LayerSpec, parts: Sequence[Part], how: How) -> LayerUpdate:
    """The sum of parts of one layer, whatever order they come in; of none, a layer whose ΔW is zero."""
    if len(parts) == 1 and (only := parts[0].whole) is not None and (how.rank is None or how.rank >= only.rank):
        return only
    stack = stack_of(spec, parts, how.device)
    rank = how.rank or max((part.rank for part in parts), default=1)
    f = solve(stack, rank, solver=how.solver, tol=how.tol, seed=how.seed, name=spec.name)
    error = None if f.energy_error is None else f.energy_error.cpu()
    f = dataclasses.replace(f, U=f.U.cpu(), S=f.S.cpu(), V=f.V.cpu(), energy=f.energy.cpu(), energy_error=error)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = in_any_order(biases).float() if biases else None
    return LayerUpdate(spec, f, stack.R, bias=bias, inherited=math.fsum(part.left_out for part in parts))


def stack_of(spec: LayerSpec, parts: Sequence[Part], device: torch.device) -> Stack:
    """All columns side by side, in an order of their contents alone."""
    blocks = sorted((block for part in parts for block in part.blocks), key=_contents)
    there = [dataclasses.replace(block, B=block.B.to(device), A=block.A.to(device)) for block in blocks]
    return Stack(there, spec.m, spec.n, spec.experts)


@full_precision()
def energy(spec: LayerSpec, parts: Sequence[Part], device: torch.device) -> float:
    """‖Σ c·ΔW‖_F² of one layer (over all experts), float64, from R×R Grams."""
    P, c, Q = stack_of(spec, parts, device).equilibrated()
    outer = c.unsqueeze(2) * c.unsqueeze(1)
    return max(0.0, float(((P.mT @ P) * outer * (Q @ Q.mT)).sum()))


def in_any_order(tensors: Sequence[Tensor]) -> Tensor:
    """Σ of tensors of one shape, float64, the same to the last bit for any order: entry by entry from the lowest."""
    return torch.stack([tensor.double().cpu() for tensor in tensors]).sort(dim=0).values.sum(dim=0)


def summed(key: str, having: Sequence[tuple[float, Tensor, str]]) -> Tensor:
    """Σ c·t of tensors that are no low-rank pairs; float64 sums in the dtype that holds all of theirs.

    ``having``: c, t, and whose it is. Raises ``IncompatibleAdapterError`` for other shapes, ``AdapterError`` for NaN.
    """
    _, first, owner = having[0]
    dtype = first.dtype
    for _, tensor, name in having:
        if tensor.shape != first.shape:
            raise IncompatibleAdapterError(
                f"tensor {key!r} has shape {tuple(tensor.shape)} in {name} and {tuple(first.shape)} in {owner}; "
                "tensors that are added up must have one shape"
            )
        values.check_finite(tensor, key, client=name)
        dtype = torch.promote_types(dtype, tensor.dtype)
    result = torch.empty(first.shape, dtype=dtype)
    flat, parts = result.view(-1), [(c, tensor.reshape(-1)) for c, tensor, _ in having]
    for at in range(0, flat.numel(), _CHUNK):
        here = slice(at, min(at + _CHUNK, flat.numel()))
        flat[here] = extras.cast(in_any_order([c * x[here].double() for c, x in parts]), dtype)
    return result


# -- what is combined ---


def _checked(terms: Sequence[tuple[float, Source]]) -> list[tuple[float, Source]]:
    terms = list(terms)
    if not terms:
        raise EmptyRoundError("there are no terms; give at least one, as (coefficient, adapter or update)")
    for i, pair in enumerate(terms):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Adapter | GlobalUpdate)):
            raise OptionError(f"term {i} is a {type(pair).__name__}; give (coefficient, Adapter or GlobalUpdate)")
    return terms


def _name(i: int, source: Source) -> str:
    return (source.client if isinstance(source, Adapter) else None) or f"term {i}"


def _constant(i: int, c: Any) -> Coefficient:
    if isinstance(c, bool) or not isinstance(c, numbers.Real) or not math.isfinite(c):
        raise WeightError(f"the coefficient of term {i} is {c!r}; give a finite number")
    value = float(c)
    return lambda _: value


def _config(source: Source) -> Config:
    return source.skeleton.config if isinstance(source, Adapter) else source.template


def _spec(source: Source, layer: str) -> LayerSpec:
    return source.spec(layer) if isinstance(source, Adapter) else source[layer].spec


def _contents(block: Block) -> tuple[bytes, list[float]]:
    digest = hashlib.sha256()
    for X in (block.B, block.A):
        digest.update(X.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.digest(), block.d.tolist()
