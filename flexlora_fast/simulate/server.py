"""The server's part of a run: whom it asks, what it sends them, and what it makes of their answers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast import layouts
from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.errors import AdapterError, EmptyRoundError
from flexlora_fast.methods.fedopt import FedAdam, FedAvgM, ServerOptimizer
from flexlora_fast.methods.slora import initial
from flexlora_fast.methods.sparse import Mask, SparseDelta, average
from flexlora_fast.simulate import metrics, ranks, state
from flexlora_fast.simulate.jobs import Model, Sparse
from flexlora_fast.simulate.prepare import DROPOUT, INITIAL, SAMPLE, Client, People
from flexlora_fast.simulate.spec import Experiment
from flexlora_fast.simulate.state import State
from flexlora_fast.simulate.uploads import nbytes, save
from flexlora_fast.truncation import truncated
from flexlora_fast.update import GlobalUpdate, Refusal


@dataclass(frozen=True)
class Outcome:
    """What a round's aggregation gave: the update (None: nobody was accepted), the mean of the sparse changes of an
    SLoRA stage, and who was refused.
    """

    update: GlobalUpdate | None
    sparse: SparseDelta | None = None
    refused: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True)
class Upload:
    """What a client sent: an adapter folder, and the file of an SLoRA stage."""

    client: Client
    adapter: Path
    sparse: Path | None = None


class Server:
    """Holds the ``State`` of a run and everything that follows from it.

    Args:
        folder: where the state is kept. initial: the adapter that everybody starts from, of the largest ranks.
    """

    def __init__(self, experiment: Experiment, people: People, folder: Path, initial: Adapter, now: State) -> None:
        self.experiment, self.people, self.folder, self.initial, self.state = experiment, people, folder, initial, now
        self.method = experiment.method.make()
        self.by_type = {label: ranks.of_layers(kind, initial) for label, kind in people.types.items()}
        self.rank = max(max(found.values()) for found in self.by_type.values())
        self.heaviest = list(self.by_type)[-1]
        self.fresh = self.method.output == "fresh"
        if now.optimizer is None:
            now.optimizer = fresh_optimizer(experiment, self.rank)

    # -- whom it asks ---

    def sample(self, number: int) -> tuple[list[Client], list[Client]]:
        """Who is asked in a round, and who of them answers."""
        everybody, seed = self.people.clients, self.experiment.seed
        count = self.experiment.clients.sampled(len(everybody))
        drawn = np.random.default_rng([seed, SAMPLE, number]).choice(len(everybody), count, replace=False)
        lost = np.random.default_rng([seed, DROPOUT, number]).random(len(everybody)) < self.experiment.clients.dropout
        sampled = [everybody[i] for i in np.sort(drawn)]
        return sampled, [client for client in sampled if not lost[client.index]]

    # -- what it sends ---

    def model(self, label: str) -> Model:
        """The global model as clients of that type have it."""
        return self._model(label, self.by_type[label])

    def model_of(self, client: Client) -> Model:
        """The global model as that client has it."""
        own = self.state.ranks.get(client.name)
        if own is None and not self.fresh:
            return self.model(client.type)
        # Adapters that begin anew are drawn for each client and round: all in the same directions would see less.
        seed = np.random.SeedSequence([self.experiment.seed, INITIAL, self.state.round, client.index])
        return self._model(f"client-{client.index}", own or self.by_type[client.type], seed)

    def _model(self, name: str, wanted: dict[str, int], seed: np.random.SeedSequence | None = None) -> Model:
        path = self.place(self.state.round, name)
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = self.experiment.seed if seed is None else int(seed.generate_state(1)[0])
            save(self._cut(wanted, drawn), path)
        return Model(path, self.state.base)

    def place(self, number: int, name: str) -> Path:
        """Where the adapter lies that a type of client had after that round."""
        return self.folder / "sent" / f"{number:05d}" / name.replace("/", "-")

    def _cut(self, wanted: dict[str, int], seed: int) -> Adapter:
        scales = {layer: self.initial.scale(layer) for layer in wanted}
        update = self.state.update
        if update is None:
            return truncated(self.initial, wanted, scales, seed=seed)
        names = {layer: self.initial.spec(layer).pattern_name for layer in wanted}
        given = {layer: update[layer].given(rank) for layer, rank in wanted.items()}  # FLoRIST's may be lower
        config = configs.with_ranks(self.initial.config, given, scales, names)
        return dataclasses.replace(update, seed=seed).adapter(config=config)

    def sent_bytes(self, models: Sequence[Model]) -> int:
        """What these take to send: adapters, and what is added to base weights. Adapters that begin anew cost nothing
        but their heads.
        """
        update = self.state.update
        parts = [] if update is None else [part for layer in update.values() for part in layer.base or ()]
        total = len(models) * sum(part.nbytes for part in parts)
        if self.fresh and update is not None:
            return total + len(models) * sum(extra.nbytes for extra in update.extras.values())
        sizes: dict[Path, int] = {}
        for model in models:
            if model.adapter not in sizes:
                sizes[model.adapter] = nbytes(Adapter.load(model.adapter))
            total += sizes[model.adapter]
        return total

    # -- what it makes of the answers ---

    def sparse(self, client: Client, out: Path) -> Sparse | None:
        """What that client trains in the next round of an SLoRA stage; None when there is none."""
        stage = self.experiment.method.slora
        if stage is None or self.state.round >= stage.rounds:
            return None
        mask = Mask(self.experiment.seed, stage.densities.get(client.type, stage.density))
        return Sparse(mask, self.state.sparse, out)

    def aggregate(self, uploads: Sequence[Upload]) -> Outcome:
        """The update of those uploads that are accepted; weights are the clients' numbers of rows."""
        stage = any(upload.sparse is not None for upload in uploads)
        options = self.experiment.server
        aggregator = Aggregator(
            self.rank,
            "flexlora" if stage else self.method,  # in the stage only heads change, which all methods average
            options.solver,
            options.tol,
            "cuda" if torch.cuda.is_available() else None,
            self.experiment.seed,
            defence=None if stage else options.defence,
            progress=False,
        )
        deltas: list[tuple[SparseDelta, int]] = []
        for upload in uploads:
            client = upload.client
            try:
                delta = None if upload.sparse is None else SparseDelta.load(upload.sparse, client.name)
                aggregator.add(upload.adapter, weight=client.train, client=client.name)
            except AdapterError as error:  # a client that diverged ends no round
                if not any(refusal.client == client.name for refusal in aggregator.refused):
                    aggregator.refused.append(Refusal(client.name, str(error), error.code))
                continue
            deltas += [] if delta is None else [(delta, client.train)]
        try:
            update = aggregator.finish()
        except EmptyRoundError:
            return Outcome(None, refused=aggregator.refused)
        mean = average([delta for delta, _ in deltas], [weight for _, weight in deltas]) if deltas else None
        return Outcome(update, mean, aggregator.refused)

    def advance(self, outcome: Outcome, ranks_left: Mapping[str, int]) -> None:
        """The state after the round, also on disk. ``ranks_left``: of clients, after their self-pruning."""
        now, update, sparse = self.state, outcome.update, outcome.sparse
        now.round += 1
        base: Mapping[str, Tensor] | None = None
        stage = self.experiment.method.slora
        if sparse is None and stage is not None and now.round <= stage.rounds:  # nobody came
            sparse = None if now.sparse is None else SparseDelta.load(now.sparse)
        if sparse is not None and stage is not None and now.round == stage.rounds:
            heads = update or now.update
            assert heads is not None
            update, sparse = initial(sparse, self.initial, self.rank, extras=heads.extras, seed=heads.seed), None
            now.base = None
        elif sparse is not None:
            base = dict(self._weights(sparse))
        elif update is not None:
            if now.optimizer is not None:
                update = now.optimizer.step(now.update, update)
            if self.method.merges:
                base = self._added(update)
        now.update = update or now.update
        if self.experiment.method.gamma is not None:
            now.ranks |= {name: dict.fromkeys(self.initial.layers, rank) for name, rank in ranks_left.items()}
        now.save(self.folder / f"{now.round:05d}", base=base, sparse=sparse)

    def _weights(self, sparse: SparseDelta) -> Iterator[tuple[str, Tensor]]:
        """Trained entries in the layout of the weights, dense, by layer."""
        for layer, delta in sparse.items():
            yield layer, layouts.to_weight_layout(self.initial.spec(layer), delta.unsqueeze(0))

    def _added(self, update: GlobalUpdate) -> dict[str, Tensor]:
        """What the base weights have more than in the beginning, with this round's part."""
        total = state.added(self.state.base)
        for layer in update:
            delta = update.base_delta(layer, layout="weight")
            if delta is not None:
                total[layer] = total[layer] + delta if layer in total else delta
        return total

    def updated(self) -> dict[str, Any] | None:
        """The state's update as a line of ``metrics.jsonl`` has it; in an SLoRA stage adapters have none."""
        now = self.state
        return None if now.update is None or now.sparse is not None else metrics.updating(now.update, self.by_type)

    def clean(self, needed: Collection[int] = ()) -> None:
        """Remove what belongs to rounds before this state, but for those that are ``needed``."""
        for kind in (self.folder, self.folder / "sent", self.folder / "work"):
            for path in kind.glob("[0-9]" * 5) if kind.is_dir() else ():
                number, done = int(path.name), kind.name == "work"
                if number <= self.state.round if done else number < self.state.round and number not in needed:
                    shutil.rmtree(path)


OPTIMIZERS: dict[str, type[ServerOptimizer]] = {"fedavgm": FedAvgM, "fedadam": FedAdam}


def fresh_optimizer(experiment: Experiment, rank: int) -> ServerOptimizer | None:
    """The server optimizer that the experiment asks for, before its first step."""
    wanted, options = experiment.server.optimizer, experiment.server
    if wanted is None:
        return None
    shared = {"solver": options.solver, "tol": options.tol, "seed": experiment.seed}
    if wanted.name == "fedavgm":
        return FedAvgM(wanted.lr, wanted.momentum, rank, **shared)  # type: ignore[arg-type]
    return FedAdam(wanted.lr, wanted.beta1, wanted.beta2, wanted.tau, rank, **shared)  # type: ignore[arg-type]
