"""Runs on a made-up task: every method, the same numbers for a seed, and what goes wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexlora_fast import methods
from flexlora_fast.errors import OptionError, SimulationError
from flexlora_fast.simulate import results, worker
from flexlora_fast.simulate.run import run
from tests.simulations import colours, experiment, numbers  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("colours")


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_plays_its_rounds(name: str, tmp_path: Path) -> None:
    equal = {} if methods.METHODS[name].mixed else {"ranks__everyone": "smallest"}
    summary = run(experiment(method__name=name, **equal), tmp_path, workers=0)
    found = results.read(tmp_path)
    assert [line.round for line in found.rounds] == [0, 1, 2]
    assert summary["method"] == name and 0 <= summary["final"] <= 1
    assert found.scores["test"].shape == (12,) and found.scores["unseen"].shape == (12,)
    for line in found.rounds[1:]:
        assert not line.refused and len(line.train.clients) == 3
        assert line.update.norm > 0 and line.bytes.up > 0 and line.bytes.down > 0
        assert all(part.loss is not None for part in (line.train, line.test, line.unseen))
    losses = [line.test.loss for line in found.rounds]
    assert losses[0] != losses[1] != losses[2]


def test_the_same_seed_gives_the_same_numbers_and_another_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(experiment(seed=seed, lora__dropout=0.1), tmp_path / name, workers=0)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")
    assert (tmp_path / "a/scores.npz").read_bytes() == (tmp_path / "b/scores.npz").read_bytes()
