"""Replies of nodes that are not in order: refused by code, and nothing else comes of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg, Strategy

from flexlora_fast.integrations.flower import (
    FlexLoRAStrategy,
    wire,
)
from tests import flower, rounds
from tests.flower import RANKS, A, B, LocalGrid, app, three, trains, undisturbed


def state(rank: int = 4) -> dict[str, torch.Tensor]:
    return rounds.client("bad", rank=rank, alpha=flower.ALPHA).state_dict()


def changed(**changes: Any) -> dict[str, torch.Tensor]:
    named = {{"A": A, "B": B}.get(key, key): value for key, value in changes.items()}
    return {key: x for key, x in (state() | named).items() if x is not None}


def reply(record: Any = None, **metrics: Any) -> RecordDict:
    return flower.reply_of(state() if record is None else record, **metrics)


def without(content: RecordDict, key: str) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if name != key})


def and_more(content: RecordDict, **records: Any) -> RecordDict:
    return RecordDict({**content, **records})


def with_nan() -> torch.Tensor:
    return state()[A].index_fill(0, torch.tensor([1]), math.nan)


HOSTILE: dict[str, tuple[Any, str]] = {
    "raises": (lambda: 1 / 0, "failed"),
    "nothing": (RecordDict, "records"),
    "no arrays": (lambda: without(reply(), "arrays"), "records"),
    "two sets of arrays": (lambda: and_more(reply(), more=ArrayRecord()), "records"),
    "a config for arrays": (lambda: and_more(reply(), arrays=ConfigRecord({"x": 1})), "records"),
    "no metrics": (lambda: without(reply(), "metrics"), "records"),
    "two sets of metrics": (lambda: and_more(reply(), more=MetricRecord()), "records"),
    "no number of examples": (lambda: and_more(reply(), metrics=MetricRecord({"loss": 1.0})), "records"),
    "a list of examples": (lambda: reply(weight=[1, 2]), "weight"),
    "NaN examples": (lambda: reply(weight=math.nan), "weight"),
    "infinite examples": (lambda: reply(weight=math.inf), "weight"),
    "negative examples": (lambda: reply(weight=-1), "weight"),
    "more examples than allowed": (lambda: reply(weight=10**9), "weight"),
    "a NaN loss": (lambda: reply(loss=math.nan), "metrics"),
    "an infinite loss in a list": (lambda: reply(losses=[1.0, -math.inf]), "metrics"),
    "a metric with a long name": (lambda: reply(**{"x" * 257: 1.0}), "metrics"),
    "a million metrics": (lambda: reply(losses=[0.0] * 10**6), "metrics"),
    "NaN": (lambda: reply(changed(A=with_nan())), "not-finite"),
    "infinities": (lambda: reply(changed(B=torch.full((29, 4), math.inf))), "not-finite"),
    "an update of norm 1e30": (lambda: reply(changed(B=torch.full((29, 4), 1e30))), "norm"),
    "no tensors": (lambda: reply({}), "missing-tensor"),
    "a tensor less": (lambda: reply(changed(A=None)), "missing-tensor"),
    "a tensor more": (lambda: reply(changed(**{"base_model.model.x": torch.ones(1)})), "unknown-tensor"),
    "a path for a name": (lambda: reply(changed(**{"../../etc/passwd\0": torch.ones(1)})), "unknown-tensor"),
    "a rank of 3": (lambda: reply(state(3)), "rank"),
    "a rank of 64": (lambda: reply(state(64)), "file-size"),
    "ranks that differ": (lambda: reply(changed(A=torch.ones(2, 12))), "shape"),
    "another shape": (lambda: reply(changed(A=torch.ones(4, 13))), "shape"),
    "another order": (lambda: reply(changed(A=torch.ones(12, 4))), "shape"),
    "one dimension": (lambda: reply(changed(A=torch.ones(48))), "shape"),
    "none": (lambda: reply(changed(A=torch.tensor(1.0))), "shape"),
    "empty": (lambda: reply(changed(A=torch.ones(0, 12))), "shape"),
    "float64": (lambda: reply(changed(A=torch.ones(4, 12, dtype=torch.float64))), "dtype"),
    "integers": (lambda: reply(changed(A=torch.ones(4, 12, dtype=torch.int32))), "dtype"),
    "a pickle": (
        lambda: RecordDict(
            {
                "arrays": ArrayRecord({A: Array("float32", (4, 12), wire.NUMPY, b"\x80\x04.")}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        ),
        "content",
    ),
}


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a journal"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_reply_is_refused_and_changes_nothing(name: str, kept: bool, tmp_path: Path) -> None:
    bad, code = HOSTILE[name]
    alone = undisturbed()
    grid = three()
    grid.apps[9] = app(lambda message, context: bad())
    run = FlexLoRAStrategy(flower.policy(), ranks=RANKS | {9: 4}, directory=tmp_path if kept else None)
    result = run.start(grid, flower.initial(), num_rounds=2)
    assert result.arrays == alone.arrays  # to the last bit
    for number in (1, 2):
        assert [(refusal.client, refusal.code) for refusal in run.refused[number]] == [("node-9", code)]
        metrics = result.train_metrics_clientapp[number]
        assert (metrics["flexlora-accepted"], metrics["flexlora-refused"], metrics[f"flexlora-refused-{code}"]) == (
            3,
            1,
            1,
        )
        assert metrics["flexlora-norm"] == alone.train_metrics_clientapp[number]["flexlora-norm"]
    refusal = run.refused[1][0]
    assert refusal.reason.startswith("client 'node-9'")
    assert len(refusal.reason) < 700
    assert refusal.reason.isprintable()


def test_hostile_replies_are_kept_as_evidence(tmp_path: Path) -> None:
    grid = three()
    grid.apps[9] = app(lambda message, context: reply(changed(A=with_nan())))
    run = FlexLoRAStrategy(flower.policy(), ranks=RANKS | {9: 4}, directory=tmp_path)
    run.start(grid, flower.initial(), num_rounds=1)
    assert run.update is not None
    assert [(refusal.client, refusal.code) for refusal in run.update.refused] == [("node-9", "not-finite")]
    assert any((tmp_path / "round-0001" / "quarantine").iterdir())


def test_flowers_own_driver_takes_no_harm_either() -> None:
    """``Strategy.start`` hands over all replies at once; only decoding them is then out of our hands."""
    grid = three()
    grid.apps[9] = app(lambda message, context: 1 / 0)
    run = FlexLoRAStrategy(flower.policy(), ranks=RANKS | {9: 4})
    result = Strategy.start(run, grid, flower.initial(), num_rounds=2)
    assert result.train_metrics_clientapp[2]["flexlora-refused-failed"] == 1
    assert result.arrays == undisturbed().arrays


def test_flowers_fedavg_ends_the_run_where_one_reply_is_bad() -> None:
    """What the strategy is for: if Flower learns to go on, the README should say so."""
    grid = LocalGrid({node: app(trains(8, seed=node)) for node in (1, 2)}, {})
    grid.apps[9] = app(lambda message, context: without(reply(state(8)), "metrics"))
    with pytest.raises(InconsistentMessageReplies):
        FedAvg().start(grid, flower.initial(), num_rounds=1)


def test_a_node_that_answers_twice_is_counted_once() -> None:
    grid = three()
    run = FlexLoRAStrategy(flower.policy(), ranks=RANKS)
    messages = list(run.configure_train(1, flower.initial(), ConfigRecord(), grid))
    answers = list(grid.send_and_receive(messages))
    _, metrics = run.aggregate_train(1, [*answers, answers[0]])
    assert metrics is not None
    assert (metrics["flexlora-accepted"], metrics["flexlora-refused-incompatible"]) == (3, 1)


class Broken(LocalGrid):
    """A grid on which the reply of node 2 cannot be decoded, that of 3 does not come, and 4 cannot be sent to."""

    error: Exception = TypeError("Invalid arguments for Array")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        if message_id.startswith("2-"):
            raise self.error
        return [] if message_id.startswith("3-") else super().pull_messages(message_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        return [None] if messages[0].metadata.dst_node_id == 4 else super().push_messages(messages)  # type: ignore


def test_what_cannot_be_decoded_is_its_nodes_alone() -> None:
    grid = Broken({node: app(trains(4, seed=node)) for node in (1, 2, 3, 4)}, {})
    run = FlexLoRAStrategy(flower.policy(), ranks=4, fraction_evaluate=0.0)
    result = run.start(grid, flower.initial(), num_rounds=1, timeout=0.5)
    metrics = result.train_metrics_clientapp[1]
    assert [(refusal.client, refusal.code) for refusal in run.refused[1]] == [("node-2", "unreadable")]
    assert (metrics["flexlora-accepted"], metrics["flexlora-silent"]) == (1, 2)


@pytest.mark.parametrize("error", [httpx.ConnectError("gone"), ConnectionResetError("gone")])
def test_a_superlink_that_is_gone_ends_the_run(error: Exception) -> None:
    grid = Broken({node: app(trains(4, seed=node)) for node in (1, 2)}, {})
    grid.error = error
    with pytest.raises(type(error), match="gone"):
        FlexLoRAStrategy(flower.policy(), ranks=4).start(grid, flower.initial(), num_rounds=1)
