"""Edge servers' sums: the update of one flat round bit for bit, and what is wrong with a part is its edge's alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora_fast.errors import EmptyRoundError, ProtocolError
from flexlora_fast.secure import Part, Plan, Server, add, part, sketch
from tests import rounds, secure
from tests.rounds import Client
from tests.secure import ROUNDS, first, mixed, plan_for, resized, run

EDGES = {"north": slice(0, 1), "south": slice(1, 4)}


def vectors(plan: Plan, clients: Sequence[Client], message: bytes) -> list[Any]:
    return [sketch(c.adapter(), plan, message, weight=c.weight) for c in clients]


def by_edges(plan: Plan, clients: Sequence[Client], edges: dict[str, slice] = EDGES) -> Server:
    """All rounds, each edge's part over the wire."""
    server = Server(plan)
    while not server.done:
        sent = {
            edge: part(add(vectors(plan, clients[those], server.message)), plan, server.message).to_bytes()
            for edge, those in edges.items()
        }
        server.receive({edge: Part.from_bytes(data, plan, server.message) for edge, data in sent.items()})
    return server


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("count", ROUNDS)
def test_parts_of_edges_give_the_update_of_one_flat_round_bit_for_bit(count: int, bits: int) -> None:
    clients = mixed()
    plan = plan_for(clients, rounds=count, bits=bits)
    flat, edges = run(plan, clients), by_edges(plan, clients).finish()
    assert secure.same(flat, edges) and flat.method == edges.method


def test_layers_sent_whole_biases_and_other_tensors() -> None:
    clients = rounds.typical("mixed")
    plan = plan_for(clients)
    assert secure.same(run(plan, clients), by_edges(plan, clients, {"a": slice(0, 2), "b": slice(2, None)}).finish())


def test_edges_of_edges() -> None:
    clients = mixed()
    plan = plan_for(clients, rounds=1)
    each = [part(v, plan) for v in vectors(plan, clients, Server(plan).message)]
    region = part(add(x.vector for x in each[:3]), plan)
    assert region.clients == 3 and region.weight == pytest.approx(sum(c.weight for c in clients[:3]), rel=1e-6)
    server = Server(plan)
    server.receive({"region": region, "alone": each[3]})
    assert secure.same(run(plan, clients), server.finish())


def test_a_part_says_its_clients_and_in_the_last_round_their_weight() -> None:
    clients = mixed()
    plan = plan_for(clients, rounds=2)
    server = Server(plan)
    north = part(add(vectors(plan, clients, server.message)), plan)
    assert (north.stage, north.clients, north.weight) == (1, 4, None)
    server.receive(north.vector)
    north = part(add(vectors(plan, clients, server.message)), plan, server.message)
    assert (north.stage, north.clients) == (2, 4) and north.weight == pytest.approx(2.5, rel=1e-6)


def test_an_edge_with_another_message_is_named_and_the_others_go_on() -> None:
    clients = mixed()
    plan = plan_for(clients, rounds=2)
    server = Server(plan)
    old = server.message
    server.receive(add(vectors(plan, clients, old)))
    good = part(add(vectors(plan, clients[:2], server.message)), plan, server.message)
    with pytest.raises(ProtocolError, match=r"not all 2 clients.*had this plan and the message of round 2"):
        # One of them still had another message of this round.
        other = Server(plan)
        other.receive(add(vectors(plan, clients[:1], old)))
        mixed_up = [*vectors(plan, clients[2:3], server.message), *vectors(plan, clients[3:], other.message)]
        part(add(mixed_up), plan, server.message)
    with pytest.raises(ProtocolError, match=r"the part of edge 'south'.*had this plan and the message of round 2"):
        server.receive({"north": good, "south": Part(2, 2, None, add(mixed_up))})
    assert not server.done
    server.receive({"north": good})
    assert server.finish().method == "flexlora by secure aggregation of 2 clients in 2 rounds"


def test_no_more_clients_than_planned_over_all_edges() -> None:
    clients = mixed()
    plan = plan_for(clients, rounds=1, clients=3)
    those = vectors(plan, clients, Server(plan).message)
    with pytest.raises(ProtocolError, match="the sum says it is of 4 clients, this plan has room for 3"):
        Server(plan).receive({"north": add(those[:2]), "south": add(those[2:])})


@pytest.mark.parametrize("bits", [32, 64])
def test_entries_that_so_many_clients_cannot_make(bits: int) -> None:
    """A part of one client that holds what takes two: it would count once and weigh twice."""
    clients = mixed()
    plan = plan_for(clients, rounds=1, clients=8, bits=bits)
    honest = first(plan, clients[0])
    for value in (plan.levels + 1, -plan.levels - 1, -(1 << bits - 1)):
        forged = honest.copy()
        secure.signed(forged)[7] = value
        with pytest.raises(ProtocolError, match=rf"edge 'south' of 1 clients has an entry of {abs(value)}, where one"):
            Server(plan).receive({"north": honest, "south": forged})
        with pytest.raises(ProtocolError, match="the sum of 1 clients has an entry"):
            Server(plan).receive(forged)
    secure.signed(honest)[7] = plan.levels
    Server(plan).receive({"north": honest})


def test_an_edge_without_clients() -> None:
    plan = plan_for(mixed(), rounds=1)
    nothing = np.zeros(plan.length(1), dtype=plan.dtype)
    with pytest.raises(EmptyRoundError, match="the sum of round 1 is of no client"):
        part(nothing, plan)
    with pytest.raises(EmptyRoundError, match="the part of edge 'south' of round 1 is of no client"):
        Server(plan).receive({"north": first(plan, mixed()[0]), "south": nothing})
    with pytest.raises(ProtocolError, match="no vector to add"):
        Server(plan).receive({})


GOOD = part(first(plan_for(mixed(), rounds=1), mixed()[0]), plan_for(mixed(), rounds=1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        "text",
        None,
        b"\xff" * 64,
        GOOD.to_bytes()[:-1],
        safetensors.numpy.save({"other": GOOD.vector}),
        safetensors.numpy.save({"vector": GOOD.vector[:-1]}),
        safetensors.numpy.save({"vector": GOOD.vector.astype(np.float64)}),
        safetensors.numpy.save({"vector": GOOD.vector.reshape(1, -1)}),
        GOOD.to_bytes() + b"0" * 2_000,
    ],
    ids=range(10),
)
def test_bytes_that_are_no_part(data: Any) -> None:
    with pytest.raises(ProtocolError):
        Part.from_bytes(data, plan_for(mixed(), rounds=1))


def test_a_part_of_another_plan() -> None:
    plan = plan_for(mixed(), rounds=1)
    with pytest.raises(ProtocolError, match="had this plan"):
        Part.from_bytes(GOOD.to_bytes(), resized(plan, seed=3))
    assert Part.from_bytes(GOOD.to_bytes(), plan).clients == 1


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Part.from_bytes(data, plan_for(mixed(), rounds=1))


def test_any_bracketing_gives_the_same_sum() -> None:
    clients = mixed()
    plan = plan_for(clients, rounds=1, bits=64)
    those = vectors(plan, clients, Server(plan).message)
    whole = add(those)
    for cut in range(1, 4):
        for order in itertools.permutations(range(4)):
            left, right = (add(those[i] for i in part_) for part_ in (order[:cut], order[cut:]))
            assert np.array_equal(add([right, left]), whole)
