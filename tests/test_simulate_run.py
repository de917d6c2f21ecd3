"""Runs on a made-up task: every method, the same numbers for a seed, and what goes wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
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


def test_an_slora_stage_trains_base_weights_and_then_initialises_the_adapters(tmp_path: Path) -> None:
    stage = {"rounds": 2, "density": 0.5, "densities": {"4": 0.9}}
    run(experiment(rounds=3, method__slora=stage), tmp_path, workers=0)
    rounds = results.read(tmp_path).rounds
    assert rounds[1].update is None and rounds[2].update.norm > 0
    assert len({line.test.loss for line in rounds}) == 4
    # Values alone are sent: a client of density 0.9 sends more than one of 0.5, and neither sends its adapter.
    assert not (tmp_path / "state/00003/sparse.safetensors").exists()
    assert rounds[3].bytes.up < rounds[1].bytes.up


@pytest.mark.parametrize("optimizer", [{"name": "fedavgm"}, {"name": "fedadam", "lr": 0.01}])
def test_a_server_optimizer_moves_the_update(optimizer: dict[str, Any], tmp_path: Path) -> None:
    run(experiment(rounds=3), tmp_path / "plain", workers=0)
    run(experiment(rounds=3, server__optimizer=optimizer), tmp_path / "moved", workers=0)
    plain, moved = (results.read(tmp_path / name).rounds for name in ("plain", "moved"))
    assert moved[3].update.norm != plain[3].update.norm
    if optimizer["name"] == "fedavgm":  # without a moment yet, its first step is the round's update
        assert moved[1].test.loss == pytest.approx(plain[1].test.loss, abs=1e-5)


def test_hetlora_clients_prune_their_ranks(tmp_path: Path) -> None:
    pruning = {"method__gamma": 0.5, "method__penalty": 100.0, "training__lr": 0.1, "training__steps": 4}
    run(experiment(method__name="hetlora", rounds=3, ranks={"all": 4}, **pruning), tmp_path, workers=0)
    rounds = results.read(tmp_path).rounds
    before, after = ({name: one.rank for name, one in rounds[i].train.clients.items()} for i in (1, 3))
    assert set(after.values()) < {1, 2, 4} and sum(after.values()) < sum(before.values()) + 1
    assert min(after.values()) < 4


def test_ffa_lora_trains_b_alone(tmp_path: Path) -> None:
    run(experiment(method__name="ffa-lora", rounds=1), tmp_path, workers=0)
    folder = tmp_path / "state/sent/00001/4"
    import flexlora_fast as ff

    start, sent = ff.Adapter.load(tmp_path / "state/initial"), ff.Adapter.load(folder)
    for layer in start.layers:
        A, B = (adapter.factors(layer) for adapter in (start, sent))
        assert (A[0] - B[0]).abs().max() < 1e-6 and B[1].abs().max() > 0


def test_dropouts_leave_the_round_to_the_others_or_to_nobody(tmp_path: Path) -> None:
    run(experiment(rounds=3, seed=2, clients__dropout=0.5, clients__per_round=1), tmp_path, workers=0)
    rounds = results.read(tmp_path).rounds[1:]
    for line in rounds:
        assert len(line.sampled) == 1 and set(line.dropped) <= set(line.sampled)
        assert set(line.train.clients) == set(line.sampled) - set(line.dropped)
        assert (line.update is None) == (len(line.dropped) == 1)
    assert [line.update is None for line in rounds] == [False, True, False]
    assert rounds[0].test.loss == rounds[1].test.loss != rounds[2].test.loss


def test_a_client_that_diverges_is_refused_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = worker.Worker.train

    def diverge(self: worker.Worker, job: Any) -> Any:
        done = train(self, job)
        if job.client == "client-2":
            import torch
            from safetensors.torch import load_file, save_file

            path = job.out / "adapter_model.safetensors"
            save_file({key: torch.full_like(value, torch.nan) for key, value in load_file(path).items()}, path)
        return done

    monkeypatch.setattr(worker.Worker, "train", diverge)
    run(experiment(), tmp_path, workers=0)
    for line in results.read(tmp_path).rounds[1:]:
        assert [(one.client, one.code) for one in line.refused] == [("client-2", "adapter")]
        assert line.update.norm > 0 and line.test.loss is not None


def test_who_diverged_has_no_loss(tmp_path: Path) -> None:
    """Trainer would tell the mean of the steps before, which looks better than a client that trains."""
    run(experiment(rounds=1, training__lr=1e30, training__steps=4), tmp_path, workers=0)
    line = results.read(tmp_path).rounds[1]
    assert len(line.refused) == 3 and line.train.loss is None
    assert all(client.loss is None for client in line.train.clients.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lora__target_modules": ["nothing"]},
            r"model 'tiny' cannot be made \(.*No modules were targeted.*check \[model\] and",
        ),
        ({"model__path": "nope/missing"}, "model 'nope/missing' cannot be made"),
    ],
)
def test_what_is_wrong_with_the_model_is_told(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=said):
        run(experiment(**changes), tmp_path / "here", workers=0)


def test_a_worker_process_leaves_what_is_wrong_with_the_model_to_its_first_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setup: object) -> None:
        raise ValueError("no such module")

    monkeypatch.setattr(worker, "belong", lambda taken: None)
    monkeypatch.setattr(worker, "Worker", broken)
    monkeypatch.setattr(worker, "_worker", None)
    monkeypatch.setattr(worker, "_failure", None)
    worker.start(SimpleNamespace(model=SimpleNamespace(path="tiny")), object())  # type: ignore[arg-type]
    with pytest.raises(SimulationError, match=r"cannot be made \(ValueError: no such module\)"):
        worker.run(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"server__optimizer": {"name": "fedavgm"}},
        {"method__name": "flora"},
        {"method__slora": {"rounds": 2, "density": 0.5}},
        {"server__asynchronous": {"goal": 2, "concurrency": 3}, "clients__number": 6, "clients__smallest": 2},
    ],
    ids=["fedavgm", "flora", "slora", "fedbuff"],
)
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_numbers(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"evaluation": {"limit": 8, "by_rank": "never", "unseen": False, "batch": 8}}
    wanted = experiment(rounds=3, **few, **changes)
    run(wanted, tmp_path / "whole", workers=0)
    train, evaluate, count = worker.Worker.train, worker.Worker.evaluate, [0]

    def stop(then: Any) -> Any:
        def job(self: worker.Worker, given: Any) -> Any:
            count[0] += 1
            if count[0] in (1, 4, 7, 12):  # in the test of round 0, in training, and in tests behind it
                raise KeyboardInterrupt
            return then(self, given)

        return job

    monkeypatch.setattr(worker.Worker, "train", stop(train))
    monkeypatch.setattr(worker.Worker, "evaluate", stop(evaluate))
    for _ in range(5):
        try:
            run(wanted, tmp_path / "parts", workers=0, resume=True)
        except KeyboardInterrupt:
            continue
        break
    assert count[0] > 12
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    for name in ("scores.npz", "clients.json", "state/sent/00003/4/adapter_model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_disk_holds_one_state(tmp_path: Path) -> None:
    run(experiment(rounds=3), tmp_path, workers=0)
    there = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert there == ["00003", "initial", "sent", "work"]
    assert [path.name for path in (tmp_path / "state/sent").iterdir()] == ["00003"]
    assert not list((tmp_path / "state/work").iterdir())


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    run(experiment(rounds=1), tmp_path, workers=0)
    with pytest.raises(SimulationError, match="--resume goes on"):
        run(experiment(rounds=1), tmp_path, workers=0)
    with pytest.raises(SimulationError, match="its seed is 0, not 1"):
        run(experiment(rounds=1, seed=1), tmp_path, workers=0, resume=True)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(experiment(rounds=1), tmp_path, workers=0, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run(experiment(rounds=1, seed=1), tmp_path, workers=0, force=True)
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 1
    (tmp_path / "notes.txt").write_text("mine")
    run(experiment(rounds=1, seed=2), tmp_path, workers=0, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(SimulationError, match="holds something else"):
        run(experiment(), tmp_path / "other", workers=0, force=True)


def test_a_run_that_failed_before_it_began_is_in_nobodys_way(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot give"):
        run(experiment(rounds=1, clients__smallest=50), tmp_path, workers=0)
    assert run(experiment(rounds=1), tmp_path, workers=0)["rounds"] == 1


def test_equal_ranks_are_asked_for_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'fedex-lora' needs equal ranks, and there are 1, 2, 4; set ranks"):
        run(experiment(method__name="fedex-lora"), tmp_path, workers=0)


def test_asynchronous_rounds_take_late_uploads_in_the_order_of_simulated_time(tmp_path: Path) -> None:
    several = {"clients__number": 8, "clients__smallest": 2, "clients__dropout": 0.2}
    run(experiment(rounds=4, server__asynchronous={"goal": 2, "concurrency": 4}, **several), tmp_path, workers=0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    assert all(len(line["staleness"]) == 2 for line in lines)
    assert max(tau for line in lines for tau in line["staleness"].values()) > 0
    assert sorted(line["clock"] for line in lines) == [line["clock"] for line in lines]
    assert any(line["dropped"] for line in lines)
    assert len({line["test"]["loss"] for line in lines}) == 4
    kept = {int(path.name) for path in (tmp_path / "state").glob("0*")}
    assert 4 in kept and len(kept) <= 5


def test_more_clients_at_a_time_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="3 clients training beside 2 that have, and there are 3"):
        run(experiment(server__asynchronous={"goal": 2, "concurrency": 3}), tmp_path, workers=0)
