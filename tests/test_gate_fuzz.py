"""A bounded share of ``make fuzz``, by chance instead of coverage, and the oracle's own test."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from flexlora_fast.gate import Reason
from tests import fuzzing, hostile

INPUTS = {"file": 4000, "config": 4000, "bent": 2000}  # some 4 s in all
# What a share of inputs this large always finds: that the mutations get past each stage of the gate.
FOUND = {
    "file": {"admitted", "header", "header-size", "unknown-tensor"},
    "config": {"admitted", "config", "config-rank", "unsupported", "pattern"},
    "bent": {"admitted", "header", "shape", "dtype", "not-finite", "norm", "missing-tensor", "unknown-tensor"},
}


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_any_input_is_refused_with_a_reason_or_within_the_policy(target: str) -> None:
    generator, pool, tokens = random.Random(f"{target}"), fuzzing.seeds(target), fuzzing.words(target)
    outcomes: Counter[str] = Counter()
    for data in [*pool, *(fuzzing.mutated(generator, pool, tokens) for _ in range(INPUTS[target]))]:
        try:
            outcomes[fuzzing.TARGETS[target](data)] += 1
        except Exception as error:
            raise AssertionError(f"target {target}, input {data!r}") from error
    assert outcomes.keys() <= {"admitted", *Reason} and FOUND[target] <= outcomes.keys(), outcomes


def test_good_uploads_are_admitted_and_the_corpus_is_not() -> None:
    for policy, files in fuzzing.GOOD.items():
        assert [fuzzing.judge(policy, data, None) for data in files] == ["admitted"] * len(files)
        assert fuzzing.judge(policy, files[0], fuzzing.ABOUT[policy][0]) == "admitted"
    for name, (content, code) in hostile.CONFIGS.items():
        assert fuzzing.judge(fuzzing.PLAIN, fuzzing.GOOD[fuzzing.PLAIN][3], content) == code, name


def test_nothing_bent_is_the_good_upload() -> None:
    for good in range(6):
        policy, weights, about = fuzzing.bend(bytes([0, good]))
        assert (policy, about) == (fuzzing.PLAIN, None)
        expected, found = load(fuzzing.GOOD[policy][good]), load(weights)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def _other_bits(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {hostile.A: state[hostile.A] * 2}


SPOILED: dict[str, Any] = {
    "other bits": (_other_bits, "other bits"),
    "another dtype": (lambda s: s | {hostile.A: s[hostile.A].half()}, "lora_A"),
    "a tensor more": (lambda s: s | {"x": torch.ones(1)}, "names differ"),
    "a tensor less": (lambda s: {k: v for k, v in s.items() if "head" not in k}, "names differ"),
}


@pytest.mark.parametrize(("change", "says"), SPOILED.values(), ids=SPOILED.keys())
def test_the_oracle_notices_what_differs_from_the_file(change: Any, says: str) -> None:
    weights = fuzzing.GOOD[fuzzing.PLAIN][3]
    adapter = fuzzing.PLAIN.admit(weights, client="c")
    with pytest.raises(AssertionError, match=says):
        fuzzing.check(fuzzing.PLAIN, adapter, save(change(load(weights))))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda X: X * float("nan"), "not finite"),
        (lambda X: X * 1e6, "has norm"),
    ],
)
def test_the_oracle_notices_what_a_gate_without_bounds_lets_in(
    change: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load(fuzzing.GOOD[fuzzing.PLAIN][3])
    spoiled = save(state | {hostile.A: change(state[hostile.A])})
    monkeypatch.setattr("flexlora_fast.gate.norms.check", lambda *_: None)
    with pytest.raises(AssertionError, match=says):
        fuzzing.judge(fuzzing.PLAIN, spoiled, None)


def test_what_a_bend_says_is_reproducible() -> None:
    data = random.Random(1).randbytes(40)
    (_, weights, about), (_, again, same) = fuzzing.bend(data), fuzzing.bend(data)
    assert weights == again and about == same and json.loads(about or b"{}") is not None
