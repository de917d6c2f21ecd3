"""Does the planner choose well? Every solver in its reach timed beside the chosen one, and the regret.

Regret is the chosen solver's time over the fastest one's that keeps the promise (excess ≤ tol).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from torch import Tensor

from benchmarks.fresh import Fresh, OverLimit
from benchmarks.layers import alternate, repeats_for
from benchmarks.truth import Residual
from benchmarks.workloads import AnyWorkload, Workload, paper_ranks, stack_of
from flexlora_fast.lowrank import plan
from flexlora_fast.lowrank.solve import solve

TOL = 1e-3
# Solvers predicted to be this many times slower than the chosen one are not run.
REACH = 6.0
# A solver's first run is ended after this many times the chosen one's, plus what starting costs.
_PATIENCE = 20.0
_START = 2.0
# Seconds of a run that a warm-up would not shorten.
_LONG = 1.0

# Beside the layer workloads: shapes between them, where the solvers' ranges meet.
BETWEEN = (
    Workload("small", 384, 384, (2, 2, 4, 4, 8, 8, 16, 32), 32),
    Workload("small ffn", 1536, 384, (8,) * 20, 8),
    Workload("base", 768, 3072, (16,) * 40, 16),
    Workload("tall", 5632, 2048, (4, 8, 16, 32, 64) * 3, 64),
    Workload("many", 2048, 2048, (16,) * 60, 16),
    Workload("many, larger k", 2048, 2048, (16,) * 60, 64),
    Workload("paper, flat", 2048, 2048, paper_ranks(), 200, "flat"),
)


@dataclass
class Regret:
    """What was found on one workload; seconds are medians, ``over`` says why a solver in reach has none."""

    workload: str
    chosen: str
    predicted: dict[str, float]
    measured: dict[str, float] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    over: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The fastest solver that keeps the promise, or the chosen one where none does."""
        kept = {name: seconds for name, seconds in self.measured.items() if self.excess[name] <= TOL}
        return min(kept, key=kept.__getitem__, default=self.chosen)

    @property
    def value(self) -> float:
        return self.measured[self.chosen] / self.measured[self.best]

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"best": self.best, "regret": self.value}


def prepare(workload: AnyWorkload, solver: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """A solver's call in another process: B', A' with all of S in B'."""
    clients = workload.clients()

    def call() -> tuple[Tensor, Tensor]:
        f = solve(stack_of(clients), workload.k, solver=solver, tol=TOL)
        return f.U[0] * f.S[0].float(), f.V[0].T

    return call


def excess_of(rest: dict[str, float], energy: float) -> dict[str, float]:
    """Each solver's excess from the ‖ΔW − BA‖_F² it leaves, against the one that leaves least."""
    best = min(rest.values())
    if best <= 1e-13 * energy:  # nothing is left out but rounding
        return {name: (r / energy) ** 0.5 for name, r in rest.items()}
    return {name: (r / best) ** 0.5 - 1 for name, r in rest.items()}


def regret(workload: AnyWorkload, turns: int, pause: float) -> Regret:
    """Time the chosen solver and those in its reach, in alternation."""
    shape = plan.Shape(workload.m, workload.n, workload.R, workload.k, TOL)
    predicted, chosen = plan.seconds(shape, plan.default_constants()), plan.choose(shape)
    found = Regret(workload.name, chosen, predicted)
    reach = [name for name in predicted if name != chosen and predicted[name] < REACH * predicted[chosen]]
    first, rest = {}, {}
    clients = workload.clients()
    residual = Residual(clients)
    with Fresh() as process:
        for name in (chosen, *reach):
            process.prepare(prepare, workload, name)
            limit = None if name == chosen else _START + _PATIENCE * first[chosen]
            try:
                outcome = process.run(limit)
            except OverLimit:
                found.over[name] = f"more than {limit:.1f} s"
                continue
            first[name] = outcome.seconds
            rest[name] = residual.of(*outcome.value)
    found.excess = excess_of(rest, residual.energy)
    del residual

    def call(name: str) -> None:
        solve(stack_of(clients), workload.k, solver=name, tol=TOL)

    calls = {name: (lambda name=name: call(name)) for name in first}
    for name, warm_up in calls.items():
        if first[name] < _LONG:
            warm_up()
    found.measured = first | alternate(calls, {name: repeats_for(first[name], turns) for name in calls}, pause)
    return found
