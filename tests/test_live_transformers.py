"""Live models of transformers, and the LoRA variants that are plain LoRA to us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.config import VeloraConfig

from flexlora_fast.adapter import Adapter
from tests.models import LLAMA, randomize, reload, tiny, trained_adapter

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
