"""Rounds of Flower in this process: what each node is sent, against float64, and what the server takes no harm from."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg, Result, Strategy

import flexlora_fast as ff
from flexlora_fast.integrations.flower import (
    FlexLoRAStrategy,
    from_record,
    rank_mod,
    replies,
    strategy,
    to_record,
    wire,
)
from tests import flower, rounds
from tests.flower import LocalGrid, app, trains

A, B = rounds.LINEAR[0].keys()
RANKS = {1: 2, 2: 4, 3: 8}
LOWEST = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


def three(**configs: Any) -> LocalGrid:
    """Nodes 1, 2, 3 of ranks 2, 4, 8 and weights 10, 20, 30."""
    apps = {node: app(trains(rank, seed=node, weight=10 * node)) for node, rank in RANKS.items()}
    return LocalGrid(apps, configs.get("configs", {node: {"lora-rank": rank} for node, rank in RANKS.items()}))


def ranks_sent(grid: LocalGrid, node: int) -> list[int]:
    """The rank of each training message's arrays."""
    return [from_record(message.content["arrays"])[A].shape[0] for message in trainings(grid, node)]


def trainings(grid: LocalGrid, node: int) -> list[Message]:
    return [m for m in grid.sent[node] if m.metadata.message_type == "train" and "arrays" in m.content]


def truth(grid: LocalGrid, number: int, layer: str) -> torch.Tensor:
    """Σ w·s·B·A of a round in float64, from what the nodes were sent and the noise they are known to add."""
    total = torch.zeros(())
    for node, rank in RANKS.items():
        message = trainings(grid, node)[number - 1]
        local = Message(RecordDict(dict(message.content)), metadata=message.metadata)
        context = Context(1, node, {"lora-rank": rank}, RecordDict(), {})
        adapter = flower.adapter_of(grid.apps[node](local, context).content["arrays"], rank)
        A, B = (X[0].double() for X in adapter.factors(layer))
        total = total + node / 6 * flower.ALPHA / rank * (B @ A)
    return total


def best(dense: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * float(wanted.norm()))


@pytest.mark.parametrize("ranks", [None, RANKS, RANKS.get], ids=["learnt", "given", "by a function"])
def test_each_node_is_sent_the_truncated_svd_at_its_rank(ranks: Any) -> None:
    grid = three()
    run = FlexLoRAStrategy(flower.policy(), ranks=ranks, options={"tol": 0})
    result = run.start(grid, flower.initial(), num_rounds=3)
    for layer in flower.policy().specs:
        for number in (1, 2):
            whole = truth(grid, number, layer)
            for node, rank in RANKS.items():
                sent = flower.adapter_of(trainings(grid, node)[number].content["arrays"], rank)
                close(sent.delta(layer), best(whole, rank))
        close(
            flower.adapter_of(result.arrays, flower.LARGEST).delta(layer), best(truth(grid, 3, layer), flower.LARGEST)
        )
    assert {node: ranks_sent(grid, node) for node in RANKS} == {
        node: [rank if ranks else flower.LARGEST, rank, rank] for node, rank in RANKS.items()
    }


def test_ranks_are_asked_for() -> None:
    grid = three()
    FlexLoRAStrategy(flower.policy(), query_ranks=True).start(grid, flower.initial(), num_rounds=2)
    assert {node: ranks_sent(grid, node) for node in RANKS} == {node: [rank] * 2 for node, rank in RANKS.items()}
    assert all(sum("arrays" not in message.content for message in grid.sent[node]) == 1 for node in RANKS)


@pytest.mark.parametrize("answer", [3, -1, "many", 2.0, None])
def test_a_bad_answer_leaves_the_rank_unknown(answer: Any) -> None:
    def train(message: Message, context: Context) -> RecordDict:
        if "arrays" not in message.content:
            return RecordDict({"flexlora": ConfigRecord({} if answer is None else {"lora-rank": answer})})
        return trains(8)(message, context)

    def unchanged(message: Message, context: Context, call_next: Any) -> Message:
        return call_next(message, context)

    grid = LocalGrid({1: app(train, unchanged)}, {})
    run = FlexLoRAStrategy(flower.policy(), query_ranks=True, **LOWEST)
    result = run.start(grid, flower.initial(), num_rounds=1)
    assert ranks_sent(grid, 1) == [8]
    assert sum("arrays" not in message.content for message in grid.sent[1]) == 1
    assert result.train_metrics_clientapp[1]["flexlora-accepted"] == 1


def test_nodes_of_one_rank_share_what_is_sent() -> None:
    grid = LocalGrid({node: app(trains(4, seed=node)) for node in range(4)}, {})
    FlexLoRAStrategy(flower.policy(), ranks=4).start(grid, flower.initial(), num_rounds=1)
    assert len({id(trainings(grid, node)[0].content["arrays"]) for node in range(4)}) == 1


@pytest.mark.parametrize("ranks", [3, True, {1: 16}, lambda node: 5], ids=["3", "True", "16", "function"])
def test_ranks_that_the_policy_does_not_allow_are_the_servers_error(ranks: Any) -> None:
    with pytest.raises(ff.errors.OptionError, match="none that the policy allows"):
        FlexLoRAStrategy(flower.policy(), ranks=ranks).start(three(), flower.initial(), num_rounds=1)


def test_a_node_above_the_carried_rank_is_sent_columns_that_hold_nothing() -> None:
    grid = LocalGrid({1: app(trains(8))}, {1: {"lora-rank": 8}})
    small = to_record({key: X[:2] if "lora_A" in key else X[:, :2] for key, X in from_record(flower.initial()).items()})
    result = FlexLoRAStrategy(flower.policy(), ranks=8, **LOWEST).start(grid, small, num_rounds=2)
    assert from_record(result.arrays)[A].shape[0] == 2
    assert ranks_sent(grid, 1) == [8, 8]
    second = from_record(trainings(grid, 1)[1].content["arrays"])
    assert second[B][:, :2].any()
    assert not second[B][:, 2:].any()


@pytest.mark.parametrize("scale", ["alpha", "constant", lambda layer, rank: 3.0 / rank + len(layer)])
def test_the_mod_cuts_at_the_scale_that_the_server_has_for_the_rank(scale: Any) -> None:
    policy, seen = flower.policy(scale=scale), {}

    def train(message: Message, context: Context) -> RecordDict:
        seen.update(from_record(message.content["arrays"]))
        return flower.reply_of(from_record(message.content["arrays"]))

    grid = LocalGrid({1: app(train)}, {1: {"lora-rank": 2}})
    run = FlexLoRAStrategy(policy, options={"tol": 0}, **LOWEST)
    run.start(grid, flower.initial(trained=True), num_rounds=1)
    whole = from_record(flower.initial(trained=True))
    for layer, spec in policy.specs.items():
        wanted = policy.scale(layer, 8) * (whole[spec.b_key].double() @ whole[spec.a_key].double())
        close(policy.scale(layer, 2) * (seen[spec.b_key] @ seen[spec.a_key]), best(wanted, 2))


def test_where_a_node_finds_its_rank() -> None:
    def sent_to(mod: Any, node_config: dict[str, Any], run_config: dict[str, Any]) -> int:
        grid, found = LocalGrid({1: app(trains(8))}, {}), []

        def train(message: Message, context: Context) -> RecordDict:
            found.append(from_record(message.content["arrays"])[A].shape[0])
            return RecordDict()

        FlexLoRAStrategy(flower.policy(), **LOWEST).start(grid, flower.initial(), num_rounds=1)
        message = Message(RecordDict(dict(grid.sent[1][0].content)), metadata=grid.sent[1][0].metadata)
        app(train, mod)(message, Context(1, 1, node_config, RecordDict(), run_config))
        return found[0]

    default = strategy_mod()
    assert sent_to(default, {"lora-rank": 2}, {"lora-rank": 4}) == 2
    assert sent_to(default, {}, {"lora-rank": 4}) == 4
    assert sent_to(default, {}, {}) == 8
    assert sent_to(rank_mod(lambda context: context.node_config["partition-id"] * 2), {"partition-id": 2}, {}) == 4
    for bad in (0, -1, 2.0, "2", True):
        with pytest.raises(ff.errors.OptionError, match="integer of at least 1"):
            sent_to(default, {"lora-rank": bad}, {})
    with pytest.raises(ff.errors.OptionError, match=r"is 3, and the server admits \[1, 2, 4, 8\]"):
        sent_to(default, {"lora-rank": 3}, {})


def strategy_mod() -> Any:
    from flexlora_fast.integrations.flower import flexlora_mod

    return flexlora_mod


def test_messages_of_other_strategies_pass_the_mod() -> None:
    LocalGrid({}, {})
    content = RecordDict({"arrays": flower.initial(), "flexlora": MetricRecord({"x": 1})})
    message = Message(content, dst_node_id=1, message_type="train")
    passed = strategy_mod()(message, Context(1, 1, {"lora-rank": 2}, RecordDict(), {}), lambda msg, ctx: msg)
    assert passed is message
    assert from_record(passed.content["arrays"])[A].shape[0] == 8


# -- replies that are not in order ---


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


@functools.cache
def undisturbed() -> Result:
    return FlexLoRAStrategy(flower.policy(), ranks=RANKS).start(three(), flower.initial(), num_rounds=2)


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


@pytest.mark.parametrize("model", ["mixed", "weird"])
def test_layers_of_every_kind_go_there_and_back(model: str) -> None:
    def train(message: Message, context: Context) -> RecordDict:
        generator = torch.Generator().manual_seed(context.node_id)
        state = from_record(message.content["arrays"])
        return flower.reply_of({key: x + torch.randn(x.shape, generator=generator) for key, x in state.items()})

    server = rounds.client("server", model, rank=6, alpha=3).adapter()
    policy = ff.RoundPolicy.from_adapter(server, ranks=(1, 3, 6), max_weight=100.0)
    grid = LocalGrid({node: app(train) for node in (1, 2)}, {1: {"lora-rank": 1}, 2: {"lora-rank": 3}})
    run = FlexLoRAStrategy(policy, fraction_evaluate=0.0, options={"tol": 0})
    result = run.start(grid, to_record(server.state_dict()), num_rounds=2)
    sent = [
        ff.Adapter.from_state_dict(
            from_record(grid.received[node][-1].content["arrays"]), server.config | {"r": rank}, client=str(node)
        )
        for node, rank in ((1, 1), (2, 3))
    ]
    wanted = ff.aggregate(sent, rank=6, tol=0)
    found = ff.Adapter.from_state_dict(from_record(result.arrays), server.config)
    for layer in server.layers:
        whole = wanted.delta(layer).double()
        torch.testing.assert_close(found.delta(layer).double(), whole, rtol=0, atol=1e-5 * float(whole.norm()))


def test_a_policy_from_shapes_alone_will_do() -> None:
    shapes = {layer: (spec.m, spec.n) for layer, spec in flower.policy().specs.items()}
    policy = ff.RoundPolicy.from_config({"r": 8, "lora_alpha": 8}, shapes, ranks=(2, 4, 8), max_weight=100.0)
    result = FlexLoRAStrategy(policy, ranks=RANKS).start(three(), flower.initial(), num_rounds=2)
    assert result.arrays == undisturbed().arrays


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


# -- rounds that fail, metrics, evaluation ---


def test_a_round_that_nobody_joins_changes_nothing() -> None:
    grid = LocalGrid({node: app(lambda message, context: 1 / 0) for node in (1, 2)}, {})
    run = FlexLoRAStrategy(flower.policy(), ranks=4)
    result = run.start(grid, flower.initial(), num_rounds=2)
    assert result.arrays == flower.initial()
    assert run.update is None
    metrics = result.train_metrics_clientapp[2]
    assert (metrics["flexlora-accepted"], metrics["flexlora-refused-failed"]) == (0, 2)


@pytest.mark.parametrize("size", [1e12, 1e18, 1e19, 3e37])
def test_huge_updates_under_a_policy_without_bounds_do_not_end_the_run(size: float) -> None:
    def huge(message: Message, context: Context) -> RecordDict:
        state = from_record(message.content["arrays"])
        return flower.reply_of({key: torch.full_like(x, size if "lora_B" in key else 1.0) for key, x in state.items()})

    grid = three()
    grid.apps[9] = app(huge)
    run = FlexLoRAStrategy(flower.policy(max_layer_norm=math.inf), ranks=RANKS | {9: 4})
    result = run.start(grid, flower.initial(), num_rounds=2)
    assert len(result.train_metrics_clientapp) == 2
    assert all(bool(x.isfinite().all()) for x in from_record(result.arrays).values())


def test_weights_of_zero_change_nothing() -> None:
    grid = LocalGrid({node: app(trains(4, seed=node, weight=0)) for node in (1, 2)}, {})
    result = FlexLoRAStrategy(flower.policy(), ranks=4).start(grid, flower.initial(), num_rounds=1)
    assert result.arrays == flower.initial()


def test_a_defence_is_an_option() -> None:
    grid = three()
    run = FlexLoRAStrategy(flower.policy(), ranks=RANKS, options={"defence": "clip"})
    run.start(grid, flower.initial(), num_rounds=1)
    assert run.update is not None
    assert len(run.update.verdicts) == 3
    with pytest.raises(ff.errors.OptionError, match="strategy's own"):
        FlexLoRAStrategy(flower.policy(), options={"rank": 4})


def test_metrics_of_a_round() -> None:
    apps = {
        1: app(trains(2, seed=1, weight=10, loss=1.0, steps=[1, 2])),
        2: app(trains(4, seed=2, weight=30, loss=2.0)),
    }
    grid = LocalGrid(apps, {1: {"lora-rank": 2}, 2: {"lora-rank": 4}})
    run = FlexLoRAStrategy(flower.policy())
    metrics = run.start(grid, flower.initial(), num_rounds=1).train_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx(1.75)
    assert "steps" not in metrics  # one of two is not most
    assert run.update is not None
    assert metrics["flexlora-norm"] == run.update.norm
    assert metrics["flexlora-energy-kept-r2"] == run.update.energy_kept(2)
    assert metrics["flexlora-energy-kept-r2"] < metrics["flexlora-energy-kept-r4"] <= 1
    assert metrics["flexlora-seconds"] > 0


def test_most_decide_which_metrics_there_are() -> None:
    records = [MetricRecord({"n": 1, "loss": 1.0}), MetricRecord({"n": 2, "loss": 2.0}), MetricRecord({"n": 3, "x": 0})]
    assert [dict(content["metrics"]) for content in replies.comparable(records)] == [dict(records[0]), dict(records[1])]
    assert replies.comparable([]) == []


def test_evaluation_is_of_each_nodes_own_rank_and_averaged_over_the_sound_ones() -> None:
    apps = {node: app(trains(4, seed=node, weight=node, loss=float(node))) for node in (1, 2)}
    apps[3] = app(trains(4, loss=math.nan))
    apps[4] = app(lambda message, context: 1 / 0)
    apps[5] = app(trains(4, weight=[1], loss=100.0))
    apps[6] = app(trains(4, weight=math.nan, loss=100.0))
    apps[7] = app(trains(4, weight=math.inf, loss=100.0))
    apps[8] = app(trains(4, weight=10**6, loss=100.0))
    grid = LocalGrid(apps, {})
    result = FlexLoRAStrategy(flower.policy(), ranks=4).start(grid, flower.initial(), num_rounds=1)
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(5 / 3)
    messages = [m for m in grid.sent[1] if m.metadata.message_type == "evaluate"]
    assert from_record(messages[0].content["arrays"])[A].shape[0] == 4


def test_the_server_evaluates_what_is_carried() -> None:
    seen = {}

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen[number] = from_record(arrays)[A].shape[0]
        return MetricRecord({"number": number})

    result = FlexLoRAStrategy(flower.policy(), ranks=RANKS).start(
        three(), flower.initial(), num_rounds=2, evaluate_fn=evaluate
    )
    assert seen == {0: 8, 1: 8, 2: 8}
    assert result.evaluate_metrics_serverapp[2]["number"] == 2


def test_initial_arrays_must_be_the_policys() -> None:
    record = flower.initial()
    del record[B]
    with pytest.raises(ff.errors.AdapterError, match="the arrays have no"):
        FlexLoRAStrategy(flower.policy()).start(three(), record, num_rounds=1)


def test_heads_are_averaged_and_sent_to_all() -> None:
    reference = flower.reference(**{"head.weight": torch.zeros(3, 2)})
    policy = ff.RoundPolicy.from_adapter(reference.adapter(), ranks=(2, 4, 8), max_weight=100.0)
    key = "base_model.model.head.weight"

    def train(weight: int) -> flower.Train:
        def run(message: Message, context: Context) -> RecordDict:
            state = from_record(message.content["arrays"])
            return flower.reply_of(state | {key: state[key] + weight}, weight)

        return run

    grid = LocalGrid({1: app(train(1)), 2: app(train(3))}, {})
    start = to_record({k: torch.zeros_like(x) if "lora_B" in k else x for k, x in reference.state_dict().items()})
    run = FlexLoRAStrategy(policy, ranks={1: 2, 2: 4})
    result = run.start(grid, start, num_rounds=2)
    assert torch.equal(from_record(trainings(grid, 1)[1].content["arrays"])[key], torch.full((3, 2), 2.5))
    assert torch.equal(from_record(result.arrays)[key], torch.full((3, 2), 5.0))


def test_bfloat16_factors_of_a_node_come_exactly() -> None:
    def train(message: Message, context: Context) -> RecordDict:
        state = from_record(message.content["arrays"])
        return flower.reply_of({key: (x + 0.1).bfloat16() for key, x in state.items()})

    grid = LocalGrid({1: app(train)}, {})
    run = FlexLoRAStrategy(flower.policy(), ranks=4, **LOWEST)
    run.start(grid, flower.initial(), num_rounds=1)
    assert run.update is not None
    assert run.update.clients[0].dtype == "bfloat16"


def test_summary_says_what_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    strategy.log.propagate = True
    with caplog.at_level("INFO", logger="flwr"):
        FlexLoRAStrategy(flower.policy(), ranks=4).summary()
    assert "ranks allowed: [1, 2, 4, 8]" in caplog.text


# -- rounds that survive their server ---


def folders(directory: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(directory.glob("round-*/global_update.safetensors"))}


class Died(BaseException):
    """What ends a server in the middle of a round."""


class Dying(LocalGrid):
    """A grid whose server dies when it asks for its ``left``-th reply."""

    left = 10**9

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.left -= 1
        if self.left < 0:
            raise Died
        return super().pull_messages(message_ids)


def dying(left: int) -> Dying:
    grid = Dying({n: app(trains(r, seed=n, weight=10 * n)) for n, r in RANKS.items()}, three().configs)
    grid.left = left
    return grid


@pytest.mark.parametrize("left", range(1, 9))
def test_a_run_that_is_started_again_goes_on_in_the_middle_of_its_round(left: int, tmp_path: Path) -> None:
    """Three rounds of three replies (and no evaluation): killed after each, the files come out the same to the byte."""

    def run(name: str, grid: LocalGrid) -> Result:
        run = FlexLoRAStrategy(flower.policy(), directory=tmp_path / name, fraction_evaluate=0.0)
        return run.start(grid, flower.initial(), num_rounds=3)

    whole = run("undisturbed", three())
    first = dying(left)
    with pytest.raises(Died):
        run("killed", first)
    again = three()
    result = run("killed", again)
    asked = {node: len(first.sent[node]) + len(again.sent[node]) for node in RANKS}
    # Who was in the round is not asked again; who was asked and not heard is.
    assert sum(len(again.sent[node]) for node in RANKS) == 9 - left
    assert all(3 <= count <= 4 for count in asked.values())
    assert result.arrays == whole.arrays
    assert folders(tmp_path / "killed") == folders(tmp_path / "undisturbed")
    assert len(folders(tmp_path / "killed")) == 3


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    def run() -> tuple[LocalGrid, Result]:
        grid = three()
        strategy = FlexLoRAStrategy(flower.policy(), directory=tmp_path)
        return grid, strategy.start(grid, flower.initial(), num_rounds=2)

    (_, before), (grid, after) = run(), run()
    assert not grid.sent
    assert after.arrays == before.arrays


def test_ranks_are_known_after_a_restart(tmp_path: Path) -> None:
    FlexLoRAStrategy(flower.policy(), directory=tmp_path).start(three(), flower.initial(), num_rounds=1)
    grid = three()
    FlexLoRAStrategy(flower.policy(), directory=tmp_path).start(grid, flower.initial(), num_rounds=2)
    assert {node: ranks_sent(grid, node) for node in RANKS} == {node: [rank] for node, rank in RANKS.items()}


def test_a_round_below_its_quorum_changes_nothing(tmp_path: Path) -> None:
    grid = three()
    grid.apps[1] = app(lambda message, context: 1 / 0)
    for directory in (None, tmp_path):
        run = FlexLoRAStrategy(flower.policy(), directory=directory, options={"min_clients": 3})
        result = run.start(grid, flower.initial(), num_rounds=1)
        assert result.arrays == flower.initial()
        assert result.train_metrics_clientapp[1]["flexlora-accepted"] == 2


def test_another_policy_is_not_taken_for_the_one_that_a_round_began_with(tmp_path: Path) -> None:
    with pytest.raises(Died):
        FlexLoRAStrategy(flower.policy(), directory=tmp_path).start(dying(1), flower.initial(), num_rounds=1)
    with pytest.raises(ff.errors.OptionError, match="policy"):
        FlexLoRAStrategy(flower.policy(max_norm=1.0), directory=tmp_path).start(three(), flower.initial(), num_rounds=1)


def test_hostile_replies_are_kept_as_evidence(tmp_path: Path) -> None:
    grid = three()
    grid.apps[9] = app(lambda message, context: reply(changed(A=with_nan())))
    run = FlexLoRAStrategy(flower.policy(), ranks=RANKS | {9: 4}, directory=tmp_path)
    run.start(grid, flower.initial(), num_rounds=1)
    assert run.update is not None
    assert [(refusal.client, refusal.code) for refusal in run.update.refused] == [("node-9", "not-finite")]
    assert any((tmp_path / "round-0001" / "quarantine").iterdir())
