"""Means, intervals and paired tests against values by hand and scipy's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import statistics


def test_a_mean_has_students_interval():
    values = [0.61, 0.58, 0.66, 0.60, 0.63]
    found = statistics.mean(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.n, found.mean) == (5, pytest.approx(0.616))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_a_single_value_has_no_spread():
    found = statistics.mean([0.6])
    assert found.mean == 0.6
    assert all(map(math.isnan, (found.sd, found.low, found.high)))


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_t_test_is_scipys(n):
    draw = np.random.default_rng(n)
    ours, theirs = draw.random(n), draw.random(n)
    assert statistics.paired(ours, theirs).t_p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_sign_flips_are_all_counted(n):
    gaps = np.random.default_rng(n).normal(0.3, 1, n)
    patterns = [abs(np.mean(gaps * signs)) for signs in itertools.product((1, -1), repeat=n)]
    expected = np.mean([value >= abs(gaps.mean()) - 1e-12 for value in patterns])
    assert statistics.sign_flip(gaps) == pytest.approx(expected)


def test_five_pairs_that_agree_cannot_give_less_than_a_sixteenth():
    found = statistics.paired([0.7, 0.8, 0.75, 0.72, 0.9], [0.5, 0.5, 0.5, 0.5, 0.5])
    assert found.permutation_p == found.least_p == 0.0625
    assert (found.above, found.below) == (5, 0)
    assert found.t_p < 0.05


def test_test_rows_are_many_pairs():
    draw = np.random.default_rng(0)
    theirs = (draw.random(400) < 0.6).astype(float)
    ours = np.where(draw.random(400) < 0.1, 1.0, theirs)  # right where it was, and more
    found = statistics.paired(ours, theirs)
    assert found.least_p < found.permutation_p < 0.02 and found.t_p < 0.02
    other = 1 - np.roll(ours, 7)
    drawn = statistics.sign_flip(ours - other)
    assert 0 < drawn < 1
    assert drawn == statistics.sign_flip(ours - other)  # patterns come from one seed


def test_equal_scores_differ_in_nothing():
    found = statistics.paired([0.1 + 0.2, 0.5], [0.3, 0.5])  # 0.1 + 0.2 is not 0.3 in float64
    assert (found.mean, found.t_p, found.permutation_p) == (0.0, 1.0, 1.0)


def test_differences_without_spread_have_no_t():
    found = statistics.paired([0.7, 0.6, 0.5], [0.6, 0.5, 0.4])
    assert math.isnan(found.t_p)
    assert found.permutation_p == 0.25


def test_holm_corrects_by_rank_and_keeps_the_order():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_leaves_out_what_has_no_p():
    found = statistics.holm([math.nan, 0.02, 0.03])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.04, 0.04])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.paired([1.0, 2.0], [1.0]), "2 values cannot be paired with 1"),
        (lambda: statistics.mean([]), "finite values"),
        (lambda: statistics.mean([1.0, math.nan]), "leave out runs"),
    ],
)
def test_what_cannot_be_averaged_is_refused(call, message):
    with pytest.raises(OptionError, match=message):
        call()
