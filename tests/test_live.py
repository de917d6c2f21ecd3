"""Live PEFT models: snapshots, and loading in place at the same and at another rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError
from tests.models import KINDS, base_model, outputs, randomize, reload, tokens, trained_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def assert_holds(model: nn.Module, source: Adapter) -> None:
    now = Adapter.from_peft(model).state_dict()
    assert all(torch.equal(now[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
def test_what_is_loaded_without_autograd_can_be_trained_and_loaded_again(mode: Callable[[], Any]) -> None:
    """Servers evaluate in inference mode; tensors made there take neither gradients nor writes outside it."""
    options = {"kind": "mixed", "modules_to_save": ["classifier"]}
    model = trained_adapter(2, 4, **options)
    sources = [Adapter.from_peft(trained_adapter(seed, rank, **options)) for seed, rank in ((1, 6), (3, 6), (5, 2))]
    with mode():
        assert sources[0].load_into(model) and not torch.is_grad_enabled()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert not any(p.is_inference() for p in model.parameters())
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None for p in parameters)
    for source in sources[1:]:
        source.load_into(model)
        assert_holds(model, source)


@pytest.mark.parametrize("rank", [4, 6])
def test_a_model_made_in_inference_mode_is_written_inside_and_outside_of_it(rank: int) -> None:
    options = {"kind": "mixed", "modules_to_save": ["classifier"]}
    with torch.inference_mode():
        model = trained_adapter(2, 4, **options)
    for seed, inside in ((1, True), (3, False)):
        source = Adapter.from_peft(trained_adapter(seed, rank, **options))
        with torch.inference_mode(inside):
            source.load_into(model)
        assert_holds(model, source)


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


def test_config_stays_json() -> None:
    model = trained_adapter(2, 4)
    Adapter.from_peft(trained_adapter(1, 5, lora_alpha=3)).load_into(model)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (5, 3) and isinstance(config.lora_alpha, int)
    json.dumps(Adapter.from_peft(model).config)
