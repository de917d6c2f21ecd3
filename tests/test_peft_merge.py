"""The drop-in for PEFT's ``add_weighted_adapter``: against dense float64, against PEFT where PEFT is right, and on the
cases of PEFT's own tests (``tests/testing_common.py`` and ``tests/test_custom_models.py`` of peft 0.21), told anew.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flexlora_fast.errors import AdapterError, OptionError, RankError, UnsupportedAdapterError, WeightError
from flexlora_fast.peft import CombinationType, add_weighted_adapter
from tests.models import HIDDEN, KINDS, LLAMA, WIDE, base_model, outputs, randomize, reload, tiny, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:Adapter .*invalid shape"),  # PEFT takes lora_B.bias for a shard
]
PLAIN = {"target_modules": ["fc"]}


def several(*options: dict[str, Any], dtype: torch.dtype = torch.float32, base: nn.Module | None = None) -> PeftModel:
    """A model with adapters "a0", "a1", … of these configs, all looking trained; "a0" is active."""
    model: Any = base_model(dtype=dtype) if base is None else base
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        for i, config in enumerate(options):
            if i == 0:
                model = get_peft_model(model, LoraConfig(**config), "a0", autocast_adapter_dtype=False)
            else:
                model.add_adapter(f"a{i}", LoraConfig(**config), autocast_adapter_dtype=False)
            model.set_adapter(f"a{i}")
            randomize(model, i, f"a{i}")
    model.set_adapter("a0")
    return model.eval()


def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.scaling}
    assert found
    return found


def delta(module: Any, adapter: str) -> Tensor:
    """PEFT's own update of one layer in float64: (E, m, n) for experts, else one matrix in a batch."""
    whole = copy.deepcopy(module).double().get_delta_weight(adapter).detach()
    return whole if getattr(module, "num_experts", 1) > 1 else whole.flatten(1)[None]


def total(module: Any, weights: dict[str, float]) -> Tensor:
    return sum((w * delta(module, name) for name, w in weights.items() if name in module.scaling), torch.zeros(()))


def truncated(whole: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def assert_is_the_best(model: PeftModel, weights: dict[str, float], rank: int, name: str = "sum", tol: float = 3e-6):
    """In every layer that one of the adapters has, and no other."""
    layers = lora_layers(model, name)
    assert set(layers) == {layer for source in weights for layer in lora_layers(model, source)}
    for module in layers.values():
        assert module.r[name] == rank
        whole = total(module, weights)
        best = truncated(whole, rank)
        assert (delta(module, name) - best).norm() <= tol * whole.norm() + 1e-12


# -- the contract ---


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_the_best_of_its_rank(kind: str, rank: int) -> None:
    model = several(*({"r": r, "lora_alpha": 3, **KINDS[kind]} for r in (2, 5, 1)))
    weights = {"a0": 0.7, "a1": -1.3, "a2": 2.0}
    add_weighted_adapter(model, list(weights), list(weights.values()), "sum", svd_rank=rank)
    assert_is_the_best(model, weights, rank)
    model.set_adapter("sum")
    assert torch.isfinite(outputs(model)).all()


VARIED = (
    {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["fc", "embed"]},
    {"r": 3, "lora_alpha": 1, "rank_pattern": {"fc": 6}, "alpha_pattern": {"fc": 5}, "target_modules": ["fc", "proj"]},
    {"r": 1, "lora_alpha": 16, "target_modules": ["conv2", "embed"]},
)


@pytest.mark.parametrize("svd_rank", [None, 2, 5])
def test_scales_patterns_and_layers_of_its_own_for_each(svd_rank: int | None, tmp_path: Path) -> None:
    model = several(*VARIED)
    model.get_submodule("base_model.model.embed").set_scale("a0", 0.3)
    weights = {"a0": 1.5, "a1": 0.25, "a2": 1.0}
    add_weighted_adapter(model, list(weights), list(weights.values()), "sum", svd_rank=svd_rank)
    assert_is_the_best(model, weights, svd_rank or 6)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(outputs(reload(tmp_path / "sum")), outputs(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_added_up_in_full_and_kept(dtype: torch.dtype) -> None:
    """PEFT rounds each ΔW to the dtype first, and returns float32."""
    options = {"target_modules": ["fc", "embed", "conv2"]}
    model = several({"r": 4, **options}, {"r": 8, **options}, dtype=dtype)
    add_weighted_adapter(model, ["a0", "a1"], [0.5, -0.5], "sum")
    rounding = torch.finfo(dtype).eps
    for module in lora_layers(model, "sum").values():
        whole = total(module, {"a0": 0.5, "a1": -0.5})
        best = truncated(whole, 8)
        assert (delta(module, "sum") - best).norm() <= rounding * best.norm()
    kept = {p.dtype for name, p in model.named_parameters() if ".sum" in name}
    assert kept == {dtype}


def test_mixed_dtypes_are_kept_wide() -> None:
    model = several({"r": 2, **PLAIN}, {"r": 3, **PLAIN})
    model.get_submodule("base_model.model.fc").lora_A["a0"].to(torch.bfloat16)
    model.get_submodule("base_model.model.fc").lora_B["a0"].to(torch.bfloat16)
    add_weighted_adapter(model, ["a0", "a1"], [1, 1], "sum")
    assert {p.dtype for n, p in model.named_parameters() if ".sum" in n} == {torch.float32}
    assert_is_the_best(model, {"a0": 1, "a1": 1}, 3)


def test_biases_of_b_are_added_up() -> None:
    options = {"target_modules": ["fc"], "lora_alpha": 6}
    model = several({"r": 2, "lora_bias": True, **options}, {"r": 3, **options, "target_modules": ["fc", "classifier"]})
    add_weighted_adapter(model, ["a0", "a1"], [-0.5, 2], "sum", svd_rank=5)
    fc, classifier = (model.get_submodule(f"base_model.model.{layer}") for layer in ("fc", "classifier"))
    torch.testing.assert_close(fc.lora_B["sum"].bias.detach(), -0.5 * 3 * fc.lora_B["a0"].bias.detach())
    assert not classifier.lora_B["sum"].bias.any()
    assert_is_the_best(model, {"a0": -0.5, "a1": 2}, 5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
        ({"exclude_modules": ["v_proj"]}, {}),
        ({"target_modules": r".*layers\.0\..*q_proj"}, {}),
        ({"target_modules": r".*layers\.0\..*q_proj"}, {"target_modules": r".*layers\.1\..*q_proj"}),
    ],
)
def test_each_adapter_may_restrict_its_layers(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    """PEFT takes the first one's restrictions for all, or refuses the mixture."""
    options = {"target_modules": ["q_proj", "v_proj"]}
    model = several({"r": 2, **options, **first}, {"r": 3, **options, **second}, base=tiny("Llama", **LLAMA))
    add_weighted_adapter(model, ["a0", "a1"], [1, 2], "sum", svd_rank=5)
    assert_is_the_best(model, {"a0": 1, "a1": 2}, 5)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(reload(tmp_path / "sum", tiny("Llama", **LLAMA))(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kinds", [["linear"], ["embedding"], ["conv2"], ["linear", "conv2_pointwise"]], ids=str)
def test_as_peft_where_peft_is_right(kinds: list[str]) -> None:
    targets = [name for kind in kinds for name in KINDS[kind]["target_modules"]]
    ours = several(*({"r": r, "lora_alpha": 4, "target_modules": targets} for r in (2, 3)))
    theirs = copy.deepcopy(ours)
    add_weighted_adapter(ours, ["a0", "a1"], [0.5, 1.5], "sum", svd_rank=3)
    theirs.add_weighted_adapter(["a0", "a1"], [0.5, 1.5], "sum", svd_rank=3)
    for name, module in lora_layers(ours, "sum").items():
        other = theirs.get_submodule(name)
        torch.testing.assert_close(delta(module, "sum"), delta(other, "sum"), rtol=1e-5, atol=1e-5)
    mine, other = ours.peft_config["sum"].to_dict(), theirs.peft_config["sum"].to_dict()
    assert {key for key in mine if mine[key] != other[key]} <= {"init_lora_weights"}
    ours_now, theirs_now = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (ours, theirs))
    assert ours_now == theirs_now
    assert ours.active_adapters == theirs.active_adapters == ["a0"]


def test_rank_beyond_a_side_of_the_layer_is_padded() -> None:
    """PEFT leaves A and B of different ranks, and the forward fails."""
    model = several({"r": 2, **PLAIN}, {"r": 3, **PLAIN})
    add_weighted_adapter(model, ["a0", "a1"], [1, 1], "sum", svd_rank=WIDE + 5)
    assert_is_the_best(model, {"a0": 1, "a1": 1}, WIDE + 5)
    fc = model.get_submodule("base_model.model.fc")
    assert fc.lora_A["sum"].weight.shape == (WIDE + 5, HIDDEN)
    assert not fc.lora_B["sum"].weight[:, HIDDEN:].any() and fc.lora_A["sum"].weight[HIDDEN:].any()


def test_one_adapter_is_cut_too() -> None:
    """PEFT goes over to "linear" without a word, and keeps the rank."""
    model = several({"r": 6, "use_rslora": True, **PLAIN})
    add_weighted_adapter(model, ["a0"], [-2.0], "sum", svd_rank=3)
    assert_is_the_best(model, {"a0": -2.0}, 3)


def test_weights_of_a_name_that_comes_twice_add_up_and_zero_counts_as_nothing() -> None:
    model = several({"r": 2, **PLAIN}, {"r": 5, "target_modules": ["proj"]})
    add_weighted_adapter(model, ["a0", "a1", "a0"], [0.5, 0, 0.25], "sum")
    assert_is_the_best(model, {"a0": 0.75, "a1": 0}, 5)
    add_weighted_adapter(model, ["a0", "a1"], [0, 0], "nothing")
    assert all(not delta(module, "nothing").any() for module in lora_layers(model, "nothing").values())


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
def test_clamp_cuts_at_a_quantile_of_both_factors(quantile: float) -> None:
    model = several(*({"r": r, "target_modules": ["fc", "conv1"]} for r in (2, 3)))
    add_weighted_adapter(model, ["a0", "a1"], [1, 2], "whole")
    add_weighted_adapter(model, ["a0", "a1"], [1, 2], "cut", svd_clamp=quantile)
    for layer in ("fc", "conv1"):
        module = model.get_submodule(f"base_model.model.{layer}")
        B, A = module.lora_B["whole"].weight, module.lora_A["whole"].weight
        highest = torch.quantile(torch.cat([B.flatten(), A.flatten()]), quantile)
        torch.testing.assert_close(module.lora_A["cut"].weight, A.clamp(-highest, highest))
        torch.testing.assert_close(module.lora_B["cut"].weight, B.clamp(-highest, highest))


def test_the_lora_model_itself_is_as_good_and_nothing_else_changes() -> None:
    model = several({"r": 2, **PLAIN}, {"r": 3, **PLAIN})
    before = {name: p.clone() for name, p in model.state_dict().items()}
    configs = copy.deepcopy({name: config.to_dict() for name, config in model.peft_config.items()})
    state = torch.random.get_rng_state()
    add_weighted_adapter(model.base_model, ["a0", "a1"], [1, 1], "sum")
    assert torch.equal(state, torch.random.get_rng_state())
    assert_is_the_best(model, {"a0": 1, "a1": 1}, 3)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert configs == {name: model.peft_config[name].to_dict() for name in configs}
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)
    model.set_adapter("sum")
    assert all(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)


# -- PEFT's own cases ---

SVD_TYPES = [kind for kind in get_args(CombinationType) if kind.endswith("_svd")]
SAME_RANK = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("signs", [(0.5, 1.5, 1.5), (-0.5, -0.8, -1.2)], ids=["positive", "negative"])
def test_peft_weighted_combinations(signs: tuple[float, ...], rslora: bool) -> None:
    """PEFT's round through all combination types: names, ranks, an exact single one, and a forward of each."""
    options = {"lora_alpha": 8, "use_rslora": rslora, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    base = tiny("Llama", **LLAMA | {"hidden_size": 32, "intermediate_size": 40})
    model = several({"r": 8, **options}, {"r": 8, **options}, {"r": 20, **options}, base=base)
    uneven, even, one = (["a1", "a2"], signs[1:]), (["a0", "a1"], signs[:2]), (["a0"], signs[:1])

    def add(what: tuple[list[str], tuple[float, ...]], name: str, **given: Any) -> None:
        add_weighted_adapter(model, what[0], list(what[1]), name, **given)

    add(one, "single")
    add(uneven, "svd")
    add(uneven, "cat", combination_type="cat")
    for kind in SVD_TYPES:
        add(uneven, kind, combination_type=kind, density=0.5)
    for kind in SAME_RANK:
        add(even, kind, combination_type=kind, density=None if kind == "linear" else 0.5)
        with pytest.raises(ValueError, match="same r value"):
            add(uneven, f"{kind} of two ranks", combination_type=kind, density=0.5)
    add((["a0", "a1"], (signs[0], 0.0)), "single_enabled", combination_type="linear")
    assert not any("of two ranks" in name for name in model.peft_config)

    for name, rank in {"svd": 20, "cat": 28, **dict.fromkeys(SVD_TYPES, 20), **dict.fromkeys(SAME_RANK, 8)}.items():
        assert {module.r[name] for module in lora_layers(model, name).values()} == {rank}
    for name in ("single", "single_enabled"):
        assert_is_the_best(model, {"a0": signs[0]}, 8, name)
    assert_is_the_best(model, dict(zip(*uneven, strict=True)), 20, "svd")
    assert_is_the_best(model, dict(zip(*uneven, strict=True)), 28, "cat")
    for name in list(model.peft_config):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert torch.isfinite(model(torch.arange(12).reshape(2, 6)).logits).all()


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_peft_adapter_minus_itself_is_nothing(kind: CombinationType) -> None:
    model = several({"r": 4, **PLAIN}, {"r": 4, **PLAIN})
    fc = model.get_submodule("base_model.model.fc")
    for factors in (fc.lora_A, fc.lora_B):
        factors["a1"].load_state_dict(factors["a0"].state_dict())
    add_weighted_adapter(model, ["a0", "a1"], [1.0, -1.0], "none", combination_type=kind)
    assert delta(fc, "none").abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["svd", "cat"])
@pytest.mark.parametrize("pattern", [{"fc": 16}, {"fc": 3, "classifier": 4}])
def test_peft_rank_pattern(kind: CombinationType, pattern: dict[str, int], tmp_path: Path) -> None:
    options = {"target_modules": ["fc", "classifier"], "r": 8}
    model = several(options, {**options, "rank_pattern": pattern})
    add_weighted_adapter(model, ["a0", "a1"], [1, 1], "sum", combination_type=kind)
    largest = max(8, *pattern.values())
    assert_is_the_best(model, {"a0": 1, "a1": 1}, 8 + largest if kind == "cat" else largest)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(outputs(reload(tmp_path / "sum")), outputs(model))


def test_linear_with_a_rank_pattern_can_be_loaded_again(tmp_path: Path) -> None:
    """PEFT's own result cannot (peft#3737): its config says one rank, its factors have another."""
    options = {"target_modules": ["fc", "classifier"], "r": 8, "rank_pattern": {"fc": 3}, "use_rslora": True}
    model = several(options, options)
    add_weighted_adapter(model, ["a0", "a1"], [1, -1], "sum", combination_type="linear")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(outputs(reload(tmp_path / "sum")), outputs(model))


# -- what is refused, with the model left as it was ---


def delta_is_not_sba(model: PeftModel) -> None:
    model.peft_config["a1"].use_dora = True


def not_a_number(model: PeftModel) -> None:
    model.get_submodule("base_model.model.fc").lora_A["a1"].weight.data[0, 0] = torch.nan


def untouched(model: PeftModel) -> None:
    """As it is."""


@pytest.mark.parametrize(
    ("change", "options", "error", "text"),
    [
        (untouched, {"adapters": ["a0", "a2"]}, AdapterError, "no adapter 'a2'.*'a0', 'a1'"),
        (untouched, {"adapters": [], "weights": []}, AdapterError, "at least one"),
        (untouched, {"adapters": "a0", "weights": [1]}, AdapterError, "names of at least one"),
        (untouched, {"weights": [1]}, WeightError, "1 weights for 2 adapters"),
        (untouched, {"weights": [1, float("nan")]}, WeightError, "client 'a1'.*nan"),
        (untouched, {"weights": [1, None]}, WeightError, "client 'a1'.*None"),
        (untouched, {"weights": [1, 1e308], "svd_rank": 2}, AdapterError, "client 'a1'"),
        (untouched, {"adapter_name": "a0"}, AdapterError, "delete_adapter"),
        (untouched, {"combination_type": "cats"}, OptionError, "'cats' is not one of 'svd'"),
        (untouched, {"svd_rank": 0}, RankError, "svd_rank is 0"),
        (untouched, {"svd_rank": 2.5}, RankError, "svd_rank is 2.5"),
        (untouched, {"svd_clamp": 1.5}, OptionError, "quantile"),
        (delta_is_not_sba, {}, UnsupportedAdapterError, "client 'a1'.*DoRA"),
        (delta_is_not_sba, {"combination_type": "linear"}, UnsupportedAdapterError, "client 'a1'.*DoRA"),
        (not_a_number, {}, AdapterError, "client 'a1', layer 'fc'.*NaN"),
        (not_a_number, {"combination_type": "linear"}, AdapterError, "NaN"),
        (untouched, {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, Exception, '"x"'),
    ],
)
def test_refused(
    change: Callable[[PeftModel], None], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = several({"r": 2, **PLAIN}, {"r": 2, **PLAIN})
    change(model)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    given = {"adapters": ["a0", "a1"], "weights": [1, 1], "adapter_name": "sum", **options}
    with pytest.raises(error, match=text):
        add_weighted_adapter(model, **given)
    assert sorted(model.peft_config) == ["a0", "a1"] and model.active_adapters == ["a0"]
    after = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(p is before[name][0] and flag == before[name][1] for name, (p, flag) in after.items())


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"modules_to_save": ["classifier"]}, "svd", "modules_to_save=.*aggregate"),
        ({"trainable_token_indices": {"embed": [1]}}, "cat", "trainable_token_indices"),
        ({"lora_bias": True}, "cat", "lora_bias: PEFT drops"),
        ({"bias": "lora_only"}, "svd", "bias='lora_only'"),
    ],
)
def test_what_is_no_update_is_refused(options: dict[str, Any], kind: CombinationType, text: str) -> None:
    model = several({"r": 2, **PLAIN, **options})
    with pytest.raises(UnsupportedAdapterError, match=text):
        add_weighted_adapter(model, ["a0"], [1], "sum", combination_type=kind)


def test_no_lora_model() -> None:
    with pytest.raises(AdapterError, match="Zoo is no model with LoRA adapters"):
        add_weighted_adapter(base_model(), ["a0"], [1], "sum")


def test_a_value_that_the_dtype_cannot_hold_leaves_the_model_as_it_was() -> None:
    model = several({"r": 2, **PLAIN}, dtype=torch.float16)
    with pytest.raises(AdapterError, match="float16"):
        add_weighted_adapter(model, ["a0"], [1e7], "sum")
    assert list(model.peft_config) == ["a0"] and not any(".sum" in name for name in model.state_dict())
    add_weighted_adapter(model, ["a0"], [2.0], "sum")
    assert_is_the_best(model, {"a0": 2.0}, 2, tol=1e-3)


def test_training_goes_on_from_the_sum() -> None:
    model = several({"r": 2, **PLAIN}, {"r": 3, **PLAIN})
    with torch.inference_mode():
        add_weighted_adapter(model, ["a0", "a1"], [1, 1], "sum")
    model.set_adapter("sum")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = outputs(model)
    model(tokens()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(outputs(model), before)
