"""Clients with ranks of their own train adapters of one model in turn, and a merge of these is the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from flexlora_fast.peft import add_weighted_adapter


def federate(
    base: Any,
    configs: Mapping[str, LoraConfig],
    data: Mapping[str, Sequence[Any]],
    arguments: TrainingArguments,
    rounds: int,
) -> tuple[PeftModel, list[float]]:
    """The model with an adapter "NAME-ROUND" for each client, and the mean training loss of each round."""
    first, *others = configs
    model = get_peft_model(base, configs[first], f"{first}-0")
    for name in others:
        model.add_adapter(f"{name}-0", configs[name])
    total = sum(len(rows) for rows in data.values())
    weights = [len(data[name]) / total for name in configs]
    losses = []
    for number in range(rounds):
        trained = [f"{name}-{number}" for name in configs]
        loss = 0.0
        for name, adapter in zip(configs, trained, strict=True):
            model.set_adapter(adapter)
            loss += Trainer(model, arguments, train_dataset=data[name]).train().training_loss / len(data)
        losses.append(loss)
        for name, config in configs.items():
            add_weighted_adapter(model, trained, weights, f"{name}-{number + 1}", svd_rank=config.r)
        for adapter in trained:
            model.delete_adapter(adapter)
    return model, losses
