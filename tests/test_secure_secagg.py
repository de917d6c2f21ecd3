"""End to end through a simulated secure summation with dropouts: masks, Shamir's shares, and what the server sees."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

import flexlora_fast as ff
from examples import secagg
from flexlora_fast.secure import Plan, Server, add, sketch

ADAPTERS = secagg.toy_adapters(7)
NAMES = sorted(ADAPTERS)


def plan(**options: int) -> Plan:
    return Plan.from_adapter(
        ADAPTERS["client-2"], **{"rank": 4, "clients": 50, "clip": 60.0, "oversample": 4} | options
    )


def vectors(length: int = 5000, dtype: type = np.uint32) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.integers(0, 50, length).astype(dtype) for name in NAMES}


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize(
    "gone",
    [
        {},
        {"early": NAMES[:2]},
        {"late": NAMES[:1]},
        {"late": NAMES[-2:]},
        {"silent": NAMES[3:5]},
        {"early": NAMES[:1], "late": NAMES[3:4], "silent": NAMES[5:6]},
    ],
    ids=str,
)
def test_the_sum_is_that_of_all_who_sent_a_vector(gone: dict[str, list[str]], dtype: type) -> None:
    sent = vectors(dtype=dtype)
    total, view = secagg.secure_sum(sent, 4, **gone)
    expected = [sent[name] for name in NAMES if name not in {*gone.get("early", ()), *gone.get("late", ())}]
    assert total.dtype == dtype and np.array_equal(total, add(expected))
    assert len(view.masked) == len(expected)


@pytest.mark.parametrize("kind", ["early", "late", "silent"])
def test_too_few_clients_stop_the_round(kind: str) -> None:
    with pytest.raises(RuntimeError, match="3 clients are fewer than the threshold 4; the round stops"):
        secagg.secure_sum(vectors(), 4, **{kind: NAMES[:4]})


def test_the_server_sees_nothing_but_noise() -> None:
    """Every masked vector looks uniform on all 32 bits, none is a sketch, and every masking is another."""
    asked = plan(rounds=1)
    sent = {name: sketch(adapter, asked) for name, adapter in ADAPTERS.items()}
    views = [secagg.secure_sum(sent, 4, late=NAMES[:1], silent=NAMES[1:2])[1] for _ in range(2)]
    for index, name in enumerate(NAMES[1:], start=2):
        masked, again = (view.masked[index] for view in views)
        assert np.mean(masked == sent[name]) < 1e-2 and np.mean(masked == again) < 1e-2
        # A sketch is far from uniform: its bytes are those of small integers, positive or negative.
        assert unevenness(sent[name]) > 50
        assert unevenness(masked) < 6
        assert abs(np.corrcoef(masked.astype(float), sent[name].astype(float))[0, 1]) < 0.05


def unevenness(vector: np.ndarray) -> float:
    """χ² of the hypothesis that bytes are uniform, in its standard deviations above its mean: the worst byte's."""
    found = []
    for byte in vector.view(np.uint8).reshape(len(vector), -1).T:
        expected = len(byte) / 256
        chi2 = float(((np.bincount(byte, minlength=256) - expected) ** 2 / expected).sum())
        found.append((chi2 - 255) / (2 * 255) ** 0.5)
    return max(found)


def test_nobody_learns_both_secrets_of_a_client() -> None:
    """The shares that are revealed are of one secret each: a survivor's seed, or the key of one that dropped out."""
    _, view = secagg.secure_sum(vectors(), 4, late=NAMES[:1], silent=NAMES[1:2])
    assert len(view.revealed) == len(NAMES) - 2
    for shares in view.revealed.values():
        assert {owner: len(share) for owner, share in shares.items()} == {
            1: 32,  # the key of who dropped out, in two halves
            **dict.fromkeys(range(2, len(NAMES) + 1), 16),
        }


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_round_through_secure_summation_is_the_round_in_the_clear(count: int, bits: int) -> None:
    """With dropouts of every kind in every summed round; bit for bit, and FlexLoRA's within the stated excess."""
    asked = plan(rounds=count, bits=bits)
    hidden, clear, members = Server(asked), Server(asked), list(NAMES)
    while not hidden.done:
        assert hidden.message == clear.message
        sent = {name: sketch(ADAPTERS[name], asked, hidden.message) for name in members}
        late = members[:1] if hidden.stage <= 2 else []
        total, view = secagg.secure_sum(sent, 4, late=late, silent=members[-1:])
        counted = [name for name in members if name not in late]
        assert not any(np.array_equal(masked, mine) for masked in view.masked.values() for mine in sent.values())
        hidden.receive(total)
        clear.receive(add(sent[name] for name in counted))
        members = counted
    update, other = hidden.finish(), clear.finish()
    plain = ff.aggregate([ADAPTERS[name] for name in members], rank=4)
    for layer in update:
        assert all(
            np.array_equal(getattr(update[layer].factorization, part), getattr(other[layer].factorization, part))
            for part in ("U", "S", "V")
        )
        exact = sum(ADAPTERS[name].delta(layer).double() for name in members) / len(members)
        excess = float((exact - update.delta(layer)).norm()) / plain[layer].error(4)
        assert excess <= {1: 2.0, 2: 2.0, 4: 1.05}[count]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    secagg.main()
    told = capsys.readouterr().out
    assert "round 4: 5 clients, 5 masked vectors of " in told
    assert "by secure aggregation of 5 clients in 4 rounds" in told
    counts = [int(count) for count in re.findall(r"(\d+) masked vectors", told)]
    assert len(counts) == 4 and all(a - b != 1 for a, b in pairwise(counts))  # no two sums tell one client's part


def test_no_party_answers_twice() -> None:
    """A server that first calls a client a survivor, and then one that dropped out, would have both its secrets."""
    parties = {i: secagg.Party(i, 2) for i in (1, 2, 3)}
    keys = {i: party.advertise() for i, party in parties.items()}
    letters = {i: party.share(keys) for i, party in parties.items()}
    parties[1].mask(vectors()[NAMES[0]], {i: letters[i][1] for i in parties})
    parties[1].unmask([1, 2, 3])
    with pytest.raises(RuntimeError, match="asked for already"):
        parties[1].unmask([1, 2])
