"""Rounds of state dicts for any framework: exact, and unmoved by what is not in order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.integrations.served import Served
from flexlora_fast.integrations.states import at_rank, upload_of
from tests import states
from tests.states import HOSTILE, A, check, expected, policy, state

MIXED = [(2, 10), (4, 20), (8, 30)]


def mixed() -> tuple[list[states.State], list[float]]:
    return [state(rank, seed) for seed, (rank, _) in enumerate(MIXED)], [weight for _, weight in MIXED]


def after(served: Served) -> states.State:
    """The round of three clients of mixed ranks."""
    for number, (sent, weight) in enumerate(zip(*mixed(), strict=True)):
        assert served.take(sent, weight, f"c{number}") is None
    found = served.finish()
    assert found is not None
    return found


def test_the_round_is_the_truncated_svd_of_the_scaled_sum() -> None:
    served = Served(policy())
    found = after(served)
    assert len(found[A]) == 8
    check(found, expected(*mixed(), rank=8))
    assert served.metrics["accepted"] == 3 and served.metrics["refused"] == 0
    assert {"norm", "seconds", "energy-kept-r2", "energy-kept-r4", "energy-kept-r8"} <= served.metrics.keys()
    assert {name: set(ranks.values()) for name, ranks in served.ranks.items()} == {"c0": {2}, "c1": {4}, "c2": {8}}


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_a_client_gets_the_update_truncated_to_its_rank_at_its_scale(rank: int) -> None:
    cut = at_rank(after(Served(policy())), policy(), rank)
    assert len(cut[A]) == rank
    check(cut, expected(*mixed(), rank=rank))


def test_a_client_gets_the_first_rows_of_what_begins_at_zero() -> None:
    initial = {key: x if "lora_A" in key else torch.zeros_like(x) for key, x in state(8).items()}
    cut = at_rank(initial, policy(), 2)
    assert torch.equal(cut[A], initial[A][:2])
    assert not cut[states.B].any()


def test_a_cut_to_a_rank_that_is_not_allowed_or_of_other_tensors() -> None:
    with pytest.raises(OptionError, match="rank 3 is none that the policy allows"):
        at_rank(state(8), policy(), 3)
    with pytest.raises(OptionError, match="rank True"):
        at_rank(state(8), policy(), True)
    with pytest.raises(AdapterError, match="has no 'base_model"):
        at_rank({"x": torch.ones(1)}, policy(), 2)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bad_state_dict_is_refused_by_code_and_changes_nothing(what: str) -> None:
    bad, code = HOSTILE[what]
    served = Served(policy())
    refusal = served.take(bad, 10, "bad")
    assert refusal is not None and (refusal.client, refusal.code) == ("bad", code), refusal
    assert "bad" in refusal.reason
    found, alone = after(served), after(Served(policy()))
    assert all(torch.equal(found[key], alone[key]) for key in alone)
    assert served.metrics["refused"] == served.metrics[f"refused-{code}"] == 1
    assert served.refused == [refusal]


@pytest.mark.parametrize("weight", [None, "10", True, -1, float("nan"), float("inf"), 1e9, [1], 10**400])
def test_a_bad_weight_is_refused(weight: Any) -> None:
    refusal = Served(policy()).take(state(), weight, "bad")
    assert refusal is not None and refusal.code == "weight"


@pytest.mark.parametrize("name", ["", None, 7])
def test_a_client_without_a_name_is_refused(name: Any) -> None:
    refusal = Served(policy()).take(state(), 1, name)
    assert refusal is not None and refusal.code in ("name", "adapter")


def test_the_second_of_a_name_is_refused() -> None:
    served = Served(policy())
    assert served.take(state(), 1, "a") is None
    assert served.take(state(seed=1), 1, "a") is not None
    assert served.clients == ["a"]


def test_a_round_of_nobody_or_below_its_quorum_changes_nothing() -> None:
    served = Served(policy(), options={"min_clients": 2})
    assert served.finish() is None
    served.begin()
    assert served.take(state(), 1, "a") is None
    assert served.finish() is None
    assert served.metrics["accepted"] == 1 and "norm" not in served.metrics
    served.begin()
    check(after(served), expected(*mixed(), rank=8))


def test_a_round_begins_with_the_first_who_comes_after_the_last_one() -> None:
    served = Served(policy())
    assert served.take(None, 1, "bad") is not None
    first = after(served)
    assert len(served.refused) == 1
    second = after(served)
    assert not served.refused
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_go_into_the_round_bit_for_bit(dtype: torch.dtype) -> None:
    served, sent = Served(policy()), state(4, dtype=dtype)
    assert served.take(sent, 1, "a") is None
    found = served.finish()
    assert found is not None
    check(found, expected([sent], [1], rank=8))


def test_arrays_of_numpy_however_they_lie_are_tensors() -> None:
    sent = state(4)
    arrays = {key: x.numpy() for key, x in sent.items()}
    for number, ways in enumerate((np.asfortranarray, lambda x: x[::-1][::-1], lambda x: x[::-1].copy()[::-1])):
        served = Served(policy())
        assert served.take({key: ways(x) for key, x in arrays.items()}, 1, f"c{number}") is None
        found = served.finish()
        assert found is not None
        check(found, expected([sent], [1], rank=8))


def test_tensors_that_share_memory_or_are_views() -> None:
    both = torch.randn(4, 12 + 29)
    served, sent = Served(policy()), states.changed(A=both[:, :12], B=both[:, 12:].T)
    assert served.take(sent, 1, "a") is None
    found = served.finish()
    assert found is not None
    check(found, expected([sent], [1], rank=8))


def test_references_are_read_once_and_none_of_a_file_that_is_too_large(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    with large.open("wb") as file:
        file.truncate(10**9)
    sent = {key: states.Reference(x, str(small)) for key, x in state().items()}
    assert upload_of(sent, policy()) == upload_of(state(), policy())
    assert all(value.read == 1 for value in sent.values())
    sent[A] = states.Reference(state()[A], str(large))
    refusal = Served(policy()).take(sent, 1, "a")
    assert refusal is not None and refusal.code == "file-size"
    assert sent[A].read == 0


def test_clients_may_come_from_several_threads() -> None:
    served = Served(policy())
    sent, weights = mixed()
    with ThreadPoolExecutor(3) as pool:
        refusals = list(pool.map(served.take, sent, weights, ["c0", "c1", "c2"]))
    assert refusals == [None] * 3
    found, alone = served.finish(), after(Served(policy()))
    assert found is not None and all(torch.equal(found[key], alone[key]) for key in alone)


def test_a_policy_is_itself_its_document_or_its_file(tmp_path: Path) -> None:
    path = policy().save(tmp_path / "policy.json")
    for given in (policy(), policy().to_json(), path, str(path)):
        assert Served(given).policy == policy()


def test_what_cannot_be_served_is_said_at_once() -> None:
    with pytest.raises(OptionError, match="partial"):
        Served(policy(partial=True))
    with pytest.raises(OptionError, match="rank 3"):
        Served(policy(), rank=3)
    with pytest.raises(OptionError, match="'spool'"):
        Served(policy(), options={"spool": "x"})


def test_heads_are_averaged_and_travel_with_the_factors() -> None:
    from flexlora_fast import RoundPolicy
    from tests import rounds

    head = {"classifier.weight": torch.ones(3, 5)}
    reference = rounds.client("server", rank=8, alpha=8).but(extras=head)
    rules = RoundPolicy.from_adapter(reference.adapter(), ranks=(4, 8), max_weight=10.0)
    key = rounds.PREFIX + "classifier.weight"
    served = Served(rules)
    assert served.take(state(4) | {key: torch.ones(3, 5)}, 1, "a") is None
    assert served.take(state(4, 1) | {key: 4 * torch.ones(3, 5)}, 2, "b") is None
    found = served.finish()
    assert found is not None
    assert torch.allclose(found[key], torch.full((3, 5), 3.0))
    assert torch.equal(at_rank(found, rules, 4)[key], found[key])
