"""An experiment: what ``flexlora-fast simulate`` reads from a TOML or YAML file, each table a model that checks it."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flexlora_fast import defence, methods
from flexlora_fast.errors import OptionError, shown
from flexlora_fast.lowrank import plan
from flexlora_fast.simulate import documents, tasks
from flexlora_fast.simulate.learners.base import LoraSpec, ModelSpec

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Chance = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Table(BaseModel):
    """A table of the file: unknown keys are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Clients(Table):
    """The ``[clients]`` table: how many there are, and who has what.

    Attributes:
        number: of clients; with "natural" the largest ones, and None takes all.
        per_round: sampled for a round: a count, a fraction of all (0.05), or None for all.
        dropout: probability that a sampled client does not answer, for each client and round by itself.
        partition: "dirichlet" (label skew, of ``alpha``), "iid", or "natural" (by the rows' ``client`` column).
        smallest: rows that a client has at least: draws with less are repeated, natural clients with less left out.
    """

    number: Count | None = None
    per_round: Count | Fraction | None = None
    dropout: Chance = 0.0
    partition: Literal["dirichlet", "iid", "natural"]
    alpha: Positive | None = None
    smallest: Count = 1

    @model_validator(mode="after")
    def _consistent(self) -> Clients:
        if (self.partition == "dirichlet") != (self.alpha is not None):
            raise ValueError("alpha goes with partition 'dirichlet', which needs it")
        if self.partition != "natural" and self.number is None:
            raise ValueError(f"partition {self.partition!r} needs a number of clients")
        return self

    def sampled(self, total: int) -> int:
        """How many of ``total`` clients a round asks."""
        wanted = total if self.per_round is None else self.per_round
        if isinstance(wanted, float):
            return max(1, round(wanted * total))
        return min(wanted, total)


class RankType(Table):
    """What a kind of device can afford: rank ``r``, and ``ffn`` in place of it in feed-forward layers."""

    r: Count
    ffn: Count | None = None

    @property
    def label(self) -> str:
        return str(self.r) if self.ffn in (None, self.r) else f"{self.r}/{self.ffn}"


# The paper's four (its section 5.1 and released code), from light to heavy: 8, 30, 30 with 200 in the FFN, 200.
PAPER_TYPES = [RankType(r=8), RankType(r=30), RankType(r=30, ffn=200), RankType(r=200)]


class Ranks(Table):
    """The ``[ranks]`` table: exactly one of ``all``, ``each`` and ``distribution``.

    Attributes:
        all: one rank for everybody.
        each: ranks in the order of the clients, repeated as often as it takes.
        distribution: each client draws one of ``types``, see ``ranks.SHARES``.
        types: from light to heavy; the paper's by default, smaller ones for smaller models.
        everyone: who draws what stays as it is, but then all have the "smallest" (or "largest") type that somebody
            drew: what methods for equal ranks are compared by.
        attention: a regular expression found in the names of layers that have ``r`` where a type has ``ffn``.
    """

    all: Count | None = None
    each: Annotated[list[Count], Field(min_length=1)] | None = None
    distribution: Literal["uniform", "heavy-tail-light", "heavy-tail-strong", "normal"] | None = None
    types: Annotated[list[RankType], Field(min_length=1)] = PAPER_TYPES
    everyone: Literal["own", "smallest", "largest"] = "own"
    attention: str = r"att(n|ention)|[qkvo]_(proj|lin)"

    @model_validator(mode="after")
    def _one(self) -> Ranks:
        given = [name for name in ("all", "each", "distribution") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of all, each and distribution, not {' and '.join(given) or 'none'}")
        if self.distribution is None and self.types != PAPER_TYPES:
            raise ValueError("types are what a distribution draws from; give a distribution, or each and no types")
        try:
            re.compile(self.attention)
        except re.error as error:
            raise ValueError(f"attention is no regular expression ({error})") from error
        return self

    @property
    def drawn(self) -> list[RankType]:
        """The types that clients may have."""
        if self.distribution is not None:
            return self.types
        return [RankType(r=r) for r in (self.each or [self.all or 1])]


class Sparse(Table):
    """``[method.slora]``: ``rounds`` of sparse fine-tuning of base weights, whose average then initialises adapters.

    ``density``: the share of the weights' entries that are trained; ``densities``: another one for clients of a type,
    by its label ("8", "30/200"), as in FlexLoRA's experiments.
    """

    rounds: Count
    density: Fraction
    densities: dict[str, Fraction] = {}


class MethodTable(Table):
    """The ``[method]`` table.

    Attributes:
        name: one of ``flexlora-fast methods``. The paper's "FedAvg" is "fedit" with ``training.optimizer = "sgd"``.
        settings: of the method (its constructor's arguments).
        gamma, penalty: HetLoRA's rank self-pruning in the clients: the last (1 − gamma) of the columns are penalised
            by ``penalty`` times their norms' product, and cut off where they became small.
        slora: an SLoRA stage before the method's own rounds.
        label: what tables and plots call it (default: ``name``).
    """

    name: str = "flexlora"
    label: str | None = None
    settings: dict[str, Any] = {}
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None
    penalty: NotNegative = 0.0
    slora: Sparse | None = None

    @model_validator(mode="after")
    def _known(self) -> MethodTable:
        if self.name not in methods.METHODS:
            near = difflib.get_close_matches(self.name, methods.METHODS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no method {self.name!r}; {hint}there are {', '.join(methods.METHODS)}")
        try:
            self.make()
        except TypeError as error:
            raise ValueError(f"settings do not fit method {self.name!r}: {error}") from error
        if self.gamma is not None and self.name != "hetlora":
            raise ValueError("gamma is HetLoRA's self-pruning; leave it out for other methods")
        if self.penalty and self.gamma is None:
            raise ValueError("penalty is that of HetLoRA's self-pruning; give gamma with it")
        return self

    def make(self) -> methods.Method:
        """The method with its settings."""
        return methods.METHODS[self.name](**self.settings)


class Optimizer(Table):
    """``[server.optimizer]``: FedOpt's step from one global update to the next (Reddi et al., arXiv 2003.00295)."""

    name: Literal["fedavgm", "fedadam"]
    lr: Positive = 1.0
    momentum: Chance = 0.9
    beta1: Chance = 0.9
    beta2: Chance = 0.99
    tau: Positive = 1e-3


class Asynchronous(Table):
    """``[server.asynchronous]``: FedBuff (Nguyen et al., arXiv 2106.06639) in simulated time, in place of
    ``clients.per_round``.

    A round is a step of the server, as soon as ``goal`` uploads are there. ``concurrency`` clients train at any time;
    each takes as long as its examples times a pace of its own, drawn log-normally: exp(spread·N(0, 1)). An upload that
    started τ steps ago weighs (1 + τ)^−exponent as much, and later than ``max_staleness`` it is refused.
    """

    goal: Count
    concurrency: Count
    exponent: NotNegative = 0.5
    spread: NotNegative = 0.5
    max_staleness: Annotated[int, Field(ge=0)] = 10


class Server(Table):
    """The ``[server]`` table: what the server does beside the method; arguments of ``ff.Aggregator``."""

    solver: str = "auto"
    tol: NotNegative = 1e-3
    defence: str | None = None
    optimizer: Optimizer | None = None
    asynchronous: Asynchronous | None = None

    @model_validator(mode="after")
    def _one(self) -> Server:
        if self.optimizer is not None and self.asynchronous is not None:
            raise ValueError("asynchronous rounds have no server optimizer here; leave one of the two out")
        plan.check_solver(self.solver)
        defence.get(self.defence)
        return self


class Decay(Table):
    """From ``round`` on, learning rates are ``factor`` times those of the file."""

    round: Count
    factor: Positive


class Training(Table):
    """The ``[training]`` table: a client's part in a round, done by ``transformers.Trainer``.

    Attributes:
        steps, epochs: exactly one: optimizer steps, or passes over the client's rows.
        batch: rows a step. lr: of LoRA's factors. lr_head: of heads and all else that is trained (default: ``lr``).
        optimizer: torch's "adamw" or "sgd". momentum: of "sgd". clip: of the gradient's norm.
        schedule: factors of the learning rates by round.
    """

    steps: Count | None = None
    epochs: Positive | None = None
    batch: Count = 16
    lr: Positive
    lr_head: Positive | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Chance = 0.0
    weight_decay: NotNegative = 0.0
    clip: Positive = 1.0
    schedule: list[Decay] = []

    @model_validator(mode="after")
    def _one(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum is that of optimizer 'sgd'; AdamW has its own")
        return self

    def examples(self, rows: int) -> int:
        """How many a client with so many rows sees in a round: the last batch of a pass over them may be small."""
        a_pass = math.ceil(rows / self.batch)
        steps = math.ceil((self.epochs or 0) * a_pass) if self.steps is None else self.steps
        passes, more = divmod(steps, a_pass)
        return passes * rows + min(more * self.batch, rows)

    def factor(self, number: int) -> float:
        """Of the learning rates in that round."""
        passed = [decay for decay in self.schedule if decay.round <= number]
        return max(passed, key=lambda decay: decay.round).factor if passed else 1.0


class Evaluation(Table):
    """The ``[evaluation]`` table.

    Attributes:
        every: rounds; the last is tested always. limit: rows of each part, drawn once (default: all).
        by_rank: test what each type of client is sent, not only the heaviest: "last" round, "always", or "never".
        unseen: test on clients that never train, where the task has them. batch: rows at a time.
    """

    every: Count = 1
    limit: Count | None = None
    by_rank: Literal["never", "last", "always"] = "last"
    unseen: bool = True
    batch: Count = 64


class Experiment(Table):
    """The whole file."""

    name: str
    rounds: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: dict[str, Any]
    model: ModelSpec
    lora: LoraSpec = LoraSpec()
    clients: Clients
    ranks: Ranks
    method: MethodTable = MethodTable()
    server: Server = Server()
    training: Training
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _rounds(self) -> Experiment:
        if self.method.slora is not None and self.method.slora.rounds >= self.rounds:
            raise ValueError(f"method.slora.rounds leaves none of the {self.rounds} rounds; raise rounds")
        for key, text in (("name", self.name), ("method.label", self.method.label)):
            if text is not None and (not text.strip() or "/" in text or text.startswith(".")):
                raise ValueError(f"{key} is {text!r}, and runs are kept in a folder of that name; leave / and . out")
        labels = [kind.label for kind in self.ranks.drawn]
        if self.method.gamma is not None and any("/" in label for label in labels):
            raise ValueError("method.gamma prunes a client to one rank; give ranks without ffn")
        if self.method.slora is not None and (unknown := sorted(set(self.method.slora.densities) - set(labels))):
            raise ValueError(f"method.slora.densities has {unknown}; the types of [ranks] are {sorted(set(labels))}")
        method = self.method.make()
        if self.server.optimizer is not None and (method.merges or method.trains != ("A", "B")):
            raise ValueError(f"method {self.method.name!r} has no server.optimizer; take flexlora or fedit")
        plain = self.method.name == "flexlora" and self.method.slora is None and self.server.defence is None
        if self.server.asynchronous is not None and not (plain and self.clients.per_round is None):
            raise ValueError(
                "server.asynchronous adds up updates as method 'flexlora' does, without slora, defence and per_round"
            )
        return self

    @property
    def task_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.task.items() if key != "name"}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``Experiment.of`` reads it back."""
        document: dict[str, Any] = json.loads(self.model_dump_json())
        return document

    @classmethod
    def of(cls, document: Mapping[str, Any], source: str) -> Experiment:
        """Check a document. Raises ``OptionError`` naming ``source``, the key, its value, and what to do."""
        try:
            # As JSON: a strict model takes a path for text and a list for a tuple there, and still no "1" for 1.
            experiment = cls.model_validate_json(json.dumps(document, default=str), strict=True)
        except ValidationError as error:
            raise OptionError("\n".join(documents.told(problem, source, cls) for problem in error.errors())) from error
        name = experiment.task.get("name")
        if not isinstance(name, str):
            raise OptionError(f"{source}: task.name is {shown(name)}; give one of {', '.join(tasks.TASKS)}")
        options = tasks.task_class(name).Options
        try:
            options.model_validate_json(json.dumps(experiment.task_options), strict=True)
        except ValidationError as error:
            problems = [{**problem, "loc": ("task", *problem["loc"])} for problem in error.errors()]
            raise OptionError(
                "\n".join(documents.told(problem, source, cls, options) for problem in problems)
            ) from error
        return experiment

    @classmethod
    def read(cls, path: Path, changes: Sequence[str] = ()) -> Experiment:
        """The experiment in a file. ``changes``: ``key.path=value`` each, with values as TOML writes them (or plain
        text). Raises ``OptionError`` for what does not fit, ``OSError`` for a file that cannot be read.
        """
        text = path.read_bytes()
        try:
            document = documents.parse(path, text)
        except ValueError as error:
            raise OptionError(f"{path}: not a {path.suffix.removeprefix('.').upper()} file ({error})") from error
        if not isinstance(document, dict):
            raise OptionError(f"{path}: holds a {type(document).__name__}; an experiment is a table of keys")
        for change in changes:
            documents.change(document, change)
        return cls.of(document, str(path))
