"""What private rounds cost: against closed forms, published figures and the library itself; the ledger; the budget."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

import flexlora_fast as ff
from flexlora_fast.errors import OptionError, PrivacyError
from flexlora_fast.privacy import Charge, Ledger, epsilon
from tests import private
from tests.private import privacy

DELTA = 1e-5


def gaussian_delta(epsilon: float, z: float) -> float:
    """δ(ε) of one Gaussian mechanism of noise z: Balle and Wang, ICML 2018 (arXiv 1805.06530), theorem 8."""

    def phi(x: float) -> float:  # of full precision in the lower tail
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(1 / (2 * z) - epsilon * z) - math.exp(epsilon) * phi(-1 / (2 * z) - epsilon * z)


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (4.0, 1), (2.0, 9), (20.0, 400), (0.5, 1)])
def test_without_sampling_it_is_the_closed_form(z: float, rounds: int) -> None:
    """T rounds are one of noise z/√T. An upper bound, and no more than 1 % above."""
    found = epsilon([Charge(z, 1.0)] * rounds, DELTA)
    assert gaussian_delta(found, z / math.sqrt(rounds)) <= DELTA
    assert gaussian_delta(0.99 * found - 1e-3, z / math.sqrt(rounds)) > DELTA


def test_published_figures() -> None:
    """Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (arXiv 1607.00133), section 3.2 and figure 2:
    q = 0.01, σ = 4, δ = 1e-5: 1.26 after 100 epochs and 2.55 after 400, by the moments accountant, whose conversion to
    ε has been sharpened since.
    """
    for rounds, published in ((10_000, 1.26), (40_000, 2.55)):
        found = epsilon([Charge(4.0, 0.01)] * rounds, DELTA)
        assert 0.75 * published < found <= published


def test_against_the_library_called_directly() -> None:
    dp = pytest.importorskip("dp_accounting")
    kinds = [(1.1, 0.01, 300), (0.9, 0.02, 50), (5.0, 1.0, 1)]
    bounds = []
    for accountant in (dp.rdp.RdpAccountant(range(2, 64)), dp.pld.PLDAccountant()):
        for z, rate, count in kinds:
            accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(z)), count)
        bounds.append(accountant.get_epsilon(1e-6))
    rounds = [Charge(z, rate) for z, rate, count in kinds for _ in range(count)]
    found = epsilon(rounds, 1e-6)
    assert found == pytest.approx(min(bounds), rel=1e-4) and found < bounds[0]
    assert found == epsilon(rounds[::-1], 1e-6)


def test_sampling_and_noise_help_and_rounds_cost() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([Charge(1.0, 0.1)], DELTA) < epsilon([Charge(1.0, 1.0)], DELTA)
    assert epsilon([Charge(2.0, 0.1)], DELTA) < epsilon([Charge(1.0, 0.1)], DELTA)
    assert epsilon([Charge(1.0, 0.1)] * 2, DELTA) > epsilon([Charge(1.0, 0.1)], DELTA)
    huge = epsilon([Charge(1e-6, 1.0)], DELTA)  # far beyond what a loss distribution could hold
    assert math.isfinite(huge) and huge >= 5e11 * 0.99


def test_calibrated_noise_keeps_the_plan_and_is_the_least() -> None:
    plan = {"delta": 1e-6, "rate": 1.0, "clip": 1.0, "denominator": 50.0}
    made = ff.Privacy.calibrated(epsilon=2.0, rounds=3, **plan)
    assert made.epsilon(rounds=3) <= 2.0 == made.max_epsilon
    assert gaussian_delta(2.0, (made.noise_multiplier - 2e-3) / math.sqrt(3)) > 1e-6
    for _ in range(3):
        made.ledger.charge(made.charge, made.delta, made.max_epsilon)
    with pytest.raises(PrivacyError, match="max_epsilon is 2"):
        private.aggregator(made)
    with pytest.raises(OptionError, match="rounds is 0"):
        ff.Privacy.calibrated(epsilon=1.0, rounds=0, **plan)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "rounds", "rate"), [(1.0, 20, 0.01), (2.0, 50, 0.05), (8.0, 1000, 0.01)])
def test_calibration_knows_of_sampling(target: float, rounds: int, rate: float) -> None:
    given = {"delta": 1e-6, "rate": rate, "clip": 1.0, "denominator": 50.0}
    made = ff.Privacy.calibrated(epsilon=target, rounds=rounds, **given)
    less = privacy(noise_multiplier=made.noise_multiplier - 1e-3, rate=rate)
    assert made.epsilon(rounds) <= target < less.epsilon(rounds)


# -- the ledger ---


def test_a_ledger_outlives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "budget" / "ledger.json"
    code = (
        "import sys; from flexlora_fast.privacy import Charge, Ledger\n"
        "print(*Ledger(sys.argv[1]).charge(Charge(1.0, 0.5), 1e-6))"
    )
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    ledger = Ledger(path)
    assert told.split() == [str(ledger.epsilon(1e-6)), "1"]
    total, rounds = ledger.charge(Charge(2.0, 0.5), 1e-6)
    assert rounds == 2 and Ledger(path).rounds == [Charge(1.0, 0.5), Charge(2.0, 0.5)]
    assert Ledger(path).epsilon(1e-6) == total > float(told.split()[0])
    assert json.loads(path.read_text())["adjacency"] == "add-or-remove-one-client"
    assert sorted(p.name for p in path.parent.iterdir()) == ["ledger.json", "ledger.json.lock"]


def _charge(path: Path) -> None:
    for _ in range(5):
        Ledger(path).charge(Charge(50.0, 0.5), 1e-6)


def test_processes_that_charge_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    workers = [multiprocessing.get_context("fork").Process(target=_charge, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(Ledger(path).rounds) == 15


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": "flexlora_fast.ledger/1"}',
        '{"format": "flexlora_fast.ledger/2", "adjacency": "add-or-remove-one-client", "rounds": []}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "replace-one", "rounds": []}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": [{"rate": 1}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": 0, "rate": 1}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": "1", "rate": 1}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": NaN, "rate": 1}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": 1, "rate": 1.5}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": Infinity, "rate": 1.0}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": 1e999, "rate": 1.0}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": true, "rate": true}]}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": {}}',
        '{"format": "flexlora_fast.ledger/1", "adjacency": "add-or-remove-one-client", "rounds": '
        '[{"noise_multiplier": 1.0, "rate": 1.0}], "rounds": []}',
        "[" * 100_000,
    ],
    ids=range(17),
)
def test_a_damaged_ledger_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(PrivacyError, match="restore it from a backup"):
        private.aggregator(privacy(ledger=Ledger(path)))
    with pytest.raises(PrivacyError, match="restore it from a backup"):
        Ledger(path).charge(Charge(1.0, 1.0), 1e-6)
    assert path.read_text() == text


def test_links_and_working_directories_make_no_second_ledger(tmp_path: Path, monkeypatch) -> None:
    one = Charge(1.0, 1.0)
    for folder in ("data", "job"):
        (tmp_path / folder).mkdir()
    link = tmp_path / "job" / "ledger.json"
    link.symlink_to(tmp_path / "data" / "ledger.json")  # which is not there yet
    Ledger(link).charge(one, 1e-6)
    assert link.is_symlink() and Ledger(tmp_path / "data" / "ledger.json").charge(one, 1e-6)[1] == 2
    monkeypatch.chdir(tmp_path / "data")
    ledger = Ledger("ledger.json")
    monkeypatch.chdir(tmp_path)
    assert ledger.charge(one, 1e-6)[1] == len(Ledger(link).rounds) == 3


def test_a_ledger_that_loses_rounds_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    ledger, of = Ledger(path), Charge(1.0, 1.0)
    ledger.charge(of, 1e-6)
    before = path.read_text()
    Ledger(path).charge(Charge(2.0, 1.0), 1e-6)  # by somebody else: seen
    assert ledger.rounds == [of, Charge(2.0, 1.0)]
    path.write_text(before)
    with pytest.raises(PrivacyError, match=r"it has 1 rounds, and not all of the 2 .* restore it from a backup"):
        ledger.charge(of, 1e-6)
    path.unlink()
    with pytest.raises(PrivacyError, match=r"it has 0 rounds, and not all of the 2"):
        private.aggregator(privacy(ledger=ledger))
    assert not path.exists()


def test_a_round_is_on_disk_before_its_noise_is_drawn(tmp_path: Path, monkeypatch) -> None:
    ledger = Ledger(tmp_path / "ledger.json")

    def crash() -> bytes:
        raise KeyboardInterrupt

    agg = private.aggregator(privacy(ledger=ledger))
    monkeypatch.setattr(private.mechanism, "fresh_key", crash)
    with pytest.raises(KeyboardInterrupt):
        agg.finish()
    assert len(ledger.rounds) == 1
    monkeypatch.undo()
    assert agg.finish().privacy.rounds == 2  # another release, charged again


def test_a_round_that_cannot_be_solved_costs_nothing() -> None:
    of = privacy()
    with pytest.raises(OptionError, match="memory_limit is"):
        private.aggregator(of, memory_limit=1000).finish()
    assert of.ledger.rounds == []


def test_the_budget_is_kept_before_anything_is_computed(monkeypatch) -> None:
    one = privacy(noise_multiplier=2.0).epsilon()
    of = privacy(noise_multiplier=2.0, max_epsilon=1.2 * one)
    agg, late = private.aggregator(of), private.aggregator(of)
    spent = agg.finish().privacy
    assert spent.epsilon == spent.total == pytest.approx(one) and spent.rounds == 1
    monkeypatch.setattr(private.mechanism, "fresh_key", lambda: pytest.fail("drawn"))
    for again in (agg, late):
        with pytest.raises(
            PrivacyError, match=r"after 1 rounds at epsilon .* one more would make it .* max_epsilon is"
        ):
            again.finish()
    with pytest.raises(PrivacyError, match="max_epsilon"):
        private.aggregator(of)
    assert len(of.ledger.rounds) == 1


def test_totals_of_rounds_with_other_noise_and_rates_add_up() -> None:
    ledger = Ledger()
    rounds = [Charge(1.0, 0.1), Charge(2.0, 1.0)]
    for charge in rounds:
        of = privacy(noise_multiplier=charge.noise_multiplier, rate=charge.rate, ledger=ledger)
        spent = private.aggregate(private.members(2), of).privacy
    assert spent.total == pytest.approx(epsilon(rounds, 1e-6)) and spent.rounds == 2
    assert spent.epsilon == pytest.approx(epsilon(rounds[1:], 1e-6)) and spent.epsilon < spent.total


def test_samples_are_of_the_rate_and_independent() -> None:
    names = [f"n{i}" for i in range(40_000)]
    of = privacy(rate=0.25)
    one, two = set(of.sample(names)), set(of.sample(names))
    for size, expected in ((len(one), 10_000), (len(two), 10_000), (len(one & two), 2_500)):
        assert abs(size - expected) < 6 * math.sqrt(expected)  # 2e-9 of failing by chance
    assert privacy(rate=1.0).sample(names) == names and privacy(rate=1e-12).sample(["a"]) == []
    assert of.sample([]) == []
    with pytest.raises(OptionError, match="'b' is in the population 2 times"):
        of.sample(["a", "b", "b"])


@pytest.mark.parametrize("name", ["dp_accounting", "cryptography.hazmat.primitives.ciphers"])
def test_missing_libraries_are_named(monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    ff.privacy.accounting._epsilon.cache_clear()
    with pytest.raises(PrivacyError, match=r"pip install 'flexlora_fast\[privacy\]'"):
        private.aggregate([])
