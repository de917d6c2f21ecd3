"""The global update of a round: certified leading triplets of every layer, and the adapters made from them."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast import layouts
from flexlora_fast.adapter import Adapter
from flexlora_fast.defence.base import Verdict
from flexlora_fast.errors import AdapterError, OptionError, RankError
from flexlora_fast.factors import SPLITS, Split, check_representable, copy_as, descale, pad, split_triplets
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.lowrank.random import stream
from flexlora_fast.precision import full_precision
from flexlora_fast.privacy import Spent

if TYPE_CHECKING:
    from flexlora_fast.report import Report


@dataclass(frozen=True)
class ClientRecord:
    """What the round knows of one accepted client, enough to make its adapter again.

    ``weight`` is its normalised share (in a private round its weight as given); ``ranks`` its rank by layer; ``extras``
    the keys of its tensors that are not low-rank pairs; ``dtype`` that of its factors.
    """

    name: str
    weight: float
    config: dict[str, Any]
    ranks: dict[str, int]
    extras: tuple[str, ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class Refusal:
    """A client that was not taken into the round, and why.

    ``code`` is that of the error (``errors``, ``gate.Reason``), and stays the same while sentences may change.
    """

    client: str
    reason: str
    code: str = ""


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW of one layer as its leading singular triplets, with their certificate.

    Attributes:
        spec: names and shapes of the layer.
        factorization: U (E, m, k), S (E, k), V (E, n, k), energy (E,); E is 1 but for MoE experts.
        total_rank: R, the sum of the clients' ranks in this layer; min(m, n) where they are secret (``secure``).
        averaged: for methods that average factors (``output = "slice"``), their B̄ (E, m, r) and Ā (E, r, n), whole:
            adapters are then their first columns instead of singular triplets.
        bias: Σ w·s·(lora_B.bias) (m,), where clients train one.
        inherited: in a merged update, a bound of ‖·‖_F of what the updates it was made of had left out of ΔW. All
            else here is of what they kept: ``norm`` is within ``inherited`` of ‖ΔW‖_F, and ``error`` has it in it.
    """

    spec: LayerSpec
    factorization: Factorization
    total_rank: int
    averaged: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    inherited: float = 0.0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def S(self) -> Tensor:
        """The kept spectrum, float64, descending: (k,), or (E, k) for the experts of a MoE layer."""
        S = self.factorization.S
        return S if self.spec.kind == "moe" else S[0]

    @property
    def rank(self) -> int:
        """k, the largest rank an adapter can be cut to."""
        return self.averaged[1].shape[1] if self.averaged and self.complete else self.factorization.S.shape[1]

    @property
    def energy(self) -> float:
        """‖ΔW‖_F² (over all experts), float64."""
        return float(self.factorization.energy.sum())

    @property
    def energy_error(self) -> float:
        """Standard error of ``energy`` where it was estimated (``certificate="estimate"``); 0 where it was computed."""
        error = self.factorization.energy_error
        return 0.0 if error is None else float(error.square().sum().sqrt())

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return self.energy**0.5

    @property
    def solver(self) -> str:
        return self.factorization.solver

    @property
    def iterations(self) -> int:
        return self.factorization.iterations

    @property
    def excess(self) -> float:
        """Estimated excess of the rank-k result; 0 where the solver is exact."""
        return self.factorization.excess

    @property
    def complete(self) -> bool:
        """Whether the triplets hold all of ΔW, so that any higher rank is as good."""
        return self.factorization.S.shape[1] >= min(self.total_rank, self.spec.m, self.spec.n)

    def error(self, rank: int) -> float:
        """‖ΔW − ΔW_rank‖_F of the adapter of that rank: √(‖ΔW‖_F² − Σ_{j≤rank} σ_j²); of a merged update with
        ``inherited`` an upper bound of it.

        Resolved down to about 1e-8·‖ΔW‖ for exact solvers and 5e-4·‖ΔW‖ for those that iterate in float32; its
        standard error is energy_error / (2·error) where the energy was estimated.
        Raises ``RankError`` beyond what is kept, unless nothing was cut off.
        """
        return self.cut_off(rank) + self.inherited

    def cut_off(self, rank: int) -> float:
        """‖·‖_F of what an adapter of that rank leaves out of what is known here: ``error`` but for ``inherited``."""
        self.check_rank(rank, lowest=0)
        if self.averaged:
            return self._slice_error(rank)
        kept = float(self.factorization.S[:, :rank].square().sum())
        return max(0.0, self.energy - kept) ** 0.5

    def energy_kept(self, rank: int) -> float:
        """The share of ‖ΔW‖_F² that an adapter of that rank holds, 0…1 (1 where ΔW is zero); of what was kept of it,
        where there is something ``inherited``.
        """
        return 1.0 - self.cut_off(rank) ** 2 / self.energy if self.energy else 1.0

    def check_rank(self, rank: int, lowest: int = 1) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise RankError(f"rank {rank!r} is no integer", layer=self.name)
        if rank < lowest:
            raise RankError(f"rank {rank} is below {lowest}", layer=self.name)
        if rank > self.rank and not self.complete:
            raise RankError(
                f"rank {rank} is more than the {self.rank} triplets this update keeps; "
                f"aggregate again with rank={rank} or more",
                layer=self.name,
            )

    def _slice_error(self, rank: int) -> float:
        """‖B̄·Ā − B̄[:, :rank]·Ā[:rank]‖_F: the norm of the columns cut off, from their Grams in float64."""
        assert self.averaged is not None
        B, A = (X.double() for X in self.averaged)
        B, A = B[:, :, rank:], A[:, rank:]
        return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0)) ** 0.5

    def factors(self, rank: int, split: Split, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A (E, rank, n) and B (E, m, rank), float32, with B·A = ΔW_rank; the scale is not in them.

        Columns beyond the rank of ΔW hold no update but stay trainable: one factor is zero, the other has unit
        rows (as LoRA's own initialisation has).
        """
        self.check_rank(rank)
        if self.averaged:
            B, A = self.averaged
            return pad(A[:, :rank], B[:, :, :rank], rank, split, stream(seed, self.name))
        A, B = split_triplets(self.factorization, rank, split)
        return pad(A, B, rank, split, stream(seed, self.name))


@dataclass(frozen=True)
class GlobalUpdate(Mapping[str, LayerUpdate]):
    """The result of a round, by layer. Made by ``aggregate`` or ``Aggregator.finish``.

    Attributes:
        layer_updates: the layers, sorted by name.
        extras: averages of what is not a low-rank pair (heads, biases, trainable tokens), by state-dict key.
        clients: the accepted clients, those that a defence rejected among them with weight 0; refused: the others.
        defence, verdicts: the rule against hostile clients in words, and what it made of each; None and empty without.
        method, seed: as given. template: the LoRA config that adapters start from.
        seconds: wall time of the parts of the round.
        privacy: what a private round cost. All that is made from its layers and extras may go out; the names, weights,
            ranks and refusals of its clients, and its wall times, which a saved file holds as well, are the server's.
        weight: the sum of the weights that its clients came with; None where it is not known. missing: as given.
    """

    layer_updates: dict[str, LayerUpdate]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    clients: list[ClientRecord] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    method: str = "flexlora"
    seed: int = 0
    template: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    defence: str | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    privacy: Spent | None = None
    weight: float | None = None
    missing: str = "zero"

    @property
    def layers(self) -> list[str]:
        """Names of all layers any client adapted, sorted."""
        return list(self.layer_updates)

    def __getitem__(self, layer: str) -> LayerUpdate:
        if layer not in self.layer_updates:
            near = difflib.get_close_matches(layer, self.layers, n=3)
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "see update.layers"
            raise AdapterError(f"this update has no layer {layer!r}; {hint}")
        return self.layer_updates[layer]

    def get(self, layer: str, default: Any = None) -> Any:
        """The layer, or ``default`` (``Mapping.get`` only knows ``KeyError``)."""
        return self.layer_updates.get(layer, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer_updates)

    def __len__(self) -> int:
        return len(self.layer_updates)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layer_updates

    @full_precision()
    def delta(self, layer: str, rank: int | None = None, layout: str = "matrix") -> Tensor:
        """The dense update of one layer cut to ``rank`` (default: all that is kept), float32.

        (m, n), or (E, m, n) for MoE; with ``layout="weight"`` in the layout of the weight itself.
        """
        update = self[layer]
        A, B = update.factors(update.rank if rank is None else rank, "B", self.seed)
        delta = B @ A
        if layout == "weight":
            return layouts.to_weight_layout(update.spec, delta)
        if layout != "matrix":
            raise OptionError(f"layout {layout!r} is neither 'matrix' nor 'weight'")
        return delta if update.spec.kind == "moe" else delta[0]

    def adapter(
        self,
        rank: int | None = None,
        *,
        config: Any = None,
        client: str | None = None,
        alpha: float | None = None,
        split: Split = "B",
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """The best adapter of a given rank: s'·B'·A' is ΔW truncated to it, layer by layer.

        Exactly one of these says which:
            rank: one rank for all layers. The rest of the config is that of the client whose name sorts first (of
                positive weight), without its patterns: its rsLoRA flag and, unless ``alpha`` is given, its
                ``lora_alpha`` as it stands, whatever rank it went with there. The scale becomes alpha/rank
                (alpha/√rank with rsLoRA), which may be no client's; the factors make up for it, and ΔW is the same.
            config: a ``peft.LoraConfig`` or its dict; its targets, ranks, alphas and patterns are honoured.
            client: a name of this round; its own layers, ranks, scale and dtype.
        With none of them: the largest rank kept, in each layer as far as it was kept there.

        Args:
            split: where the singular values go: all in B ("B", as in FlexLoRA and PEFT), √S in each ("balanced"),
                or all in A ("A").
            dtype: of the factors; default float32, or the client's own.

        Raises:
            RankError: a rank that this update does not keep.
            OptionError: contradicting arguments. AdapterError: an unknown client, or a config that targets no layer.
        """
        if sum(x is not None for x in (rank, config, client)) > 1:
            raise OptionError("give one of rank=, config= or client=, not several")
        if alpha is not None and (config is not None or client is not None):
            raise OptionError("alpha= goes with rank=; a config or client brings its own")
        if split not in SPLITS:
            raise OptionError(f"split {split!r} is not one of {', '.join(map(repr, SPLITS))}")
        if client is not None:
            record = self._client(client)
            dtype = dtype or getattr(torch, record.dtype)
            return self._build(record.config, dict(record.ranks), list(record.extras), split, dtype, client)
        if config is not None:
            config = configs.normalize(config)
            configs.refuse_unsupported(config)
            ranks = self._targeted(config)
            return self._build(config, ranks, configs.extras_for(config, self.extras), split, dtype, None)
        if rank is None:
            rank = max(update.rank for update in self.values())
            ranks = {name: rank if update.complete else min(rank, update.rank) for name, update in self.items()}
        else:
            ranks = dict.fromkeys(self.layers, rank)
            for update in self.values():
                update.check_rank(rank)
        config = {**self.template, "r": rank, "rank_pattern": {}, "alpha_pattern": {}}
        config["lora_alpha"] = config.get("lora_alpha", rank) if alpha is None else alpha
        return self._build(config, ranks, list(self.extras), split, dtype, None)

    def _client(self, name: str) -> ClientRecord:
        for record in self.clients:
            if record.name == name:
                return record
        if not self.clients:
            what = f"this update knows no clients ({self.method}); give rank= or config= of the one to be served"
            raise AdapterError(what, client=name)
        known = ", ".join(repr(record.name) for record in self.clients[:5])
        raise AdapterError(f"no such client in this round; it has {len(self.clients)}: {known} …", client=name)

    def _targeted(self, config: dict[str, Any]) -> dict[str, int]:
        """Ranks by layer of the layers that a config adapts."""
        names = {layer: update.spec.pattern_name for layer, update in self.items()}
        ranks = {
            layer: configs.rank_for(config, name) for layer, name in names.items() if configs.targets(config, name)
        }
        if not ranks:
            raise AdapterError(
                f"the config targets none of this update's layers: target_modules={config.get('target_modules')!r}, "
                f"layers {', '.join(self.layers[:3])} …"
            )
        return ranks

    @full_precision()
    def _build(
        self,
        config: dict[str, Any],
        ranks: dict[str, int],
        extras: list[str],
        split: Split,
        dtype: torch.dtype | None,
        client: str | None,
    ) -> Adapter:
        config, dtype = configs.normalize(config), dtype or torch.float32
        factors, scales, biases = {}, {}, {}
        for layer, rank in ranks.items():
            update = self[layer]
            scale = configs.scale_for(config, update.spec.pattern_name, rank)
            if scale == 0:
                raise OptionError("alpha is 0 here, so no adapter can hold the update; give another alpha", layer=layer)
            A, B = update.factors(rank, split, self.seed)
            A, B = descale(A, B, scale, split, sliced=update.averaged is not None)
            # Copies: an adapter is trained in place, and neither this update nor another adapter may see it.
            factors[layer] = (copy_as(A, dtype), copy_as(B, dtype))
            scales[layer] = scale
            named = dict(zip("AB", factors[layer], strict=True))
            if update.bias is not None and config.get("lora_bias"):
                biases[layer] = named["lora_B.bias"] = (update.bias / scale).to(factors[layer][1])
            check_representable(named, layer)
        there = next(iter(factors.values()))[0].device  # averages of heads are on the CPU, whatever the results are
        return Adapter.from_factors(
            factors,
            {layer: self[layer].spec for layer in ranks},
            scales,
            config,
            client=client,
            lora_bias=biases,
            extras={key: self.extras[key].to(there, copy=True) for key in extras if key in self.extras},
        )

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file (``load`` reads it back bit for bit). Returns the path."""
        from flexlora_fast import storage

        return storage.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> GlobalUpdate:
        """Read what ``save`` wrote; singular vectors and extras are read from the file, which stays open, when they are
        used. Raises ``AdapterError`` for a file that is none.
        """
        from flexlora_fast import storage

        return storage.load(Path(path))

    def report(self) -> Report:
        """Tables, plots and JSON of this round."""
        from flexlora_fast.report import Report

        return Report(self)

    @property
    def norm(self) -> float:
        """√(Σ‖ΔW‖_F²) over all layers."""
        return self._energy**0.5

    @property
    def _energy(self) -> float:
        return math.fsum(update.energy for update in self.values())

    def energy_kept(self, rank: int) -> float:
        """The share of Σ‖ΔW‖_F² over all layers that ``adapter(rank=rank)`` holds, at most 1 (1 where all are zero).

        Methods that hand out slices of averaged factors can have less than 0: what is cut off then cancelled.
        Raises ``RankError``, as ``LayerUpdate.error`` and ``adapter`` do, for a rank beyond what one of the layers
        keeps, unless nothing was cut off there: what such a layer would hold is not known.
        """
        lost = math.fsum(update.cut_off(rank) ** 2 for update in self.values())
        return 1.0 - lost / self._energy if self._energy else 1.0

    def solvers(self) -> Counter[str]:
        """How many layers each solver took."""
        return Counter(update.solver for update in self.values())
