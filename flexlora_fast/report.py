"""What a round did, layer by layer: rows for machines, tables and plots for people."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora_fast import tables
from flexlora_fast.tables import count, natural, number, percent, span, spread
from flexlora_fast.verdicts import refusal_table, tally, verdict_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from flexlora_fast.update import GlobalUpdate, LayerUpdate

FORMAT = "flexlora_fast.report/1"
# Up to so many layers a table lists each; above, it summarises. A screen has about 50 lines.
LISTED = 40
_WORST = 8  # layers shown by name in a summary
_RANK_COLUMNS = 6  # more would not fit beside the rest in 160 characters


class Report:
    """Tables, plots and JSON of one :class:`~flexlora_fast.GlobalUpdate`; printing it shows the tables.

    Of a private round it says what it cost, and nothing of who came: no clients, no refusals, no wall times.

    Args:
        update: the round.
        ranks: the ranks of interest, at which errors and energies are given (default: every rank that a client
            of the round has, or the ranks kept where it knows no clients).

    >>> import torch, flexlora_fast as ff
    >>> state = {"base_model.model.fc.lora_A.weight": torch.eye(2, 3),
    ...          "base_model.model.fc.lora_B.weight": torch.tensor([[3., 0.], [0., 4.]])}
    >>> update = ff.aggregate([ff.Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 2})])
    >>> report = Report(update, ranks=[1, 2])
    >>> report.rows[0]["norm"], report.rows[0]["error"], report.rows[0]["energy_kept"]
    (5.0, {1: 3.0, 2: 0.0}, {1: 0.64, 2: 1.0})
    """

    def __init__(self, update: GlobalUpdate, ranks: Iterable[int] | None = None) -> None:
        self.update = update
        sent = {rank for client in update.clients for rank in client.ranks.values()}
        kept = {layer.rank for layer in update.values()}
        self.private = update.privacy is not None
        if self.private:
            sent = set()
        self.ranks: list[int] = sorted(set(ranks) if ranks is not None else sent or kept)
        self.layers: list[str] = sorted(update.layers, key=natural)
        self.refused = [] if self.private else list(update.refused)

    # -- for machines ---

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer, in the order of the model (layers.2 before layers.10).

        layer, kind, m, n, experts; clients: how many adapt it (None where that is a secret); clients_rank_total: R (in
        a private round min(m, n), of the noise); kept_rank: k; norm: ‖ΔW‖_F; stable_rank: ‖ΔW‖_F²/σ_1², for MoE the
        mean over experts; effective_rank: see :func:`effective_rank`, None where the spectrum was cut;
        error: ‖ΔW − ΔW_r‖_F and energy_kept: its share of ‖ΔW‖_F², each by rank of interest, None beyond what is
        kept; solver, iterations, excess: how it was solved, with the estimated excess at rank k (0: exact);
        energy_error: the standard error of ‖ΔW‖_F² where it was estimated (0: computed); inherited: the part of error
        that a merged update has from those it was made of; base_error: the part of it that was cut off from what
        goes into frozen weights; limit: the most columns that an adapter gets (None: as many as asked for).
        Methods that hand out slices of averaged factors can have energy_kept < 0: what is cut off then cancelled.
        """
        return [self._row(self.update[layer]) for layer in self.layers]

    def _row(self, layer: LayerUpdate) -> dict[str, Any]:
        curve = energy_curve(layer)
        energy = {rank: _at(curve, rank, layer.any_rank) for rank in self.ranks}
        spec, spectrum = layer.spec, layer.factorization.S  # (E, k)
        return {
            "layer": layer.name,
            "kind": spec.kind,
            "m": spec.m,
            "n": spec.n,
            "experts": spec.experts,
            "clients": None if self.private else sum(layer.name in client.ranks for client in self.update.clients),
            "clients_rank_total": layer.total_rank,
            "kept_rank": layer.rank,
            "norm": layer.norm,
            "stable_rank": stable_rank(layer.factorization.energy, spectrum),
            "effective_rank": effective_rank(spectrum) if layer.complete else None,
            "error": {rank: None if energy[rank] is None else layer.error(rank) for rank in self.ranks},
            "energy_kept": energy,
            "solver": layer.solver,
            "iterations": layer.iterations,
            "excess": _finite(layer.excess),
            "energy_error": layer.energy_error,
            "inherited": layer.inherited,
            "base_error": layer.base_error,
            "limit": layer.limit,
        }

    @cached_property
    def clients(self) -> list[dict[str, Any]]:
        """One dict per accepted client: name, weight (normalised share), layers (their number), ranks (distinct,
        sorted), r, lora_alpha, use_rslora, dtype.
        """
        return [
            {
                "name": client.name,
                "weight": client.weight,
                "layers": len(client.ranks),
                "ranks": sorted(set(client.ranks.values())),
                "r": client.config.get("r"),
                "lora_alpha": client.config.get("lora_alpha"),
                "use_rslora": bool(client.config.get("use_rslora")),
                "dtype": client.dtype,
            }
            for client in ([] if self.private else self.update.clients)
        ]

    @cached_property
    def total(self) -> dict[str, Any]:
        """Over all layers: norm, and the share of energy kept at each rank (None where one layer keeps less)."""
        energy = math.fsum(row["norm"] ** 2 for row in self.rows)
        shares: dict[int, float | None] = {}
        for rank in self.ranks:
            known = all(row["error"][rank] is not None for row in self.rows)
            shares[rank] = self.update.energy_kept(rank) if known else None
        return {"norm": energy**0.5, "energy_kept": shares}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values: finite numbers, ranks as string keys, None for what is not known."""
        return _jsonable(
            {
                "format": FORMAT,
                "method": self.update.method,
                "seed": self.update.seed,
                "seconds": {} if self.private else self.update.seconds,
                "ranks": self.ranks,
                "total": self.total,
                "layers": self.rows,
                "clients": self.clients,
                "refused": [{"client": r.client, "reason": r.reason, "code": r.code} for r in self.refused],
                "defence": self.update.defence,
                "verdicts": [dataclasses.asdict(verdict) for verdict in self.update.verdicts],
                "extras": sorted(self.update.extras),
                "privacy": None if self.update.privacy is None else dataclasses.asdict(self.update.privacy),
            }
        )

    # -- for people ---

    def tables(self, full: bool | None = None) -> list[Table]:
        """rich tables: the layers, the clients, the defence's verdicts and the refused. ``full`` lists every layer
        (default: up to 40; above, they are summarised by module, with the worst ones by name).
        """
        if full or (full is None and len(self.rows) <= LISTED):
            result = [self._layer_table("Layers", self.rows)]
        else:
            result = [self._group_table(), self._layer_table(self._worst_title(), self._worst())]
        if self.clients:
            result.append(self._client_table(full))
        if self.update.verdicts:
            result.append(verdict_table(self.update.defence, self.update.verdicts, None if full else LISTED))
        if self.refused:
            result.append(refusal_table(self.refused))
        return result

    def summary(self) -> str:
        """One line on the whole round."""
        solvers = ", ".join(f"{name} {count}" for name, count in sorted(self.update.solvers().items()))
        worst = max((row["excess"] or 0.0 for row in self.rows), default=0.0)
        excess = f"excess up to {number(worst)}" if worst else "exact"
        if any(row["excess"] is None for row in self.rows):  # not known, or infinite
            excess = "excess not known"
        clients = f", {count(len(self.clients), 'client')}" if self.clients else ""  # sums name nobody
        clients = ", private" if self.private else clients
        kept = ", ".join(f"{percent(share)} at rank {rank}" for rank, share in self._columns(self.total["energy_kept"]))
        refused = f" ({len(self.refused)} refused)" if self.refused else ""
        left_out = math.fsum(row["inherited"] ** 2 for row in self.rows) ** 0.5
        base = (
            "; clients add a part to their frozen weights"
            if any(layer.merges for layer in self.update.values())
            else ""
        )
        merged = f" of what the merged updates kept, which left out up to {number(left_out)}" if left_out else ""
        defended = f"; defence {self.update.defence}{tally(self.update.verdicts)}" if self.update.defence else ""
        private = "" if self.update.privacy is None else f"; {self.update.privacy}"
        return (
            f"{count(len(self.rows), 'layer')}{clients}{refused}; "
            f"method {self.update.method}{defended}; solved by {solvers or 'none'} "
            f"({excess}); "
            f"‖ΔW‖_F {number(self.total['norm'])} in all{merged}; energy kept: {kept or '–'}{base}{private}"
        )

    def view(self, full: bool | None = None) -> RenderableType:
        """What rich prints: the summary line and the tables."""
        from rich.console import Group
        from rich.text import Text

        return Group(Text(tables.clean(self.summary())), Text(), *self.tables(full))

    def __rich__(self) -> RenderableType:
        return self.view()

    def __str__(self) -> str:
        return tables.plain(self.view())

    def markdown(self) -> str:
        """The same as a Markdown document that lists every layer."""
        groups = [self._group_table()] if len(self.rows) > LISTED else []
        return f"# Round\n\n{tables.clean(self.summary())}\n\n{tables.markdown([*groups, *self.tables(full=True)])}"

    def plot_energy(self, path: str | Path) -> Path:
        """Energy kept by layer and rank, as an image (the suffix says which kind). Returns the path."""
        from flexlora_fast import plots

        return plots.save(plots.energy(self), path)

    def plot_spectrum(self, path: str | Path) -> Path:
        """Singular values by layer, as an image. Returns the path."""
        from flexlora_fast import plots

        return plots.save(plots.spectrum(self), path)

    def _columns(self, by_rank: dict[int, Any]) -> list[tuple[int, Any]]:
        """As many ranks as fit a table, spread over all of them."""
        return [(rank, by_rank[rank]) for rank in spread(self.ranks, _RANK_COLUMNS)]

    def _layer_table(self, title: str, rows: Sequence[dict[str, Any]]) -> Table:
        ranks = [rank for rank, _ in self._columns(self.total["energy_kept"])]
        return tables.table(
            f"{title} (energy kept at each rank)",
            ["layer", "kind", "m×n", "R", "kept", "‖ΔW‖_F", *(f"r={rank}" for rank in ranks), "solver", "excess"],
            [
                [
                    row["layer"],
                    row["kind"],
                    shape(row),
                    row["clients_rank_total"],
                    row["kept_rank"],
                    number(row["norm"]),
                    *(percent(row["energy_kept"][rank]) for rank in ranks),
                    f"{row['solver']} ({row['iterations']})" if row["iterations"] else row["solver"],
                    "exact" if row["excess"] == 0 else number(row["excess"]),
                ]
                for row in rows
            ],
            left=["layer", "kind", "solver"],
            implied={"kind": "linear", "excess": "exact", "solver": self._one_solver()},
        )

    def _one_solver(self) -> str:
        """The solver of all layers, which the summary line names already; empty if there are several."""
        solvers = self.update.solvers()
        return next(iter(solvers)) if len(solvers) == 1 else ""

    def _group_table(self) -> Table:
        ranks = [rank for rank, _ in self._columns(self.total["energy_kept"])]
        lines = []
        for name, rows in grouped(self.rows).items():
            norms = [row["norm"] for row in rows]
            solvers = Counter(row["solver"] for row in rows)
            lines.append(
                [
                    name,
                    len(rows),
                    span(shape(row) for row in rows),
                    span(row["clients_rank_total"] for row in rows),
                    span(row["kept_rank"] for row in rows),
                    f"{number(min(norms))}…{number(max(norms))}",
                    *(_mean_and_min([row["energy_kept"][rank] for row in rows]) for rank in ranks),
                    ", ".join(f"{solver} {count}" for solver, count in sorted(solvers.items()))
                    if len(solvers) > 1
                    else next(iter(solvers)),
                ]
            )
        return tables.table(
            "Layers by module (energy kept at each rank: mean, and the worst layer's)",
            ["module", "layers", "m×n", "R", "kept", "‖ΔW‖_F", *(f"r={rank}" for rank in ranks), "solver"],
            lines,
            left=["module", "solver"],
            implied={"solver": self._one_solver()},
        )

    def _worst(self) -> list[dict[str, Any]]:
        """The layers that lose most at the smallest rank that all of them keep."""
        ranks = [rank for rank in self.ranks if self.total["energy_kept"][rank] is not None]
        return sorted(self.rows, key=lambda row: row["energy_kept"][ranks[0]])[:_WORST] if ranks else []

    def _worst_title(self) -> str:
        return f"The {len(self._worst())} layers that keep least, of {len(self.rows)}"

    def _client_table(self, full: bool | None) -> Table:
        shown = self.clients if full or len(self.clients) <= LISTED else self.clients[:LISTED]
        more = f" (the first {len(shown)} of {len(self.clients)})" if len(shown) < len(self.clients) else ""
        return tables.table(
            f"Clients{more}",
            ["client", "share", "layers", "ranks", "alpha", "dtype"],
            [
                [
                    client["name"],
                    percent(client["weight"]),
                    client["layers"],
                    span(client["ranks"]),
                    f"{number(client['lora_alpha'])}{' rs' if client['use_rslora'] else ''}",
                    client["dtype"],
                ]
                for client in shown
            ],
            left=["client", "dtype"],
        )


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of σ/Σσ, from 1 (one direction) to k (all equal); the mean over experts; 0 for ΔW = 0.

    ``spectrum``: (E, k) or (k,), σ ≥ 0. Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007).

    >>> round(effective_rank(torch.tensor([1., 1., 0.])), 6)
    2.0
    """
    spectrum = spectrum.double()
    share = spectrum / spectrum.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    ranks = torch.special.entr(share).sum(dim=-1).exp() * (share.sum(dim=-1) > 0)
    return float(ranks.mean())


def stable_rank(energy: Tensor, spectrum: Tensor) -> float:
    """‖ΔW‖_F²/σ_1², the mean over experts; 0 for ΔW = 0. ``energy`` (E,), ``spectrum`` (E, k) descending."""
    if not spectrum.shape[-1]:
        return 0.0
    top = spectrum[:, 0].double().square()
    return float(torch.where(top > 0, energy.double() / top.clamp_min(torch.finfo(torch.float64).tiny), 0.0).mean())


def energy_curve(layer: LayerUpdate) -> Tensor:
    """The share of energy that an adapter of rank 0, 1, … keeps: (k+1,) float64, as ``energy_kept`` gives it."""
    if not layer.energy or layer.fresh:
        return torch.ones(layer.rank + 1, dtype=torch.float64)
    if layer.averaged:
        # All slices at once: error² at rank r is the sum of the Gram's block [r:, r:].
        B, A = (X.double() for X in layer.averaged)
        gram = ((B.mT @ B) * (A @ A.mT)).sum(dim=0)
        lost = gram.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal().clamp_min(0)
        return 1 - torch.cat([lost, lost.new_zeros(1)]) / layer.energy
    kept = torch.nn.functional.pad(layer.factorization.S.square().sum(dim=0).cumsum(0), (1, 0))
    return (kept / layer.energy).clamp_max(1.0)


def _at(curve: Tensor, rank: int, any_rank: bool) -> float | None:
    """Energy kept at a rank; None beyond what is kept."""
    if rank < curve.numel():
        return float(curve[rank])
    return float(curve[-1]) if any_rank else None


def grouped(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by module: the same path but for block numbers (``layers.*.q_proj``), or by kind and shape where that
    would leave nearly as many groups as layers.
    """
    by_module: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_module.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", row["layer"]), []).append(row)
    if len(by_module) <= max(20, len(rows) // 8):
        return by_module
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_shape.setdefault(f"{row['kind']} {shape(row)}", []).append(row)
    return by_shape


def shape(row: dict[str, Any]) -> str:
    """``m×n``, with the number of experts in front where there are several."""
    return f"{row['experts']}×{row['m']}×{row['n']}" if row["kind"] == "moe" else f"{row['m']}×{row['n']}"


def _mean_and_min(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{percent(sum(known) / len(known))} ({percent(min(known))})" if len(known) == len(shares) else "–"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return _finite(value) if isinstance(value, float) else value
