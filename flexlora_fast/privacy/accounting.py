"""What rounds of the Gaussian mechanism cost, by Google's dp-accounting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flexlora_fast.errors import PrivacyError
from flexlora_fast.privacy.noise import INSTALL

ADJACENCY = "add-or-remove-one-client"
# A privacy loss distribution holds losses of up to ε in steps of 1e-4, for every kind of round: at ε = 200 that takes
# ten seconds. Beyond this Rényi's bound stands, a few per cent above it.
_TIGHT = 50.0
# Of Rényi divergences under sampling: whole ones have a closed form, the library's series for others may not converge.
_ORDERS = [*range(2, 64), *range(64, 1025, 32)]


@dataclass(frozen=True, order=True)
class Charge:
    """One round: Gaussian noise of ``noise_multiplier`` × the clipping bound on the sum over clients that were each
    taken with probability ``rate``.
    """

    noise_multiplier: float
    rate: float


def epsilon(rounds: Sequence[Charge], delta: float) -> float:
    """ε of all ``rounds`` together at ``delta``, for adding or removing one client of all of them; 0 without any.

    Both of the library's accountants give upper bounds, and the smaller counts: privacy loss distributions (Sommer,
    Meiser, Mohammadi, PoPETs 2019; Doroshenko et al., PoPETs 2022), rounded up, and Rényi divergences of the sampled
    Gaussian (Mironov, Talwar, Zhang, arXiv 1908.10530).

    >>> round(epsilon([Charge(4.0, 0.01)] * 10_000, 1e-5), 2) <= 1.26  # Abadi et al., CCS 2016, section 3.2
    True
    """
    return _epsilon(tuple(sorted(Counter(rounds).items())), delta)


@lru_cache(maxsize=256)
def _epsilon(rounds: tuple[tuple[Charge, int], ...], delta: float) -> float:
    """The same from how often each kind of round was run."""
    if not rounds:
        return 0.0
    accounting = _library()
    bound = _renyi(accounting, rounds, delta)
    if bound > _TIGHT:
        return bound
    return min(bound, float(_tight(accounting).compose(_event(accounting, rounds)).get_epsilon(delta)))


def _renyi(accounting: Any, rounds: Sequence[tuple[Charge, int]], delta: float) -> float:
    sampled = any(charge.rate < 1 for charge, _ in rounds)
    relation = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = accounting.rdp.RdpAccountant(_ORDERS if sampled else None, relation)
    return float(accountant.compose(_event(accounting, rounds)).get_epsilon(delta))


def _tight(accounting: Any) -> Any:
    return accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)


def calibrate(target: float, delta: float, rounds: int, rate: float) -> float:
    """The least noise multiplier, to 1e-4 and from above, with which so many rounds cost at most ``target``."""
    accounting = _library()

    def quick(z: float) -> float:  # from above, in milliseconds
        return _renyi(accounting, [(Charge(z, rate), rounds)], delta)

    high = 1.0
    while quick(high) > target:
        high *= 2
        if high > 2**30:
            raise PrivacyError(f"no noise gives epsilon {target!r} at delta {delta!r} in {rounds} rounds; ask for more")
    while quick(high / 2) <= target:
        high /= 2
    low = high / 2
    while epsilon([Charge(low, rate)] * rounds, delta) <= target:
        low /= 2
    found = accounting.calibrate_dp_mechanism(
        lambda: _tight(accounting),
        lambda z: _event(accounting, [(Charge(float(z), rate), rounds)]),
        target,
        delta,
        accounting.ExplicitBracketInterval(low, high),
        tol=1e-4,
    )
    return float(found)


def _event(accounting: Any, rounds: Sequence[tuple[Charge, int]]) -> Any:
    """Rounds in the library's words."""
    parts = []
    for charge, count in rounds:
        one = accounting.PoissonSampledDpEvent(charge.rate, accounting.GaussianDpEvent(charge.noise_multiplier))
        parts.append(accounting.SelfComposedDpEvent(one, count))
    return accounting.ComposedDpEvent(parts)


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise PrivacyError(f"privacy is accounted by dp-accounting ({error}); {INSTALL}") from error
    return dp_accounting
