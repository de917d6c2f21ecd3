"""The server's side: Flower's rounds, with a rank for each node and replies that nobody has to trust."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, EmptyRoundError, FlexLoRAError, OptionError, WeightError, shown
from flexlora_fast.gate import RoundPolicy
from flexlora_fast.integrations.flower import note, replies, wire
from flexlora_fast.integrations.flower.replies import Answer
from flexlora_fast.integrations.rounds import Rounds
from flexlora_fast.oneshot import aggregate
from flexlora_fast.truncation import truncated
from flexlora_fast.update import GlobalUpdate, Refusal

_QUESTION_TIMEOUT = 60.0  # seconds; a node that does not answer is sent the largest rank

Ranks = int | Mapping[int, int] | Callable[[int], int | None] | None

log = logging.getLogger("flwr")


class FlexLoRAStrategy(FedAvg):
    """FlexLoRA as a Flower strategy: each node trains at a rank of its own, and is sent factors of that rank.

    Between rounds the server carries one adapter, at the ranks of ``initial_arrays``: that is what ``evaluate_fn`` and
    ``Result.arrays`` get. Each node gets its leading columns, which is ΔW truncated to the node's rank. A reply that is
    not in order (a node that failed, NaN, a wrong shape, a weight above the policy's …) is refused, logged with its
    code, and left out; the run goes on. So it does, with the arrays as they were, after a round that nobody joined or
    that missed its quorum.

    Args:
        policy: what nodes may send, as for ``Aggregator``. Weights are numbers of examples here: set ``max_weight``.
        ranks: the rank to send: one for all, by node id, or a function of the node id (None: not known). A node whose
            rank is not given is sent what it replied with last, and at first the ranks of ``initial_arrays``, which
            ``flexlora_mod`` on the client cuts to the node's own.
        query_ranks: ask nodes of unknown rank for it (``flexlora_mod`` answers) before they are first sent anything.
        directory: where each round leaves its global update, in a folder ``round-0001`` …. A run that is started
            again with the same directory goes on after the last finished round; the uploads of the round that it was in
            are in its journal (``ff.Round``), and only the other nodes are asked again.
        options: what else the round takes (``Aggregator``, or ``Round.open`` where there is a ``directory``), such as
            ``{"defence": "clip", "min_clients": 3, "seed": 7}``.
        sampling: as for Flower's ``FedAvg``: fraction_train, min_available_nodes, weighted_by_key …

    Attributes:
        update: the last round's ``GlobalUpdate``, None before. refused: each round's refusals.

    Each round's metrics are the nodes' own, averaged over those accepted, and: flexlora-accepted, flexlora-refused
    (and flexlora-refused-CODE), flexlora-silent (nodes that did not answer), flexlora-norm (‖ΔW‖_F),
    flexlora-energy-kept-rN (at each rank N of the round) and flexlora-seconds (of aggregation). The own ones of nodes
    that were in the round before a restart are not in its averages: their journal has uploads alone.

    Raises ``OptionError`` for ranks that the policy does not allow, ``AdapterError`` for initial arrays that are not
    the policy's tensors.
    """

    def __init__(
        self,
        policy: RoundPolicy,
        *,
        ranks: Ranks = None,
        query_ranks: bool = False,
        directory: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        super().__init__(**sampling)
        self.policy, self.ranks, self.query_ranks = policy, ranks, query_ranks
        self.update: GlobalUpdate | None = None
        self.refused: dict[int, list[Refusal]] = {}
        self._rounds = Rounds(policy, directory, dict(options or {}))
        self._table = note.ScaleTable.of(policy)
        self._carried: Adapter | None = None  # the initial arrays: which layers and ranks are carried
        self._learnt: dict[int, dict[str, int]] = {}  # ranks by layer, by node
        self._questioned: set[int] = set()
        self._accepted: dict[str, MetricRecord] = {}
        self._asked = 0
        for rank in [ranks] if isinstance(ranks, int) else ranks.values() if isinstance(ranks, Mapping) else []:
            self._check_rank(rank)

    def summary(self) -> None:
        """Log what the strategy does."""
        super().summary()
        given = "as nodes reply" if self.ranks is None else self.ranks if isinstance(self.ranks, int) else "by node"
        log.info("\t└──> FlexLoRA:")
        log.info("\t\t├── Layers: %d, ranks allowed: %s", len(self.policy.specs), shown(sorted(self.policy.ranks)))
        log.info("\t\t├── Ranks sent: %s%s", given, ", asked for at first" if self.query_ranks else "")
        log.info("\t\t└── Rounds kept in: %s", self._rounds.directory or "nothing")

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds, as Flower's ``Strategy.start``; with a ``directory``, those that are not finished yet.

        Replies are taken into the round as they come, one at a time.
        """
        log.info("Starting %s:", type(self).__name__)
        self.summary()
        result = Result()
        first, arrays = self._begin(initial_arrays)
        self._evaluate_here(result, first - 1, arrays, evaluate_fn)
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        try:
            for current in range(first, num_rounds + 1):
                log.info("[ROUND %s/%s]", current, num_rounds)
                arrays = self._train(result, current, arrays, train_config, grid, timeout)
                self._evaluate(result, current, arrays, evaluate_config, grid, timeout)
                self._evaluate_here(result, current, arrays, evaluate_fn)
        finally:
            self._rounds.close()
        result.arrays = arrays
        log.info("Final results:\n%s", result)
        return result

    def _train(
        self, result: Result, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, timeout: float
    ) -> ArrayRecord:
        """One round of training; the arrays after it."""
        messages = list(self.configure_train(number, arrays, config, grid))
        for node, answer in replies.exchange(grid, messages, timeout):
            self._take(number, node, answer)
        found, metrics = self.aggregate_train(number, [])
        if metrics is not None:
            log.info("\t└──> Training: %s", metrics)
            result.train_metrics_clientapp[number] = metrics
        return arrays if found is None else found

    def _evaluate(
        self, result: Result, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, timeout: float
    ) -> None:
        messages = list(self.configure_evaluate(number, arrays, config, grid))
        metrics = self._averaged_evaluation(number, replies.exchange(grid, messages, timeout))
        if metrics is not None:
            log.info("\t└──> Evaluation: %s", metrics)
            result.evaluate_metrics_clientapp[number] = metrics

    # -- Flower's steps ---

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each sampled node, with factors of its own rank; none for those already in the round."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._accepted, self._asked = {}, 0
        self.refused[server_round] = []
        if not messages:
            return []
        adapter = self._adapter_of(arrays)
        there = set(self._rounds.open(server_round, max(self._carried_ranks(adapter).values())))
        left = [message for message in messages if _name(message.metadata.dst_node_id) not in there]
        if there:
            log.info("configure_train: %s nodes are in this round already", len(there))
            left = left[: max(0, len(messages) - len(there))]
        self._asked = len(left)
        return self._addressed(left, adapter, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each sampled node, with factors of its own rank."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        return self._addressed(messages, self._adapter_of(arrays), grid) if messages else []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in what was not yet, and finish the round. No arrays: it had too few clients, and changes nothing."""
        for reply in replies:
            self._take(server_round, reply.metadata.src_node_id, reply)
        if not self._rounds.is_open:
            return None, None
        started = time.perf_counter()
        try:
            update = self._rounds.finish()
            arrays = self._arrays_of(update)
        except (EmptyRoundError, WeightError, AdapterError) as error:  # too few, or too large for float32 together
            log.warning("Round %s changes nothing (%s): %s", server_round, error.code, error)
            self._rounds.nothing(server_round)
            return None, self._metrics(server_round, None, time.perf_counter() - started)
        self.update = update
        self._learn(update)
        return arrays, self._metrics(server_round, update, time.perf_counter() - started)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The nodes' metrics, averaged by weight over those whose reply is in order; None where there are none."""
        return self._averaged_evaluation(server_round, ((reply.metadata.src_node_id, reply) for reply in replies))

    # -- what comes back ---

    def _take(self, server_round: int, node: int, answer: Answer) -> None:
        """One reply into the round, or a refusal."""
        name = _name(node)
        try:
            reply = replies.trained(answer, self.weighted_by_key, self.policy)
            self._rounds.add(reply.upload, reply.weight, name)
        except (AdapterError, WeightError) as error:
            error.at(client=name)
            log.warning("Refused (%s): %s", error.code, error)
            self.refused.setdefault(server_round, []).append(Refusal(name, str(error), error.code))
        else:
            self._accepted[name] = reply.metrics

    def _averaged_evaluation(self, server_round: int, answers: Iterable[tuple[int, Answer]]) -> MetricRecord | None:
        found = []
        for node, answer in answers:
            try:
                found.append(replies.evaluated(answer, self.weighted_by_key, self.policy))
            except AdapterError as error:
                log.warning("Round %s, evaluation of node %s left out (%s): %s", server_round, node, error.code, error)
        return self._averaged(found, self.evaluate_metrics_aggr_fn)

    def _averaged(self, found: Iterable[MetricRecord], average: Callable[..., MetricRecord]) -> MetricRecord | None:
        contents = replies.comparable(list(found))
        weight = sum(content["metrics"][self.weighted_by_key] for content in contents)
        return average(contents, self.weighted_by_key) if weight > 0 else None

    def _metrics(self, server_round: int, update: GlobalUpdate | None, seconds: float) -> MetricRecord:
        averages = self._averaged(self._accepted.values(), self.train_metrics_aggr_fn)
        own = {key: value for key, value in dict(averages or {}).items() if not key.startswith("flexlora-")}
        metrics = MetricRecord(own)
        refused = self.refused.get(server_round, [])
        accepted = len(self._accepted) if update is None else len(update.clients)
        metrics["flexlora-accepted"], metrics["flexlora-refused"] = accepted, len(refused)
        for code, count in sorted(Counter(refusal.code for refusal in refused).items()):
            metrics[f"flexlora-refused-{code}"] = count
        metrics["flexlora-silent"] = max(0, self._asked - len(self._accepted) - len(refused))
        if update is not None:
            metrics["flexlora-norm"] = update.norm
            kept = min((layer.rank for layer in update.values() if not layer.complete), default=math.inf)
            for rank in sorted({rank for client in update.clients for rank in client.ranks.values()}):
                if rank <= kept:
                    metrics[f"flexlora-energy-kept-r{rank}"] = update.energy_kept(rank)
        metrics["flexlora-seconds"] = seconds
        return metrics

    def _evaluate_here(
        self,
        result: Result,
        server_round: int,
        arrays: ArrayRecord,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        metrics = None if evaluate_fn is None else evaluate_fn(server_round, arrays)
        if metrics is not None:
            log.info("\t└──> Evaluation on the server, after round %s: %s", server_round, metrics)
            result.evaluate_metrics_serverapp[server_round] = metrics

    # -- what is sent ---

    def _addressed(self, messages: list[Message], adapter: Adapter, grid: Grid) -> list[Message]:
        """The messages with content for their nodes; nodes of one rank share it."""
        self._ask([message.metadata.dst_node_id for message in messages], grid)
        contents: dict[tuple[int, ...] | None, tuple[ArrayRecord, ConfigRecord]] = {}
        for message in messages:
            ranks = self._ranks_of(message.metadata.dst_node_id, adapter)
            key = tuple(ranks[layer] for layer in adapter.layers)
            if key not in contents:
                own = note.at_ranks(adapter, self.policy, ranks)
                said = note.write(own, self._table, self.arrayrecord_key)
                contents[key] = wire.to_record(own.state_dict()), said
            arrays, said = contents[key]
            config = ConfigRecord(dict(message.content[self.configrecord_key]))  # Flower writes each round into one
            message.content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config, note.KEY: said})
        return messages

    def _ranks_of(self, node: int, adapter: Adapter) -> dict[str, int]:
        given = self._given(node)
        if given is not None:
            return dict.fromkeys(adapter.layers, given)
        learnt = self._learnt.get(node, {})
        return {layer: learnt.get(layer, adapter.rank(layer)) for layer in adapter.layers}

    def _given(self, node: int) -> int | None:
        if callable(self.ranks):
            rank = self.ranks(node)
            return None if rank is None else self._check_rank(rank)
        return self.ranks.get(node) if isinstance(self.ranks, Mapping) else self.ranks

    def _ask(self, nodes: list[int], grid: Grid) -> None:
        """Ask nodes whose rank nobody knows for it, once: a round shall not wait for the same silence again."""
        known = self._learnt.keys() | self._questioned
        unknown = [node for node in nodes if self._given(node) is None and node not in known]
        if not self.query_ranks or not unknown:
            return
        self._questioned |= set(unknown)
        question = RecordDict({note.KEY: ConfigRecord({"ask": note.RANK})})
        # A mod stands before the function for training: only messages of that type come to it in every app.
        messages = [Message(question, dst_node_id=node, message_type=MessageType.TRAIN) for node in unknown]
        for node, answer in replies.exchange(grid, messages, _QUESTION_TIMEOUT):
            try:
                rank = self._check_rank(replies.said(answer, note.KEY).get(note.RANK))
            except FlexLoRAError as error:
                log.warning("The rank of node %s is not known: %s", node, error)
            else:
                self._learnt[node] = dict.fromkeys(self.policy.specs, rank)

    def _check_rank(self, rank: Any) -> int:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank not in self.policy.ranks:
            raise OptionError(f"rank {rank!r} is none that the policy allows: {sorted(self.policy.ranks)}")
        return rank

    # -- what is carried ---

    def _begin(self, initial: ArrayRecord) -> tuple[int, ArrayRecord]:
        """The number of the round to go on with, and the arrays before it."""
        adapter = self._carried = self._adapter_of(initial)
        number, update = self._rounds.last()
        if number:
            log.info("%s has %s finished rounds; going on after them", self._rounds.directory, number)
        if update is not None:
            self.update = update
            self._learn(update)
            return number + 1, self._arrays_of(update)
        if any(bool(adapter.factors(layer)[1].any()) for layer in adapter.layers):
            # Columns as they were trained: in descending order they can be cut.
            ranks = self._carried_ranks(adapter)
            return number + 1, self._arrays_of(aggregate([adapter], rank=max(ranks.values()), progress=False))
        return number + 1, initial

    def _adapter_of(self, arrays: ArrayRecord) -> Adapter:
        """The server's own arrays, with the policy's scales at the ranks that they have."""
        state = wire.from_record(arrays)
        missing = [name for name in self.policy.names if name not in state]
        if missing:
            raise AdapterError(
                f"the arrays have no {missing[0]!r}, which the policy lists; start with all that "
                "peft.get_peft_model_state_dict(model, save_embedding_layers=False) gives"
            )
        ranks = {layer: len(state[spec.a_key]) // spec.experts for layer, spec in self.policy.specs.items()}
        return Adapter.from_state_dict(state, note.config_at(self.policy, ranks))

    def _carried_ranks(self, adapter: Adapter) -> dict[str, int]:
        carried = self._carried = self._carried or adapter
        return {layer: carried.rank(layer) for layer in carried.layers}

    def _arrays_of(self, update: GlobalUpdate) -> ArrayRecord:
        """The update at the ranks that are carried; a layer that nobody sent stays as it was at the beginning."""
        assert self._carried is not None
        ranks = {layer: rank for layer, rank in self._carried_ranks(self._carried).items() if layer in update}
        scales = {layer: self.policy.scale(layer, rank) for layer, rank in ranks.items()}
        adapter = truncated(update.adapter(), ranks, scales, seed=update.seed)
        return wire.to_record(self._carried.state_dict() | adapter.state_dict())

    def _learn(self, update: GlobalUpdate) -> None:
        self._learnt |= {_node(client.name): dict(client.ranks) for client in update.clients}


def _name(node: int) -> str:
    """What a node is called in the round."""
    return f"node-{node}"


def _node(name: str) -> int:
    return int(name.removeprefix("node-"))
