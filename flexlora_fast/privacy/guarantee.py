"""What a private round promises, in numbers: how updates are clipped, noised, averaged and accounted."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from flexlora_fast.errors import OptionError
from flexlora_fast.privacy.accounting import ADJACENCY, Charge, calibrate, epsilon
from flexlora_fast.privacy.ledger import Ledger

# Beyond these, float32 could not hold the noise.
_LEAST, _MOST = 1e-20, 1e20


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Client-level differential privacy: ΔW = (Σ_i clip_C(w_i·s_i·B_i·A_i) + N(0, (z·C)²) on every entry)/D.

    The clip is joint over all layers, biases and other trained tensors of a client, so that adding or removing one
    client moves the sum by at most C; the noise is on all of them, whoever came. What is released (adapters, and
    anything made from them) is (ε, δ)-differentially private for that adjacency, as ``update.privacy`` says it.

    Source: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018
    (arXiv 1710.06963), the estimator of fixed denominator.

    Args:
        clip: C, the most that one client may move the sum, as a Frobenius norm.
        noise_multiplier: z; the noise has a standard deviation of z·C on each entry of the sum.
        rate: q, the probability with which each client of the population is taken into a round, by itself and anew in
            every round: ``sample`` does so. 1: all are, and nothing is gained by sampling. Cohorts of a fixed size are
            another claim, with twice the sensitivity, that this class does not make.
        denominator: D, a public number: the expected total weight of a round, such as q × population. Never the weight
            of those that came, which would tell who did.
        delta: δ, the probability with which ε may fail to hold; well below 1/population.
        ledger: of all rounds so far over this population (default: in memory, so of this object alone).
        max_epsilon: refuses the round that would bring the total beyond it, before anything is computed.

    >>> privacy = Privacy(clip=0.5, noise_multiplier=1.0, rate=0.01, denominator=100, delta=1e-6)
    >>> round(privacy.epsilon(rounds=1000), 2)
    2.12
    """

    clip: float
    noise_multiplier: float
    rate: float
    denominator: float
    delta: float
    ledger: Ledger = field(default_factory=Ledger)
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        remedy = "epsilon would be infinite; give one > 0, or no privacy at all"
        self._check("clip", self.clip, _LEAST, _MOST, "the norm that updates are clipped to")
        if self.noise_multiplier == 0:
            raise OptionError(f"noise_multiplier is 0: {remedy}")
        self._check("noise_multiplier", self.noise_multiplier, _LEAST, _MOST, "about 1 is usual")
        self._check("rate", self.rate, 0, 1, "the probability that a client takes part; 1 where all do")
        self._check("denominator", self.denominator, _LEAST, _MOST, "the expected total weight of a round")
        sigma = self.noise_multiplier * self.clip / self.denominator
        if not _LEAST < sigma < _MOST:
            raise OptionError(f"the noise of the mean, z·C/D, is {sigma:.3g}, which float32 cannot hold; scale clip")
        self._check("delta", self.delta, 0, 1 - 2**-53, "well below 1/population, such as 1e-6")
        if not isinstance(self.ledger, Ledger):
            raise OptionError(f"ledger is {self.ledger!r}; give a flexlora_fast.privacy.Ledger")
        if self.max_epsilon is not None:
            self._check("max_epsilon", self.max_epsilon, 0, math.inf, "or None for no bound")

    @staticmethod
    def _check(name: str, value: object, low: float, high: float, what: str) -> None:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (good and low < value <= high):  # type: ignore[operator]
            bound = f" and ≤ {high:g}" if math.isfinite(high) else ""
            raise OptionError(f"{name} is {value!r}; give a finite number > {low:g}{bound} ({what})")

    @classmethod
    def calibrated(
        cls,
        *,
        epsilon: float,
        delta: float,
        rounds: int,
        rate: float,
        clip: float,
        denominator: float,
        ledger: Ledger | None = None,
    ) -> Privacy:
        """The least noise with which ``rounds`` rounds cost at most ``epsilon``, which is its ``max_epsilon``.

        Rounds that the ledger holds already are not planned for: they shorten the plan.
        """
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise OptionError(f"rounds is {rounds!r}; give an integer ≥ 1")
        ledger = Ledger() if ledger is None else ledger
        common = {"rate": rate, "clip": clip, "denominator": denominator, "delta": delta}
        cls(noise_multiplier=1.0, max_epsilon=epsilon, ledger=ledger, **common)  # all checked before the search
        found = calibrate(epsilon, delta, rounds, rate)
        return cls(noise_multiplier=found, max_epsilon=epsilon, ledger=ledger, **common)

    @property
    def charge(self) -> Charge:
        """What one round is to the ledger."""
        return Charge(float(self.noise_multiplier), float(self.rate))

    def epsilon(self, rounds: int = 1) -> float:
        """ε of so many rounds, whatever the ledger holds."""
        return epsilon([self.charge] * rounds, self.delta)

    def sample(self, population: Iterable[str]) -> list[str]:
        """Who takes part in a round: each with probability ``rate``, by the operating system's generator.

        The draw is as secret as the noise: who was taken must not be published. Nobody may be, and that is a round like
        any other. A client that does not answer, or is refused, counts as not taken.

        Raises ``OptionError`` for a name that comes twice, and would have twice the chance.
        """
        names = list(population)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise OptionError(f"{twice[0]!r} is in the population {names.count(twice[0])} times; give each client once")
        draw = secrets.SystemRandom().random
        return [name for name in names if draw() < self.rate]


@dataclass(frozen=True)
class Spent:
    """What a round cost. Nothing in it depends on the clients.

    Attributes:
        clip, noise_multiplier, rate, denominator, delta: as given to :class:`Privacy`.
        epsilon: ε of this round alone. total: of all rounds of the ledger, this among them. rounds: how many those are.
        adjacency: between which rounds nobody can tell: with and without one client.
    """

    clip: float
    noise_multiplier: float
    rate: float
    denominator: float
    delta: float
    epsilon: float
    total: float
    rounds: int
    adjacency: str = ADJACENCY

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.4g} this round, {self.total:.4g} over all {self.rounds} (delta {self.delta:g}, "
            f"{self.adjacency}); clip {self.clip:g}, noise {self.noise_multiplier:g}, rate {self.rate:g}"
        )
