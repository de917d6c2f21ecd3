"""The fixed-point code: no entry beyond its bound, whatever clients send, and no sum that wraps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlora_fast.errors import OptionError, ProtocolError
from flexlora_fast.secure import Plan, Server, add, matrices, sketch
from flexlora_fast.secure.plan import HEADROOM
from tests import oracle, rounds, secure
from tests.rounds import Client, Layer
from tests.secure import WIDE, mixed, plan_for

SMALL = (Layer("up", 70, 83), Layer("down", 5, 9))  # the first is sketched, the second sent whole
SCALES = st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e8, 1e30])


def largest(vectors: list[np.ndarray]) -> int:
    """The largest magnitude of an integer, but for the mark of plan and message, which may be any."""
    return max(int(np.abs(np.delete(secure.signed(v).astype(np.float64), 1)).max()) for v in vectors)


def all_vectors(plan: Plan, client: Client) -> list[np.ndarray]:
    """What the client sends in every round, alone."""
    server, vectors, adapter = Server(plan), [], client.adapter()
    while not server.done:
        vectors.append(sketch(adapter, plan, server.message, weight=client.weight))
        server.receive(vectors[-1])
    return vectors


@given(
    rank=st.integers(1, 6),
    scales=st.tuples(SCALES, SCALES, SCALES, SCALES),
    alpha=st.sampled_from([-1e6, 1e-6, 1.0, 1e6]),
    weight=st.sampled_from([1e-5, 0.3, 1.0]),
    clip=st.sampled_from([1e-20, 1.0, 1e20]),
    bits=st.sampled_from([32, 64]),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_no_entry_exceeds_its_bound(
    rank: int,
    scales: tuple[float, ...],
    alpha: float,
    weight: float,
    clip: float,
    bits: int,
    count: int,
    seed: int,
) -> None:
    factors = dict(zip(("up", "down"), (scales[:2], scales[2:]), strict=True))
    client = rounds.client("c", SMALL, rank=rank, alpha=alpha, weight=weight, seed=seed)
    client = client.mapped(lambda name, A, B: (A * factors[name][0], B * factors[name][1]))
    plan = plan_for([client], rank=2, clip=clip, bits=bits, rounds=count, max_weight=1.0)
    vectors = all_vectors(plan, client)
    assert largest(vectors) <= plan.levels
    assert plan.levels * plan.clients < 2 ** (bits - 1)


@pytest.mark.parametrize("count", [1, 2])
def test_an_update_aligned_with_the_test_matrix_reaches_the_bound_and_not_more(count: int) -> None:
    """One row of ΔW along a column of Ω, ten times too long: the entry is the whole clip."""
    client = rounds.client("c", SMALL, rank=1, alpha=1)
    plan = plan_for([client], rank=2, clip=1.0, rounds=count)
    omega = matrices.right(plan, plan.layers[1])
    A, B = torch.zeros(1, 1, 83), torch.zeros(1, 70, 1)
    A[0, 0], B[0, 4, 0] = omega[0, :, 1].float(), 10.0
    client = client.without("down").but(factors={"up": (A, B)})
    top = largest(all_vectors(plan, client))
    assert plan.levels / HEADROOM * (1 - 1e-6) <= top <= plan.levels


def test_the_largest_sum_does_not_wrap() -> None:
    client = rounds.client("c", SMALL, rank=1, alpha=100.0)
    for bits in (32, 64):
        plan = plan_for([client], rank=2, clip=1.0, bits=bits, clients=30_000, rounds=1)
        vector = secure.first(plan, client)
        total = secure.signed(vector * vector.dtype.type(plan.clients))  # as many copies
        assert np.array_equal((total // plan.clients)[2:], secure.signed(vector)[2:])


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_gauge_invariance(factor: float) -> None:
    """(B·M, M⁻¹·A) gives the vector of (B, A), up to the rounding of factors to float32."""
    client = mixed()[2]
    M = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 4.0]], dtype=torch.float64) * factor
    turned = client.mapped(lambda _, A, B: ((M.inverse() @ A.double()), (B.double() @ M)))
    plan = plan_for([client], clip=0.5 * secure.norm(client))  # both are clipped, alike
    one, other = (secure.signed(secure.first(plan, c)).astype(np.float64) for c in (client, turned))
    assert np.abs(one - other).max() <= 2
    assert one[1] == other[1] != 0


def test_columns_that_cancel_cannot_hide_their_norm() -> None:
    """B = [b, b] and A = [a; ε − a] hide what is left among 1e16 times larger numbers: clipped by what it is."""
    b, a = torch.ones(1, 70, 1, dtype=torch.float64), torch.ones(1, 1, 83, dtype=torch.float64) * 1e12
    client = rounds.client("c", SMALL, rank=2, alpha=2).without("down")
    client = client.but(factors={"up": (torch.cat([a, 1e-3 - a], dim=1), torch.cat([b, b], dim=2))})
    plan = plan_for([client], rank=2, clip=1e-3)
    assert 0 < largest(all_vectors(plan, client)) <= plan.levels


def test_clients_are_clipped_jointly_over_layers_and_biases() -> None:
    long = [c.but(bias={layer.name: torch.ones(layer.m) for layer in WIDE}) for c in mixed()]
    long = [c.but(config=c.config | {"lora_bias": True}) for c in long]
    clip = 0.8 * min(map(secure.norm, long))
    update = secure.run(plan_for(long, rank=14, clip=clip, bits=64), long)
    total = sum(c.weight for c in long)
    for layer in long[0].layers:
        shortened = [(clip / secure.norm(c), c) for c in long]
        expected = sum(f * c.weight * oracle.product(c, layer)[0] for f, c in shortened) / total
        got = oracle.array(update.delta(layer))
        assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)
        bias = sum(f * c.weight * c.scales[layer] * c.bias[layer].double() for f, c in shortened) / total
        assert torch.allclose(update[layer].bias.double(), bias, rtol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [32, 64])
def test_rounding_is_what_the_plan_says(bits: int) -> None:
    client = mixed()[1]
    plan = plan_for([client], rounds=2, bits=bits)
    for (layer, spec), seg in zip(
        ((spec.name, spec) for spec in plan.layers), [s for s in plan.stages[0] if s.kind == "right"], strict=True
    ):
        exact = 0.25 * oracle.product(client, layer) @ oracle.array(matrices.right(plan, spec))
        start = sum(s.size for s in plan.stages[0][: plan.stages[0].index(seg)])
        codes = secure.signed(secure.first(plan, client))[start : start + seg.size].reshape(seg.shape)
        assert np.abs(codes * seg.quantum - exact).max() <= seg.quantum / 2 + 1e-12 * np.abs(exact).max()
    assert math.isclose(seg.quantum, plan.clip * HEADROOM / plan.levels)
    assert plan.levels == ((2**31 - 1) // 20 if bits == 32 else 2**52)


def test_vectors_add_up_modulo_m() -> None:
    for dtype in (np.uint32, np.uint64):
        top = np.iinfo(dtype).max
        one = np.array([top, 1, 0], dtype=dtype)
        assert add([one, np.array([2, top, 0], dtype=dtype)]).tolist() == [1, 0, 0]
        assert one.tolist() == [top, 1, 0]  # not summed in place
    with pytest.raises(ProtocolError, match="no vector to add"):
        add([])
    with pytest.raises(ProtocolError, match=r"uint32 \(2,\) and uint32 \(3,\) cannot be added"):
        add([np.zeros(2, dtype=np.uint32), np.zeros(3, dtype=np.uint32)])
    with pytest.raises(ProtocolError, match=r"uint32 .* and uint64"):
        add([np.zeros(2, dtype=np.uint32), np.zeros(2, dtype=np.uint64)])


def test_more_clients_than_the_modulus_has_room_for() -> None:
    client = mixed()[0]
    with pytest.raises(OptionError, match=r"40000 clients leave 53687 levels .* bits=64, or plan for at most 32767"):
        plan_for([client], clients=40_000)
    assert plan_for([client], clients=32_767).levels >= 2**16
    assert plan_for([client], clients=40_000, bits=64).levels * 40_000 < 2**63
