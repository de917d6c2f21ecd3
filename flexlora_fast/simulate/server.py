"""The server's part of a run: whom it asks, what it sends them, and what it makes of their answers."""

from __future__ import annotations

import dataclasses
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
from flexlora_fast.simulate.prepare import DROPOUT, INITIAL, SAMPLE, Client, People
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
        self.fresh = self.method.output == "fresh"

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
        path = self.folder / "sent" / f"{self.state.round:05d}" / name.replace("/", "-")
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = self.experiment.seed if seed is None else int(seed.generate_state(1)[0])
            save(self._cut(wanted, drawn), path)
        return Model(path, self.state.base)

    def _cut(self, wanted: dict[str, int], seed: int) -> Adapter:
        scales = {layer: self.initial.scale(layer) for layer in wanted}
        update = self.state.update
        if update is None:
            return truncated(self.initial, wanted, scales, seed=seed)
        names = {layer: self.initial.spec(layer).pattern_name for layer in wanted}
        given = {layer: update[layer].given(rank) for layer, rank in wanted.items()}  # FLoRIST's may be lower
        config = configs.with_ranks(self.initial.config, given, scales, names)
        return dataclasses.replace(update, seed=seed).adapter(config=config)

    def sent_bytes(self, clients: Sequence[Client]) -> int:
        """What goes to these clients as a round begins: adapters, and what they add to their base weights. Adapters
        that begin anew cost nothing but their heads.
        """
        update = self.state.update
        parts = [] if update is None else [part for layer in update.values() for part in layer.base or ()]
        total = len(clients) * sum(part.nbytes for part in parts)
        if self.fresh and update is not None:
            return total + len(clients) * sum(extra.nbytes for extra in update.extras.values())
        sizes: dict[Path, int] = {}
        for client in clients:
            path = self.model_of(client).adapter
            if path not in sizes:
                sizes[path] = nbytes(Adapter.load(path))
            total += sizes[path]
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
