"""The aggregator with APPFL's face: called as APPFL calls one, which need not be installed."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora_fast.errors import AdapterError, OptionError
from flexlora_fast.integrations.appfl import FlexLoRAAggregator
from tests import rounds
from tests.states import HOSTILE, A, check, expected, policy, state

MIXED = {"c1": (2, 10), 2: (4, 20), "c3": (8, 30)}  # ids are texts or integers there
STATES = [state(rank, seed) for seed, (rank, _) in enumerate(MIXED.values())]


def made(folder: Path, **more: Any) -> FlexLoRAAggregator:
    rounds.client("server", rank=8, alpha=8).adapter().save(folder / "initial")
    path = policy().save(folder / "policy.json")
    configs = {"policy": str(path), "initial": str(folder / "initial")} | more
    return FlexLoRAAggregator(model=None, aggregator_configs=configs, logger=None)


def after(aggregator: FlexLoRAAggregator, others: dict[Any, Any] | None = None) -> dict[str, torch.Tensor]:
    for client, (_, size) in MIXED.items():
        aggregator.set_client_sample_size(client, size)
    return aggregator.aggregate((others or {}) | dict(zip(MIXED, STATES, strict=True)), client_train_stats={})


def test_a_round_of_mixed_ranks_by_sample_size(tmp_path: Path) -> None:
    aggregator = made(tmp_path)
    found, sizes = after(aggregator), [size for _, size in MIXED.values()]
    check(found, expected(STATES, sizes, rank=8))
    again = aggregator.get_parameters(client_id="c1")
    assert all(torch.equal(again[key], x) for key, x in found.items())
    for rank in (2, 4):
        cut = aggregator.get_parameters(rank=rank)
        assert len(cut[A]) == rank
        check(cut, expected(STATES, sizes, rank=rank))


def test_the_first_parameters_are_the_initial_ones_and_nobodys_to_change(tmp_path: Path) -> None:
    aggregator = made(tmp_path)
    initial = rounds.client("server", rank=8, alpha=8).state_dict()
    aggregator.get_parameters()[A].zero_()
    check(aggregator.get_parameters(), expected([initial], [1], rank=8))


@pytest.mark.parametrize("what", HOSTILE)
def test_a_malformed_local_model_is_left_out(what: str, tmp_path: Path) -> None:
    bad, code = HOSTILE[what]
    aggregator = made(tmp_path)
    found, alone = after(aggregator, {"bad": bad}), after(made(tmp_path))
    assert [(refusal.client, refusal.code) for refusal in aggregator.refused] == [("bad", code)]
    assert all(torch.equal(found[key], x) for key, x in alone.items())
    assert aggregator.metrics[f"refused-{code}"] == 1


def test_a_bad_sample_size_and_a_round_below_its_quorum(tmp_path: Path) -> None:
    aggregator = made(tmp_path, options={"min_clients": 2})
    before = aggregator.get_parameters()
    aggregator.set_client_sample_size("a", -1)
    found = aggregator.aggregate({"a": state(2), "b": state(4)})
    assert [refusal.code for refusal in aggregator.refused] == ["weight"]
    assert all(torch.equal(found[key], x) for key, x in before.items())
    assert aggregator.aggregate({})[A].equal(before[A])


def test_what_is_not_configured_right_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rank 3"):
        made(tmp_path, rank=3)
    with pytest.raises(OptionError, match="give 'policy'"):
        FlexLoRAAggregator(aggregator_configs={"initial": str(tmp_path)})
    rounds.client("other", [rounds.Layer("fc", 3, 5)], rank=8).adapter().save(tmp_path / "other")
    with pytest.raises(AdapterError, match="the policy lists"):
        made(tmp_path, initial=str(tmp_path / "other"))


def test_the_methods_are_those_of_appfls_base_class() -> None:
    """``BaseAggregator`` of APPFL 1.12: set_client_sample_size, aggregate and get_parameters."""
    assert "appfl" not in sys.modules
    sizes = inspect.signature(FlexLoRAAggregator.set_client_sample_size).parameters
    assert list(sizes) == ["self", "client_id", "sample_size"]
    for name in ("aggregate", "get_parameters"):
        kinds = [p.kind for p in inspect.signature(getattr(FlexLoRAAggregator, name)).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD in kinds
