"""Super-NaturalInstructions with one client a task: the FlexLoRA paper's experiment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from flexlora_fast.errors import DataError, OptionError
from flexlora_fast.simulate.corpus import Corpus
from flexlora_fast.simulate.tasks import instruction_files
from flexlora_fast.simulate.tasks.answering import AnsweringOptions, AnsweringTask, alpaca, best
from flexlora_fast.simulate.tasks.base import TaskOptions
from flexlora_fast.simulate.tasks.instruction_files import Client, Example, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

Score = Literal["test", "eval"]


class NaturalInstructionsOptions(AnsweringOptions):
    """Where the tasks come from, which of them are clients, and how much of each is used.

    ``path``: the authors' folder of ``local_training_*.json``; a checkout of allenai/natural-instructions; or a JSON
    Lines file with a client a line. None: the copy on the hub. ``share``: of a task's instances, where they are not
    subsampled already (the paper takes a tenth). ``clients``: how many train (None: all that are left); ``unseen``: how
    many never train: a number, a share below 1 of all that are left, or "test_tasks" for those in
    splits/default/test_tasks.txt.
    ``categories``: only these. ``english``: only tasks whose letters are Latin ones by nine tenths: Rouge reads no
    others. ``max_chars``: only examples whose input and answer have no more together. ``train``, ``test``: examples a
    client at most. ``score_on``: which of the authors' two held-out parts tests: "eval" for tuning, "test" for results.
    """

    path: Path | None = None
    share: float = Field(0.1, gt=0, le=1)
    clients: int | None = Field(None, ge=1)
    unseen: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] | Literal["test_tasks"] = 0
    categories: list[str] | None = None
    english: bool = False
    max_chars: int | None = Field(None, ge=1)
    train: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)
    score_on: Score = "test"


class NaturalInstructions(AnsweringTask):
    """Rouge-L of generated answers, the best over the references, stemmed, as the data set's own evaluation has it.

    Prompt: Alpaca's, as in the authors' code. Their code scores something else under the same name: Rouge-L of the most
    likely next tokens, given the right ones before, over prompt and answer together; such a score is high without a
    single right answer, so it is not repeated here. Where no reference has a Latin letter or digit, which is all that
    Rouge's own tokenizer keeps, words are what stands between spaces, as in Tk-Instruct's evaluation.
    """

    name = "natural-instructions"
    metric = "rougeL"
    summary = "1,600 instructed tasks, one a client; tests also on tasks that nobody trained on"
    source = (
        "Wang et al., Super-NaturalInstructions, EMNLP 2022 (github.com/allenai/natural-instructions, "
        "github.com/yizhongw/Tk-Instruct); split into clients: Bai et al., arXiv 2402.11505 "
        "(github.com/alibaba/FederatedScope, branch FlexLoRA)"
    )
    Options: ClassVar[type[TaskOptions]] = NaturalInstructionsOptions
    options: NaturalInstructionsOptions

    def load(self, seed: int) -> Corpus:
        """The corpus; ``seed`` draws the clients, which of them are unseen, and their examples."""
        seen, unseen = self._clients(instruction_files.open_source(self.options.path, self.options.share, seed), seed)
        if not seen:
            raise DataError(f"no client of {self.options.path} passes task.categories, english and max_chars")
        test = [(client, client.held_out(self.options.score_on)) for client in seen]
        never = [(client, client.held_out(self.options.score_on)) for client in unseen]
        return Corpus(
            kind=self.kind,
            train=_rows([(client, client.train) for client in seen], self.options.train),
            test=_rows(test, self.options.test),
            unseen=_rows(never, self.options.test) if unseen else None,
            metric=self.metric,
        )

    def score(self, predictions: Sequence[str], rows: Dataset) -> np.ndarray:
        """Rouge-L (F-measure) of each answer."""
        return best(RougeL(), predictions, rows)

    def _clients(self, source: Source, seed: int) -> tuple[list[Client], list[Client]]:
        """Those that train, and those that do not; read in an order drawn by ``seed`` until there are enough."""
        names = sorted(source.names)
        order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        wanted = self.options.unseen
        if wanted == "test_tasks":
            held_out = set(source.test_tasks())
            unseen = list(self._wanted(source, [name for name in order if name in held_out], None))
            rest = [name for name in order if name not in held_out]
            return self._enough(source, rest, self.options.clients), unseen
        clients = self.options.clients
        if isinstance(wanted, int):
            found = self._enough(source, order, None if clients is None else clients + wanted)
            return found[wanted:], found[:wanted]
        # A share of those that pass the filters; with ``clients`` given, of them and the unseen together.
        found = self._enough(source, order, None if clients is None else round(clients / (1 - wanted)))
        count = round(wanted * len(found))
        return found[count:], found[:count]

    def _enough(self, source: Source, names: Sequence[str], count: int | None) -> list[Client]:
        """The first ``count`` that have what the options ask for. Raises ``OptionError`` where there are less."""
        found = list(self._wanted(source, names, count))
        if count is not None and len(found) < count:
            raise OptionError(
                f"task.clients and task.unseen want {count} clients, and {len(found)} are there to be had"
            )
        return found

    def _wanted(self, source: Source, names: Sequence[str], count: int | None) -> Iterator[Client]:
        """The first ``count`` clients that have what the options ask for."""
        found = 0
        for name in names:
            if count is not None and found == count:
                return
            client = source.read(name).without_longer(self.options.max_chars)
            of_category = self.options.categories is None or client.category in self.options.categories
            of_language = not self.options.english or client.latin() >= 0.9
            if of_category and of_language and client.train and client.held_out(self.options.score_on):
                found += 1
                yield client


class RougeL:
    """Rouge-L of an answer and a reference (Lin, 2004), by Google's rouge-score with its Porter stemmer."""

    def __init__(self) -> None:
        from rouge_score import rouge_scorer

        self._latin = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        self._other = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())

    def __call__(self, answer: str, reference: str) -> float:
        latin = any(letter.isascii() and letter.isalnum() for letter in reference)
        scorer = self._latin if latin else self._other
        return float(scorer.score(target=reference, prediction=answer)["rougeL"].fmeasure)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


def _rows(parts: Sequence[tuple[Client, Sequence[Example]]], most: int | None) -> Dataset:
    """Columns ``prompt``, ``target``, ``targets``, ``client`` and ``category``."""
    from datasets import Dataset

    pairs = [(client, example) for client, examples in parts for example in examples[:most]]
    return Dataset.from_dict(
        {
            "prompt": [alpaca(client.instruction, example.text) for client, example in pairs],
            "target": [example.answers[0] for _, example in pairs],
            "targets": [example.answers for _, example in pairs],
            "client": [client.name for client, _ in pairs],
            "category": [client.category for client, _ in pairs],
        }
    )
