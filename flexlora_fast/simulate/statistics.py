"""What runs with several seeds can show: means with their intervals, and paired tests.

Two methods that run with the same seed have the same split, initialisation and data order, so the difference is taken
within each seed before anything is averaged: what makes one seed easier than another then cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from flexlora_fast.errors import OptionError

CONFIDENCE = 0.95
# Sign patterns up to which the permutation test goes through all of them: those of 13 pairs. Above (a test's rows, not
# seeds) it draws as many, from this seed.
_PATTERNS = 1 << 13
_SEED = 0


@dataclass(frozen=True)
class Mean:
    """Of N values: ``mean``; ``sd``, with N − 1; ``low`` and ``high``, Student's 95 % interval of the mean.

    sd, low and high are NaN for a single value, which has no spread.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Mean):
    """Of N paired differences, what is in :class:`Mean`, and two-sided p-values of "it is zero on average".

    Attributes:
        t_p: of Student's paired t-test, which takes the differences to be normal; NaN where they have no spread.
        permutation_p: of the sign-flip test (Fisher 1935), which only takes their signs to be a coin's under the null:
            the share of all 2^N sign patterns whose |mean| is at least the one found. NaN for a single pair.
        above, below: how many pairs have a difference above and below zero.
    """

    t_p: float
    permutation_p: float
    above: int
    below: int

    @property
    def least_p(self) -> float:
        """The smallest ``permutation_p`` that so many pairs can give, 2/2^N: for five 0.0625."""
        return 2.0 ** (1 - self.n)


def mean(values: ArrayLike, confidence: float = CONFIDENCE) -> Mean:
    """Mean, deviation and interval of some values, (N,).

    >>> found = mean([1.0, 2.0, 3.0])
    >>> found.mean, found.sd, round(found.low, 3), round(found.high, 3)
    (2.0, 1.0, -0.484, 4.484)
    """
    x = _values(values)
    middle = float(x.mean())
    if len(x) == 1:
        return Mean(1, middle, math.nan, math.nan, math.nan)
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1)) * sd / math.sqrt(len(x))
    return Mean(len(x), middle, sd, middle - half, middle + half)


def paired(ours: ArrayLike, theirs: ArrayLike, confidence: float = CONFIDENCE) -> Difference:
    """ours − theirs, pair by pair: (N,) each, in the same order of seeds, or of test rows.

    Raises ``OptionError`` where they are not as many, or none.

    >>> found = paired([3.0, 4.0, 6.0], [1.0, 3.0, 3.0])
    >>> found.mean, round(found.t_p, 4), found.permutation_p, found.least_p
    (2.0, 0.0742, 0.25, 0.25)
    """
    a, b = _values(ours), _values(theirs)
    if a.shape != b.shape:
        raise OptionError(f"{len(a)} values cannot be paired with {len(b)}; give those that both have")
    # 0.7 − 0.6 and 0.6 − 0.5 differ in float64's last bits, and are the same difference of two shares.
    gaps = np.round(a - b, 12)
    found = mean(gaps, confidence)
    return Difference(
        n=found.n,
        mean=found.mean,
        sd=found.sd,
        low=found.low,
        high=found.high,
        t_p=_t_test(gaps),
        permutation_p=sign_flip(gaps),
        above=int((gaps > 0).sum()),
        below=int((gaps < 0).sum()),
    )


def _t_test(gaps: np.ndarray) -> float:
    if len(gaps) < 2:
        return math.nan
    if not gaps.any():
        return 1.0
    if gaps.std() < 1e-10:  # of 1 at most: t is infinite, whatever the number of pairs: it says nothing
        return math.nan
    return float(stats.ttest_1samp(gaps, 0.0).pvalue)


def sign_flip(differences: ArrayLike) -> float:
    """Two-sided p-value that differences (N,) are zero on average, over all 2^N patterns of signs where those are at
    most 8,192, else over so many drawn ones. NaN for a single difference.
    """
    gaps = _values(differences)
    if len(gaps) < 2:
        return math.nan
    found = stats.permutation_test(
        (gaps,),
        lambda x, axis: np.abs(x.mean(axis=axis)),
        permutation_type="samples",
        alternative="greater",  # of the absolute mean: patterns and their mirror images count alike
        n_resamples=_PATTERNS,
        batch=max(1, 2**22 // len(gaps)),  # 32 MiB at a time
        vectorized=True,
        rng=_SEED,
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, corrected so that one false alarm among all of them has the probability said
    (Holm 1979): the i-th smallest of m is multiplied by m − i + 1, and none may be below a smaller one's.

    A NaN stays one, and is not counted among the comparisons.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected = [math.nan] * len(p_values)
    least = 0.0
    for place, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(known) - place) * p_values[i]))
        corrected[i] = least
    return corrected


def _values(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64).ravel()
    if not len(x) or not np.isfinite(x).all():
        raise OptionError(f"a mean needs finite values, not {x[:5].tolist()}; leave out runs that have none")
    return x
