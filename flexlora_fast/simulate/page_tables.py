"""The tables of a report: what the clients have and did, what rounds cost, and the settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexlora_fast.simulate import comparison
from flexlora_fast.simulate.comparison import Arm, Part, flat
from flexlora_fast.simulate.results import ABOUT, Client, Run
from flexlora_fast.tables import clean, natural, spread

ROWS, COLUMNS = 40, 16  # of the table of labels: more cannot be taken in
LISTED = 1000  # clients in the table of clients: a page of more takes seconds to open


@dataclass(frozen=True)
class Skew:
    """How labels, or categories, are spread over the clients.

    Attributes:
        distance: the mean over clients, weighted by their examples, of the total variation distance between a client's
            labels and everybody's: 0 where all are alike, towards 1 where each has labels of its own.
        columns: names (and False: of numbers). rows: client, its type, examples, and by column the count
            and its share of the client's.
        clients, labels: how many there are; fewer may be listed.
    """

    distance: float
    columns: list[tuple[str, bool]]
    rows: list[tuple[str, str, int, list[tuple[int, float]]]]
    clients: int
    labels: int


@dataclass(frozen=True)
class ClientRow:
    """One client over all rounds: how often it was sampled, dropped and refused (and why), its last part in a round,
    the mean of its seconds, and its own test score where there is one.
    """

    client: Client
    type: str
    sampled: int
    dropped: int
    refused: int
    reasons: str
    loss: float | None
    norm: float | None
    seconds: float | None
    score: float | None


@dataclass(frozen=True)
class Cost:
    """Of one arm, a round in the mean: seconds of training, of the server, of testing; bytes up and down."""

    arm: Arm
    train: float | None
    aggregate: float | None
    evaluate: float | None
    up: float
    down: float


def skew(run: Run) -> Skew | None:
    """None where the clients have no labels, or only one for all."""
    counted = [client for client in run.clients if client.labels]
    if not counted:
        return None
    counts = np.array([client.labels for client in counted], dtype=np.float64)  # (clients, labels)
    total = counts.sum(0)
    if (total > 0).sum() < 2:
        return None
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    distances = 0.5 * np.abs(shares - total / total.sum()).sum(1)
    labels = sorted(np.argsort(-total, kind="stable")[:COLUMNS].tolist())
    chosen = spread(range(len(counted)), ROWS)
    names = _label_names(run, counts.shape[1])
    rows = []
    for i in chosen:
        cells = [(int(counts[i, label]), float(shares[i, label])) for label in labels]
        rows.append((clean(counted[i].name), _type(counted[i]), int(counts[i].sum()), cells))
    distance = float(np.average(distances, weights=counts.sum(1)))
    return Skew(distance, [(names[label], False) for label in labels], rows, len(counted), counts.shape[1])


def _label_names(run: Run, number: int) -> list[str]:
    """From the corpus' description beside the data; labels are numbered where it is not there."""
    path = run.folder / ABOUT
    names = json.loads(path.read_text()).get("labels") if path.is_file() else None
    return [clean(name) for name in names] if names and len(names) == number else [str(i) for i in range(number)]


def categories(run: Run) -> list[tuple[str, int, int]]:
    """Category, clients, examples; the largest first. Empty where clients have none."""
    clients: Counter[str] = Counter()
    examples: Counter[str] = Counter()
    for client in run.clients:
        if client.category is not None:
            clients[client.category] += 1
            examples[client.category] += client.train
    return [(clean(name), number, examples[name]) for name, number in clients.most_common()]


def clients(run: Run, part: Part) -> list[ClientRow]:
    """In natural order, the first thousand."""
    sampled = Counter(name for line in run.rounds for name in line.sampled)
    dropped = Counter(name for line in run.rounds for name in line.dropped)
    refused = Counter(refusal.client for line in run.rounds for refusal in line.refused)
    reasons = {r.client: f"{r.code}: {r.reason}" for line in run.rounds for r in line.refused}
    trained = [line.train.clients for line in run.rounds if line.train is not None]
    test = run.last(part)
    scores = {} if test is None else test.by_client
    rows = []
    for client in sorted(run.clients, key=lambda client: natural(client.name))[:LISTED]:
        own = [each[client.name] for each in trained if client.name in each]
        seconds = [each.seconds for each in own if each.seconds is not None]
        rows.append(
            ClientRow(
                client=client,
                type=_type(client),
                sampled=sampled[client.name],
                dropped=dropped[client.name],
                refused=refused[client.name],
                reasons=clean(reasons.get(client.name, "")),
                loss=own[-1].loss if own else None,
                norm=own[-1].norm if own else None,
                seconds=float(np.mean(seconds)) if seconds else None,
                score=scores[client.name].value if client.name in scores else None,
            )
        )
    return rows


def _type(client: Client) -> str:
    return clean(client.type or "/".join(map(str, client.all_ranks)) or "–")


def costs(arms: Sequence[Arm]) -> list[Cost]:
    """In the arms' order."""
    found = []
    for arm in arms:
        train, aggregate, evaluate = (_seconds(arm, part) for part in ("train", "aggregate", "evaluate"))
        traffic = [line.bytes for run in arm.runs for line in run.rounds if line.round > 0 and line.bytes is not None]
        up, down = (sum(each) / max(len(traffic), 1) for each in ([t.up for t in traffic], [t.down for t in traffic]))
        found.append(Cost(arm, train, aggregate, evaluate, up, down))
    return found


def _seconds(arm: Arm, part: str) -> float | None:
    found = arm.mean(lambda run: run.seconds(part))
    return None if found is None else found.mean


def settings(arms: Sequence[Arm]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """What all arms have in common (name, value), and what differs (name, and a value an arm)."""
    every = [flat(comparison.settings(arm.runs[0])) for arm in arms]
    names = dict.fromkeys(name for each in every for name in each)
    common, differing = [], []
    for name in names:
        values = [_value(each[name]) if name in each else "–" for each in every]
        if len(set(values)) == 1:
            common.append((clean(name), values[0]))
        else:
            differing.append((clean(name), values))
    return common, differing


def _value(value: Any) -> str:
    return clean("–" if value is None else value if isinstance(value, str) else json.dumps(value, default=str))
