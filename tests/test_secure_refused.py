"""Plans, messages, adapters and sums that are refused, with a reason, and without harm to the round."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexlora_fast as ff
from flexlora_fast.errors import (
    AdapterError,
    EmptyRoundError,
    IncompatibleAdapterError,
    OptionError,
    ProtocolError,
    WeightError,
)
from flexlora_fast.secure import Plan, Server, add, sketch
from tests import rounds, secure
from tests.rounds import Layer
from tests.secure import WIDE, mixed, plan_for

CLIENT = mixed()[1]


def full_plan(**options: Any) -> Plan:
    """A plan with everything in it: sketched layers, a bias, tensors of other kinds."""
    client = CLIENT.but(
        bias={WIDE[0].name: torch.ones(WIDE[0].m)},
        extras={"head.weight": torch.ones(2, 3), "norm.count": torch.tensor(3)},
        config=CLIENT.config | {"lora_bias": True},
    )
    return plan_for([client], **{"extra_bound": 5.0} | options)


# -- plans ---


@pytest.mark.parametrize("options", [{}, {"bits": 64, "rounds": 1}, {"seed": -7, "oversample": None, "rank": 300}])
def test_a_plan_is_read_back_as_it_was(options: dict[str, Any]) -> None:
    plan = full_plan(**options)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest
    assert [again.length(stage + 1) for stage in range(len(again.stages))] == [
        plan.length(stage + 1) for stage in range(len(plan.stages))
    ]
    model = plan_for(rounds.typical("mixed"))
    assert Plan.from_json(model.to_json()) == model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; give an integer from 1"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"clients": True}, "clients is True"),
        ({"rounds": 17}, "rounds is 17; give an integer from 1 to 16"),
        ({"oversample": -1}, "oversample is -1"),
        ({"clip": 0}, "clip is 0; give a number from 1e-30"),
        ({"clip": float("nan")}, "clip is nan"),
        ({"clip": float("inf")}, "clip is inf"),
        ({"max_weight": -1.0}, "max_weight is -1.0"),
        ({"extra_bound": None}, "extra_bound is missing, but 'base_model.model.head.weight'"),
        ({"bits": 16}, "bits is 16; give 32 or 64"),
        ({"bits": 32.0}, "bits is 32.0"),
        ({"seed": 1 << 70}, "seed is"),
    ],
)
def test_settings_that_no_plan_can_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        full_plan(**options)


def edited(**changes: Any) -> str:
    """The plan's JSON with other values; a name with __ reaches into the first layer."""
    document = json.loads(full_plan().to_json())
    for name, value in changes.items():
        place = document["layers"][0] if name.startswith("__") else document
        place[name.removeprefix("__")] = value
    return json.dumps(document)


HOSTILE = [
    "",
    "[]",
    "null",
    "{}",
    '{"format": "flexlora_fast.secure.plan/1"}',
    "[" * 100_000,
    edited()[:-1] + ', "rank": 3}',
    edited(format="flexlora_fast.secure.plan/2"),
    edited(clip=float("nan")),
    edited().replace('"seed": 0', '"seed": 1e999'),
    edited(clip="1"),
    edited(clients=0),
    edited(unknown=1),
    edited(layers=[]),
    edited(layers={}),
    edited(layers=7),
    edited(layers=json.loads(edited())["layers"] * 2),
    edited(biases=["nowhere"]),
    edited(biases=[["h"]]),
    edited(extras={"x": [[2, -1], "float32"]}),
    edited(extras={"x": [[2, 1], "complex64"]}),
    edited(extras={"x": [[1 << 50], "float32"]}),
    edited(extras=[1]),
    edited(config={"r": "8"}),
    edited(config=None),
    edited(__m=0),
    edited(__m=1 << 60),
    edited(__n=2.5),
    edited(__experts=3),
    edited(__kind="dense"),
    edited(__kind="conv"),
    edited(__a_shape_tail=[1, 2]),
    edited(__name=None),
    edited(__extra=1),
    edited(__pattern_name="\ud800"),
    edited(rank=1 << 19, __m=1 << 20, __n=1 << 20),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_plans(text: str) -> None:
    with pytest.raises(ProtocolError, match="this is no plan"):
        Plan.from_json(text)


@given(st.data())
def test_damaged_plans_are_read_or_refused(data: st.DataObject) -> None:
    """Any one character changed: a plan that is what its text says, or ``ProtocolError``."""
    text = full_plan().to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from(list('0129-.eE"{}[],:xNa'))) + text[at + 1 :]
    try:
        plan = Plan.from_json(damaged)
    except ProtocolError:
        return
    assert Plan.from_json(plan.to_json()) == plan


# -- what servers say ---


def begun(plan: Plan) -> Server:
    """A server after its first sum."""
    server = Server(plan)
    server.receive(sketch(CLIENT.adapter(), plan, weight=0.25))
    return server


def tampered(message: bytes, **changes: Any) -> bytes:
    tensors = safetensors.torch.load(message)
    for name, change in changes.items():
        key = "basis/" + WIDE[0].name if name == "basis" else name
        tensors[key] = change(tensors.get(key)).contiguous()
    return safetensors.torch.save(tensors)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stage": lambda x: x + 1}, r"basis is torch.float32 \(1, 97, 8\), expected torch.float32 \(1, 230, 8\)"),
        ({"stage": lambda x: x + 9}, "is of round 11, this plan has 4"),
        ({"stage": lambda x: x - 2}, "is of round 0"),
        ({"stage": lambda x: x - 1}, "message of round 1 has not the bases of all layers"),
        ({"stage": lambda x: x.repeat(3)}, "cannot be read"),
        ({"stage": lambda x: x.double() * torch.inf}, "cannot be read .*its stage is"),
        ({"stage": lambda x: x + 0.5}, "cannot be read .*its stage is"),
        ({"plan": lambda x: torch.tensor(1 << 62)}, "cannot be read .*its plan"),  # bytes(1 << 62) would want as many
        ({"plan": lambda x: x.long()}, "cannot be read .*its plan"),
        ({"plan": lambda x: x[:5]}, "cannot be read .*its plan"),
        ({"plan": lambda x: x + 1}, "belongs to another plan"),
        ({"basis": lambda x: x[:, :-1]}, r"basis is torch.float32 \(1, 209, 8\)"),
        ({"basis": lambda x: x[:, :, :1].expand(x.shape)}, "not orthonormal"),
        ({"basis": lambda x: 2 * x}, r"not orthonormal \(off by 3"),
        ({"basis": lambda x: x * torch.nan}, r"not orthonormal \(off by nan"),
        ({"basis": lambda x: x * torch.inf}, "not orthonormal"),
        ({"basis": lambda x: x.half()}, "basis is torch.float16"),
        ({"basis/other": lambda _: torch.ones(1)}, "has not the bases of all layers"),
    ],
)
def test_messages_that_a_client_refuses(changes: dict[str, Any], reason: str) -> None:
    plan = plan_for([CLIENT])
    with pytest.raises(ProtocolError, match=reason):
        sketch(CLIENT.adapter(), plan, tampered(begun(plan).message, **changes))


@pytest.mark.parametrize("message", [b"", b"x" * 50, b"\xff" * 8, b"{}" * 10_000_000, "text", 5])
def test_messages_that_are_none(message: Any) -> None:
    with pytest.raises(ProtocolError, match=r"the message (cannot be read|is no bytes object of at most)"):
        sketch(CLIENT.adapter(), plan_for([CLIENT]), message)


# -- what clients bring ---


def test_adapters_that_do_not_fit_the_plan() -> None:
    plan = plan_for([CLIENT])

    def refused(error: type[Exception], match: str, client: rounds.Client, weight: float = 0.25) -> None:
        with pytest.raises(error, match=match):
            sketch(client.adapter(), plan, weight=weight)

    bad = CLIENT.mapped(lambda _, A, B: (A.index_fill(2, torch.tensor(3), torch.nan), B))
    refused(AdapterError, "client 'c1', layer 'h.0.down': .* NaN or infinite", bad)
    other = [*WIDE[:1], Layer(WIDE[1].name, 97, 231)]
    refused(IncompatibleAdapterError, "97 outputs and 231 inputs, the plan has a", rounds.client("c1", other))
    more = [*WIDE, Layer("h.1.up", 3, 4)]
    refused(IncompatibleAdapterError, "layer 'h.1.up': .* the plan has no such layer", rounds.client("c1", more))
    base = CLIENT.but(config=CLIENT.config | {"base_model_name_or_path": "another"})
    refused(IncompatibleAdapterError, "client 'c1': its base_model_name_or_path is 'another', the plan's is", base)
    head = CLIENT.but(extras={"head.weight": torch.ones(2, 2)})
    refused(IncompatibleAdapterError, r"head.weight' of shape \(2, 2\) does not fit the plan: there is no such", head)
    bias = CLIENT.but(bias={WIDE[0].name: torch.ones(210)}, config=CLIENT.config | {"lora_bias": True})
    refused(IncompatibleAdapterError, r"lora_B.bias, which the plan has not", bias)
    vast = CLIENT.mapped(lambda _, A, B: (A.double() * 1e200, B.double() * 1e200))
    refused(AdapterError, "beyond float64; leave this client out", vast)
    for weight in (-1, 0.26, float("nan"), "1", None, True):
        refused(WeightError, r"weight is .*; this plan takes numbers from 0 to 0\.25", CLIENT, weight)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"head.weight' holds values up to 7, the plan has room for 5"):
        sketch(CLIENT.but(extras={"head.weight": torch.full((2, 3), -7.0)}).adapter(), full_plan(), weight=0.25)
    with pytest.raises(IncompatibleAdapterError, match=r"there it is \(2, 3\)"):
        sketch(head.adapter(), full_plan(), weight=0.25)


# -- sums ---


def test_sums_that_a_server_refuses_leave_it_as_it_was() -> None:
    clients = mixed()
    plan = plan_for(clients, clients=5)
    server = Server(plan)

    def refuse(total: Any, error: type[Exception], match: str) -> None:
        stage, message = server.stage, server.message
        with pytest.raises(error, match=match):
            server.receive(total)
        assert (server.stage, server.message) == (stage, message)

    while not server.done:
        vectors = [sketch(c.adapter(), plan, server.message, weight=c.weight) for c in clients]
        good = add(vectors)
        refuse(good[:-1], ProtocolError, r"the sum is uint32 \(\d+,\), round . of this plan has uint32 \(\d+,\)")
        refuse(good.astype(np.uint64), ProtocolError, "the sum is uint64")
        refuse(good.astype(np.int64).tolist(), ProtocolError, "the sum is list")
        refuse(torch.from_numpy(good.astype(np.int64)), ProtocolError, "the sum is Tensor")
        refuse(np.zeros_like(good), EmptyRoundError, f"the sum of round {server.stage} is of no client")
        refuse(add([good, good]), ProtocolError, "it is of 8 clients, this plan has room for 5")
        refuse(add([np.zeros_like(good), good - np.uint32(5)]), ProtocolError, r"it is of -1 clients")
        if server.stage == len(plan.stages):
            silent = add(sketch(c.adapter(), plan, server.message, weight=0) for c in clients)
            refuse(silent, WeightError, "sum to zero")
        else:
            with pytest.raises(ProtocolError, match=f"round {server.stage} of 4 has no sum yet"):
                server.finish()
        server.receive(good)
    refuse(good, ProtocolError, r"all 4 sums are there; call finish\(\)")
    assert secure.same(server.finish(), secure.run(plan, clients))


def test_a_client_with_another_plan_or_message_is_noticed() -> None:
    """All have vectors of one length, so nothing else would tell; the round goes on with the sum of the others."""
    one, two, three = (c.but(weight=0.25) for c in mixed()[:3])
    plan = plan_for([one, two, three])
    other = secure.resized(plan, seed=9)
    server = Server(plan)
    for stray in (other, secure.resized(plan, clip=plan.clip / 2)):
        with pytest.raises(ProtocolError, match=r"not all 3 clients .* had this plan and the message of round 1"):
            server.receive(add([secure.first(plan, one), secure.first(plan, two), secure.first(stray, three)]))
    server.receive(add(secure.first(plan, c) for c in (one, two)))
    second = server.message
    server.receive(add(sketch(c.adapter(), plan, second, weight=0.25) for c in (one, two)))
    late = secure.first(plan, one)  # of round 1, as long as those of round 3
    assert plan.length(3) == plan.length(1)
    with pytest.raises(ProtocolError, match="message of round 3; give all of them the same"):
        server.receive(add([late, sketch(two.adapter(), plan, server.message, weight=0.25)]))


@pytest.mark.filterwarnings("error")
def test_sums_come_from_a_network() -> None:
    """Read-only, and strided ones alike."""
    plan = plan_for([CLIENT])
    vector = secure.first(plan, CLIENT)
    servers = [Server(plan) for _ in range(3)]
    servers[0].receive(vector)
    servers[1].receive(np.frombuffer(vector.tobytes(), dtype=np.uint32))
    servers[2].receive(np.repeat(vector, 2)[::2])
    assert servers[0].message == servers[1].message == servers[2].message


def test_nothing_takes_a_defence() -> None:
    """Gram-based defences see single updates, secure aggregation hides them: said plainly; there is no way to ask."""
    for call in (Server, sketch, add, Plan, Server.receive, Server.finish):
        assert not {"defence", "policy"} & set(inspect.signature(call).parameters)
    with pytest.raises(TypeError, match="defence"):
        Server(plan_for([CLIENT]), defence="krum")  # type: ignore[call-arg]
    with pytest.raises(AdapterError, match=r"sums go to secure.Server, which takes no defence and no policy"):
        ff.Aggregator(defence="krum").add(secure.first(plan_for([CLIENT]), CLIENT), client="c")  # type: ignore[arg-type]
    assert "cannot be combined with secure aggregation" in " ".join((ff.secure.__doc__ or "").split())
