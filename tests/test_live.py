"""Live PEFT models: snapshots, and loading in place at the same and at another rank."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.config import VeloraConfig
from torch import Tensor, nn

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, IncompatibleAdapterError, UnsupportedAdapterError
from tests.models import KINDS, base_model, randomize, tokens, trained_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens())


def reload(folder: Path, base: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base_model(dtype=dtype) if base is None else base
        return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


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


# -- from_peft ---


@pytest.mark.parametrize("kind", KINDS)
def test_snapshot_has_the_deltas_of_the_live_layers(kind: str) -> None:
    model = trained_adapter(1, 4, kind=kind).double()
    adapter = Adapter.from_peft(model, client="c1")
    modules = dict(model.named_modules())
    for layer in adapter.layers:
        live = modules[f"base_model.model.{layer}"].get_delta_weight("default").detach()
        torch.testing.assert_close(adapter.delta(layer, "weight"), live, rtol=1e-13, atol=1e-13)
    assert adapter.client == "c1"
    before = adapter.delta(adapter.layers[0]).clone()
    randomize(model, 9)
    assert torch.equal(adapter.delta(adapter.layers[0]), before)


def test_snapshot_knows_transposed_experts() -> None:
    """A state dict cannot tell (E, n, m) from (E, m, n)."""
    model = trained_adapter(2, 3, kind="moe_nested", model=base_model(is_transposed=True)).double()
    adapter = Adapter.from_peft(model)
    for layer in adapter.layers:
        live = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default").detach()
        assert adapter.spec(layer).weight_transposed
        torch.testing.assert_close(adapter.delta(layer, "weight"), live, rtol=1e-13, atol=1e-13)


def test_snapshot_knows_which_layer_is_stored_transposed() -> None:
    """One config holds one fan_in_fan_out, and PEFT flips it as it goes from Linear to Conv1D."""
    model = trained_adapter(2, 3, target_modules=["fc", "proj"])
    adapter = Adapter.from_peft(model)
    assert {x: adapter.spec(x).weight_transposed for x in adapter.layers} == {"fc": False, "proj": True}


@pytest.mark.parametrize("rslora", [False, True])
def test_snapshot_takes_the_scale_in_force(rslora: bool, tmp_path: Path) -> None:
    model = trained_adapter(3, 4, kind="mixed", use_rslora=rslora, rank_pattern={"fc": 2})
    model.get_submodule("base_model.model.fc").set_scale("default", 0.3)
    model.get_submodule("base_model.model.embed").scale_layer(1.7)
    adapter = Adapter.from_peft(model)
    for layer in adapter.layers:
        live = model.get_submodule(f"base_model.model.{layer}").scaling["default"]
        assert adapter.scale(layer) == pytest.approx(live, rel=2.3e-16)
    adapter.save(tmp_path)
    torch.testing.assert_close(outputs(reload(tmp_path)), outputs(model))


def test_snapshot_of_one_adapter_among_several() -> None:
    model = trained_adapter(1, 4)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["fc", "classifier"]))
    model.set_adapter("other")
    randomize(model, 5, "other")
    assert Adapter.from_peft(model).rank("fc") == 4
    other = Adapter.from_peft(model, "other")
    assert other.layers == ["classifier", "fc"] and other.scale("fc") == 1.5


def test_snapshot_leaves_full_embeddings_out() -> None:
    assert Adapter.from_peft(trained_adapter(1, 4, kind="embedding")).extras == {}


def test_ambiguous_nested_parameters_are_read_from_a_live_model() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eij,ejk->bk", x, self.first, self.second)

    base = nn.Sequential(nn.Linear(4, 4), Pair())
    options = {"target_modules": [], "target_parameters": ["1.first", "1.second"], "alpha_pattern": {"1.first": 2}}
    model = trained_adapter(1, 2, model=base, **options)
    adapter = Adapter.from_peft(model)
    assert {x: adapter.spec(x).pattern_name for x in adapter.layers} == {
        "1": "1.first",
        "1.base_layer": "1.second",
    }
    with pytest.raises(AdapterError, match="does not tell which"):
        Adapter.from_state_dict(get_peft_model_state_dict(model), model.peft_config["default"])


# -- load_into, same rank ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [4, 1, 6], ids=lambda r: f"rank {r}")
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_becomes_the_source(kind: str, rank: int, dtype: torch.dtype, tmp_path: Path) -> None:
    source = trained_adapter(1, rank, kind=kind, dtype=dtype)
    model = trained_adapter(2, 4, kind=kind, dtype=dtype)
    adapter = Adapter.from_peft(source)
    # once only: PEFT's MultiheadAttention merges and unmerges in each forward, and the rounding stays in the base
    expected = outputs(source)
    assert adapter.load_into(model) == (rank != 4)
    assert torch.equal(outputs(model), expected)
    again = Adapter.from_peft(model)
    assert all(again.rank(x) == rank for x in again.layers)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(reload(tmp_path, dtype=dtype)), expected)


def test_same_rank_keeps_the_parameters_of_the_optimizer() -> None:
    model = trained_adapter(2, 4, kind="mixed")
    before = dict(model.named_parameters())
    trainable = {n: p for n, p in before.items() if p.requires_grad}
    assert Adapter.from_peft(trained_adapter(1, 4, kind="mixed")).load_into(model) is False
    after = dict(model.named_parameters())
    assert all(after[n] is p and p.requires_grad for n, p in trainable.items())


def test_only_the_scale_changes(tmp_path: Path) -> None:
    source = trained_adapter(1, 4, lora_alpha=3, alpha_pattern={"fc": 5}, target_modules=["fc", "classifier"])
    model = trained_adapter(1, 4, target_modules=["fc", "classifier"])
    assert Adapter.from_peft(source).load_into(model) is False
    fc = model.get_submodule("base_model.model.fc")
    assert (fc.scaling["default"], fc.lora_alpha["default"]) == (1.25, 5)
    fc.set_scale("default", 1.0)
    assert fc.scaling["default"] == 1.25
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(reload(tmp_path)), outputs(source))


def test_scales_survive_another_convention() -> None:
    """The adapter is plain, the model uses rsLoRA: the scale must be the adapter's."""
    source = trained_adapter(1, 4, lora_alpha=3)
    model = trained_adapter(2, 9, use_rslora=True)
    assert Adapter.from_peft(source).load_into(model)
    assert model.get_submodule("base_model.model.fc").scaling["default"] == 0.75
    assert torch.equal(outputs(model), outputs(source))
    assert Adapter.from_peft(model).scale("fc") == 0.75


# -- load_into, another rank ---


def test_another_rank_keeps_flags_dtype_dropout_mode_and_random_numbers() -> None:
    base = base_model(dtype=torch.bfloat16)
    options = {"lora_dropout": 0.3, "init_lora_weights": "orthogonal", "target_modules": ["fc", "embed"]}
    model = trained_adapter(2, 4, model=base, **options).float()
    model.get_submodule("base_model.model.fc.base_layer").bfloat16()
    model.get_submodule("base_model.model.fc").lora_A["default"].weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    source = trained_adapter(1, 3, target_modules=["fc", "embed"])  # odd: orthogonal_init would refuse it
    state = torch.random.get_rng_state()
    assert Adapter.from_peft(source).load_into(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32
    fc = model.get_submodule("base_model.model.fc")
    assert not fc.lora_dropout["default"].training and not fc.lora_A["default"].training
    assert fc.lora_dropout["default"].p == 0.3
    assert model.peft_config["default"].init_lora_weights == "orthogonal"


ACCEPTED = [
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    {"velora_config": VeloraConfig(num_groups=2)},
    {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=lambda o: "-".join(map(str, o.items()))[:40])
def test_accepted_variants_change_rank(options: dict[str, Any]) -> None:
    source = trained_adapter(1, 6, model=tiny("Llama", **LLAMA), target_modules=["q_proj"], **options)
    model = trained_adapter(2, 4, model=tiny("Llama", **LLAMA), target_modules=["q_proj"], **options)
    adapter = Adapter.from_peft(source)
    assert adapter.extras == {}  # VeLoRA's projection comes from one client's activations: it stays there
    assert adapter.load_into(model)
    ids = torch.tensor([[5, 1, 2, 7], [1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)


def test_only_the_layers_whose_rank_changes_get_new_parameters(tmp_path: Path) -> None:
    options = {"target_modules": ["fc", "classifier", "embed"]}
    source = trained_adapter(1, 4, rank_pattern={"embed": 7}, **options)
    model = trained_adapter(2, 4, rank_pattern={"classifier": 2}, **options)
    before = dict(model.named_parameters())
    assert Adapter.from_peft(source).load_into(model)
    kept = {n.split(".")[2] for n, p in model.named_parameters() if "lora_" in n and before[n] is p}
    assert kept == {"fc"}
    assert torch.equal(outputs(model), outputs(source))
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) == (4, {"^embed": 7})
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(reload(tmp_path)), outputs(source))


def test_frozen_second_adapter_stays_frozen_and_whole() -> None:
    model = trained_adapter(1, 4)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["fc"]))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    values = {n: p.clone() for n, p in model.named_parameters() if ".default" in n}
    other = Adapter.from_state_dict(get_peft_model_state_dict(trained_adapter(3, 5)), {"r": 5, "lora_alpha": 4})
    assert other.load_into(model, "other")
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters() if n in values)
    assert model.peft_config["default"].r == 4 and model.peft_config["other"].r == 5


def test_training_goes_on_after_another_rank() -> None:
    model = trained_adapter(2, 4, kind="mixed")
    assert Adapter.from_peft(trained_adapter(1, 6, kind="mixed")).load_into(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = outputs(model)
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
    optimizer.step()
    assert not torch.equal(outputs(model), before)


# -- extras ---

EXTRAS = {
    "modules_to_save": ["classifier"],
    "trainable_token_indices": {"embed": [2, 9]},
    "bias": "lora_only",
    "lora_bias": True,
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT takes lora_B.bias for a shard
@pytest.mark.parametrize("rank", [3, 5])
def test_extras_and_biases_come_along(rank: int, tmp_path: Path) -> None:
    source, model = trained_adapter(1, rank, **EXTRAS), trained_adapter(2, 3, **EXTRAS)
    assert Adapter.from_peft(source).load_into(model) == (rank != 3)
    assert torch.equal(outputs(model), outputs(source))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(reload(tmp_path)), outputs(source))


def test_resized_embeddings_come_along() -> None:
    source, model = trained_adapter(1, 4, kind="embedding"), trained_adapter(2, 4, kind="embedding")
    state = dict(get_peft_model_state_dict(source))
    state["base_model.model.embed.base_layer.weight"] = torch.randn(23, 12)
    Adapter.from_state_dict(state, source.peft_config["default"]).load_into(model)
    assert torch.equal(model.get_submodule("base_model.model.embed.base_layer").weight, list(state.values())[-1])


# -- what is refused, before anything is written ---


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


# -- transformers ---


def tiny(name: str, **options: Any) -> Any:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 32, **options}
    config = getattr(transformers, f"{name}Config")(**sizes)
    kind = "ForCausalLM" if hasattr(transformers, f"{name}ForCausalLM") else "LMHeadModel"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name + kind)(config).eval()


LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "GPT2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, {"target_modules": ["c_attn", "wte"]}),
    "Llama": (LLAMA, {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*v_proj": 7}}),
    "Mixtral": (
        {**LLAMA, "num_local_experts": 3},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name: str, tmp_path: Path) -> None:
    sizes, options = MODELS[name]
    ids = torch.arange(12).reshape(2, 6)
    source = trained_adapter(1, 5, model=tiny(name, **sizes), **options)
    model = trained_adapter(2, 4, model=tiny(name, **sizes), **options)
    adapter = Adapter.from_peft(source)
    parsed = Adapter.from_state_dict(
        get_peft_model_state_dict(source, save_embedding_layers=False), source.peft_config["default"]
    )
    for layer in adapter.layers:
        assert parsed.spec(layer).pattern_name == adapter.spec(layer).pattern_name
        assert (parsed.rank(layer), parsed.scale(layer)) == (adapter.rank(layer), adapter.scale(layer))
    with torch.no_grad():
        expected = source(ids).logits
        assert adapter.load_into(model)
        assert torch.equal(model(ids).logits, expected)
        adapter.save(tmp_path / "a")
        model.save_pretrained(tmp_path / "b", save_embedding_layers=False)
        for folder in ("a", "b"):
            assert torch.equal(reload(tmp_path / folder, tiny(name, **sizes))(ids).logits, expected)


def test_adapters_injected_by_transformers() -> None:
    """``model.add_adapter`` puts LoRA layers into the model without a PeftModel around it."""
    ids = torch.arange(12).reshape(2, 6)
    models = [tiny("Llama", **LLAMA) for _ in range(2)]
    for seed, (model, rank) in enumerate(zip(models, (5, 3), strict=True)):
        model.add_adapter(LoraConfig(r=rank, lora_alpha=7, target_modules=["q_proj"]))
        randomize(model, seed)
        model.eval()
    adapter = Adapter.from_peft(models[0])
    assert adapter.layers[0] == "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        assert adapter.load_into(models[1])
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


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


def test_config_stays_json() -> None:
    model = trained_adapter(2, 4)
    Adapter.from_peft(trained_adapter(1, 5, lora_alpha=3)).load_into(model)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (5, 3) and isinstance(config.lora_alpha, int)
    json.dumps(Adapter.from_peft(model).config)
