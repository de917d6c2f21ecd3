"""Flower without its servers: a grid of nodes in this process, each with a ClientApp and a config of its own."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.supercore.task_identity import TaskIdentity

import flexlora_fast as ff
from flexlora_fast.integrations.flower import FlexLoRAStrategy, flexlora_mod, from_record, to_record
from tests import rounds

ALPHA, LARGEST = 8, 8
RANKS = {1: 2, 2: 4, 3: 8}  # of the nodes of ``three``
LOWEST = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
A, B = rounds.LINEAR[0].keys()
Train = Callable[[Message, Context], RecordDict]


def reference(**extras: torch.Tensor) -> rounds.Client:
    """The server's own adapter, at the largest rank."""
    return rounds.client("server", rank=LARGEST, alpha=ALPHA).but(extras=extras)


def policy(**rules: Any) -> ff.RoundPolicy:
    rules = {"ranks": (1, 2, 4, 8), "max_weight": 1000.0, "max_layer_norm": 1e6} | rules
    return ff.RoundPolicy.from_adapter(reference().adapter(), **rules)


def initial(*, trained: bool = False) -> ArrayRecord:
    """What a run begins with: B = 0, as LoRA begins, or not."""
    state = reference().state_dict()
    return to_record({key: x if trained or "lora_A" in key else torch.zeros_like(x) for key, x in state.items()})


def adapter_of(record: ArrayRecord, rank: int) -> ff.Adapter:
    """The adapter that a client of this rank has after ``set_peft_model_state_dict``."""
    config = reference().config | {"r": rank}
    return ff.Adapter.from_state_dict(from_record(record), config)


def reply_of(state: dict[str, torch.Tensor], weight: Any = 10, **metrics: Any) -> RecordDict:
    found = MetricRecord({"num-examples": weight, **metrics})
    return RecordDict({"arrays": to_record(state), "metrics": found})


def trains(rank: int, *, seed: int = 0, weight: Any = 10, **metrics: Any) -> Train:
    """A client that insists on its rank, and answers with what it got plus noise that (seed, round) addresses."""

    def train(message: Message, context: Context) -> RecordDict:
        state = from_record(message.content["arrays"])
        number = int(message.content["config"]["server-round"])
        generator = torch.Generator().manual_seed(1000 * seed + number)
        for key, x in state.items():
            assert (x.shape[0] if "lora_A" in key else x.shape[1]) == rank, (key, tuple(x.shape))
            state[key] = x + 0.1 * torch.randn(x.shape, generator=generator)
        return reply_of(state, weight, **metrics)

    return train


def app(train: Train, *mods: Any) -> ClientApp:
    made = ClientApp(mods=list(mods or [flexlora_mod]))

    @made.train()
    def _train(message: Message, context: Context) -> Message:
        return Message(train(message, context), reply_to=message)

    @made.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        found = train(message, context)
        return Message(RecordDict({"metrics": found["metrics"]}), reply_to=message)

    return made


class LocalGrid(Grid):
    """Nodes by id, with their configs and the run's. ``sent`` and ``received`` keep every message, by node."""

    def __init__(
        self, apps: dict[int, ClientApp], configs: dict[int, dict[str, Any]], run_config: dict[str, Any] | None = None
    ) -> None:
        self.apps, self.configs, self.run_config = apps, configs, run_config or {}
        self.sent: dict[int, list[Message]] = defaultdict(list)
        self.received: dict[int, list[Message]] = defaultdict(list)
        self._replies: dict[str, Message] = {}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def set_run(self, run: Any) -> None:
        pass

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            ids.append(f"{node}-{len(self.sent[node])}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent[node].append(message)
            copy = Message(RecordDict(dict(message.content)), metadata=message.metadata)
            context = Context(1, node, self.configs.get(node, {}), RecordDict(), self.run_config)
            try:
                reply = self.apps[node](copy, context)
            except Exception as error:  # as a SuperNode does
                reply = Message(Error(2, repr(error)), reply_to=message)
            self._replies[ids[-1]] = reply
            self.received[node].append(reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def three(**configs: Any) -> LocalGrid:
    """Nodes 1, 2, 3 of ranks 2, 4, 8 and weights 10, 20, 30."""
    apps = {node: app(trains(rank, seed=node, weight=10 * node)) for node, rank in RANKS.items()}
    return LocalGrid(apps, configs.get("configs", {node: {"lora-rank": rank} for node, rank in RANKS.items()}))


def ranks_sent(grid: LocalGrid, node: int) -> list[int]:
    """The rank of each training message's arrays."""
    return [from_record(message.content["arrays"])[A].shape[0] for message in trainings(grid, node)]


def trainings(grid: LocalGrid, node: int) -> list[Message]:
    return [m for m in grid.sent[node] if m.metadata.message_type == "train" and "arrays" in m.content]


@functools.cache
def undisturbed() -> Result:
    return FlexLoRAStrategy(policy(), ranks=RANKS).start(three(), initial(), num_rounds=2)
