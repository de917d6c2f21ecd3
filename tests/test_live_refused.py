"""What a live model refuses leaves it as it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, UnsupportedAdapterError
from tests.models import LLAMA, base_model, tiny, trained_adapter


def everything(model: Any) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """All that ``load_into`` may change: tensors, config, and each layer's numbers."""
    layers = {
        name: (dict(m.r), dict(m.lora_alpha), dict(m.scaling), [p.requires_grad for p in m.parameters()])
        for name, m in model.named_modules()
        if hasattr(m, "lora_A")
    }
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, copy.deepcopy(model.peft_config["default"].to_dict()), layers


def assert_unchanged(model: Any, before: tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]) -> None:
    state, config, layers = everything(model)
    assert config == before[1] and layers == before[2] and state.keys() == before[0].keys()
    assert all(torch.equal(v, before[0][k]) for k, v in state.items())


def refused(error: type[Exception], message: str, model: Any, adapter: Adapter) -> None:
    before = everything(model)
    with pytest.raises(error, match=message) as caught:
        adapter.load_into(model)
    assert isinstance(caught.value, AdapterError) and caught.value.client == "c4"
    assert_unchanged(model, before)


def source_of(seed: int = 1, rank: int = 6, **options: Any) -> Adapter:
    return Adapter.from_peft(trained_adapter(seed, rank, **options), client="c4")


BOTH = {"target_modules": ["fc", "classifier"]}


def test_layers_that_only_one_side_has() -> None:
    refused(
        IncompatibleAdapterError,
        r"'fc'.*missing in the adapter",
        trained_adapter(2, 4, **BOTH),
        source_of(target_modules=["classifier"]),
    )
    refused(
        IncompatibleAdapterError,
        r"'fc'.*missing in the model",
        trained_adapter(2, 4, target_modules=["classifier"]),
        source_of(**BOTH),
    )


def test_other_shapes() -> None:
    state = get_peft_model_state_dict(trained_adapter(1, 6, **BOTH))
    key = "base_model.model.fc.lora_B.weight"
    other = Adapter.from_state_dict(state | {key: torch.zeros(21, 6)}, {"r": 6}, client="c4")
    refused(IncompatibleAdapterError, r"layer 'fc'.*B \(21, 6\).*B \(20, 4\)", trained_adapter(2, 4, **BOTH), other)


def test_another_number_of_experts() -> None:
    adapter = Adapter.from_state_dict(
        get_peft_model_state_dict(trained_adapter(1, 4, kind="moe")),
        {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        client="c4",
    )
    refused(IncompatibleAdapterError, r"6 expert\(s\).*with 3", trained_adapter(2, 4, kind="moe"), adapter)


def test_values_that_are_not_finite_or_do_not_fit() -> None:
    for value, message in ((float("nan"), "NaN"), (1e6, r"1e\+06 does not fit the model's torch.float16")):
        source = trained_adapter(1, 4, **BOTH)
        source.get_submodule("base_model.model.fc").lora_B["default"].weight.data[0, 0] = value
        refused(
            AdapterError,
            message,
            trained_adapter(2, 4, dtype=torch.float16, **BOTH),
            Adapter.from_peft(source, client="c4"),
        )


def test_extras_that_only_one_side_has() -> None:
    with_head = {"modules_to_save": ["classifier"]}
    nowhere = {"base_model.model.nowhere.weight": torch.zeros(2)}
    state = get_peft_model_state_dict(trained_adapter(1, 6))
    other = Adapter.from_state_dict(state | nowhere, {"r": 6}, client="c4")
    refused(IncompatibleAdapterError, "the model has nothing there", trained_adapter(2, 4), other)
    refused(IncompatibleAdapterError, r"trains .*classifier", trained_adapter(2, 4, **with_head), source_of())
    state = get_peft_model_state_dict(trained_adapter(1, 6, **with_head))
    state["base_model.model.classifier.bias"] = torch.zeros(7)
    other = Adapter.from_state_dict(state, {"r": 6}, client="c4")
    refused(IncompatibleAdapterError, r"shape \(7,\).*\(5,\)", trained_adapter(2, 4, **with_head), other)


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")
def test_lora_bias_on_one_side_only() -> None:
    refused(
        IncompatibleAdapterError, "only the adapter has a lora_bias", trained_adapter(2, 4), source_of(lora_bias=True)
    )
    refused(
        IncompatibleAdapterError, "only the model has a lora_bias", trained_adapter(2, 4, lora_bias=True), source_of()
    )


def test_attention_needs_one_rank() -> None:
    """PEFT gives in_proj and out_proj one rank; an adapter with two cannot be said in its config."""
    state = get_peft_model_state_dict(trained_adapter(1, 4, kind="mha"))
    adapter = Adapter.from_state_dict(state, {"r": 4}, client="c4")
    factors = {x: adapter.factors(x) for x in adapter.layers}
    a, b = factors["mha"]
    factors["mha"] = (a[:, :2], b[:, :, :2])
    with pytest.raises(AdapterError, match="one rank"):
        Adapter.from_factors(
            factors, {x: adapter.spec(x) for x in factors}, dict.fromkeys(factors, 1.0), adapter.config
        )


def test_merged_adapters_are_refused() -> None:
    model = trained_adapter(2, 4)
    model.merge_adapter()
    refused(AdapterError, r"merged.*unmerge_adapter", model, source_of())
    model.unmerge_adapter()
    assert source_of().load_into(model)


def test_models_whose_adapter_is_no_plain_lora_are_refused() -> None:
    dora = trained_adapter(2, 4, use_dora=True)
    refused(UnsupportedAdapterError, "DoRA", dora, source_of())
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        Adapter.from_peft(dora)
    pissa = trained_adapter(2, 4, init_lora_weights="pissa")
    refused(UnsupportedAdapterError, r"PiSSA.*initial=", pissa, source_of())
    grouped = trained_adapter(2, 4, kind="conv1", model=base_model(groups=2))
    with pytest.raises(UnsupportedAdapterError, match=r"layer 'conv1'.*groups=2"):
        Adapter.from_peft(grouped)


def test_things_that_are_no_peft_model() -> None:
    for call in (Adapter.from_peft, source_of().load_into):
        with pytest.raises(AdapterError, match="Zoo is not a model with PEFT adapters"):
            call(base_model())
        with pytest.raises(AdapterError, match=r"no adapter 'other'; it has \['default'\]"):
            call(trained_adapter(1, 4), "other")


def test_parameters_without_values_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(), LoraConfig(r=6, target_modules=["fc"]), low_cpu_mem_usage=True)
    with pytest.raises(AdapterError, match="no values yet"):
        Adapter.from_peft(model)
    with pytest.raises(AdapterError, match="no values yet"):
        source_of().load_into(model)


def test_tied_factors_keep_their_tie() -> None:
    """``ensure_weight_tying``: the factors of lm_head are those of the embedding, transposed, in one memory."""
    options = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    sizes = {**LLAMA, "tie_word_embeddings": True}
    source, model = (trained_adapter(s, 4, model=tiny("Llama", **sizes), **options) for s in (1, 2))
    ids = torch.arange(12).reshape(2, 6)
    assert Adapter.from_peft(source).load_into(model) is False
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits)
    other = Adapter.from_peft(trained_adapter(3, 6, model=tiny("Llama", **sizes), **options), client="c4")
    refused(UnsupportedAdapterError, "tied", model, other)


def test_an_adapter_that_is_named_like_a_layer() -> None:
    """PEFT sorts keys by adapter as text, and takes ``layers.1`` for adapter "1": nothing may be lost silently."""
    model = trained_adapter(1, 2, model=tiny("Llama", **LLAMA), target_modules=["q_proj"])
    model.add_adapter("1", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"'c4', layer 'model.layers.1.self_attn.q_proj'.*other names"):
        Adapter.from_peft(model, client="c4")
