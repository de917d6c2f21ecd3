"""A server and its clients in one process, each client with an ordinary ``Trainer`` that lives through all rounds.

The clients' only federated line is ``FlexLoRACallback``. One more client is hostile: its uploads are files, and each
round's is another kind of wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PrinterCallback, ProgressCallback

import flexlora_fast as ff
from flexlora_fast.integrations.transformers import FlexLoRACallback, receive

HOSTILE = "mallory"


@dataclass(frozen=True)
class Round:
    """What one round gave: the clients' mean training loss, that on held-out data by client, and who was refused."""

    number: int
    train_loss: float
    test_loss: dict[str, float]
    refused: list[ff.Refusal]
    clients: list[str]


@dataclass
class Federation:
    """``trainers`` by client name; ``policy`` is the server's; hostile uploads are written to ``folder``."""

    trainers: Mapping[str, Any]
    policy: ff.RoundPolicy
    folder: Path
    rounds: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent: dict[str, ff.Adapter] = {}
        self.round = ff.Aggregator(policy=self.policy, progress=False)
        # Where a hostile client begins: what an honest one has before the first round.
        self.initial = ff.Adapter.from_peft(next(iter(self.trainers.values())).model)
        for name, trainer in self.trainers.items():
            trainer.add_callback(FlexLoRACallback(lambda name=name: self.sent.get(name), self.upload, client=name))
            for noisy in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(noisy)

    def upload(self, adapter: ff.Adapter, weight: float, client: str | None) -> None:
        self.round.add(adapter, weight, client)

    def play(self) -> Round:
        """All clients train and submit, the server aggregates, each is sent its own, and each is tested with it."""
        number = len(self.rounds) + 1
        self.round = ff.Aggregator(policy=self.policy, progress=False)
        torch.manual_seed(number)  # Trainer shuffles by it, and would take the last round's examples again
        losses = []
        for trainer in self.trainers.values():
            try:
                losses.append(trainer.train().training_loss)
            except ff.errors.FlexLoRAError:
                continue  # an honest client may diverge: the round notes it in ``refused`` and goes on
        with suppress(ff.errors.FlexLoRAError):  # noted in ``refused`` too
            self.round.add(hostile(number, self.initial, self.folder), 1.0, HOSTILE)
        update = self.round.finish()
        self.sent = {name: update.adapter(client=name) for name in self.round.clients}
        tested = {}
        for name, adapter in self.sent.items():
            trainer = self.trainers[name]
            receive(trainer.model, adapter, optimizer=trainer.optimizer)
            tested[name] = trainer.evaluate()["eval_loss"]
        self.rounds.append(Round(number, sum(losses) / len(losses), tested, update.refused, self.round.clients))
        return self.rounds[-1]


def hostile(number: int, adapter: ff.Adapter, folder: Path) -> Path:
    """An adapter folder that must not get into a round: values that are no numbers, too large, or of another shape."""
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    key = next(key for key in state if key.endswith("lora_B.weight"))
    if number % 3 == 1:
        state[key].fill_(torch.nan)
    elif number % 3 == 2:
        state = {name: tensor + 1e4 for name, tensor in state.items()}
    else:
        state[key] = torch.zeros(state[key].shape[0] + 1, state[key].shape[1])
    target = folder / f"{HOSTILE}-{number}"
    adapter.save(target)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "adapter_model.safetensors")
    return target
