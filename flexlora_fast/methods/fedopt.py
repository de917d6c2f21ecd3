"""Server optimizers on the update in factored form: FedAvgM and FedAdam over rounds of any ranks.

Sources: FedAvgM is Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification" (arXiv 1909.06335); FedAdam is Reddi et al., "Adaptive Federated Optimization" (arXiv 2003.00295),
algorithm 2. With X_t what clients started from, and Δ_t = (the round's update) − X_t in the place of a gradient, both
are sums of low-rank updates, X_{t+1} = X_t + η·M_t: they are formed by stacking factors, and cut back to ``rank`` by
the solvers, with a certificate. Nothing dense is formed. X_t is all of the update: what truncation to their ranks keeps
from small clients is missing in what they send back, enters Δ_t, and momentum carries it on. Where most clients are
small, take less momentum, or none, and the step is the round's update itself.

Adam divides entry by entry by √v, and such a quotient has no factored form. FedAdam here has one second moment for
each layer, v ← β₂·v + (1−β₂)·‖Δ‖_F²/(m·n), as NovoGrad does (Ginsburg et al., arXiv 1905.11286): r×r work, and the
same for (B·M, M⁻¹·A) as for (B, A). Heads and other tensors that are no low-rank pairs have the ordinary rule, entry by
entry; the bias of a B goes with its layer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from flexlora_fast import devices, extras, files, finishing
from flexlora_fast.combining import How, Term, check, combined, energy, parts_of, specs_of
from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.precision import full_precision
from flexlora_fast.tensorfile import TensorFile
from flexlora_fast.update import GlobalUpdate

FORMAT = "flexlora_fast.server_optimizer/1"
STATE = "optimizer.json"


class ServerOptimizer:
    """What FedAvgM and FedAdam share: M_t = decay·M_{t-1} + gain·Δ_t, and X_{t+1} = X_t + η_t·M_t.

    The state is what was kept: ``update[layer].error(rank)`` of a step bounds ‖·‖_F of its distance to the exact step
    from the state as it is, with what the round's update had left out in it; ``recompression`` says what was cut off
    from M. A layer (or head) that nobody of the round has, has Δ = 0. What ``step`` raises leaves the state as it was.

    Attributes:
        momentum: M by layer, an update of rank ``rank``; None before the first step, and without momentum.
        steps: how many were taken.
    """

    name: ClassVar[str]
    decay: float
    gain: float

    def __init__(
        self, lr: float, rank: int | None, solver: str, tol: float, seed: int, device: str | torch.device | None
    ) -> None:
        self.lr = number("lr", lr, above=0.0)
        self._how = How(rank, solver, tol, seed, devices.usable(device))
        self.momentum: GlobalUpdate | None = None
        self.steps = 0
        self._first: dict[str, Tensor] = {}  # of heads, float64
        self._second: dict[str, float | Tensor] = {}  # by layer, and of heads, float64

    @full_precision()
    def step(self, previous: GlobalUpdate | None, update: GlobalUpdate) -> GlobalUpdate:
        """X_{t+1}, with the clients of the round, whose adapters it hands out as ``update`` would.

        Args:
            previous: X_t, what this round's clients started from: the last step's result (in the first round None,
                for X_0 = 0; heads then take the round's average as it is).
            update: of this round, with adapters that stand for all that changed so far, as they do after every method
                but those that merge into the frozen weight.

        Raises:
            OptionError: no ``previous`` after the first step, or updates that go into the frozen weight or freeze A.
            IncompatibleAdapterError: updates of other base models, layers or shapes.
        """
        self._check(previous, update)
        change = [Term("the round's update", _layers(update), lambda _: self.gain)]
        if previous is not None:
            change.append(
                Term("the last step's", _layers(previous), lambda x: -self.gain if x in update else 0.0, state=True)
            )
        kept = [] if self.momentum is None else [Term("the momentum", self.momentum, lambda _: self.decay, state=True)]
        check([*change, *kept])
        second = self._squares(change, update)
        rates = {layer: self._rate(second.get(layer)) for layer in specs_of([*change, *kept])}
        moved = [_scaled(term, rates) for term in (*change, *kept)]
        if previous is not None:  # in one term with what Δ has of it, so that nothing is left where they cancel
            gain = self.gain
            moved[1] = dataclasses.replace(moved[1], of=lambda x: 1.0 - gain * rates[x] if x in update else 1.0)
        result = combined(moved, self._how)
        momentum = combined([*change, *kept], self._how) if self.decay > 0 else None
        heads, first = self._heads(previous, update, second)
        self.momentum, self._first, self._second, self.steps = momentum, first, second, self.steps + 1
        return _framed(result, heads, previous, update, self.name)

    @property
    def recompression(self) -> dict[str, float]:
        """By layer, ‖·‖_F of what the last step cut off from M."""
        return {} if self.momentum is None else {name: x.cut_off(x.rank) for name, x in self.momentum.items()}

    # -- the rule ---

    def _settings(self) -> dict[str, float]:
        """Of the rule, by the names of its arguments."""
        raise NotImplementedError(f"{type(self).__name__} must implement _settings()")

    def _squares(self, change: list[Term], update: GlobalUpdate) -> dict[str, Any]:
        """The second moments after this step's Δ; of heads those before it. Empty for a rule that has none."""
        return {}

    def _squared(self, before: float | Tensor | None, square: float | Tensor) -> float | Tensor | None:
        """The second moment after Δ² (or its mean); None for a rule that has none."""
        return None

    def _rate(self, second: float | Tensor | None) -> Any:
        """η by the second moment (Tensor for Tensor); the lr where there is none."""
        return self.lr

    def _heads(
        self, previous: GlobalUpdate | None, update: GlobalUpdate, second: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """X and M of what is no low-rank pair; their second moments go into ``second``."""
        before = {} if previous is None else previous.extras
        heads, first = {}, dict(self._first)
        for key in sorted({*before, *update.extras}):
            mean = update.extras[key] if key in update.extras else before[key]
            if key not in before or not mean.is_floating_point():
                heads[key] = mean  # nothing to compare it with, or whole numbers, which have no momentum
                continue
            x, g = before[key].double(), mean.double()
            if x.shape != g.shape:
                what = f"tensor {key!r} has shape {tuple(g.shape)}, that of the last step {tuple(x.shape)}"
                raise AdapterError(f"{what}; give step() what the clients of this round started from")
            m = self._first.get(key, torch.zeros_like(x))
            squares = self._squared(second.get(key), (g - x).square())
            if squares is not None:
                second[key] = squares
            rate = self._rate(squares)
            heads[key] = extras.cast(
                (1 - rate * self.gain) * x + rate * self.gain * g + rate * self.decay * m, mean.dtype
            )
            if self.decay > 0:
                first[key] = self.decay * m + self.gain * (g - x)
        return heads, first

    def _check(self, previous: GlobalUpdate | None, update: GlobalUpdate) -> None:
        if previous is None and self.steps:
            raise OptionError(f"this is step {self.steps + 1}; give previous=, what the clients of it started from")
        for given in (update, previous):
            if given is not None and any(layer.frozen or layer.merges for layer in given.values()):
                raise OptionError(
                    f"updates of method {given.method!r} freeze A or go into the frozen weight, so that adapters do "
                    "not stand for all that changed; use server optimizers with 'flexlora' or 'fedit'"
                )

    # -- on disk ---

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write all that a next step needs, so that it comes out bit for bit the same. Returns the folder.

        A crash at any time leaves the last state or this one, never a mixture. ``device`` is not part of it.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        names = {"momentum": f"momentum-{self.steps}.safetensors", "heads": f"heads-{self.steps}.safetensors"}
        if self.momentum is not None:
            self.momentum.save(place / names["momentum"])
        tensors = {f"first/{key}": x for key, x in self._first.items()}
        tensors |= {f"second/{key}": x for key, x in self._second.items() if isinstance(x, Tensor)}
        files.replace(place / names["heads"], lambda to: save_file({k: x.contiguous() for k, x in tensors.items()}, to))
        how = self._how
        state = {
            "format": FORMAT,
            "kind": self.name,
            "settings": {**self._settings(), "rank": how.rank, "solver": how.solver, "tol": how.tol, "seed": how.seed},
            "steps": self.steps,
            "second": {key: x for key, x in self._second.items() if not isinstance(x, Tensor)},
            "momentum": None if self.momentum is None else names["momentum"],
            "heads": names["heads"],
        }
        files.replace(place / STATE, lambda to: Path(to).write_text(json.dumps(state, indent=1), encoding="utf-8"))
        for old in [*place.glob("momentum-*.safetensors"), *place.glob("heads-*.safetensors")]:
            if old.name not in names.values():
                old.unlink()
        return place

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | torch.device | None = None) -> Self:
        """What ``save`` wrote. Raises ``AdapterError`` for a folder that holds no such optimizer, or a damaged one."""
        place = Path(folder)
        try:
            state = json.loads((place / STATE).read_text(encoding="utf-8"))
            if (state["format"], state["kind"]) != (FORMAT, cls.name):
                raise AdapterError(f"{place} holds a {state['kind']} of format {state['format']}, not a {cls.name}")
            made = cls(**state["settings"], device=device)
            made.steps = int(state["steps"])
            made._second = {key: float(x) for key, x in state["second"].items()}
            if not all(math.isfinite(x) and x >= 0 for x in made._second.values()):
                raise ValueError("a second moment is no finite number ≥ 0")
            heads = TensorFile(place / state["heads"])
            made._first = {key.removeprefix("first/"): heads[key] for key in heads if key.startswith("first/")}
            made._second |= {key.removeprefix("second/"): heads[key] for key in heads if key.startswith("second/")}
            if state["momentum"] is not None:
                made.momentum = GlobalUpdate.load(place / state["momentum"])
        except (AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError, ValueError) as error:
            if isinstance(error, AdapterError):
                raise
            what = f"{place} holds no server optimizer that can be read ({type(error).__name__}: {error})"
            raise AdapterError(f"{what}; give a folder that save() wrote") from error
        return made


class FedAvgM(ServerOptimizer):
    """M_t = β·M_{t-1} + Δ_t, X_{t+1} = X_t + η·M_t, with β ``momentum`` and η ``lr``.

    With lr=1 and momentum=0 a step gives the round's update itself (cut to ``rank``).

    Args:
        lr: η > 0. momentum: β in [0, 1).
        rank: columns that X and M keep in each layer (default: the most that one of what is added up has there).
        solver, tol, seed, device: as for ``ff.aggregate``.

    >>> import torch, flexlora_fast as ff
    >>> def round_of(seed):
    ...     A, B = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(seed))
    ...     state = {"base_model.model.fc.lora_A.weight": A, "base_model.model.fc.lora_B.weight": B.mT}
    ...     return ff.aggregate([ff.Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 2})])
    >>> opt, update, rounds = FedAvgM(momentum=0.5, rank=8), None, [round_of(0), round_of(1)]
    >>> for one in rounds:
    ...     update = opt.step(update, one)
    >>> first, second = (one.delta("fc") for one in rounds)
    >>> bool(torch.allclose(update.delta("fc"), second + 0.5 * first, atol=1e-5))
    True
    """

    name = "fedavgm"

    def __init__(
        self,
        lr: float = 1.0,
        momentum: float = 0.9,
        rank: int | None = None,
        *,
        solver: str = "auto",
        tol: float = 1e-3,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(lr, rank, solver, tol, seed, device)
        self.decay, self.gain = number("momentum", momentum, below=1.0), 1.0

    def _settings(self) -> dict[str, float]:
        return {"lr": self.lr, "momentum": self.decay}


class FedAdam(ServerOptimizer):
    """M_t = β₁·M_{t-1} + (1−β₁)·Δ_t, v_t = β₂·v_{t-1} + (1−β₂)·‖Δ_t‖_F²/(m·n), X_{t+1} = X_t + η·M_t/(√v_t + τ).

    One v for each layer (experts of a MoE layer together), v_0 = τ², no correction of its beginning, as in the paper.
    A layer thus moves by about η in the root mean square of its entries, where τ is small against √v.

    Args:
        lr: η > 0, in the units of ΔW's entries. beta1, beta2: in [0, 1). tau: τ > 0, below which a layer's mean change
            counts as noise; the paper's value is for weights, those of ΔW may be smaller.
        rank, solver, tol, seed, device: as for :class:`FedAvgM`.
    """

    name = "fedadam"

    def __init__(
        self,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        rank: int | None = None,
        *,
        solver: str = "auto",
        tol: float = 1e-3,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(lr, rank, solver, tol, seed, device)
        self.beta1, self.beta2 = number("beta1", beta1, below=1.0), number("beta2", beta2, below=1.0)
        self.tau = number("tau", tau, above=0.0)
        self.decay, self.gain = self.beta1, 1.0 - self.beta1

    def _settings(self) -> dict[str, float]:
        return {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "tau": self.tau}

    @property
    def second_moments(self) -> dict[str, float]:
        """v by layer."""
        return {key: float(v) for key, v in self._second.items() if not isinstance(v, Tensor)}

    def _squares(self, change: list[Term], update: GlobalUpdate) -> dict[str, Any]:
        second: dict[str, Any] = dict(self._second)
        ones = [_scaled(term, defaultdict(lambda: 1 / self.gain)) for term in change]
        for layer, spec in specs_of(change).items():
            square = energy(spec, parts_of(ones, layer), self._how.device) if layer in update else 0.0
            second[layer] = self._squared(second.get(layer), square / (spec.experts * spec.m * spec.n))
        return second

    def _squared(self, before: float | Tensor | None, square: float | Tensor) -> float | Tensor:
        return self.beta2 * (self.tau**2 if before is None else before) + (1 - self.beta2) * square

    def _rate(self, second: float | Tensor | None) -> Any:
        if isinstance(second, Tensor):
            return self.lr / (second.sqrt() + self.tau)
        return self.lr / (math.sqrt(self.tau**2 if second is None else second) + self.tau)


def _layers(update: GlobalUpdate) -> GlobalUpdate:
    """The update without what is no low-rank pair."""
    return dataclasses.replace(update, extras={})


def _scaled(term: Term, rates: Mapping[str, float]) -> Term:
    """The same with its coefficients times η."""
    of = term.of
    return dataclasses.replace(term, of=lambda layer: rates[layer] * of(layer))


def _framed(
    result: GlobalUpdate, heads: dict[str, Tensor], previous: GlobalUpdate | None, update: GlobalUpdate, name: str
) -> GlobalUpdate:
    """The sum as an update of this round's clients."""
    templates = [given.template for given in (update, previous) if given is not None]
    paths = {layer.spec.pattern_name for layer in result.values()}
    return dataclasses.replace(
        update,
        layer_updates=result.layer_updates,
        extras=heads,
        method=f"{update.method}+{name}",
        seed=result.seed,
        template=finishing.widened(templates, paths),
    )


def number(what: str, value: Any, *, above: float = -math.inf, below: float = math.inf) -> float:
    """A finite number ≥ 0 within the bounds, both excluded."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (fine and 0 <= value < below and value > above):
        wanted = f"from 0 to {below:g}, which is excluded" if below < math.inf else "> 0"
        raise OptionError(f"{what} is {value!r}; give a finite number {wanted}")
    return float(value)
