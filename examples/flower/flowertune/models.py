"""The model and the data of all nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def read_config(run_config: dict[str, Any]) -> SimpleNamespace:
    """The run config with names for Python."""
    return SimpleNamespace(**{key.replace("-", "_"): value for key, value in run_config.items()})


def get_model(cfg: SimpleNamespace) -> PeftModel:
    """The pretrained model with a LoRA adapter."""
    torch.manual_seed(0)
    config = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(cfg.model_name), config)


def load_data(partition: int, cfg: SimpleNamespace) -> list[dict[str, torch.Tensor]]:
    """One node's texts, as token numbers: here, counting in steps of its own from anywhere."""
    starts = torch.randint(0, cfg.vocabulary, (cfg.examples, 1), generator=torch.Generator().manual_seed(partition))
    rows = (starts + (1 + partition) * torch.arange(16)) % cfg.vocabulary
    return [{"input_ids": row, "labels": row} for row in rows]
