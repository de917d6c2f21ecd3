"""The global update of a round: the certified updates of its layers, and the adapters made from them."""

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
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.factors import SPLITS, Split, check_representable, copy_as, descale
from flexlora_fast.layer import LayerUpdate
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
        """The dense update of one layer cut to ``rank`` (default: all that is kept), float32: what an adapter of that
        rank adds to the weight, with what goes into the frozen weight itself, where the method has such.

        (m, n), or (E, m, n) for MoE; with ``layout="weight"`` in the layout of the weight itself.
        """
        update = self[layer]
        base = update.base_delta()
        if update.fresh and base is not None:
            update.check_rank(update.rank if rank is None else rank)
            return _laid_out(update, base.clone(), layout)
        A, B = update.factors(update.rank if rank is None else rank, "B", self.seed)
        return _laid_out(update, B @ A if base is None else base + B @ A, layout)

    @full_precision()
    def base_delta(self, layer: str, layout: str = "matrix") -> Tensor | None:
        """What every client adds to its frozen weight of one layer after the round, (m, n) float32 ((E, m, n) for MoE;
        with ``layout="weight"`` in the layout of the weight itself). None where that is nothing: for all methods but
        those that say ``merges`` (FLoRA, FedEx-LoRA).
        """
        update = self[layer]
        base = update.base_delta()
        return None if base is None else _laid_out(update, base.clone(), layout)

    def merge_into(self, model: Any, adapter_name: str = "default") -> list[str]:
        """Add ``base_delta`` of every layer to the frozen weights of a live PEFT model. Returns the layers' names.

        Each client does so once after each round, whatever its rank and whether or not it took part, and then loads
        its new adapter (``adapter``, ``Adapter.load_into``). Layers that its adapter lacks get their part as well.
        Sums are float32, rounded once to the weight's own dtype. Nothing is written where anything does not fit.

        Raises:
            AdapterError: no PEFT model, or weights without values. IncompatibleAdapterError: a layer that the model has
            not, or of another shape. UnsupportedAdapterError: quantized weights, or weights that are tied to others.
        """
        from flexlora_fast import frozen

        return frozen.merge(self, model, adapter_name)

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
            ranks = {name: rank if update.any_rank else min(rank, update.rank) for name, update in self.items()}
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
        for layer, rank in self._given(ranks).items():
            update = self[layer]
            scale = configs.scale_for(config, update.spec.pattern_name, rank)
            if scale == 0:
                raise OptionError("alpha is 0 here, so no adapter can hold the update; give another alpha", layer=layer)
            A, B = update.factors(rank, split, self.seed, client or "")
            if not update.fresh:
                sliced = update.averaged is not None and not update.frozen
                A, B = descale(A, B, scale, "B" if update.frozen else split, sliced=sliced)
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

    def _given(self, ranks: dict[str, int]) -> dict[str, int]:
        """The ranks that adapters of these ranks get. Layers that PEFT gives one rank (those of a MultiheadAttention)
        get the larger one.
        """
        alike: dict[str, int] = {}
        for layer, rank in ranks.items():
            name = self[layer].spec.pattern_name
            alike[name] = max(alike.get(name, 0), self[layer].given(rank))
        return {layer: alike[self[layer].spec.pattern_name] if self[layer].limit else r for layer, r in ranks.items()}

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


def _laid_out(update: LayerUpdate, delta: Tensor, layout: str) -> Tensor:
    """(E, m, n) as (m, n) but for MoE, or as the weight itself is stored."""
    if layout == "weight":
        return layouts.to_weight_layout(update.spec, delta)
    if layout != "matrix":
        raise OptionError(f"layout {layout!r} is neither 'matrix' nor 'weight'")
    return delta if update.spec.kind == "moe" else delta[0]
