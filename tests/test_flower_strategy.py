"""What each node is sent, against float64, and what the mod makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

import flexlora_fast as ff
from flexlora_fast.integrations.flower import (
    FlexLoRAStrategy,
    flexlora_mod,
    from_record,
    rank_mod,
    to_record,
)
from tests import flower, rounds
from tests.flower import LOWEST, RANKS, A, B, LocalGrid, app, ranks_sent, three, trainings, trains, undisturbed


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

    default = flexlora_mod
    assert sent_to(default, {"lora-rank": 2}, {"lora-rank": 4}) == 2
    assert sent_to(default, {}, {"lora-rank": 4}) == 4
    assert sent_to(default, {}, {}) == 8
    assert sent_to(rank_mod(lambda context: context.node_config["partition-id"] * 2), {"partition-id": 2}, {}) == 4
    for bad in (0, -1, 2.0, "2", True):
        with pytest.raises(ff.errors.OptionError, match="integer of at least 1"):
            sent_to(default, {"lora-rank": bad}, {})
    with pytest.raises(ff.errors.OptionError, match=r"is 3, and the server admits \[1, 2, 4, 8\]"):
        sent_to(default, {"lora-rank": 3}, {})


def test_messages_of_other_strategies_pass_the_mod() -> None:
    LocalGrid({}, {})
    content = RecordDict({"arrays": flower.initial(), "flexlora": MetricRecord({"x": 1})})
    message = Message(content, dst_node_id=1, message_type="train")
    passed = flexlora_mod(message, Context(1, 1, {"lora-rank": 2}, RecordDict(), {}), lambda msg, ctx: msg)
    assert passed is message
    assert from_record(passed.content["arrays"])[A].shape[0] == 8


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
