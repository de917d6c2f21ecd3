"""Bad clients, weights and options: each is refused by name, and never costs the others their round."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.errors import (
    AdapterError,
    BackendError,
    EmptyRoundError,
    FlexLoRAError,
    IncompatibleAdapterError,
    OptionError,
    RankError,
    WeightError,
)
from tests import rounds
from tests.checks import assert_identical
from tests.rounds import Client, Layer


def pair() -> list[Client]:
    return [rounds.client("c0", rank=2), rounds.client("c1", rank=3)]


def started() -> ff.Aggregator:
    agg = ff.Aggregator()
    for c in pair():
        agg.add(c.adapter(), client=c.name)
    return agg


# -- clients ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["A", "B", "bias", "extra"])
def test_values_that_are_not_finite_are_named(where: str, value: float, dtype: torch.dtype) -> None:
    c = rounds.client("hospital-3", rank=2, dtype=dtype, lora_bias=True)
    layer = "h.1.up"
    A, B = (X.clone() for X in c.factors[layer])
    bias, head = torch.zeros(29, dtype=dtype), torch.zeros(4, dtype=dtype)
    {"A": A, "B": B, "bias": bias, "extra": head}[where].view(-1)[1] = value
    c = c.but(factors=c.factors | {layer: (A, B)}, bias={layer: bias}, extras={"head.weight": head})
    agg = started()
    with pytest.raises(AdapterError, match="1 NaN or infinite") as caught:
        agg.add(c.adapter(), client=c.name)
    assert caught.value.client == "hospital-3"
    assert where == "extra" or caught.value.layer == layer
    assert [r.client for r in agg.refused] == ["hospital-3"] and "hospital-3" in agg.refused[0].reason
    assert agg.clients == ["c0", "c1"]


def test_a_product_beyond_float32_is_that_clients_fault() -> None:
    """1e30·1e30: finite factors, refused when they come rather than when the round is to be finished."""
    good, agg = started().finish(), started()
    bad = rounds.client("bad", rank=2).mapped(lambda _, A, B: (A * 0 + 1e30, B * 0 + 1e30))
    alpha = rounds.client("alpha", rank=2, alpha=1e38).mapped(lambda _, A, B: (A * 1e3, B * 1e3))
    bias = rounds.client("bias", rank=2, alpha=1e30, lora_bias=True).mapped(lambda _, A, B: (A * 1e-15, B * 1e-15))
    bias = bias.but(bias={"h.0.up": torch.full((29,), 1e30)})
    wide = rounds.client("float64", rank=2, dtype=torch.float64).mapped(lambda _, A, B: (A * 1e-300, B * 1e300))
    for c in (bad, alpha, bias, wide):
        with pytest.raises(AdapterError, match="beyond what float32") as caught:
            agg.add(c.adapter(), client=c.name)
        assert (caught.value.client, caught.value.layer) == (c.name, "h.0.up" if c is bias else "h.0.down")
    assert_identical(good, agg.finish())


def test_large_factors_of_a_small_product_are_fine() -> None:
    """Columns of 1e30 in B against rows of 1e-30 in A are no overflow."""
    c = rounds.client("large", rank=2).mapped(lambda _, A, B: (A * 1e-30, B * 1e30))
    update = ff.aggregate([c.adapter()])
    plain = ff.aggregate([rounds.client("large", rank=2).adapter()])
    for layer in update.layers:
        torch.testing.assert_close(update.delta(layer), plain.delta(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [3, 0, "", b"anna", ("a", 1), ["unhashable"]], ids=repr)
def test_names_that_are_no_strings(name: Any) -> None:
    """They would fail in sorting or in JSON, long after the client that brought them."""
    good, agg = started().finish(), started()
    with pytest.raises(AdapterError, match=r"its name is .*; give a non-empty string") as caught:
        agg.add(pair()[0].adapter(), client=name)
    assert repr(name) in str(caught.value)
    assert [r.client for r in agg.refused] == [str(name)] == [caught.value.client]
    assert_identical(good, agg.finish())
    with pytest.raises(AdapterError, match="non-empty string"):
        ff.aggregate([pair()[0].adapter()], clients=[name])


def test_another_base_model_whoever_names_it_first() -> None:
    """A client that names no base must not open the door to two that name different ones."""
    clients = [
        rounds.client("a", base_model_name_or_path=None),
        rounds.client("b", base_model_name_or_path="/home/b/models/Llama-7b"),
        rounds.client("c", base_model_name_or_path="Llama-7b"),
    ]
    agg = ff.Aggregator()
    for c in clients:
        agg.add(c.adapter(), client=c.name)
    other = rounds.client("d", base_model_name_or_path="Llama-13b").adapter()
    with pytest.raises(IncompatibleAdapterError, match=r"client 'd'.*'Llama-13b'.*client 'b' is 'Llama-7b'"):
        agg.add(other, client="d")


def test_extras_of_another_shape_whoever_sends_them_first() -> None:
    """The first client has no head; the second and third disagree about its shape."""
    agg = started()
    with_head = pair()[0].but(extras={"head.weight": torch.ones(5)})
    agg.add(with_head.adapter(), client="b")
    other = pair()[0].but(extras={"head.weight": torch.ones(7)})
    with pytest.raises(IncompatibleAdapterError, match=r"head.weight.*\(7,\).*client 'b' is \(5,\)"):
        agg.add(other.adapter(), client="c")
    assert torch.equal(agg.finish().extras[rounds.PREFIX + "head.weight"], torch.ones(5))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Layer("h.0.up", 29, 13), "29 outputs and 13 inputs.*29 outputs and 12 inputs"),
        (rounds.conv("h.0.up", 29, 12, 1), "conv weight.*linear weight"),
        (Layer("h.0.up", 29, 12, "embedding"), "embedding weight.*linear weight"),
    ],
    ids=["sides", "conv", "embedding"],
)
def test_another_shape_of_a_layer(layer: Layer, text: str) -> None:
    agg = started()
    with pytest.raises(IncompatibleAdapterError, match=text) as caught:
        agg.add(rounds.client("x", [layer]).adapter(), client="x")
    assert (caught.value.client, caught.value.layer) == ("x", "h.0.up")
    # What a refused client brought along settles nothing.
    agg.add(rounds.client("y", [Layer("new", 3, 4)]).adapter(), client="y")
    assert "new" in agg.finish().layers


def test_a_client_name_counts_once() -> None:
    agg = started()
    before = agg.finish()
    with pytest.raises(IncompatibleAdapterError, match="'c1': this client is already in the round"):
        agg.add(pair()[0].adapter(), client="c1")
    assert_identical(before, agg.finish())


def test_state_dicts_that_contradict_themselves() -> None:
    c = rounds.client("c", [Layer("fc", 5, 7)], rank=2)
    state, config = c.state_dict(), c.config
    a_key, b_key = c.layers["fc"].keys()
    for bad, text in (
        (state | {a_key: torch.ones(3, 7)}, "rank 3.*rank 2"),
        ({a_key: state[a_key]}, "no partner B"),
        (state | {a_key: torch.ones(2, 7, 1)}, "not the factors"),
        (state | {b_key: torch.ones(5, 2, dtype=torch.int8)}, "int8"),
    ):
        with pytest.raises(AdapterError, match=text) as caught:
            ff.Adapter.from_state_dict(bad, config, client="c")
        assert (caught.value.client, caught.value.layer) == ("c", "fc")
    with pytest.raises(AdapterError, match=r"rank 2.*config says 4"):
        ff.Adapter.from_state_dict(state, config | {"r": 4}, client="c")


def test_paths_that_are_no_adapter(tmp_path: Path) -> None:
    agg = started()
    with pytest.raises(AdapterError, match="does not exist") as caught:
        agg.add(tmp_path / "nowhere", client="gone")
    assert caught.value.client == "gone" and [r.client for r in agg.refused] == ["gone"]
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": 7}')
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        agg.add(tmp_path)
    assert agg.finish().layers == sorted(pair()[0].factors)


def test_configs_with_a_base_model_that_is_no_name() -> None:
    agg = started()
    with pytest.raises(IncompatibleAdapterError, match="base_model_name_or_path is '7'"):
        agg.add(rounds.client("odd", base_model_name_or_path=7).adapter(), client="odd")


# -- weights ---


@pytest.mark.parametrize(
    "weight", [-1, -1e-300, math.nan, math.inf, -math.inf, True, "3", None, 1j, 10**400, np.float64("nan"), np.True_]
)
def test_bad_weights(weight: Any) -> None:
    agg = started()
    with pytest.raises(WeightError, match=r"client 'w': weight is .* finite number ≥ 0"):
        agg.add(rounds.client("w").adapter(), weight, client="w")
    assert_identical(started().finish(), agg.finish())


@pytest.mark.parametrize(
    "one", [np.int64(1), np.float32(1), np.float64(1), Fraction(1), 1, 1.0], ids=lambda x: str(type(x))
)
def test_numbers_are_weights(one: Any) -> None:
    """len(dataset) often comes as a NumPy number."""
    adapters = [c.adapter() for c in pair()]
    assert_identical(ff.aggregate(adapters, [one * 3, one]), ff.aggregate(adapters, [3.0, 1.0]))


@pytest.mark.parametrize("factor", [2.0**1022, 2.0**-1020])
def test_weights_whose_sum_leaves_float64(factor: float) -> None:
    adapters = [c.adapter() for c in [*pair(), rounds.client("c2"), rounds.client("c3")]]
    plain = ff.aggregate(adapters, [1.0, 1.5, 1.25, 0.5])
    assert_identical(plain, ff.aggregate(adapters, [w * factor for w in (1.0, 1.5, 1.25, 0.5)]))


def test_weights_and_names_for_other_adapters() -> None:
    adapters = [c.adapter() for c in pair()]
    for options in ({"weights": [1]}, {"weights": [1, 2, 3]}, {"clients": ["a"]}, {"weights": {"c0": 1}}):
        with pytest.raises(FlexLoRAError, match="for 2 adapters"):
            ff.aggregate(adapters, **options)
    with pytest.raises(WeightError, match=r"client 'c1': weights has no entry.*\['c0', 'c9'\]"):
        ff.aggregate(adapters, {"c0": 1, "c9": 2})
    by_name = ff.aggregate(adapters, {"c1": 1, "c0": 3})
    assert_identical(by_name, ff.aggregate(adapters, [3, 1]))


# -- rounds ---


def test_empty_rounds() -> None:
    for empty in (lambda: ff.aggregate([]), lambda: ff.Aggregator().finish()):
        with pytest.raises(EmptyRoundError, match="no client is in this round; add at least one"):
            empty()
    agg = ff.Aggregator()
    with pytest.raises(WeightError):
        agg.add(pair()[0].adapter(), -1, client="only")
    with pytest.raises(EmptyRoundError, match="1 were refused, the first: client 'only': weight is -1"):
        agg.finish()
    with pytest.raises(WeightError, match="weights of 2 clients sum to 0"):
        ff.aggregate([c.adapter() for c in pair()], [0, 0.0])


OPTIONS: list[tuple[dict[str, Any], type[FlexLoRAError], str]] = [
    ({"rank": 0}, RankError, "rank is 0; give an integer ≥ 1"),
    ({"rank": -3}, RankError, "rank is -3"),
    ({"rank": 2.0}, RankError, r"rank is 2\.0"),
    ({"rank": True}, RankError, "rank is True"),
    ({"tol": -1e-3}, OptionError, "tol is -0.001"),
    ({"tol": math.nan}, OptionError, "tol is nan"),
    ({"tol": "small"}, OptionError, "tol is 'small'"),
    ({"solver": "magic"}, OptionError, "solver 'magic' is not one of auto, gram"),
    ({"method": "fedavg"}, OptionError, "method 'fedavg' is not one of flexlora"),
    ({"missing": "skip"}, OptionError, "missing 'skip'"),
    ({"results": "disk"}, OptionError, "results 'disk' is neither 'cpu' nor 'device'"),
    ({"device": "abacus"}, BackendError, "device 'abacus'"),
    ({"device": "meta"}, BackendError, "device 'meta'"),
    ({"device": 3.5}, BackendError, "device 3.5"),
]


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS, ids=[str(options) for options, _, _ in OPTIONS])
def test_bad_options(options: dict[str, Any], error: type[FlexLoRAError], text: str) -> None:
    with pytest.raises(error, match=text):
        ff.Aggregator(**options)


@pytest.mark.parametrize("device", ["cuda", "cuda:9", 0])
def test_a_gpu_that_is_not_there(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"no GPU|none is available"):
        ff.Aggregator(device=device)


@pytest.mark.parametrize(
    "build",
    [lambda: AdapterError("odd"), lambda: WeightError("odd", client="c"), lambda: RankError("odd", layer="fc")],
)
def test_errors_know_where_they_happened(build: Callable[[], FlexLoRAError]) -> None:
    error = build().at(client="other", layer="other")
    assert str(error).endswith(": odd") and error.args == (str(error),)
    assert error.client is not None and error.layer is not None
    assert repr(error.client) in str(error) and repr(error.layer) in str(error)
