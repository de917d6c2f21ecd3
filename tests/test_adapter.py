"""Adapters from folders and state dicts: what PEFT wrote is what comes out, and bad input is named."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import AdapterError, UnsupportedAdapterError
from tests.models import KINDS, base_model, randomize, reload, tokens, trained_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
A, B = "base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"


def simple(**tensors: Tensor) -> dict[str, Tensor]:
    return {A: torch.randn(2, 3), B: torch.randn(5, 2), **tensors}


def peft_state(model: PeftModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_that_of_peft(kind: str) -> None:
    model = trained_adapter(1, 4, kind=kind, use_rslora=True).double()
    adapter = Adapter.from_state_dict(peft_state(model), model.peft_config["default"])
    modules = dict(model.named_modules())
    assert adapter.layers
    for layer in adapter.layers:
        expected = modules[f"base_model.model.{layer}"].get_delta_weight("default").detach()
        delta = adapter.delta(layer, "weight")
        assert delta.shape == expected.shape and delta.dtype == torch.float64
        torch.testing.assert_close(delta, expected, rtol=1e-13, atol=1e-13)
        matrix, spec = adapter.delta(layer), adapter.spec(layer)
        assert matrix.shape == ((spec.experts,) * (spec.kind == "moe") + (spec.m, spec.n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_save_gives_peft_the_same_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained_adapter(2, 4, kind=kind, dtype=dtype, rank_pattern={"fc": 3}, alpha_pattern={"conv2": 5})
    adapter = Adapter.from_state_dict(peft_state(model), model.peft_config["default"], client="c")
    adapter.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(reload(tmp_path / "out", dtype=dtype)(tokens()), model(tokens()))
    again = Adapter.load(tmp_path / "out")
    assert [again.spec(x) for x in again.layers] == [adapter.spec(x) for x in adapter.layers]
    assert again.config == adapter.config
    assert all(again.state_dict()[k].dtype == v.dtype == dtype for k, v in adapter.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "moe_nested", "mixed"])
def test_load_reads_what_peft_saved(kind: str, tmp_path: Path) -> None:
    model = trained_adapter(3, 5, kind=kind)
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path, client="c7")
    state = peft_state(model)
    assert adapter.client == "c7" and adapter.state_dict().keys() == state.keys()
    assert all(torch.equal(adapter.state_dict()[k], v) for k, v in state.items())


def test_rank_and_alpha_patterns() -> None:
    options = {"target_modules": ["fc", "classifier"], "rank_pattern": {"classifier": 2}}
    model = trained_adapter(1, 4, **options, alpha_pattern={"fc": 1}, use_rslora=True)
    adapter = Adapter.from_state_dict(peft_state(model), model.peft_config["default"])
    modules = dict(model.named_modules())
    for layer in adapter.layers:
        live = modules[f"base_model.model.{layer}"]
        assert adapter.rank(layer) == live.r["default"]
        assert adapter.scale(layer) == live.scaling["default"]


@pytest.mark.filterwarnings("ignore:Adapter .default.*invalid shape")  # PEFT takes lora_B.bias for a shard
def test_extras_and_lora_bias(tmp_path: Path) -> None:
    options = {"modules_to_save": ["classifier"], "trainable_token_indices": {"embed": [1, 7]}}
    model = trained_adapter(4, 3, lora_bias=True, bias="lora_only", **options)
    adapter = Adapter.from_state_dict(peft_state(model), model.peft_config["default"])
    assert adapter.layers == ["fc"]
    assert [k.removeprefix("base_model.model.") for k in adapter.extras] == [
        "classifier.bias",
        "classifier.weight",
        "embed.token_adapter.trainable_tokens_delta",
        "fc.base_layer.bias",
    ]
    bias = adapter.lora_bias("fc")
    assert bias is not None and bias.shape == (20,)
    adapter.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(reload(tmp_path)(tokens()), model(tokens()))


def test_full_embeddings_are_extras() -> None:
    state = {f"base_model.model.embed.lora_embedding_{x}": torch.ones(2, 2) for x in "AB"}
    state["base_model.model.embed.base_layer.weight"] = torch.ones(2, 2)
    assert list(Adapter.from_state_dict(state, {"r": 2}).extras) == ["base_model.model.embed.base_layer.weight"]


def test_factors_are_views_and_inputs_stay() -> None:
    state = simple()
    state[A].requires_grad_()
    before = {k: v.detach().clone() for k, v in state.items()}
    config = {"r": 2, "lora_alpha": 3, "target_modules": {"fc"}}
    adapter = Adapter.from_state_dict(state, config)
    a, b = adapter.factors("fc")
    assert a.data_ptr() == state[A].data_ptr() and b.data_ptr() == state[B].data_ptr()
    assert not a.requires_grad and state[A].requires_grad
    assert (a.shape, b.shape) == ((1, 2, 3), (1, 5, 2))
    adapter.delta("fc"), adapter.config["rank_pattern"].update(fc=9)
    assert adapter.config["rank_pattern"] == {} and config["target_modules"] == {"fc"}
    assert all(torch.equal(v, state[k].detach()) for k, v in before.items())


def test_keys_without_peft_prefix_mean_the_same() -> None:
    state = simple()
    short = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    assert Adapter.from_state_dict(short, {"r": 2}).state_dict().keys() == state.keys()
    with pytest.raises(AdapterError, match="with and without"):
        Adapter.from_state_dict(short | state, {"r": 2})


def test_non_contiguous_and_rank_one() -> None:
    state = {A: torch.randn(3, 1).t(), B: torch.randn(1, 5).t()}
    adapter = Adapter.from_state_dict(state, {"r": 1, "lora_alpha": 3})
    torch.testing.assert_close(adapter.delta("fc"), 3 * state[B] @ state[A])


def test_delta_does_not_follow_autocast() -> None:
    adapter = Adapter.from_state_dict(simple(), {"r": 2, "lora_alpha": 3})
    expected = adapter.delta("fc")
    with torch.autocast("cpu", torch.bfloat16):
        delta = adapter.delta("fc")
    assert delta.dtype == torch.float32 and torch.equal(delta, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_of_low_precision_is_float32_of_the_exact_values(dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in simple().items()}
    delta = Adapter.from_state_dict(state, {"r": 2, "lora_alpha": 3}).delta("fc")
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, (1.5 * state[B].double() @ state[A].double()).float())


def test_from_factors_rewrites_ranks_and_scales() -> None:
    old = Adapter.from_state_dict(simple(), {"r": 2, "lora_alpha": 8, "target_modules": ["fc"]})
    factors = {"fc": (torch.randn(1, 3, 3), torch.randn(1, 5, 3))}
    extras = {"base_model.model.head.weight": torch.ones(2)}
    new = Adapter.from_factors(
        factors,
        {"fc": old.spec("fc")},
        {"fc": 0.5},
        old.config,
        lora_bias={"fc": torch.ones(5)},
        extras=extras,
        client="s",
    )
    assert (new.rank("fc"), new.scale("fc"), new.config["r"]) == (3, 0.5, 3)
    assert torch.equal(new.delta("fc"), 0.5 * (factors["fc"][1] @ factors["fc"][0])[0])
    assert torch.equal(new.lora_bias("fc"), torch.ones(5)) and new.extras.keys() == extras.keys()


def test_save_over_its_own_folder_keeps_the_mapped_tensors(tmp_path: Path) -> None:
    Adapter.from_state_dict(simple(), {"r": 2}).save(tmp_path)
    adapter = Adapter.load(tmp_path)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    adapter.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    for where in (adapter, Adapter.load(tmp_path)):
        assert all(torch.equal(before[k], v) for k, v in where.state_dict().items())


def test_save_parts_tensors_that_share_memory(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    tied = {"x.weight": shared, "y.weight": shared, "z.weight": shared[:2]}
    adapter = Adapter.from_state_dict(simple(**tied), {"r": 2})
    adapter.save(tmp_path)
    assert torch.equal(Adapter.load(tmp_path).extras["base_model.model.z.weight"], shared[:2])


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter.from_state_dict(simple(), {"r": 2})
    adapter.save(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("flexlora_fast.folder.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        Adapter.from_state_dict(simple(), {"r": 2}).save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert len(os.listdir(tmp_path)) == 2


# -- bad input ---


def broken_folders() -> list[Any]:
    def no_weights(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()

    def pickle_only(folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    def truncated(folder: Path) -> None:
        data = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(data[:-8])

    def no_config(folder: Path) -> None:
        (folder / "adapter_config.json").unlink()

    def config_text(text: str) -> Any:
        return lambda folder: (folder / "adapter_config.json").write_text(text)

    return [
        pytest.param(no_weights, "no adapter_model.safetensors", id="no weights"),
        pytest.param(pickle_only, "pickle.*safe_serialization=True", id="bin"),
        pytest.param(truncated, "not a readable safetensors", id="truncated"),
        pytest.param(no_config, "adapter_config.json' cannot be read", id="no config"),
        pytest.param(config_text("{"), "cannot be read as JSON", id="half JSON"),
        pytest.param(config_text("[]"), "holds a list", id="JSON list"),
        pytest.param(config_text("[" * 10**5), "cannot be read as JSON", id="deep JSON"),
        pytest.param(config_text('{"peft_type": "LOHA"}'), "LOHA", id="LoHa"),
        pytest.param(config_text('{"r": NaN}'), "r is nan", id="NaN rank"),
        pytest.param(config_text('{"r": 4}'), "rank 2.*config says 4", id="other rank"),
    ]


@pytest.mark.parametrize(("spoil", "message"), broken_folders())
def test_broken_folders_are_named(spoil: Any, message: str, tmp_path: Path) -> None:
    Adapter.from_state_dict(simple(), {"r": 2}).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(AdapterError, match=message) as caught:
        Adapter.load(tmp_path, client="c9")
    assert caught.value.client == "c9"


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        Adapter.load(tmp_path / "nowhere")
    Adapter.from_state_dict(simple(), {"r": 2}).save(tmp_path)
    with pytest.raises(AdapterError, match=r"is a file.*pass the folder"):
        Adapter.load(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_validate_finite_names_layer_and_tensor(value: float, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in simple().items()}
    Adapter.from_state_dict(state, {"r": 2}).validate_finite()
    state[B][3, 1] = value
    adapter = Adapter.from_state_dict(state, {"r": 2}, client="c2")
    with pytest.raises(AdapterError, match=r"lora_B.weight' holds 1 NaN or infinite values of 10") as caught:
        adapter.validate_finite()
    assert (caught.value.client, caught.value.layer) == ("c2", "fc")


def test_validate_finite_of_extras_and_huge_values() -> None:
    huge = torch.full((2, 3), torch.finfo(torch.float32).max)
    adapter = Adapter.from_state_dict(simple() | {A: huge, "steps": torch.tensor(3)}, {"r": 2})
    adapter.validate_finite()
    with pytest.raises(AdapterError, match="head"):
        Adapter.from_state_dict(simple(head=torch.tensor([math.nan])), {"r": 2}).validate_finite()


def test_things_that_are_no_tensor_and_no_layer() -> None:
    with pytest.raises(AdapterError, match="is a str, not a tensor"):
        Adapter.from_state_dict(simple(note="hello"), {"r": 2})  # type: ignore[arg-type]
    adapter = Adapter.from_state_dict(simple(), {"r": 2})
    for call in (adapter.rank, adapter.scale, adapter.spec, adapter.factors, adapter.delta, adapter.lora_bias):
        with pytest.raises(AdapterError, match=r"'fx'.*no such layer.*\['fc'\]"):
            call("fx")
    with pytest.raises(AdapterError, match="layout is 'dense'"):
        adapter.delta("fc", "dense")


# -- initialisations that change the base weight ---


def mutated(init: str, seed: int, tmp_path: Path, rank: int = 4, **options: Any) -> PeftModel:
    """A model whose base weight the initialisation changed, saved as it was before training, then trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=init, **options)
        model = get_peft_model(base_model(), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "initial")
    factors = dict(peft_state(model))
    before = {k: v.clone() for k, v in factors.items()}
    randomize(model, seed)
    for key, value in peft_state(model).items():  # training moves the factors, it does not replace them
        value.mul_(0.1).add_(before[key])
    model.save_pretrained(tmp_path / "trained")
    return model.eval()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_initial_factors_undo_what_the_base_lost(init: str, rslora: bool, tmp_path: Path) -> None:
    targets = ["fc", "classifier"] if init == "olora" else ["fc", "proj"]
    model = mutated(init, 5, tmp_path, target_modules=targets, use_rslora=rslora)
    with pytest.raises(UnsupportedAdapterError, match=r"initial="):
        Adapter.load(tmp_path / "trained")
    adapter = Adapter.load(tmp_path / "trained", client="c", initial=tmp_path / "initial")
    modules, original = dict(model.named_modules()), base_model().state_dict()
    for layer in adapter.layers:
        live = modules[f"base_model.model.{layer}"]
        weight = live.base_layer.weight.double() + live.get_delta_weight("default").double()
        torch.testing.assert_close(
            original[f"{layer}.weight"].double() + adapter.delta(layer, "matrix" if layer != "proj" else "weight"),
            weight,
            rtol=1e-5,
            atol=1e-6,
        )
        assert adapter.rank(layer) == 8 and adapter.scale(layer) == live.scaling["default"]
    adapter.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["init_lora_weights"] is True
    with torch.no_grad():
        torch.testing.assert_close(reload(tmp_path / "plain")(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)


def test_initial_factors_are_exact_in_bfloat16(tmp_path: Path) -> None:
    model = mutated("pissa", 6, tmp_path, target_modules=["fc"])
    trained = {k: v.bfloat16() for k, v in load_file(tmp_path / "trained/adapter_model.safetensors").items()}
    initial = load_file(tmp_path / "initial/adapter_model.safetensors")
    config = model.peft_config["default"]
    plain = Adapter.from_state_dict(initial, {"r": 4, "lora_alpha": 8})
    adapter = Adapter.from_state_dict(trained, config, initial=plain)
    expected = 2.0 * (trained[B].double() @ trained[A].double() - initial[B].double() @ initial[A].double())
    torch.testing.assert_close(adapter.delta("fc").double(), expected, rtol=1e-5, atol=1e-6)


def test_initial_factors_give_the_tensors_peft_gives(tmp_path: Path) -> None:
    model = mutated("pissa", 7, tmp_path, target_modules=["fc", "proj"])
    ours = Adapter.load(tmp_path / "trained", initial=tmp_path / "initial").state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    theirs = Adapter.load(tmp_path / "peft")
    assert theirs.rank("fc") == 8
    assert all(torch.equal(ours[k], v) for k, v in theirs.state_dict().items())


def test_initial_factors_that_do_not_match(tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 4, "init_lora_weights": "pissa"}
    other = Adapter.from_state_dict(simple(), {"r": 2, "lora_alpha": 8})
    with pytest.raises(AdapterError, match=r"layer 'fc'.*scale 2.*at scale 4"):
        Adapter.from_state_dict(simple(), config, "c", initial=other)
    elsewhere = Adapter.from_state_dict({k.replace("fc", "fd"): v for k, v in simple().items()}, {"r": 2})
    with pytest.raises(AdapterError, match=r"\['fc', 'fd'\]"):
        Adapter.from_state_dict(simple(), config, initial=elsewhere)
    with pytest.raises(AdapterError, match="nothing is to be subtracted"):
        Adapter.from_state_dict(simple(), {"r": 2}, initial=other)
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        Adapter.from_state_dict(simple(), config | {"use_dora": True}, initial=other)


def test_variants_are_refused_on_load_even_where_the_config_lies(tmp_path: Path) -> None:
    model = trained_adapter(1, 4, use_dora=True)
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        Adapter.from_state_dict(peft_state(model), model.peft_config["default"])
    with pytest.raises(UnsupportedAdapterError, match=r"lora_magnitude_vector.*DoRA"):
        Adapter.from_state_dict(peft_state(model), {"r": 4})
    grouped = trained_adapter(1, 4, kind="conv1", model=base_model(groups=2))
    with pytest.raises(UnsupportedAdapterError, match=r"grouped convolution.*2 groups"):
        Adapter.from_state_dict(peft_state(grouped), grouped.peft_config["default"])


def test_metadata_and_format_are_peft_readable(tmp_path: Path) -> None:
    Adapter.from_state_dict(simple(), {"r": 2}).save(tmp_path)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "copy.safetensors")
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.r == 2 and config.peft_type.value == "LORA"
