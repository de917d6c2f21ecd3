"""LoRA on a base model, as an experiment's ``[lora]`` table says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from flexlora_fast.simulate.learners.base import LoraSpec


def device() -> torch.device:
    """Where a learner's model lives: the GPU, where one is there. ``Trainer`` chooses the same."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def adapted(base: Any, lora: LoraSpec, rank: int, modules_to_save: Sequence[str] = ()) -> Any:
    """The ``PeftModel`` with a fresh adapter "default" of that rank, on the device.

    PEFT keeps LoRA's factors in float32 whatever the base is: in bfloat16 small steps would be rounded away.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=lora.scale * rank,
        target_modules=lora.target_modules,
        lora_dropout=lora.dropout,
        modules_to_save=list(modules_to_save) or None,
    )
    return get_peft_model(base, config).to(device())
