"""Clipping: whom it rejects, and bounds that are carried over rounds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from flexlora_fast import defence
from flexlora_fast.errors import OptionError
from tests.defences import alike, error_to, scaled, task_of
from tests.test_defence import aggregate


@pytest.mark.parametrize("factor", [11.0, 100.0, 1e6])
def test_clipping_is_as_if_the_rejected_had_never_come(factor: float) -> None:
    """Their norms do not move the bound of the others either: the error is that of a round without them."""
    clients = alike(10)
    sent = [*(c.mapped(lambda _, A, B: (A, factor * 1.5 * B)) for c in clients[:3]), *clients[3:]]
    one, two = aggregate(sent, "clip"), aggregate(clients[3:], "clip")
    assert [v.status for v in one.verdicts[:3]] == ["rejected"] * 3
    for mine, other in zip(one.verdicts[3:], two.verdicts, strict=True):
        assert (mine.client, mine.factor, mine.reason) == (other.client, other.factor, other.reason)
        assert mine.share == pytest.approx(other.share, rel=1e-12)
    for layer in two.layers:
        torch.testing.assert_close(one.delta(layer), two.delta(layer), rtol=0, atol=1e-6 * two[layer].norm)


def test_rejecting_some_may_show_others() -> None:
    """The median of these norms is 1 only once the three largest are gone."""
    gram = torch.diag(torch.tensor([1.0, 1, 1, 9, 91, 92, 93], dtype=torch.float64) ** 2)
    found = defence.Clip().judge(gram, torch.full((7,), 1 / 7, dtype=torch.float64))
    assert found.factors.tolist() == [1, 1, 1, pytest.approx(1 / 9), 0, 0, 0]
    assert defence.Clip(zeroing=8).judge(gram, torch.full((7,), 1 / 7, dtype=torch.float64)).factors[3] == 0


@pytest.mark.parametrize("factor", [0.01, 3.0, 9.0, 100.0])
def test_a_bound_is_carried_over_rounds(factor: float) -> None:
    """Andrew et al.: the bound follows a quantile that drifts, and hostile clients cannot drive it, be they short, long
    or just within what is not rejected.
    """
    clients = alike(10)
    rule, bounds = defence.Clip(quantile=0.6), []
    drift = [1.1**t for t in range(12)]
    for growth in drift:
        sent = [c.mapped(lambda _, A, B, growth=growth: (A, growth * B)) for c in clients]
        update = aggregate([*scaled(factor)(sent[:2]), *sent[2:]], rule)
        honest = np.sort([v.norm for v in update.verdicts[2:]])
        rule = rule.after(update)
        assert rule.quantile == 0.6 and rule.norm is not None
        bounds.append(rule.norm / honest[0])
    spread = honest[-1] / honest[0]
    assert all(0.85 < bound < 1.15 * spread for bound in bounds), (bounds, spread)
    assert defence.get(str(rule)) == dataclasses.replace(rule, norm=float(str(rule.norm)))


def test_a_bound_moves_by_the_share_of_clients_below_it() -> None:
    update = aggregate(alike(8), "clip")
    norms = sorted(v.norm for v in update.verdicts)
    first = defence.Clip().after(update)
    assert first.norm == pytest.approx(norms[3]) and first.zeroing == 10  # half of them are below: it stays
    low, high = (defence.Clip(norm=x).after(update).norm for x in (norms[0] / 2, 2 * norms[-1]))
    assert low == pytest.approx(norms[0] / 2 * math.exp(0.2 * 0.5))
    assert high == pytest.approx(2 * norms[-1] * math.exp(-0.2 * 0.5))
    with pytest.raises(OptionError, match="no verdicts to learn a bound from"):
        defence.Clip().after(aggregate(alike(3), None))
    zero = aggregate([c.mapped(lambda _, A, B: (A, B * 0)) for c in alike(3)], "clip")
    assert defence.Clip().after(zero) == defence.Clip()


@pytest.mark.parametrize("spread", [0.2, 0.4])
def test_scaling_by_any_factor_leaves_the_clean_error(spread: float) -> None:
    """With a tenth of hostile clients the error to the task is, in the median of seeds, at most 1.1 times that of the
    same rule without them. Beyond the bound of zeroing it is that error, whatever their share.
    """
    ratios: dict[tuple[int, float], list[float]] = {}
    for seed in range(5):
        target, clients = task_of(seed=seed), alike(20, seed=seed, spread=spread)
        for hostile in (2, 6):
            clean = error_to(aggregate(clients[hostile:], "clip", rank=12), target)
            for factor in (1.2, 1.5, 2.0, 5.0, 10.0, 12.0, 100.0, 1e6):
                update = aggregate([*scaled(factor)(clients[:hostile]), *clients[hostile:]], "clip", rank=12)
                ratios.setdefault((hostile, factor), []).append(error_to(update, target) / clean)
    worst = {case: float(np.median(found)) for case, found in ratios.items()}
    assert all(ratio <= 1.1 for (hostile, _), ratio in worst.items() if hostile == 2), worst
    assert all(abs(ratio - 1) < 1e-4 for (_, factor), ratio in worst.items() if factor >= 100), worst
    assert max(worst.values()) < 1.3, worst  # of 30 %: those that are kept move the median
