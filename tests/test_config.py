"""The config rules are PEFT's own, and other variants are refused by name."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, TaskType
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from flexlora_fast import config as configs
from flexlora_fast.errors import AdapterError, RankError, UnsupportedAdapterError

PART = st.sampled_from(["model", "layers", "0", "1", "12", "q_proj", "v", "q", "experts", "xq_proj"])
PATH = st.lists(PART, min_size=1, max_size=5).map(".".join)
PATTERN = st.one_of(
    PATH,
    PATH.map(lambda p: "^" + p.replace(".", r"\.")),
    st.sampled_from([r"layers\.\d+\.q", r".*\.q_proj", "q|v", r"(layers\.[01]\.)?v", ".", r"^model$"]),
)


@given(st.dictionaries(PATTERN, st.integers(1, 64), max_size=6), PATH)
def test_patterns_resolve_as_in_peft(patterns: dict[str, int], layer: str) -> None:
    config = configs.normalize({"r": 7, "lora_alpha": 3, "rank_pattern": patterns, "alpha_pattern": patterns})
    key = get_pattern_key(patterns.keys(), layer)
    assert configs.rank_for(config, layer) == patterns.get(key, 7)
    assert configs.alpha_for(config, layer) == patterns.get(key, 3)


@given(
    st.dictionaries(PATH, st.tuples(st.integers(1, 64), st.floats(-8, 8)), min_size=1, max_size=8),
    st.booleans(),
    st.dictionaries(PATTERN, st.integers(1, 64), max_size=3),
)
def test_with_ranks_gives_exactly_these_ranks_and_scales(
    wanted: dict[str, tuple[int, float]], rslora: bool, patterns: dict[str, int]
) -> None:
    old = {"r": 5, "lora_alpha": 9, "use_rslora": rslora, "rank_pattern": patterns, "alpha_pattern": patterns}
    before = json.dumps(old)
    ranks = {layer: rank for layer, (rank, _) in wanted.items()}
    scales = {layer: scale for layer, (_, scale) in wanted.items()}
    config = configs.with_ranks(old, ranks, scales)
    assert json.dumps(old) == before
    for layer, (rank, scale) in wanted.items():
        key = get_pattern_key(config["rank_pattern"].keys(), layer)
        assert config["rank_pattern"].get(key, config["r"]) == rank == configs.rank_for(config, layer)
        # one unit in the last place is what a float64 alpha can miss a scale by
        assert configs.scale_for(config, layer) == pytest.approx(scale, rel=2.3e-16, abs=0)
    json.dumps(config)


@given(st.integers(1, 512), st.integers(1, 512), st.booleans())
def test_with_ranks_keeps_a_scale_that_comes_from_an_alpha(alpha: int, rank: int, rslora: bool) -> None:
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    config = configs.with_ranks({"r": 3, "use_rslora": rslora}, {"a": rank}, {"a": scale})
    assert configs.scale_for(config, "a") == scale
    assert (config["r"], config["rank_pattern"]) == (rank, {})


def test_with_ranks_leaves_a_config_that_already_fits() -> None:
    old = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"v": 4}}
    config = configs.with_ranks(old, {"l.q": 2, "l.v": 4}, {"l.q": 4.0, "l.v": 1.0})
    assert config == configs.normalize(old)


def test_with_ranks_keeps_patterns_few() -> None:
    ranks = {f"layers.{i}.q": 8 for i in range(9)} | {"head": 16}
    config = configs.with_ranks({"r": 4, "lora_alpha": 4}, ranks, dict.fromkeys(ranks, 2.0))
    assert (config["r"], config["rank_pattern"]) == (8, {"^head": 16})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (16, {"^head": 32})


def test_with_ranks_reports_layers_that_peft_gives_one_rank() -> None:
    names = {"mha": "mha", "mha.base_layer.out_proj": "mha"}
    with pytest.raises(AdapterError, match=r"mha.base_layer.out_proj.*rank 3.*one rank"):
        configs.with_ranks({"r": 4}, {"mha": 2, "mha.base_layer.out_proj": 3}, dict.fromkeys(names, 1.0), names)


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "4"])
def test_with_ranks_refuses_bad_ranks(rank: Any) -> None:
    with pytest.raises(RankError, match="at least 1"):
        configs.with_ranks({"r": 4}, {"a": rank}, {"a": 1.0})


def test_with_ranks_refuses_a_scale_that_is_not_finite() -> None:
    with pytest.raises(AdapterError, match="finite"):
        configs.with_ranks({"r": 4}, {"a": 4}, {"a": math.nan})


LIST = st.lists(PATH, max_size=3)


@given(
    st.one_of(LIST, st.sampled_from([r".*\.q_proj", r"model\.layers\.\d+\..*", "q"])),
    st.one_of(st.none(), LIST, st.sampled_from([r".*\.v", r"model.*"])),
    st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 12), max_size=2)),
    st.sampled_from([None, "layers", ["experts", "layers"]]),
    st.one_of(st.none(), st.lists(PART, max_size=2)),
    PATH,
)
def test_targets_as_in_peft(target: Any, exclude: Any, transform: Any, pattern: Any, save: Any, layer: str) -> None:
    if isinstance(target, str) or transform is None:
        transform = pattern = None
    options = {
        "target_modules": target,
        "exclude_modules": exclude,
        "layers_to_transform": transform,
        "layers_pattern": pattern,
        "modules_to_save": save,
    }
    lora = LoraConfig(**options)
    found = check_target_module_exists(lora, layer)
    expected = bool(found) and not isinstance(found, _ExcludedModule)
    assert configs.targets(configs.normalize(lora), layer) == expected
    assert configs.targets(configs.normalize(options), layer) == expected


def test_targets_parameters_and_all_linear() -> None:
    config = configs.normalize({"target_parameters": ["experts.down_proj"]})
    assert configs.targets(config, "mlp.experts") and configs.targets(config, "mlp.experts.down_proj")
    assert not configs.targets(config, "mlp.experts.gate_up_proj")
    assert configs.targets(configs.normalize({"target_modules": "all-linear"}), "anything")


def test_normalize_takes_a_lora_config_and_gives_what_peft_writes(tmp_path: Any) -> None:
    lora = LoraConfig(
        r=4,
        target_modules={"v", "q"},
        task_type=TaskType.SEQ_CLS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.5),
        rank_pattern={"q": 2},
    )
    config = configs.normalize(lora)
    assert config["target_modules"] == ["q", "v"] and config["task_type"] == "SEQ_CLS"
    assert config["eva_config"]["rho"] == 1.5
    lora.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    same = {k: v for k, v in configs.normalize(written).items() if k not in ("target_modules", "inference_mode")}
    assert same.items() <= config.items()
    config["rank_pattern"]["q"] = 99
    assert lora.rank_pattern == {"q": 2}


def test_defaults_are_those_of_peft() -> None:
    lora = LoraConfig()
    assert configs.scale_for(configs.normalize({}), "a") == lora.lora_alpha / lora.r
    assert configs.normalize({"rank_pattern": None, "r": None})["r"] == lora.r


BAD = [
    ({"r": 0}, "r is 0"),
    ({"r": -4}, "r is -4"),
    ({"r": True}, "r is True"),
    ({"r": "8"}, "r is '8'"),
    ({"r": 8.0}, "r is 8.0"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"lora_alpha": True}, "lora_alpha is True"),
    ({"lora_alpha": 10**400}, "finite"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
    ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\['q'\] is nan"),
    ({"rank_pattern": {"(": 4}}, r"'\(', which is not a regular expression"),
    ({"alpha_pattern": [4]}, "alpha_pattern is a list"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"task": object()}, "'task' is a object"),
]


@pytest.mark.parametrize(("config", "message"), BAD)
def test_bad_numbers_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        configs.normalize(config, client="c3")
    assert caught.value.client == "c3"


def test_not_a_config() -> None:
    with pytest.raises(AdapterError, match="is a int"):
        configs.normalize(3)


@pytest.mark.parametrize("peft_type", ["ADALORA", "LOHA", "IA3"])
def test_other_peft_types_are_refused(peft_type: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=peft_type):
        configs.normalize({"peft_type": peft_type})


def _lora(**options: Any) -> LoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraConfig(**options)


REFUSED = [
    ("DoRA", _lora(use_dora=True)),
    ("PiSSA", _lora(init_lora_weights="pissa")),
    ("PiSSA", _lora(init_lora_weights="pissa_niter_4")),
    ("OLoRA", _lora(init_lora_weights="olora")),
    ("CorDA", _lora(init_lora_weights="corda", corda_config=CordaConfig())),
    ("LoRA-GA", _lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())),
    ("LoftQ", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
    ("MiCA", _lora(init_lora_weights="mica")),
    ("KaSA", _lora(kasa_config=KasaConfig())),
    ("QALoRA", _lora(use_qalora=True)),
    ("BD-LoRA", _lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["q"], nblocks=2))),
    ("Arrow", _lora(arrow_config=ArrowConfig())),
    ("MonteCLoRA", _lora(monteclora_config=MontecloraConfig())),
    ("layer replication", _lora(layer_replication=[(0, 2), (1, 3)])),
    ("use_future", {"use_future": True}),
    ("future_config", {"future_config": {"a": 1}}),
    ("'random'", {"init_lora_weights": "random"}),
]


@pytest.mark.parametrize(("name", "config"), REFUSED)
def test_variants_are_refused_by_name_with_a_remedy(name: str, config: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match=name) as caught:
        configs.refuse_unsupported(configs.normalize(config), "c1")
    assert caught.value.client == "c1" and len(caught.value.message) > 60


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        {"use_rslora": True},
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        {"velora_config": VeloraConfig()},
        {"bias": "all", "lora_bias": True, "modules_to_save": ["head"]},
    ],
)
def test_plain_lora_is_accepted(config: dict[str, Any]) -> None:
    configs.refuse_unsupported(configs.normalize(_lora(**config)))


def test_every_peft_option_is_known() -> None:
    """A new PEFT may bring a new variant: decide on it rather than letting the catch-all refuse it."""
    known = {name for name in configs.normalize(LoraConfig()) if name.startswith("use_") or name.endswith("_config")}
    assert known == {
        *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "arrow_config", "corda_config", "eva_config"),
        *("kasa_config", "loftq_config", "lora_ga_config", "megatron_config", "monteclora_config"),
        "velora_config",
    }
