"""What one adapter is: layers, ranks, scales, norms and spectrum, for people and for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexlora_fast import tables
from flexlora_fast.adapter import Adapter
from flexlora_fast.oneshot import aggregate
from flexlora_fast.report import LISTED, Report, grouped, shape
from flexlora_fast.skeleton import Form
from flexlora_fast.tables import number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from flexlora_fast.update import GlobalUpdate

FORMAT = "flexlora_fast.inspection/1"
_SHOWN = 2  # singular values in a table
_CONFIG = (
    "base_model_name_or_path",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "lora_bias",
)


class Inspection:
    """An adapter seen through the exact solver: a round of one client, so that ΔW is its own s·B·A.

    Raises ``AdapterError`` for NaN, infinities and updates beyond float32.
    """

    def __init__(self, adapter: Adapter, progress: bool | None = None) -> None:
        self.adapter = adapter
        self.update: GlobalUpdate = aggregate([adapter], tol=0, progress=progress)
        self.report = Report(self.update)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer: layer, kind, m, n, experts, rank, scale, dtype, norm (‖s·B·A‖_F), spectrum (list of σ,
        one list per expert for MoE), effective_rank, stable_rank, solver.
        """
        rows = []
        for row in self.report.rows:
            layer = row["layer"]
            rows.append(
                {key: row[key] for key in ("layer", "kind", "m", "n", "experts")}
                | {
                    "rank": self.adapter.rank(layer),
                    "scale": self.adapter.scale(layer),
                    "dtype": _name(self._form(self.adapter.spec(layer).a_key).dtype),
                }
                | {key: row[key] for key in ("norm", "effective_rank", "stable_rank", "solver")}
                | {"spectrum": self.update[layer].S.tolist()}
            )
        return rows

    @property
    def config(self) -> dict[str, Any]:
        """The settings that decide what the tensors mean."""
        config = self.adapter.config
        return {key: config[key] for key in _CONFIG if config.get(key) not in (None, {}, [], "")}

    @property
    def extras(self) -> list[dict[str, Any]]:
        """What is not a low-rank pair: key, shape, dtype."""
        return [
            {"key": key, "shape": list(self._form(key).shape), "dtype": _name(self._form(key).dtype)}
            for key in self.adapter.extras
        ]

    def _form(self, key: str) -> Form:
        return self.adapter.skeleton.forms[key]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "format": FORMAT,
            "client": self.adapter.client,
            "config": self.config,
            "norm": self.report.total["norm"],
            "layers": self.rows,
            "extras": self.extras,
        }

    def view(self, full: bool | None = None) -> RenderableType:
        """What rich prints. ``full`` lists every layer (default: up to 40; above, one line per module)."""
        from rich.console import Group
        from rich.text import Text

        rows = self.rows
        head = f"{self.adapter!r}; ‖ΔW‖_F {number(self.report.total['norm'])} in all"
        parts = [self._config_table()]
        parts.append(_layer_table(rows) if full or (len(rows) <= LISTED and full is None) else _group_table(rows))
        if self.extras:
            cells = [[x["key"], "×".join(map(str, x["shape"])), x["dtype"]] for x in self.extras]
            parts.append(tables.table("Averaged whole", ["tensor", "shape", "dtype"], cells, left=["tensor", "dtype"]))
        return Group(Text(tables.clean(head)), Text(), *parts)

    def _config_table(self) -> Table:
        def words(value: Any) -> str:
            if isinstance(value, list):
                return ", ".join(map(str, value))
            if isinstance(value, dict) and len(value) > 6:
                return f"{len(value)} entries, such as {dict(list(value.items())[:2])}"
            return str(value)

        cells = [[key, words(value)] for key, value in self.config.items()]
        return tables.table("Config", ["setting", "value"], cells, left=["setting", "value"])


def _layer_table(rows: list[dict[str, Any]]) -> Table:
    columns = ["layer", "kind", "m×n", "r", "scale", "dtype", "‖ΔW‖_F"]
    columns += [f"σ{j + 1}" for j in range(_SHOWN)] + ["last σ", "eff. rank"]
    experts = any(row["kind"] == "moe" for row in rows)
    return tables.table(
        "Layers (σ of the expert with the largest σ1)" if experts else "Layers",
        columns,
        [
            [
                row["layer"],
                row["kind"],
                shape(row),
                row["rank"],
                number(row["scale"]),
                row["dtype"],
                number(row["norm"]),
                *_values(row),
                number(row["effective_rank"]),
            ]
            for row in rows
        ],
        left=["layer", "kind", "dtype"],
        implied={"kind": "linear", "dtype": "float32"},
    )


def _values(row: dict[str, Any]) -> list[str]:
    spectrum = row["spectrum"]
    if row["kind"] == "moe":
        spectrum = max(spectrum, key=lambda values: values[:1])
    first = [number(spectrum[j] if j < len(spectrum) else None) for j in range(_SHOWN)]
    return [*first, number(spectrum[-1] if spectrum else None)]


def _group_table(rows: list[dict[str, Any]]) -> Table:
    def span(values: list[float]) -> str:
        low, high = min(values), max(values)
        return number(low) if low == high else f"{number(low)}…{number(high)}"

    lines = []
    for name, members in grouped(rows).items():
        shapes = list(dict.fromkeys(shape(row) for row in members))
        numbers = [span([row[key] for row in members]) for key in ("rank", "scale", "norm", "effective_rank")]
        lines.append([name, len(members), shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes", *numbers])
    columns = ["module", "layers", "m×n", "r", "scale", "‖ΔW‖_F", "eff. rank"]
    return tables.table("Layers by module (--full lists each)", columns, lines, left=["module"])


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
