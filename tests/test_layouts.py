"""State-dict tensors and 2-D factors: shapes there and back, names, and what is no factor."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexlora_fast import config as configs
from flexlora_fast import layouts
from flexlora_fast.errors import AdapterError, UnsupportedAdapterError
from flexlora_fast.layouts import LayerSpec

P = layouts.PREFIX


def pair(layer: str, rank: int = 2, m: int = 5, n: int = 3, **options: Any) -> dict[str, Tensor]:
    return {
        f"{P}{layer}.lora_A.weight": torch.randn(rank, n, **options),
        f"{P}{layer}.lora_B.weight": torch.randn(m, rank, **options),
    }


def parse(tensors: dict[str, Tensor], **config: Any) -> Any:
    return layouts.parse(tensors, configs.normalize({"r": 2, "lora_alpha": 4, **config}), "c1")


def specs_of(tensors: dict[str, Tensor], **config: Any) -> dict[str, LayerSpec]:
    return parse(tensors, **config)[0]


SIZES = st.integers(1, 9)


@st.composite
def spec_and_rank(draw: st.DrawFn) -> tuple[LayerSpec, int]:
    kind = draw(st.sampled_from(["linear", "embedding", "conv", "moe"]))
    tail = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))) if kind == "conv" else ()
    return LayerSpec(
        name="x",
        kind=kind,
        m=draw(SIZES),
        n=math.prod(tail) if kind == "conv" else draw(SIZES),
        a_key="a",
        b_key="b",
        pattern_name="x",
        experts=draw(st.integers(2, 4)) if kind == "moe" else 1,
        a_shape_tail=tail,
        weight_transposed=kind == "embedding" or (kind != "conv" and draw(st.booleans())),
    ), draw(st.integers(1, 5))


@given(spec_and_rank(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_factors_go_there_and_back(case: tuple[LayerSpec, int], dtype: torch.dtype) -> None:
    spec, rank = case
    a = torch.randn(spec.experts, rank, spec.n).to(dtype)
    b = torch.randn(spec.experts, spec.m, rank).to(dtype)
    a_raw, b_raw = layouts.from_factors(spec, a, b)
    assert a_raw.is_contiguous() and b_raw.is_contiguous() and a_raw.dtype == dtype
    assert a_raw.shape[0] == b_raw.shape[1] == rank * spec.experts
    a2, b2 = layouts.to_factors(spec, a_raw, b_raw)
    assert torch.equal(a, a2) and torch.equal(b, b2)
    assert a2.data_ptr() == a_raw.data_ptr() and b2.data_ptr() == b_raw.data_ptr()
    weight = layouts.to_weight_layout(spec, b.float() @ a.float())
    assert weight.numel() == spec.experts * spec.m * spec.n


@given(spec_and_rank())
def test_spec_survives_json(case: tuple[LayerSpec, int]) -> None:
    assert LayerSpec.from_json(json.loads(json.dumps(case[0].to_json()))) == case[0]


def test_from_factors_checks_shapes() -> None:
    spec = specs_of(pair("fc"))["fc"]
    with pytest.raises(AdapterError, match=r"fc.*\(1, 2, 4\)"):
        layouts.from_factors(spec, torch.zeros(1, 2, 4), torch.zeros(1, 5, 2))


def test_kinds_and_extras() -> None:
    tensors = {
        **pair("fc"),
        f"{P}fc.lora_B.bias": torch.zeros(5),
        f"{P}emb.lora_embedding_A": torch.zeros(2, 11),
        f"{P}emb.lora_embedding_B": torch.zeros(6, 2),
        f"{P}emb.base_layer.weight": torch.zeros(11, 6),
        f"{P}cv.lora_A.weight": torch.zeros(2, 3, 4, 5),
        f"{P}cv.lora_B.weight": torch.zeros(7, 2, 1, 1),
        f"{P}head.weight": torch.zeros(2, 2),
        f"{P}fc.lora_velora_embed": torch.zeros(3),
    }
    specs, biases, extras = parse(tensors)
    assert list(specs) == ["cv", "emb", "fc"]
    assert [(s.kind, s.m, s.n) for s in specs.values()] == [("conv", 7, 60), ("embedding", 6, 11), ("linear", 5, 3)]
    assert specs["cv"].a_shape_tail == (3, 4, 5) and specs["emb"].weight_transposed
    assert biases == {"fc": f"{P}fc.lora_B.bias"}
    assert extras == [f"{P}emb.base_layer.weight", f"{P}head.weight"]


def test_only_shapes_are_read() -> None:
    assert list(specs_of(pair("fc", device="meta"))) == ["fc"]


def test_fan_in_fan_out_transposes_the_weight_but_not_of_attention() -> None:
    tensors = pair("proj") | pair("mha", m=9) | pair("mha.base_layer.out_proj", m=3)
    specs = specs_of(tensors, fan_in_fan_out=True)
    assert {name: s.weight_transposed for name, s in specs.items()} == {
        "mha": False,
        "mha.base_layer.out_proj": False,
        "proj": True,
    }
    assert specs["mha.base_layer.out_proj"].pattern_name == "mha"


def test_attention_output_takes_the_rank_of_its_owner() -> None:
    tensors = pair("mha", rank=3) | pair("mha.base_layer.out_proj", rank=3)
    specs = specs_of(tensors, rank_pattern={"mha": 3, "out_proj": 7})
    assert len(specs) == 2


BAD_KEYS = [
    ("fc.lora_magnitude_vector", UnsupportedAdapterError, "DoRA"),
    ("fc.lora_diag", UnsupportedAdapterError, "KaSA"),
    ("fc.lora_monteclora_sampler.std_prior", UnsupportedAdapterError, "MonteCLoRA"),
    ("fc.lora_arrow.arrow_router.prototypes", UnsupportedAdapterError, "Arrow"),
    ("fc.lora_A.default.weight", AdapterError, "get_peft_model_state_dict"),
    ("fc.lora_embedding_A.default", AdapterError, "get_peft_model_state_dict"),
    ("fc.lora_C.weight", AdapterError, "lora_C"),
    ("fc.lora_ranknum", AdapterError, "lora_ranknum"),
    ("fc.lora_A.bias", AdapterError, r"get_peft_model_state_dict|looks like"),
]


@pytest.mark.parametrize(("key", "error", "message"), BAD_KEYS)
def test_tensors_that_are_no_plain_lora_are_refused(key: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parse(pair("fc") | {P + key: torch.zeros(2)})
    assert caught.value.client == "c1"


def test_a_base_module_may_be_called_lora() -> None:
    _, _, extras = parse(pair("fc") | {f"{P}lora_tower.head.weight": torch.zeros(2)})
    assert extras == [f"{P}lora_tower.head.weight"]


def bad_shapes() -> list[tuple[dict[str, Tensor], type, str]]:
    a, b = f"{P}fc.lora_A.weight", f"{P}fc.lora_B.weight"
    z = torch.zeros
    return [
        ({}, AdapterError, "no lora_A"),
        ({f"{P}head.weight": z(2)}, AdapterError, "no lora_A/lora_B tensor among 1"),
        ({a: z(2, 3)}, AdapterError, "no partner B"),
        ({b: z(5, 2)}, AdapterError, "no partner A"),
        ({f"{P}fc.lora_B.bias": z(2)}, AdapterError, "no partner"),
        ({a: z(2, 3), b: z(5, 4)}, AdapterError, "A .2, 3. has rank 2, B .5, 4. has rank 4"),
        ({a: z(4, 3), b: z(5, 4)}, AdapterError, "rank 4.*the config says 2"),
        ({a: z(2), b: z(5, 2)}, AdapterError, "not the factors"),
        ({a: z(2, 3, 3), b: z(5, 2)}, AdapterError, "not the factors"),
        ({a: z(2, 3, 3), b: z(5, 2, 3)}, AdapterError, "not the factors"),
        ({a: z(2, 0), b: z(5, 2)}, AdapterError, "without any entry"),
        ({a: z(2, 3).int(), b: z(5, 2)}, AdapterError, "int32"),
        ({a: z(2, 3).to(torch.float8_e4m3fn), b: z(5, 2)}, AdapterError, "float8"),
        ({a: z(2, 3).to(torch.complex64), b: z(5, 2)}, AdapterError, "complex64"),
        ({a: z(2, 3, 3), b: z(6, 1, 1)}, UnsupportedAdapterError, "grouped convolution.*2 groups"),
        ({a: z(2, 3), b: z(5, 2), f"{P}fc.lora_B.bias": z(4)}, AdapterError, "bias has shape .4,"),
        ({a: z(2, 3), f"{P}fc.lora_embedding_B": z(5, 2)}, AdapterError, "different kinds"),
    ]


@pytest.mark.parametrize(("tensors", "error", "message"), bad_shapes())
def test_bad_tensors_are_named(tensors: dict[str, Tensor], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parse(tensors)
    assert caught.value.client == "c1"
    assert caught.value.layer == ("fc" if "no lora" not in message else None)


def moe(module: str, experts: int, rank: int, m: int, n: int) -> dict[str, Tensor]:
    return pair(module, rank=experts * rank, m=m, n=n)


UP_DOWN = ["experts.gate_up_proj", "experts.down_proj"]


def nested(up: int = 2, down: int = 2, hidden: int = 6, inner: int = 5) -> dict[str, Tensor]:
    """gate_up_proj is registered first, so its wrapper is the inner one; 3 experts."""
    return moe("l.experts.base_layer", 3, up, 2 * inner, hidden) | moe("l.experts", 3, down, hidden, inner)


def test_experts_come_from_the_config_rank() -> None:
    specs = specs_of(moe("l.experts", 3, 2, 5, 4), target_parameters=["experts.w"], target_modules=[])
    assert specs["l.experts"].kind == "moe" and specs["l.experts"].experts == 3
    assert specs["l.experts"].pattern_name == "l.experts.w"


def test_a_two_dimensional_parameter_is_linear() -> None:
    spec = specs_of(pair("l.gate"), target_parameters=["gate.weight"], target_modules=[])["l.gate"]
    assert (spec.kind, spec.experts, spec.pattern_name) == ("linear", 1, "l.gate.weight")


def test_a_targeted_module_is_no_parameter() -> None:
    spec = specs_of(pair("l.w"), target_parameters=["weight"], target_modules=["w"])["l.w"]
    assert spec.pattern_name == "l.w"
    with pytest.raises(AdapterError, match=r"rank 6.*config says 2"):
        specs_of(pair("l.w", rank=6), target_parameters=["weight"], target_modules=["w"])


@pytest.mark.parametrize("order", [UP_DOWN, UP_DOWN[::-1]])
@pytest.mark.parametrize("pattern", ["gate_up_proj", r".*\.down_proj"])
def test_nested_parameters_are_told_apart_by_their_shapes(order: list[str], pattern: str) -> None:
    """The order in a config means nothing: PEFT writes sets in any order."""
    up, down = (4, 2) if "up" in pattern else (2, 4)
    specs = specs_of(nested(up, down), target_parameters=order, rank_pattern={pattern: 4})
    assert specs["l.experts"].pattern_name == "l.experts.down_proj"
    assert specs["l.experts.base_layer"].pattern_name == "l.experts.gate_up_proj"
    assert {s.experts for s in specs.values()} == {3}


def test_nested_parameters_are_told_apart_by_their_ranks() -> None:
    tensors = moe("l.experts.base_layer", 3, 4, 4, 4) | moe("l.experts", 3, 2, 4, 4)
    specs = specs_of(tensors, target_parameters=["experts.a", "experts.b"], rank_pattern={"experts.b": 4})
    assert specs["l.experts"].pattern_name == "l.experts.a"


def test_nested_parameters_that_nothing_tells_apart_are_an_error_only_where_it_matters() -> None:
    tensors = moe("l.experts.base_layer", 3, 2, 4, 4) | moe("l.experts", 3, 2, 4, 4)
    target = ["experts.a", "experts.b"]
    specs = specs_of(tensors, target_parameters=target)
    assert specs["l.experts"].pattern_name == "l.experts.b"  # listed last, so most likely outermost
    with pytest.raises(AdapterError, match=r"does not tell which.*from_peft"):
        specs_of(tensors, target_parameters=target, alpha_pattern={"experts.b": 9})


def test_parameters_that_fit_nothing_are_an_error() -> None:
    with pytest.raises(AdapterError, match="do not fit target_parameters"):
        specs_of(pair("l.experts", rank=5), target_parameters=["experts.w"])
