"""A round from start to end: clients in, in any order, one global update out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import torch
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast import methods
from flexlora_fast.adapter import Adapter
from flexlora_fast.admission import Admission, check_name
from flexlora_fast.errors import (
    BackendError,
    EmptyRoundError,
    FlexLoRAError,
    OptionError,
    RankError,
    WeightError,
)
from flexlora_fast.lowrank import plan
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.solve import solve
from flexlora_fast.methods import Contribution, Method
from flexlora_fast.precision import full_precision
from flexlora_fast.progress import track
from flexlora_fast.stack import Stack
from flexlora_fast.update import ClientRecord, GlobalUpdate, LayerUpdate, Refusal

Source = Adapter | str | os.PathLike[str]
MISSING = ("zero", "renormalize")


@dataclass(frozen=True)
class _Client:
    name: str
    adapter: Adapter
    weight: float


def aggregate(
    adapters: Iterable[Source],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | None = None,
    method: str | Method = "flexlora",
    solver: str = "auto",
    tol: float = 1e-3,
    device: str | torch.device | None = None,
    seed: int = 0,
    *,
    clients: Sequence[str] | None = None,
    missing: Literal["zero", "renormalize"] = "zero",
    progress: bool | None = None,
) -> GlobalUpdate:
    """Aggregate a round of LoRA adapters of any mix of ranks: :class:`Aggregator` fed in a loop.

    Args:
        adapters: adapters, or paths of PEFT adapter folders.
        weights: one finite number ≥ 0 for each adapter, in their order or by client name (default: all equal).
        clients: names, in the order of ``adapters`` (default: the adapter's own, or its path).
        The rest as for :class:`Aggregator`.

    Returns:
        The :class:`GlobalUpdate`.

    Raises:
        What :meth:`Aggregator.add` and :meth:`Aggregator.finish` raise: one bad adapter stops the call. Feed an
        ``Aggregator`` yourself to go on without it.

    >>> import torch, flexlora_fast as ff
    >>> def client(rank):
    ...     state = {"base_model.model.fc.lora_A.weight": torch.randn(rank, 6),
    ...              "base_model.model.fc.lora_B.weight": torch.randn(5, rank)}
    ...     return ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 16})
    >>> update = ff.aggregate([client(1), client(4)], weights=[100, 300])
    >>> update["fc"].S.shape, update.adapter(rank=2).rank("fc")
    (torch.Size([4]), 2)
    """
    adapters = list(adapters)
    round_ = Aggregator(rank, method, solver, tol, device, seed, missing=missing, progress=progress)
    for option, values in (("weights", weights), ("clients", clients)):
        if values is not None and len(values) != len(adapters):
            raise WeightError(f"{len(values)} {option} for {len(adapters)} adapters; give one for each")
    for i, adapter in enumerate(track(adapters, "clients", progress)):
        name = clients[i] if clients is not None else round_.name_for(adapter)
        if isinstance(weights, Mapping) and name not in weights:
            raise WeightError(f"weights has no entry for it; it has {sorted(weights)[:5]} …", client=name)
        share = 1.0 if weights is None else weights[name] if isinstance(weights, Mapping) else weights[i]
        round_.add(adapter, share, client=name)
    return round_.finish()


class Aggregator:
    """One round, fed as clients arrive.

    Args:
        rank: columns to keep in each layer; None keeps the largest rank any client sent there.
        method: "flexlora", "fedit", "hetlora" or a :class:`~flexlora_fast.methods.Method`.
        solver: "auto" lets the planner choose for each layer; or one of ``lowrank.plan.SOLVERS``.
        tol: bound on the excess of iterative solvers; 0 asks for exact ones.
        device: where to compute ("cpu", "cuda", …; default: CPU). Results are on the CPU.
        seed: of the test matrices, whose entries are addressed by (seed, layer, row).
        missing: a client without a layer counts as zero there ("zero"), or its weight is shared out
            ("renormalize").
        progress: a bar on stderr: None shows it on a terminal only.

    >>> import torch, flexlora_fast as ff
    >>> agg = ff.Aggregator(rank=2)
    >>> for name in ("a", "b"):
    ...     state = {"base_model.model.fc.lora_A.weight": torch.ones(1, 6),
    ...              "base_model.model.fc.lora_B.weight": torch.ones(5, 1)}
    ...     agg.add(ff.Adapter.from_state_dict(state, {"r": 1, "lora_alpha": 1}), weight=10, client=name)
    >>> round(agg.finish()["fc"].norm, 3)
    5.477
    """

    def __init__(
        self,
        rank: int | None = None,
        method: str | Method = "flexlora",
        solver: str = "auto",
        tol: float = 1e-3,
        device: str | torch.device | None = None,
        seed: int = 0,
        *,
        missing: Literal["zero", "renormalize"] = "zero",
        progress: bool | None = None,
    ) -> None:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise RankError(f"rank is {rank!r}; give an integer ≥ 1, or None for the largest that clients send")
        if not (isinstance(tol, (int, float)) and tol >= 0):
            raise OptionError(f"tol is {tol!r}; give a number ≥ 0 (0 asks for an exact solver)")
        if missing not in MISSING:
            raise OptionError(f"missing {missing!r} is neither 'zero' nor 'renormalize'")
        self.rank, self.method, self.solver, self.tol = (
            rank,
            methods.get(method),
            plan.check_solver(solver),
            tol,
        )
        self.device = _device(device)
        self.seed, self.missing, self.progress = seed, missing, progress
        self.refused: list[Refusal] = []
        self._clients: dict[str, _Client] = {}
        self._admission = Admission()
        self._started = time.perf_counter()

    @property
    def clients(self) -> list[str]:
        """Names of the accepted clients, sorted."""
        return sorted(self._clients)

    def name_for(self, adapter: Source) -> str:
        """The name a client gets when none is given: the adapter's own, its path, or a running number."""
        if isinstance(adapter, Adapter):
            return adapter.client or f"client-{len(self._clients) + len(self.refused):04d}"
        return PurePath(os.path.normpath(adapter)).as_posix()

    def add(self, adapter: Source, weight: float = 1.0, client: str | None = None) -> None:
        """Take one client into the round.

        Args:
            adapter: an :class:`Adapter`, or the path of a PEFT adapter folder.
            weight: its weight before normalisation, finite and ≥ 0 (usually its number of examples).
            client: its name, a non-empty string of its own (default: ``name_for``); results do not depend on the
                order of arrival of named clients.

        Raises:
            AdapterError (UnsupportedAdapterError, IncompatibleAdapterError), WeightError: the client is refused,
            noted in ``refused``, and the round is as if it had never come.
        """
        name = self.name_for(adapter) if client is None else client
        try:
            check_name(name)
            loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter, client=name)
            self._admission.check(name, loaded, weight)
        except FlexLoRAError as error:
            error.at(client=str(name))  # str: a name may be refused for being none
            self.refused.append(Refusal(str(name), str(error)))
            raise
        self._clients[name] = _Client(name, loaded, float(weight))
        self._admission.accept(name, loaded)

    def finish(self) -> GlobalUpdate:
        """Aggregate what was added.

        Raises:
            EmptyRoundError: no client was accepted. WeightError: all weights are zero.
            AdapterError: a layer whose ΔW overflows, naming it.
        """
        if not self._clients:
            refused = f"; {len(self.refused)} were refused, the first: {self.refused[0].reason}" if self.refused else ""
            raise EmptyRoundError(f"no client is in this round{refused}; add at least one adapter")
        # Canonical order: sums come out the same whatever the order of arrival. Weight 0 equals absent.
        clients = [self._clients[name] for name in sorted(self._clients) if self._clients[name].weight > 0]
        if not clients:
            raise WeightError(f"the weights of {len(self._clients)} clients sum to 0; they must sum to > 0")
        shares = _shares(clients)
        start = time.perf_counter()
        layers = sorted({layer for client in clients for layer in client.adapter.layers})
        updates = {layer: self._layer(layer, clients, shares) for layer in track(layers, "layers", self.progress)}
        solved = time.perf_counter()
        return GlobalUpdate(
            layer_updates=updates,
            extras=_average_extras(clients, shares),
            clients=[_record(client, shares[client.name]) for client in clients],
            refused=list(self.refused),
            method=self.method.name,
            seed=self.seed,
            template=_template(clients),
            seconds={
                "collect": start - self._started,
                "layers": solved - start,
                "extras": time.perf_counter() - solved,
            },
        )

    @full_precision()
    def _layer(self, layer: str, clients: list[_Client], shares: dict[str, float]) -> LayerUpdate:
        """One layer: contributions -> blocks -> solve."""
        having = [client for client in clients if layer in client.adapter.layers]
        total = math.fsum(shares[client.name] for client in having) if self.missing == "renormalize" else 1.0
        spec = having[0].adapter.spec(layer)
        contributions = []
        for client in having:
            A, B = client.adapter.factors(layer)
            contributions.append(
                Contribution(
                    client.name,
                    A.to(self.device),
                    B.to(self.device),
                    client.adapter.scale(layer),
                    shares[client.name] / total,
                )
            )
        blocks = self.method.blocks(contributions)
        stack = Stack(blocks, spec.m, spec.n, spec.experts)
        rank = self.rank or max(c.rank for c in contributions)
        result = solve(stack, rank, solver=self.solver, tol=self.tol, seed=self.seed, name=layer)
        averaged = None
        if self.method.output == "slice":
            averaged = (stack.P.cpu(), stack.Q.cpu())  # whole: the error of a slice is what it leaves behind
        bias = _average_bias(layer, having, contributions)
        return LayerUpdate(spec, _to_cpu(result), stack.R, averaged, bias)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"device {device!r} is none that torch knows: {error}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' was asked for, but torch sees no GPU; `flexlora-fast doctor` says more")
    try:  # "meta", a GPU that is not there, or one without the float64 that certificates need
        torch.ones(1, dtype=torch.float64, device=chosen).item()
    except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        raise BackendError(f"device {device!r} cannot compute here: {error}") from error
    return chosen


def _shares(clients: list[_Client]) -> dict[str, float]:
    """Weights over their sum. A power of two is taken out first, which is exact: their sum may overflow."""
    _, exponent = math.frexp(max(client.weight for client in clients))
    weights = {client.name: math.ldexp(client.weight, -exponent) for client in clients}
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _average_extras(clients: list[_Client], shares: dict[str, float]) -> dict[str, Tensor]:
    """Σ w·t over the clients that have t, w renormalised to them; float64 sum, the first client's dtype.

    These are whole weights (a head, biases, token rows), not updates: counting an absent one as zero would shrink it.
    """
    averages = {}
    for key in sorted({key for client in clients for key in client.adapter.extras}):
        having = [client for client in clients if key in client.adapter.extras]
        total = math.fsum(shares[client.name] for client in having)
        first = having[0].adapter.extras[key]
        mean = torch.zeros(first.shape, dtype=torch.float64)
        for client in having:
            mean += shares[client.name] / total * client.adapter.extras[key].double().cpu()
        averages[key] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
    return averages


def _average_bias(layer: str, having: list[_Client], contributions: list[Contribution]) -> Tensor | None:
    """Σ w·s·b over the clients' lora_B.bias: it is applied times the scale, so it is an update like s·B·A."""
    total = None
    for client, c in zip(having, contributions, strict=True):
        bias = client.adapter.lora_bias(layer)
        if bias is not None:
            term = c.weight * c.scale * bias.double().cpu()
            total = term if total is None else total + term
    return None if total is None else total.float()


def _to_cpu(f: Factorization) -> Factorization:
    return Factorization(f.U.cpu(), f.S.cpu(), f.V.cpu(), f.energy.cpu(), f.solver, f.iterations, f.excess)


def _record(client: _Client, share: float) -> ClientRecord:
    adapter = client.adapter
    dtype = str(adapter.factors(adapter.layers[0])[0].dtype).removeprefix("torch.")
    ranks = {layer: adapter.rank(layer) for layer in adapter.layers}
    return ClientRecord(client.name, share, adapter.config, ranks, tuple(adapter.extras), dtype)


def _template(clients: list[_Client]) -> dict[str, Any]:
    """The first client's config, widened to target every layer of the round, with every client's extras."""
    template = clients[0].adapter.config
    paths = {client.adapter.spec(layer).pattern_name for client in clients for layer in client.adapter.layers}
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        values = [client.adapter.config.get(key) for client in clients]
        if all(value == values[0] for value in values):
            continue
        if all(value is None or isinstance(value, list) for value in values):
            template[key] = sorted({item for value in values for item in value or []})
        else:  # regexes or "all-linear" beside lists: name the modules themselves
            template[key] = sorted(paths)
    if any(client.adapter.config.get("lora_bias") for client in clients):
        template["lora_bias"] = True
    if not all(configs.targets(template, path) for path in paths):  # clients chose by other rules, layer by layer
        template |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        if not all(configs.targets(template, path) for path in paths):
            template["target_modules"] = sorted(paths)
    return template
