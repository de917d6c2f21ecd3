"""Every task's config file: it is read, and two rounds are played on small files of the task's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("rouge_score")
pytest.importorskip("reasoning_gym")

from flexlora_fast.simulate import results, tasks
from flexlora_fast.simulate.run import run
from flexlora_fast.simulate.spec import Experiment
from tests import published, task_files

CONFIGS = Path(__file__).parent.parent / "configs"
# What makes any of them small: random models, a step a round, few rows to test on.
SMALL = (
    "rounds=2",
    "model.path=tiny",
    "lora.target_modules=all-linear",
    "clients.smallest=1",
    "training.epochs=",
    "training.steps=1",
    "training.batch=4",
    "evaluation.every=1",
    "evaluation.limit=8",
)
ANSWERS = ("task.max_new_tokens=2", "model.max_length=64", "evaluation.limit=4")
FEW_CLIENTS = ("clients.number=3", "clients.per_round=2", "clients.alpha=1.0")

# The config file; what writes small files of the task's format to a folder and gives the path to them; changes.
Made = Callable[[Path], Path]
PLAYED: dict[str, tuple[Made | None, tuple[str, ...]]] = {
    "trec": (published.trec, (*FEW_CLIENTS, "task.test=20")),
    "banking77": (published.banking77, FEW_CLIENTS),
    "newsgroups": (published.newsgroups, FEW_CLIENTS),
    "cifar100": (published.cifar100, FEW_CLIENTS),
    "domainnet": (
        published.domainnet,
        ("task.domains=['clipart', 'real']", "task.unseen=['sketch']", "task.classes=['apple', 'bear', 'whale']"),
    ),
    "natural-instructions": (
        lambda folder: task_files.authors(folder, clients=5),
        (*ANSWERS, "task.clients=3", "task.unseen=2"),
    ),
    "gsm8k": (task_files.gsm8k, (*ANSWERS, "clients.number=3", "clients.per_round=2")),
    "commonsense": (task_files.commonsense, (*ANSWERS, "task.sets=['boolq', 'piqa']", "task.unseen=['winogrande']")),
    "telequad": (task_files.telequad, ANSWERS),
    "reasoning-gym": (
        None,  # it makes its own data
        (*ANSWERS, "task.tasks=['chain_sum', 'gcd']", "task.unseen=['count_bits']", "task.train=4", "task.test=2"),
    ),
}


@pytest.mark.parametrize("name", PLAYED)
def test_two_rounds_of_every_task(name: str, tmp_path: Path) -> None:
    make, changes = PLAYED[name]
    (tmp_path / "data").mkdir()
    given = [] if make is None else [f"task.path={make(tmp_path / 'data')}"]
    experiment = Experiment.read(CONFIGS / f"{name}.toml", [*SMALL, *given, *changes])
    summary = run(experiment, tmp_path / "out", workers=0)
    found = results.read(tmp_path / "out")
    assert summary["metric"] == tasks.task_class(name).metric
    assert [line.round for line in found.rounds] == [0, 1, 2]
    for line in found.rounds[1:]:
        assert line.update is not None and line.update.norm > 0
        assert not line.refused
        assert line.test is not None and line.test.loss is not None and np.isfinite(line.test.loss)
    assert found.rounds[0].test.loss != found.rounds[2].test.loss
    scores = found.scores["test"]
    assert len(scores) == min(8, found.rounds[2].test.n)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_file_is_read_and_names_itself(path: Path) -> None:
    experiment = Experiment.read(path)
    assert experiment.name == path.stem
    assert f"flexlora-fast simulate configs/{path.name}" in path.read_text()


def test_every_task_has_a_config_file() -> None:
    assert set(tasks.TASKS) <= {Experiment.read(path).task["name"] for path in CONFIGS.glob("*.toml")}
