"""One private round: which tensors it has, how each client is clipped into them, and the noise on their sums."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.defence import Coordinates, Defence
from flexlora_fast.errors import OptionError, WeightError
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.layouts import LayerSpec
from flexlora_fast.methods import Method
from flexlora_fast.privacy.clipping import norm_of
from flexlora_fast.privacy.guarantee import Privacy, Spent
from flexlora_fast.privacy.noise import Noise, fresh_key
from flexlora_fast.skeleton import Form

# Clients are clipped to C·(1 − this). Sums are float64, so that what they round by stays below it: R columns of K
# clients move a sum by at most about R·2⁻⁵³·Σ_i β_i (see ``clipping``): 7e-7·C for 10,000 of rank 16 with β_i = 4C.
MARGIN = 2.0**-20
# A noised sum is rounded to multiples of σ/512 to σ/256, a power of two: of the low bits of a float64 sum, which would
# tell what was added to the noise (Mironov, CCS 2012), nothing is left, and the noise grows by 1e-6.
_GRID = 256.0
SOLVERS = ("auto", "dense", "factored", "subspace")


@dataclass(frozen=True)
class Summed:
    """What a round does with its clients beyond summing them up, as far as that bears on privacy."""

    rank: int | None
    method: Method
    solver: str
    missing: str
    defence: Defence | Coordinates | None
    quorum: bool


def of_round(
    privacy: Privacy | None,
    policy: RoundPolicy | None,
    reference: Adapter | str | os.PathLike[str] | None,
    how: Summed,
) -> Mechanism | None:
    """The mechanism of a round; None without ``privacy``.

    Raises:
        OptionError: a round that is more than a noised sum of one clipped term for each client.
        PrivacyError: one more round would exceed the budget.
    """
    if privacy is None:
        if reference is not None:
            raise OptionError("reference is what private rounds compare heads with; give it with privacy=")
        return None
    if not isinstance(privacy, Privacy):
        raise OptionError(f"privacy is {privacy!r}; give a flexlora_fast.Privacy")
    if policy is None:
        raise OptionError(
            "a private round needs a policy: its layers, shapes and config must be known whoever comes; give "
            "policy=RoundPolicy.from_adapter(…)"
        )
    _check(how)
    if policy.max_clients is not None or policy.max_round_bytes is not None:
        raise OptionError(
            "the policy has max_clients or max_round_bytes: one client would decide whether another finds room, so "
            "that nobody knows how far one can move the sum; give a policy without (sampling bounds who comes)"
        )
    public = reference if reference is None or isinstance(reference, Adapter) else Adapter.load(reference)
    made = Mechanism(privacy, policy, public)
    privacy.ledger.check(privacy.charge, privacy.delta, privacy.max_epsilon)
    return made


def _check(how: Summed) -> None:
    rank, method, solver, missing, defence = how.rank, how.method, how.solver, how.missing, how.defence
    if rank is None:
        raise OptionError("rank is None: how many columns there are would tell a client's rank; give one")
    if not (method.uniform and method.folds):
        raise OptionError(
            f"method {method.name!r} is not made from a sum of one term for each client alone, so that nobody knows "
            "how far one can move it; use 'flexlora'"
        )
    if solver not in SOLVERS:
        raise OptionError(
            f"solver {solver!r} works in the space of the clients' factors, which noise on every entry leaves; use one "
            f"of {', '.join(SOLVERS)}"
        )
    if missing != "zero":
        raise OptionError(f"missing is {missing!r}: one client would change the weights of all others; use 'zero'")
    if defence is not None:
        raise OptionError(
            f"defence {defence.name!r} judges each client by the others, so that nobody knows how far one can move the "
            "sum; leave it away (clipping bounds every client already)"
        )
    if how.quorum:
        raise OptionError(
            "min_clients or min_weight: whether there is an update would tell who came, and no noise is on that; leave "
            "them away"
        )


class Mechanism:
    """The Gaussian mechanism over one policy's tensors.

    Args:
        reference: an adapter with the public values of what is no low-rank pair (heads …), from which each client's
            differ by its update; None where the policy has no such tensors.

    Attributes:
        specs: of all layers. biased: those with a lora_B.bias. forms: of the other tensors. config: of adapters.
        widest: the largest rank that a client may have. outline: all that the policy says of an adapter.

    Raises ``OptionError`` for tensors that have no public reference to differ from.
    """

    def __init__(self, privacy: Privacy, policy: RoundPolicy, reference: Adapter | None) -> None:
        self.outline = outline = policy.reference
        self.privacy, self.reference = privacy, reference
        self.specs: dict[str, LayerSpec] = dict(sorted(outline.specs.items()))
        self.biased = frozenset(outline.bias_keys)
        self.forms: dict[str, Form] = dict(sorted(outline.extras.items()))
        self.config: dict[str, Any] = policy.config
        self.widest = max(policy.ranks)
        self.sigma = privacy.noise_multiplier * privacy.clip
        self._grid = 2.0 ** math.floor(math.log2(self.sigma / _GRID))
        for key, form in self.forms.items():
            _check_reference(key, form, reference)

    def check_weight(self, weight: float) -> None:
        """Raise ``WeightError`` for a weight above 1."""
        if weight > 1:
            raise WeightError(
                f"weight is {weight!r}, and a private round takes 0 to 1; divide by the largest that a client may have"
            )

    def factor(self, adapter: Adapter, weight: float) -> float:
        """What a client's update is scaled by: min(1, C/(w·‖·‖)), rounded down.

        Raises ``AdapterError`` for an update of no finite norm.
        """
        norm, bound = weight * norm_of(adapter, self.reference), self.privacy.clip * (1 - MARGIN)
        return min(1.0, bound / norm) if norm > 0 else 1.0

    def open(self) -> Release:
        """Charge the round to the ledger and draw the key of its noise: from here on it counts as released.

        Raises ``PrivacyError`` where that would exceed the budget.
        """
        of = self.privacy
        total, rounds = of.ledger.charge(of.charge, of.delta, of.max_epsilon)
        spent = Spent(
            clip=float(of.clip),
            noise_multiplier=float(of.noise_multiplier),
            rate=float(of.rate),
            denominator=float(of.denominator),
            delta=float(of.delta),
            epsilon=of.epsilon(),
            total=total,
            rounds=rounds,
        )
        return Release(self, spent)


class Release:
    """A round that was charged, and the noise on its sums."""

    def __init__(self, of: Mechanism, spent: Spent) -> None:
        self.of, self.spent = of, spent
        self._key = fresh_key()

    def released(self, name: str, total: Tensor, start: int = 0) -> Tensor:
        """(total + noise)/D, float32, rounded to a grid before the division.

        Args:
            name: of the tensor. total: entries ``start`` and following of its sum over clients, contiguous float64;
                overwritten.
        """
        noise = Noise(self._key, name).normal(start, total.numel())
        total += noise.mul_(self.of.sigma).view(total.shape).to(total.device)
        total.div_(self.of._grid).round_().mul_(self.of._grid / self.of.privacy.denominator)
        return total.to(torch.float32)


def _check_reference(key: str, form: Form, reference: Adapter | None) -> None:
    if not form.dtype.is_floating_point:
        raise OptionError(f"{key!r} holds {form.dtype}, to which no noise can be added; leave it out of the policy")
    if reference is None:
        raise OptionError(
            f"{key!r} is no low-rank update: its values are averaged, and only their differences from public ones can "
            "be clipped; give reference= an adapter that has what clients started from"
        )
    there = reference.skeleton.forms.get(key)
    if there is None or there.shape != form.shape:
        found = "no such tensor" if there is None else f"one of shape {there.shape}"
        raise OptionError(f"the reference has {found} as {key!r} of shape {form.shape}; give what clients started from")
    if not bool(torch.isfinite(reference.extras[key]).all()):
        raise OptionError(f"{key!r} of the reference holds NaN or infinite values; give what clients started from")
