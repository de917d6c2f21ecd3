"""Experiments as files have them, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flexlora_fast.errors import OptionError
from flexlora_fast.simulate.spec import Experiment, Training
from tests.simulations import colours, document, experiment  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("colours")
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_config_files_are_experiments(path: Path) -> None:
    read = Experiment.read(path)
    assert Experiment.of(read.to_dict(), "again") == read


def test_toml_and_yaml_say_the_same_and_changes_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(document()))
    text = 'name = "made up"\nrounds = 2\ntask.name = "colours"\nmodel = { path = "tiny", dtype = "float32" }\n'
    text += 'clients = { number = 3, partition = "dirichlet", alpha = 1, smallest = 4 }\nranks.each = [1, 2, 4]\n'
    text += "training = { steps = 1, batch = 4, lr = 1e-2 }\n"
    text += "evaluation = { limit = 12, batch = 12 }\n"
    (tmp_path / "a.toml").write_text(text)
    assert Experiment.read(tmp_path / "a.yaml") == Experiment.read(tmp_path / "a.toml") == experiment()
    changes = ["clients.alpha=0.1", "method.name=fedit", "ranks.everyone='smallest'", "server.optimizer.name=fedavgm"]
    changed = Experiment.read(tmp_path / "a.toml", [*changes, "evaluation.limit="])
    assert changed.clients.alpha == 0.1 and changed.method.name == "fedit" and changed.ranks.everyone == "smallest"
    assert changed.server.optimizer is not None and changed.evaluation.limit is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"round": 3}, "made-up.toml: round is no key of an experiment; did you mean 'rounds'?"),
    ({"clients__alhpa": 3}, "made-up.toml: clients.alhpa is no key of an experiment; did you mean 'alpha'?"),
    ({"rounds": None}, "made-up.toml: rounds is missing; add it"),
    ({"rounds": "2"}, "made-up.toml: rounds is '2': input should be a valid integer"),
    ({"rounds": 0}, "made-up.toml: rounds is 0: input should be greater than or equal to 1"),
    ({"clients__alpha": None}, "clients: alpha goes with partition 'dirichlet', which needs it"),
    ({"clients__partition": "iid"}, "clients: alpha goes with partition 'dirichlet'"),
    ({"clients__number": None}, "clients: partition 'dirichlet' needs a number of clients"),
    ({"clients__dropout": 1.0}, "clients.dropout is 1.0: input should be less than 1"),
    ({"ranks__all": 3}, "ranks: give exactly one of all, each and distribution, not all and each"),
    ({"ranks__each": []}, r"ranks.each is \[\]: list should have at least 1 item"),
    ({"training__epochs": 1.0}, "training: give exactly one of steps and epochs"),
    ({"training__lr": float("nan")}, "training.lr is nan"),
    ({"method__name": "flexlra"}, "method: no method 'flexlra'; did you mean 'flexlora'"),
    ({"method__settings": {"tau": 1}}, "method: settings do not fit method 'flexlora'"),
    ({"method__gamma": 0.5}, "method: gamma is HetLoRA's self-pruning"),
    ({"method__penalty": 0.1}, "method: penalty is that of HetLoRA's self-pruning; give gamma with it"),
    ({"name": "../x"}, "name is '../x', and runs are kept in a folder of that name"),
    ({"method__label": "a/b"}, "method.label is 'a/b'"),
    ({"model__max_length": 1}, "model.max_length is 1: input should be greater than or equal to 8"),
    ({"model__max_length": "77"}, "model.max_length is '77': input should be a valid integer"),
    ({"model__dtype": "floaty"}, "model.dtype 'floaty' is none of torch's"),
    ({"lora__scale": -1.0}, "lora.scale is -1.0: input should be greater than 0"),
    ({"lora__dropout": 1.5}, "lora.dropout is 1.5: input should be less than 1"),
    ({"seed": 10**23}, "seed is"),
    ({"training__weight_decay": float("inf")}, "training.weight_decay is inf"),
    ({"training__momentum": 0.9}, "training: momentum is that of optimizer 'sgd'"),
    ({"ranks__types": [{"r": 3}]}, "ranks: types are what a distribution draws from"),
    ({"ranks__attention": "("}, "ranks: attention is no regular expression"),
    ({"server__solver": "nope"}, "server: solver 'nope' is not one of auto"),
    ({"server__defence": "nope"}, "server: .*'nope'"),
    ({"task__rows": "8"}, "task.rows is '8': input should be a valid integer"),
    (
        {
            "method": {"name": "hetlora", "gamma": 0.5},
            "ranks": {"distribution": "uniform", "types": [{"r": 2, "ffn": 4}]},
        },
        "method.gamma prunes a client to one rank",
    ),
    (
        {"rounds": 3, "method__slora": {"rounds": 1, "density": 0.1, "densities": {"7": 0.2}}},
        r"method.slora.densities has \['7'\]; the types of \[ranks\] are \['1', '2', '4'\]",
    ),
    ({"method__slora": {"rounds": 2, "density": 0.1}}, "method.slora.rounds leaves none of the 2 rounds"),
    ({"method__name": "flora", "server__optimizer": {"name": "fedavgm"}}, "method 'flora' has no server.optimizer"),
    ({"task__name": "colors"}, "task 'colors' is not one of trec"),
    ({"task__rows": "many"}, "made-up.toml: task.rows is 'many'"),
    ({"task__row": 3}, "made-up.toml: task.row is no key of an experiment; did you mean 'rows'?"),
    ({"task": {"name": "reasoning-gym", "tasks": ["gcd"], "unseen": ["gcd"]}}, "task: no task is left to train on"),
    ({"task": {"name": "commonsense", "path": "x", "sets": []}}, "task: no set is left to train on"),
    ({"task__name": None}, "made-up.toml: task.name is None; give one of trec"),
    (
        {"method__name": "fedit", "server__asynchronous": {"goal": 1, "concurrency": 1}},
        "server.asynchronous adds up updates as method 'flexlora' does",
    ),
]


@pytest.mark.parametrize(
    ("changes", "said"), WRONG, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_a_wrong_file_is_told_by_key_value_and_remedy(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        experiment(**changes)


def test_numbers_of_yaml_need_no_point(tmp_path: Path) -> None:
    text = yaml.safe_dump(document(training__lr=77.0))
    for number, value in (("1e-3", 1e-3), ("2E+1", 20.0), ("1.5e-2", 0.015), (".5e0", 0.5)):
        (tmp_path / "a.yaml").write_text(text.replace("77.0", number))
        assert Experiment.read(tmp_path / "a.yaml").training.lr == value


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    for name, text, said in (
        ("a.toml", "rounds = ", "not a TOML file"),
        ("a.yaml", "a: [", "not a YAML file"),
        ("a.yaml", "- 1", "holds a list"),
        ("a.json", "{}", "what ends in '.json' is not read"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(OptionError, match=said):
            Experiment.read(tmp_path / name)
    for change in ("rounds", "=3"):
        (tmp_path / "b.yaml").write_text(yaml.safe_dump(document()))
        with pytest.raises(OptionError, match="is not key=value"):
            Experiment.read(tmp_path / "b.yaml", [change])
    with pytest.raises(OptionError, match="'rounds' is 2, not a table"):
        Experiment.read(tmp_path / "b.yaml", ["rounds.few=3"])


def test_a_round_asks_a_count_a_share_or_all() -> None:
    for wanted, asked in ((None, 1613), (80, 80), (0.05, 81), (5000, 1613), (0.0001, 1)):
        assert experiment(clients__per_round=wanted).clients.sampled(1613) == asked


def test_learning_rates_go_down_by_round() -> None:
    training = experiment(training__schedule=[{"round": 15, "factor": 0.5}, {"round": 30, "factor": 0.25}]).training
    assert [training.factor(number) for number in (1, 14, 15, 29, 30, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("rows", "options", "seen"),
    [
        (8, {"batch": 16, "steps": 2}, 16),
        (8, {"batch": 3, "steps": 4}, 11),
        (8, {"batch": 16, "epochs": 0.5}, 8),
        (10, {"batch": 4, "epochs": 1.5}, 18),
        (100, {"batch": 4, "steps": 3}, 12),
    ],
)
def test_a_client_sees_its_rows_in_whole_passes_and_the_rest_of_one(
    rows: int, options: dict[str, Any], seen: int
) -> None:
    assert Training(lr=1e-3, **options).examples(rows) == seen
