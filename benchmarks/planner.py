"""Does the planner choose well? ``python -m benchmarks.planner``: every solver on a grid of shapes, and the regret.

Regret is the chosen solver's time over the fastest one's that keeps the promise (excess ≤ 1e-3, or exact).
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.compare import time_alternating
from benchmarks.synthetic import Round, Truth, paper_ranks, stack_of
from flexlora_fast.lowrank import plan
from flexlora_fast.lowrank.solve import solve

GRID = [
    Round("small", 384, 384, (2, 2, 4, 4, 8, 8, 16, 32), 32),
    Round("small ffn", 1536, 384, (8,) * 20, 8),
    Round("base", 768, 3072, (16,) * 40, 16),
    Round("silo", 2048, 2048, (4, 8, 16, 32, 64) * 2, 64),
    Round("silo, tall", 5632, 2048, (4, 8, 16, 32, 64) * 3, 64),
    Round("many", 2048, 2048, (16,) * 60, 16),
    Round("many, wide k", 2048, 2048, (16,) * 60, 64),
    Round("paper", 2048, 2048, paper_ranks(), 200),
    Round("paper, flat", 2048, 2048, paper_ranks(), 200, "flat"),
    Round("paper, tall", 5632, 2048, paper_ranks(40), 200),
]
# Solvers predicted to be this many times slower than the chosen one are not run.
_HOPELESS = 12


def main() -> None:
    console = Console()
    table = Table(title="planner: predicted / measured milliseconds, chosen in bold")
    for column in ("layer", "R", "k", *plan.SOLVERS, "regret"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    worst = 1.0
    for round_ in GRID:
        clients = round_.factors()
        shape = plan.Shape(round_.m, round_.n, sum(round_.ranks), round_.k)
        predicted, chosen = plan.seconds(shape, plan.default_constants()), plan.choose(shape)
        names = [name for name in plan.SOLVERS if predicted[name] < _HOPELESS * predicted[chosen]]
        measured = time_alternating(
            {s: (lambda s=s, c=clients, k=round_.k: solve(stack_of(c), k, solver=s)) for s in names}, 3
        )
        truth, kept = Truth(clients), {}
        for name in names:
            f = solve(stack_of(clients), round_.k, solver=name)
            kept[name] = truth.excess((f.U[0] * f.S[0].float()) @ f.V[0].T, round_.k) <= 1e-3
        regret = measured[chosen] / min(seconds for name, seconds in measured.items() if kept[name])
        worst = max(worst, regret)
        cells = []
        for name in plan.SOLVERS:
            text = f"{predicted[name] * 1e3:.0f} / {measured[name] * 1e3:.0f}" if name in names else "–"
            text += "" if kept.get(name, True) else " ✗"
            cells.append(f"[bold]{text}[/]" if name == chosen else text)
        table.add_row(f"{round_.name} {round_.m}×{round_.n}", str(shape.R), str(shape.k), *cells, f"{regret:.2f}")
    console.print(table)
    console.print(f"worst regret {worst:.2f}")


if __name__ == "__main__":
    main()
