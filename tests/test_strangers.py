"""Rounds that strangers feed, and rounds in a caller's inference mode."""

from __future__ import annotations

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast import refusals
from flexlora_fast.errors import AdapterError, EmptyRoundError
from tests import checks, rounds


def test_refusals_are_counted_beyond_those_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may send, may send for ever."""
    monkeypatch.setattr(refusals, "MOST", 20)
    agg = ff.Aggregator()
    good = rounds.typical("linear")[0]
    agg.add(good.adapter(), client="good")
    for number in range(50):
        with pytest.raises(AdapterError):
            agg.add(good.adapter(), client="good" if number % 2 else "")
    assert len(agg.refused) == 21 and agg.refused.total == 50
    assert (agg.refused[-1].code, agg.refused[-1].reason) == ("others", "30 more were refused than are listed")
    update = agg.finish()
    assert len(update.refused) == 21 and update.refused[0].code == "adapter"
    assert "30 more were refused" in update.report().markdown()
    with pytest.raises(EmptyRoundError, match="2 were refused, the first"):
        empty = ff.Aggregator()
        for _ in range(2):
            with pytest.raises(AdapterError):
                empty.add(good.adapter(), client="")
        empty.finish()


def test_a_refused_name_and_reason_are_cut() -> None:
    agg = ff.Aggregator()
    with pytest.raises(AdapterError):
        agg.add(b"no policy", client="x" * 1_000_000)
    assert len(agg.refused[0].client) <= 256 and len(agg.refused[0].reason) <= 2_000


@pytest.mark.parametrize("where", ["add", "finish", "both", "before"])
def test_a_caller_s_inference_mode(where: str) -> None:
    """A server that evaluates in inference mode may aggregate there; what comes out is as ever, and can be trained."""
    clients = rounds.typical("mixed")
    with torch.inference_mode(where in ("before", "both")):
        adapters = [c.adapter() for c in clients]
        adapters = [
            ff.Adapter.from_state_dict({k: v * 1 for k, v in a.state_dict().items()}, a.config) for a in adapters
        ]
    agg = ff.Aggregator(rank=4)
    with torch.inference_mode(where in ("add", "both")):
        for c, adapter in zip(clients, adapters, strict=True):
            agg.add(adapter, c.weight, c.name)
    with torch.inference_mode(where in ("finish", "both")):
        update = agg.finish()
    checks.assert_identical(update, rounds_of(clients))
    assert not any(x.is_inference() for x in update.adapter(rank=4).state_dict().values())


def rounds_of(clients: list[rounds.Client]) -> ff.GlobalUpdate:
    return ff.aggregate(
        [c.adapter() for c in clients], [c.weight for c in clients], 4, clients=[c.name for c in clients]
    )


def test_factors_of_inference_mode_that_are_written_to_count_as_they_are() -> None:
    """Nothing tells that they were: Grams of them are not kept."""
    clients = [rounds.client(f"c{i}", [rounds.Layer("fc", 60, 70)], rank=90, seed=i) for i in range(3)]
    with torch.inference_mode():
        states = [{k: v.clone() for k, v in c.adapter().state_dict().items()} for c in clients]
        agg = ff.Aggregator(rank=4)
        adapters = [ff.Adapter.from_state_dict(s, c.adapter().config) for s, c in zip(states, clients, strict=True)]
        for c, adapter in zip(clients, adapters, strict=True):
            agg.add(adapter, client=c.name)
        for tensor in adapters[0].state_dict().values():
            tensor.mul_(0.5)
        update = agg.finish()
    expected = ff.aggregate(adapters, rank=4, clients=[c.name for c in clients])
    assert torch.allclose(update.delta("fc"), expected.delta("fc"), atol=1e-5 * expected.norm)
