"""Tasks with generated answers: small files in the published formats, their scores by hand, files that are wrong."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from datasets import Dataset
from pydantic import ValidationError

from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks import commonsense, instruction_files, make
from tests import task_files


def load(name: str, seed: int = 0, **options: Any) -> Corpus:
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return make(name, options).load(seed)


def scores(name: str, answers: list[str], targets: list[str] | list[list[str]], **options: Any) -> list[float]:
    several = isinstance(targets[0], list)
    rows = Dataset.from_dict({"target": [x[0] if several else x for x in targets]})
    if several:
        rows = rows.add_column("targets", targets)
    return list(make(name, options).score(answers, rows))


class TestNaturalInstructions:
    """Three readers and the hub, who is a client, and Rouge-L."""

    def test_the_authors_files(self, tmp_path: Path) -> None:
        corpus = load("natural-instructions", path=task_files.authors(tmp_path, clients=3))
        assert corpus.metric == "rougeL"
        assert sorted(set(corpus.train["client"])) == ["0", "1", "2"]
        assert set(corpus.train["category"]) == {"Program Execution"}
        row = next(row for row in corpus.train if row["client"] == "1")
        assert row["prompt"] == (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nDo task 1.\n\n### Input:\ntraining 0 of 1\n\n### Response:"
        )
        assert (row["target"], row["targets"]) == ("answer 0 of 1", ["answer 0 of 1"])
        assert all("test" in prompt for prompt in corpus.test["prompt"])
        tuned = load("natural-instructions", path=tmp_path, score_on="eval")
        assert all("eval" in prompt for prompt in tuned.test["prompt"])

    def test_the_original_repository(self, tmp_path: Path) -> None:
        path = task_files.original(tmp_path, tasks=4, instances=40)
        corpus = load("natural-instructions", path=path, share=0.5)
        assert len(corpus.train) == 4 * 16
        assert len(corpus.test) == 4 * 2
        assert not set(corpus.train["prompt"]) & set(corpus.test["prompt"])
        assert corpus.test["targets"][0][1:] == ["another"]
        kept = load("natural-instructions", path=path, unseen="test_tasks")
        assert kept.unseen is not None
        assert set(kept.unseen["client"]) == {"task003_x"}
        assert "task003_x" not in kept.train["client"]

    def test_a_file_of_clients(self, tmp_path: Path) -> None:
        path = task_files.client_lines(tmp_path, clients=6)
        corpus = load("natural-instructions", path=path, clients=3, unseen=2, train=2, test=1)
        assert corpus.unseen is not None
        seen, unseen = set(corpus.train["client"]), set(corpus.unseen["client"])
        assert (len(seen), len(unseen), seen & unseen) == (3, 2, set())
        assert (len(corpus.train), len(corpus.test), len(corpus.unseen)) == (6, 3, 2)
        again = load("natural-instructions", path=path, clients=3, unseen=2, train=2, test=1)
        assert list(again.train) == list(corpus.train)
        other = load("natural-instructions", seed=1, path=path, clients=3, unseen=2, train=2, test=1)
        assert list(other.train) != list(corpus.train)

    def test_who_is_left_out(self, tmp_path: Path) -> None:
        path = task_files.client_lines(tmp_path, clients=6)
        only = load("natural-instructions", path=path, categories=["Sorting"])
        assert set(only.train["category"]) == {"Sorting"}
        latin = load("natural-instructions", path=path, english=True)
        assert "c5" in load("natural-instructions", path=path).train["client"]
        assert "c5" not in latin.train["client"], "its answers are Hindi"
        short = load("natural-instructions", path=path, max_chars=20)
        assert all(len(target) <= 20 for target in short.train["target"])
        with pytest.raises(OptionError, match=r"want 7 clients, and 6 are there"):
            load("natural-instructions", path=path, clients=7)
        with pytest.raises(DataError, match=r"no client of .* passes"):
            load("natural-instructions", path=path, categories=["Chess"])
        with pytest.raises(OptionError, match="has no such list"):
            load("natural-instructions", path=path, unseen="test_tasks")
        half = load("natural-instructions", path=path, unseen=0.5)
        assert half.unseen is not None
        assert len(set(half.unseen["client"])) == 3
        part = load("natural-instructions", path=path, unseen=0.5, categories=["Sorting"])
        assert part.unseen is not None
        trained, never = len(set(part.train["client"])), len(set(part.unseen["client"]))
        total = len(set(only.train["client"]))
        assert (never, trained) == (round(0.5 * total), total - round(0.5 * total))
        for wrong in (-3, 2.5):
            with pytest.raises(ValueError, match="unseen"):
                load("natural-instructions", path=path, unseen=wrong)

    def test_a_client_of_two_lines_and_one_without_a_name_are_told(self, tmp_path: Path) -> None:
        path = tmp_path / "clients.jsonl"
        entry = {"client": 1, "category": "a", "instruction": "b", "train": [], "eval": [], "test": []}
        path.write_text(f"{json.dumps(entry)}\n{json.dumps(entry)}\n")
        with pytest.raises(DataError, match=r"clients\.jsonl:2: client '1' has a line already; a line holds"):
            load("natural-instructions", path=path)
        del entry["client"]
        path.write_text(f"{json.dumps(entry)}\n")
        with pytest.raises(DataError, match=r"clients\.jsonl:1: has no 'client'"):
            load("natural-instructions", path=path)

    def test_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def part(task: str, count: int) -> Dataset:
            rows = [(task, f"{task}-{i // 2}", "Do it.", f"in {i // 2}", f"out {i}") for i in range(count)]
            names = ("task_name", "id", "definition", "inputs", "targets")
            return Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])

        found = {"train": part("task1", 40), "test": part("task2", 20)}
        monkeypatch.setattr(datasets, "load_dataset", lambda name, _: {instruction_files.HUB: found}[name])
        corpus = load("natural-instructions", share=1.0, unseen="test_tasks")
        assert corpus.unseen is not None
        assert (set(corpus.train["client"]), set(corpus.unseen["client"])) == ({"task1"}, {"task2"})
        assert len(corpus.train) == 16, "two rows of one id are one input with two answers"
        assert all(len(targets) == 2 for targets in corpus.train["targets"])

    def test_rouge_is_the_longest_common_subsequence(self) -> None:
        # 3 of 4 words in order, of 5: P = 3/4, R = 3/5, F = 2/3. "walks" and "walked" have one stem.
        assert scores("natural-instructions", ["the cat walks dog"], ["the big cat walked home"]) == [
            pytest.approx(2 / 3)
        ]
        assert scores("natural-instructions", ["b", ""], [["a", "b c"], ["x", "y"]]) == [pytest.approx(2 / 3), 0.0]

    def test_rouge_of_other_scripts_is_over_words(self) -> None:
        assert scores("natural-instructions", ["वह घर गया"], ["वह स्कूल गया"]) == [pytest.approx(2 / 3)]


class TestGsm8k:
    """The authors' lines and the hub; the number behind the mark."""

    def test_the_authors_files(self, tmp_path: Path) -> None:
        corpus = load("gsm8k", path=task_files.gsm8k(tmp_path))
        assert corpus.train["prompt"][0] == "How much is 0 + 1?\n"
        assert corpus.train["target"][0] == "0 + 1 = <<0+1=1>>1\n#### 1"
        assert len(corpus.test) == 3

    def test_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = Dataset.from_dict({"question": ["How much?"], "answer": ["#### 3"]})
        parts = {"train": rows, "test": rows}
        monkeypatch.setattr(datasets, "load_dataset", lambda *name: {("openai/gsm8k", "main"): parts}[name])
        assert load("gsm8k").test["target"][0] == "#### 3"

    def test_the_number_counts_as_text_without_commas(self) -> None:
        answers = ["So 5. #### 1,234", "#### 1234.0", "1234", "#### 7 #### 1234"]
        assert scores("gsm8k", answers, ["… #### 1,234"] * 4) == [1.0, 0.0, 0.0, 0.0]

    def test_a_solution_without_a_number_is_named_with_its_line(self, tmp_path: Path) -> None:
        task_files.gsm8k(tmp_path)
        path = tmp_path / "test.jsonl"
        path.write_text(path.read_text() + json.dumps({"question": "q", "answer": "no number"}) + "\n")
        with pytest.raises(DataError, match=r"test\.jsonl:4: 'answer' is 'no number', not .*####.*; take train\.jsonl"):
            load("gsm8k", path=tmp_path)


class TestCommonsense:
    """Eight folders of LLM-Adapters."""

    def test_all_sets_are_clients(self, tmp_path: Path) -> None:
        corpus = load("commonsense", path=task_files.commonsense(tmp_path))
        assert sorted(set(corpus.train["client"])) == sorted(commonsense.CHOICES)
        assert corpus.train["prompt"][0] == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
            "\n\n                ### Instruction:\n                Question 0, answer true or false."
            "\n\n                ### Response:\n                "
        )
        assert corpus.train["target"][0] == "the correct answer is true"

    def test_some_sets_some_rows_some_unseen(self, tmp_path: Path) -> None:
        path = task_files.commonsense(tmp_path)
        corpus = load("commonsense", path=path, sets=["piqa", "boolq"], unseen=["boolq"], train=2, test=1)
        assert corpus.unseen is not None
        assert (list(corpus.train["client"]), list(corpus.unseen["client"])) == (["piqa", "piqa"], ["boolq"])
        with pytest.raises(ValidationError, match="no set 'copa'"):
            load("commonsense", path=path, sets=["copa"])

    def test_the_first_choice_in_the_answer_counts(self, tmp_path: Path) -> None:
        task = make("commonsense", {"path": str(tmp_path)})
        rows = Dataset.from_dict({"client": ["piqa"] * 3 + ["boolq"], "answer": ["solution2"] * 3 + ["false"]})
        answers = ["the correct answer is solution2, not solution1", "solution1 or solution2", "Solution2", "false"]
        assert list(task.score(answers, rows)) == [1.0, 0.0, 0.0, 1.0]

    def test_an_answer_of_another_set_is_named_with_its_entry(self, tmp_path: Path) -> None:
        path = task_files.commonsense(tmp_path)
        rows = json.loads((path / "piqa" / "train.json").read_text())
        rows[1]["answer"] = "option1"
        (path / "piqa" / "train.json").write_text(json.dumps(rows))
        with pytest.raises(DataError, match=r"piqa/train\.json\[1\]: 'answer' is 'option1', not one of solution1"):
            load("commonsense", path=path)


class TestTeleQuad:
    """SQuAD's format with documents as clients, and SQuAD's measures."""

    def test_documents_are_clients_and_some_questions_of_each_are_held_out(self, tmp_path: Path) -> None:
        corpus = load("telequad", path=task_files.telequad(tmp_path))
        assert set(corpus.train["client"]) == set(corpus.test["client"]) == {"36.331", "38.211"}
        assert (len(corpus.train), len(corpus.test)) == (16, 4)
        assert not set(corpus.train["prompt"]) & set(corpus.test["prompt"])
        assert "### Instruction:\nWhat is 0?\n\n### Input:\nParagraph 0 of 36.331" in "".join(corpus.train["prompt"])

    def test_squad_has_a_test_file_and_questions_without_answers(self, tmp_path: Path) -> None:
        path = task_files.telequad(tmp_path)
        corpus = load("telequad", path=path, test_path=path, unanswerable=True)
        assert (len(corpus.train), len(corpus.test)) == (22, 22)
        assert list(corpus.train["target"]).count("") == 2

    def test_the_measures_of_squad(self) -> None:
        answers = ["The 5G core, a network", "core", "radio", ""]
        rights = [["5g core network"], ["x", "the core of 5G"], [""], [""]]
        f1 = scores("telequad", answers, rights, path="x")
        assert f1 == [1.0, pytest.approx(0.5), 0.0, 1.0]
        exact = scores("telequad", answers, rights, path="x", measure="exact match")
        assert exact == [1.0, 0.0, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ({"data": [{"title": "t", "paragraphs": 3}]}, r"squad\.json, data\[0\]: 'paragraphs' is 3, not a list"),
            ({"data": []}, r"squad\.json: has no question; take"),
            ([], r"squad\.json: \[\] is no object"),
            (
                {"data": [{"paragraphs": [{"context": "c", "qas": [{"answers": []}]}]}]},
                r"paragraphs\[0\], qas\[0\]: has no 'question', only \['answers'\]",
            ),
        ],
    )
    def test_files_that_are_wrong(self, tmp_path: Path, document: Any, message: str) -> None:
        path = tmp_path / "squad.json"
        path.write_text(json.dumps(document))
        with pytest.raises(DataError, match=message):
            load("telequad", path=path, unanswerable=True)


class TestReasoningGym:
    """Puzzles by rules, and the scorers that come with them."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "tasks": ["chain_sum", "spell_backward"],
        "unseen": ["gcd"],
        "train": 6,
        "test": 3,
    }

    def test_kinds_are_clients(self) -> None:
        corpus = load("reasoning-gym", **self.OPTIONS)
        assert corpus.unseen is not None
        assert list(corpus.train["client"]) == ["chain_sum"] * 6 + ["spell_backward"] * 6
        assert set(corpus.unseen["client"]) == {"gcd"}
        assert list(load("reasoning-gym", **self.OPTIONS).train) == list(corpus.train)
        assert list(load("reasoning-gym", seed=1, **self.OPTIONS).train) != list(corpus.train)
        assert list(load("reasoning-gym", seed=1, draw=0, **self.OPTIONS).train) == list(corpus.train)

    def test_its_own_scorers_score(self) -> None:
        corpus = load("reasoning-gym", **self.OPTIONS)
        task = make("reasoning-gym", self.OPTIONS)
        assert list(task.score(corpus.test["target"], corpus.test)) == [1.0] * len(corpus.test)
        untagged = [re.sub("</?answer>", "", target) for target in corpus.test["target"]]
        assert list(task.score(untagged, corpus.test)) == [0.0] * len(corpus.test)
        wrong = task.score(["<answer>?</answer>"] * len(corpus.test), corpus.test)
        assert (wrong < 1).all()

    def test_what_it_does_not_have(self) -> None:
        with pytest.raises(OptionError, match=r"has no 'chess'; it has .*chain_sum"):
            load("reasoning-gym", tasks=["chess"])
        with pytest.raises(OptionError, match=r"task\.settings\.gcd: .*'colour'"):
            load("reasoning-gym", tasks=["gcd"], settings={"gcd": {"colour": 1}})
        few = {"coin_flip": {"min_trials": 1, "max_trials": 1}}
        with pytest.raises(DataError, match=r"coin_flip makes too few different puzzles"):
            load("reasoning-gym", tasks=["coin_flip"], settings=few, train=200, test=5)


def test_json_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "clients.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"client": 1}\n\n{"client": oops}\n'))
    with pytest.raises(DataError, match=r"clients\.jsonl\.gz:3: no JSON at line 1, column 12: 'oops}'; a line holds"):
        load("natural-instructions", path=path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"clients\.jsonl\.gz: cannot be read"):
        load("natural-instructions", path=path)
    with pytest.raises(DataError, match=r"gone: is no file, and has neither local_training_\*\.json nor tasks/"):
        load("natural-instructions", path=tmp_path / "gone")


def test_values_of_another_type_are_named_with_their_place(tmp_path: Path) -> None:
    folder = task_files.authors(tmp_path, clients=1)
    (folder / "local_test_0.json").write_text(json.dumps([{"input": "x", "output": 3}]))
    with pytest.raises(DataError, match=r"local_test_0\.json\[0\]: 'output' is 3, not a list of texts; take data/1613"):
        load("natural-instructions", path=folder)
