"""Sums of clients' vectors: what is checked in one, and those of edge servers, which add up to one flat round's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from torch import Tensor

from flexlora_fast.errors import EmptyRoundError, ProtocolError, shown
from flexlora_fast.secure import message
from flexlora_fast.secure.encoding import Vector, check, decode, split
from flexlora_fast.secure.plan import Plan

Sums = dict[tuple[str, str], Tensor]  # by kind and name

_COUNTED = 2  # entries at the beginning that are no multiples of a step: "clients" and "agreed"
_HEADER = 1024  # bytes of a part's file beside its vector; generous


@dataclass(frozen=True, eq=False)
class Part:
    """The sum of an edge server's clients in one summed round, to be handed on to the centre: see ``part``.

    Attributes:
        stage: the summed round, from 1. clients: how many are in the sum. weight: Σ of their weights; None before the
            last round, whose sum has it. vector: ``plan.length(stage)`` integers modulo M.
    """

    stage: int
    clients: int
    weight: float | None
    vector: Vector

    def to_bytes(self) -> bytes:
        """What ``from_bytes`` reads: a safetensors file with the vector, in which all the rest is."""
        return safetensors.numpy.save({"vector": np.ascontiguousarray(self.vector)})

    @staticmethod
    def from_bytes(data: bytes, plan: Plan, broadcast: bytes | None = None) -> Part:
        """What an edge sent, checked as ``part`` does. Raises ``ProtocolError`` for bytes that are no part, too."""
        longest = max(plan.length(stage) for stage in range(1, len(plan.stages) + 1)) * plan.dtype.itemsize + _HEADER
        if not isinstance(data, bytes) or len(data) > longest:
            raise ProtocolError(
                f"a part is a bytes object of at most {longest} bytes; give what Part.to_bytes returned"
            )
        try:
            vector = safetensors.numpy.load(data)["vector"]
        except (KeyError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ProtocolError(f"the part cannot be read ({shown(str(error))}); have it sent again") from None
        return part(vector, plan, broadcast)


def part(total: Vector, plan: Plan, broadcast: bytes | None = None) -> Part:
    """An edge server's sum of its clients' ``sketch`` vectors of this round, checked, for the centre.

    The centre gives ``Server.receive`` the parts of all its edges. Sums modulo M do not depend on how they are
    bracketed, so the update is that of one flat round of all clients, bit for bit. An edge may itself have edges:
    ``part(add(part.vector for part in parts), plan, message)``.

    The centre sees each edge's sum, which for an edge of one client is that client's. Where it must not, sum the edges'
    vectors by a protocol as well, and give ``Server.receive`` that sum. An edge is believed about the number of its
    clients, each of which may move the sum by the plan's ``clip``: compare ``Part.clients`` with what you know.

    Args:
        total: Σ of the vectors modulo M, by any summing protocol.
        broadcast: ``Server.message`` of this round, as the clients had it; None stands for that of the first.

    Raises:
        ProtocolError: what ``Server.receive`` refuses in a sum, or a message that does not fit the plan.
        EmptyRoundError: a sum of no client; there is nothing to hand on.

    >>> import torch, flexlora_fast as ff
    >>> def client(seed):
    ...     A, B = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(seed))
    ...     state = {"base_model.model.fc.lora_A.weight": A, "base_model.model.fc.lora_B.weight": B.mT}
    ...     return ff.Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 4})
    >>> plan = ff.secure.Plan.from_adapter(client(0), rank=2, clients=10, clip=50.0)
    >>> vectors = [ff.secure.sketch(client(seed), plan) for seed in range(5)]
    >>> north = ff.secure.part(ff.secure.add(vectors[:2]), plan)  # at an edge
    >>> south = ff.secure.part(ff.secure.add(vectors[2:]), plan)  # at another
    >>> edges, flat = ff.secure.Server(plan), ff.secure.Server(plan)
    >>> edges.receive({"north": north, "south": south})  # at the centre
    >>> flat.receive(ff.secure.add(vectors))
    >>> south.clients, torch.equal(edges.finish().delta("fc"), flat.finish().delta("fc"))
    (3, True)
    """
    broadcast = message.pack(plan, 1, {}) if broadcast is None else broadcast
    stage, _ = message.unpack(plan, broadcast)
    count, sums = read(total, plan, stage, broadcast)
    weight = sums.get(("weight", ""))
    return Part(stage, count, None if weight is None else float(weight), total)


def read(total: Vector, plan: Plan, stage: int, broadcast: bytes, what: str = "the sum") -> tuple[int, Sums]:
    """How many clients are in a sum of round ``stage``, and what it stands for.

    Raises as ``Server.receive`` does. ``what``: the sum, in errors.
    """
    check(total, plan, stage, what)
    total = np.array(total)  # a copy: it may be read-only, or strided
    parts = list(split(total, plan.stages[stage - 1]))
    sums: Sums = {(segment.kind, segment.name): decode(part, segment) for segment, part in parts}
    count = int(sums["clients", ""])
    if count == 0:
        raise EmptyRoundError(f"{what} of round {stage} is of no client")
    if not 0 < count <= plan.clients:
        raise ProtocolError(
            f"{what} says it is of {count} clients, this plan has room for {plan.clients}; it is no sum of this "
            "round's sketches, or plan for more clients"
        )
    agreed = next(int(part[0]) for segment, part in parts if segment.kind == "agreed")
    if agreed != count * message.mark(plan, broadcast) % (1 << plan.bits):
        raise ProtocolError(
            f"not all {count} clients of {what} had this plan and the message of round {stage}; give all of them the "
            "same, and sum up again"
        )
    signed = total[_COUNTED:].view(np.int32 if plan.bits == 32 else np.int64)
    largest = max(int(signed.max(initial=0)), -int(signed.min(initial=0)))
    if largest > count * plan.levels:
        raise ProtocolError(
            f"{what} of {count} clients has an entry of {largest}, where one client's are at most {plan.levels}; it is "
            "no sum of this round's sketches: leave it out, or have it summed up again"
        )
    return count, sums
