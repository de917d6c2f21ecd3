"""The server's part of a run: whom it asks, what it sends them, and what it makes of their answers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from flexlora_fast import config as configs
from flexlora_fast.adapter import Adapter
from flexlora_fast.aggregator import Aggregator
from flexlora_fast.errors import AdapterError, EmptyRoundError
from flexlora_fast.simulate import ranks, state
from flexlora_fast.simulate.jobs import Model
from flexlora_fast.simulate.prepare import DROPOUT, SAMPLE, Client, People
from flexlora_fast.simulate.spec import Experiment
from flexlora_fast.simulate.state import State
from flexlora_fast.simulate.uploads import nbytes, save
from flexlora_fast.truncation import truncated
from flexlora_fast.update import GlobalUpdate, Refusal


@dataclass(frozen=True)
class Outcome:
    """What a round's aggregation gave: the new update (None: nobody was accepted), and who was refused."""

    update: GlobalUpdate | None
    refused: list[Refusal] = field(default_factory=list)


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
        self._sizes: dict[Path, int] = {}

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
        return self.model(client.type) if own is None else self._model(f"client-{client.index}", own)

    def _model(self, name: str, wanted: dict[str, int]) -> Model:
        path = self.folder / "sent" / f"{self.state.round:05d}" / name.replace("/", "-")
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            save(self._cut(wanted), path)
        return Model(path, self.state.base)

    def _cut(self, wanted: dict[str, int]) -> Adapter:
        scales = {layer: self.initial.scale(layer) for layer in wanted}
        if self.state.update is None:
            return truncated(self.initial, wanted, scales, seed=self.experiment.seed)
        names = {layer: self.initial.spec(layer).pattern_name for layer in wanted}
        return self.state.update.adapter(config=configs.with_ranks(self.initial.config, wanted, scales, names))

    def sent_bytes(self, clients: Sequence[Client]) -> int:
        """What goes to these clients as a round begins."""
        total = 0
        for client in clients:
            path = self.model_of(client).adapter
            if path not in self._sizes:
                self._sizes = {known: size for known, size in self._sizes.items() if known.parent == path.parent}
                self._sizes[path] = nbytes(Adapter.load(path))
            total += self._sizes[path]
        return total

    # -- what it makes of the answers ---

    def aggregate(self, uploads: Sequence[tuple[Client, Path]]) -> Outcome:
        """The update of those uploads that are accepted; weights are the clients' numbers of rows."""
        options = self.experiment.server
        aggregator = Aggregator(
            self.rank,
            self.method,
            options.solver,
            options.tol,
            "cuda" if torch.cuda.is_available() else None,
            self.experiment.seed,
            defence=options.defence,
            progress=False,
        )
        for client, path in uploads:
            try:
                aggregator.add(path, weight=client.train, client=client.name)
            except AdapterError:
                continue  # noted in ``refused``; a client that diverged ends no round
        try:
            return Outcome(aggregator.finish(), aggregator.refused)
        except EmptyRoundError:
            return Outcome(None, aggregator.refused)

    def advance(self, outcome: Outcome) -> None:
        """The state after the round, also on disk."""
        now, update = self.state, outcome.update
        now.round += 1
        added = None
        if update is not None:
            now.update = update
            if self.method.merges:
                added = self._added(update)
        now.save(self.folder / f"{now.round:05d}", added)

    def _added(self, update: GlobalUpdate) -> dict[str, torch.Tensor]:
        """What the base weights have more than in the beginning, with this round's part."""
        total = state.added(self.state.base)
        for layer in update:
            delta = update.base_delta(layer, layout="weight")
            if delta is not None:
                total[layer] = total[layer] + delta if layer in total else delta
        return total

    def clean(self) -> None:
        """Remove what belongs to rounds before this state."""
        for kind in (self.folder, self.folder / "sent", self.folder / "work"):
            for path in kind.glob("[0-9]" * 5) if kind.is_dir() else ():
                if int(path.name) < self.state.round + (kind.name == "work"):
                    shutil.rmtree(path)
