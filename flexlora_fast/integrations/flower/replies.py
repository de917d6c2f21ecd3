"""Replies of nodes that nobody has to trust: what is in them, or why not."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import httpx
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from flexlora_fast.errors import RefusedError, shown
from flexlora_fast.gate import Reason, RoundPolicy
from flexlora_fast.integrations.flower import wire

Answer: TypeAlias = Message | Exception  # an exception: the reply is there, and cannot be read

_MOST_METRICS = 10_000  # numbers in one reply
_LONGEST = 256  # characters of a metric's name
_POLL = (0.1, 3.0)  # seconds between looks for replies: at first, and when nothing came for long (Flower's own)


class ReplyReason(StrEnum):
    """Codes of refusals beside ``gate.Reason``'s."""

    FAILED = "failed"
    """The node answered with an error: its app raised, or is not there."""
    UNREADABLE = "unreadable"
    """Flower cannot decode the reply."""
    RECORDS = "records"
    """Not exactly one ArrayRecord and one MetricRecord, or no weight among the metrics."""
    METRICS = "metrics"
    """A metric that is NaN or infinite, too many of them, or a name that is too long."""


@dataclass(frozen=True)
class Trained:
    """What a node trained: a safetensors file for the gate, its weight (unchecked), and its metrics."""

    upload: bytes
    weight: Any
    metrics: MetricRecord


def exchange(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Iterator[tuple[int, Answer]]:
    """Send messages, and give back what comes, with the node that was asked, as it comes.

    As ``Grid.send_and_receive``, but: one reply is held at a time; one that Flower cannot decode is that node's alone;
    and who sent it is known from whom it was asked for, not from what it says.
    """
    asked: dict[str, int] = {}
    for message in messages:
        for message_id in grid.push_messages([message]):
            if message_id is not None:
                asked[message_id] = message.metadata.dst_node_id
    end, pause = math.inf if timeout is None else time.monotonic() + timeout, _POLL[0]
    while asked and time.monotonic() < end:
        silent = True
        for message_id, node in list(asked.items()):
            for answer in _pulled(grid, message_id):
                asked.pop(message_id, None)
                silent = False
                yield node, answer
        pause = min(pause * 1.5, _POLL[1]) if silent else _POLL[0]
        if asked and silent:
            time.sleep(min(pause, max(0.0, end - time.monotonic())))


def _pulled(grid: Grid, message_id: str) -> list[Answer]:
    try:
        return list(grid.pull_messages([message_id]))
    except (httpx.HTTPError, OSError):  # the SuperLink, not the node
        raise
    except Exception as error:  # whatever decoding a stranger's message raises
        return [error]


def trained(answer: Answer, weight_key: str, policy: RoundPolicy) -> Trained:
    """What a node's answer to a training message holds, as far as it can be known before the gate.

    Raises ``RefusedError``: ``ReplyReason``'s codes, and those of ``wire.upload_of``.
    """
    content = _content(answer)
    arrays = [record for record in content.values() if isinstance(record, ArrayRecord)]
    if len(arrays) != 1:
        raise _refusal(
            f"it has {len(arrays)} ArrayRecords", ReplyReason.RECORDS, "send one, with the adapter", len(arrays)
        )
    metrics = _metrics(content, weight_key)
    return Trained(wire.upload_of(arrays[0], policy), metrics[weight_key], metrics)


def evaluated(answer: Answer, weight_key: str, policy: RoundPolicy) -> MetricRecord:
    """The metrics of a node's answer, with a weight that the policy allows. Raises ``RefusedError``."""
    metrics = _metrics(_content(answer), weight_key)
    weight = metrics[weight_key]
    if isinstance(weight, list) or not 0 <= weight <= policy.max_weight:
        what = f"its {weight_key} is {shown(weight)}, the policy allows 0 to {policy.max_weight:g}"
        raise RefusedError(what, code=Reason.WEIGHT, value=weight, remedy="send the number of its examples")
    return metrics


def said(answer: Answer, key: str) -> ConfigRecord:
    """The ConfigRecord under ``key`` in a node's answer. Raises ``RefusedError``."""
    record = _content(answer).get(key)
    if not isinstance(record, ConfigRecord):
        raise _refusal(f"it has no ConfigRecord {key!r}", ReplyReason.RECORDS, "give its ClientApp flexlora_mod", key)
    return record


def comparable(records: Sequence[MetricRecord]) -> list[RecordDict]:
    """The records of those that have all metrics which most have, with these alone, as Flower's averages take them."""
    forms = [{(key, len(x) if isinstance(x, list) else None) for key, x in record.items()} for record in records]
    counts = Counter(form for record in forms for form in record)
    common = {form for form, count in counts.items() if 2 * count > len(records)}
    return [
        RecordDict({"metrics": MetricRecord({key: record[key] for key, _ in sorted(common, key=str)})})
        for record, has in zip(records, forms, strict=True)
        if common <= has
    ]


def _content(answer: Answer) -> RecordDict:
    if isinstance(answer, Exception):
        what = f"its reply cannot be decoded ({type(answer).__name__}: {shown(str(answer), 200)})"
        raise _refusal(what, ReplyReason.UNREADABLE, "run the same version of Flower there", type(answer).__name__)
    if answer.has_error():
        reason = answer.error.reason
        what = f"it failed (code {answer.error.code}: {shown(reason, 300)})"
        raise _refusal(what, ReplyReason.FAILED, "see the log of its ClientApp", reason)
    if not answer.has_content():
        raise _refusal("its reply is empty", ReplyReason.RECORDS, "send one ArrayRecord and one MetricRecord", "")
    return answer.content


def _metrics(content: RecordDict, weight_key: str) -> MetricRecord:
    found = [record for record in content.values() if isinstance(record, MetricRecord)]
    if len(found) != 1:
        raise _refusal(f"it has {len(found)} MetricRecords", ReplyReason.RECORDS, "send one", len(found))
    metrics, count = found[0], 0
    for key, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        count += len(numbers)
        if count > _MOST_METRICS:
            raise _refusal(f"it has over {_MOST_METRICS} metrics", ReplyReason.METRICS, "send fewer", count)
        if len(key) > _LONGEST:
            what = f"it has a metric whose name has {len(key)} characters"
            raise _refusal(what, ReplyReason.METRICS, f"use at most {_LONGEST}", len(key))
        # The weight is the gate's to judge.
        if key != weight_key and not all(-math.inf < number < math.inf for number in numbers):
            raise _refusal(f"its metric {shown(key)} is not finite", ReplyReason.METRICS, "leave it away", key)
    if weight_key not in metrics:
        raise _refusal(
            f"it has no metric {weight_key!r}",
            ReplyReason.RECORDS,
            "send the number of examples it trained on",
            weight_key,
        )
    return metrics


def _refusal(what: str, code: ReplyReason, remedy: str, value: object) -> RefusedError:
    return RefusedError(what, code=code, value=value, remedy=remedy)
