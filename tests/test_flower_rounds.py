"""Rounds that fail, metrics, evaluation, and rounds that survive their server."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

import flexlora_fast as ff
from flexlora_fast.integrations.flower import (
    FlexLoRAStrategy,
    from_record,
    replies,
    strategy,
)
from tests import flower
from tests.flower import RANKS, A, B, LocalGrid, app, ranks_sent, three, trains


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


def test_summary_says_what_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    strategy.log.propagate = True
    with caplog.at_level("INFO", logger="flwr"):
        FlexLoRAStrategy(flower.policy(), ranks=4).summary()
    assert "ranks allowed: [1, 2, 4, 8]" in caplog.text


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


def test_a_round_that_changed_nothing_is_over_after_a_restart(tmp_path: Path) -> None:
    """Round 2 misses its quorum, and the server dies in round 3. Taken up again, round 2 would get its third node and
    an update, and the uploads in round 3's journal would be of an older one.
    """
    grid = dying(8)
    failing = grid.apps[1]
    calls: list[int] = []

    def in_round_two(message: Message, context: Context) -> RecordDict:
        calls.append(int(message.content["config"]["server-round"]))
        if calls[-1] == 2:
            raise RuntimeError
        return trains(2, seed=1, weight=10)(message, context)

    grid.apps[1] = app(in_round_two)

    def run(where: LocalGrid, rounds_: int) -> tuple[FlexLoRAStrategy, Result]:
        run = FlexLoRAStrategy(flower.policy(), directory=tmp_path, options={"min_clients": 3}, fraction_evaluate=0.0)
        return run, run.start(where, flower.initial(), num_rounds=rounds_)

    with pytest.raises(Died):
        run(grid, 3)
    assert calls == [1, 2, 3] and (tmp_path / "round-0002.nothing").exists()
    assert list(folders(tmp_path)) == ["round-0001"]
    grid.apps[1], grid.left = failing, 10**9
    again, result = run(grid, 3)
    assert list(folders(tmp_path)) == ["round-0001", "round-0003"]
    assert list(result.train_metrics_clientapp) == [3] and again.update is not None
    assert result.train_metrics_clientapp[3]["flexlora-accepted"] == 3
    _, after = run(three(), 3)
    assert not after.train_metrics_clientapp and after.arrays == result.arrays


def test_a_round_whose_update_cannot_be_sent_is_none_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a file, but nobody trained with it."""

    def too_large(self: FlexLoRAStrategy, update: ff.GlobalUpdate) -> ArrayRecord:
        raise ff.errors.AdapterError("beyond float32")

    with monkeypatch.context() as patch:
        patch.setattr(FlexLoRAStrategy, "_arrays_of", too_large)
        run = FlexLoRAStrategy(flower.policy(), ranks=RANKS, directory=tmp_path)
        assert run.start(three(), flower.initial(), num_rounds=1).arrays == flower.initial()
    assert list(folders(tmp_path)) == ["round-0001"]
    again = FlexLoRAStrategy(flower.policy(), ranks=RANKS, directory=tmp_path)
    assert again.start(three(), flower.initial(), num_rounds=1).arrays == flower.initial()
    assert again.start(three(), flower.initial(), num_rounds=2).arrays != flower.initial()


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_methods_that_need_more_than_adapters_are_refused(method: str) -> None:
    with pytest.raises(ff.errors.OptionError, match=rf"method '{method}' has clients add to their frozen"):
        FlexLoRAStrategy(flower.policy(), options={"method": method})


def test_nodes_do_not_speak_in_the_servers_name() -> None:
    """Most decide which metrics there are, but not what the server counted."""
    told = {"flexlora-norm": 7.0, "flexlora-refused-weight": 99, "loss": 1.0}
    grid = LocalGrid({1: app(lambda message, context: flower.reply_of({}, **told))}, {})
    grid.apps |= {n: app(trains(4, seed=n, **told)) for n in (2, 3)}
    run = FlexLoRAStrategy(flower.policy(), ranks=4)
    metrics = run.start(grid, flower.initial(), num_rounds=1).train_metrics_clientapp[1]
    assert run.update is not None and metrics["flexlora-norm"] == run.update.norm
    assert metrics["loss"] == pytest.approx(1.0) and "flexlora-refused-weight" not in metrics


def test_another_policy_is_not_taken_for_the_one_that_a_round_began_with(tmp_path: Path) -> None:
    with pytest.raises(Died):
        FlexLoRAStrategy(flower.policy(), directory=tmp_path).start(dying(1), flower.initial(), num_rounds=1)
    with pytest.raises(ff.errors.OptionError, match="policy"):
        FlexLoRAStrategy(flower.policy(max_norm=1.0), directory=tmp_path).start(three(), flower.initial(), num_rounds=1)
