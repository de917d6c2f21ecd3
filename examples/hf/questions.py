"""The two tasks, both on the TREC questions: their class from a small encoder, and the same in words from SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import flexlora_fast as ff
from examples import demo_data, demo_train
from examples.demo_data import Question
from examples.hf.federation import Federation
from flexlora_fast.simulate.processes import base_dtype

WORDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}
SCALE = 2  # alpha/r of every client, at every rank
# Rank 4, rank 8 but for one layer of 16, rank 16.
RANKS: dict[str, dict[str, Any]] = {
    "small": {"r": 4, "lora_alpha": SCALE * 4},
    "mixed": {"r": 8, "lora_alpha": SCALE * 8, "rank_pattern": {}, "alpha_pattern": {}},
    "large": {"r": 16, "lora_alpha": SCALE * 16},
}
COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "dataloader_pin_memory": False,
    "bf16": False,
}


def config(client: str, wide: str, **options: Any) -> LoraConfig:
    """A client's LoRA config; the ``mixed`` one has rank 16 where a layer's name ends in ``wide``."""
    ranks = dict(RANKS[client])
    if client == "mixed":
        ranks |= {"rank_pattern": {wide: 16}, "alpha_pattern": {wide: SCALE * 16}}
    return LoraConfig(**ranks, **options)


def policy(models: Sequence[Any], weight: float) -> ff.RoundPolicy:
    """What the server admits: these layers, three ranks, one scale, and bounds of weights and lengths."""
    return ff.RoundPolicy.from_model(
        models[0], ranks=(4, 8, 16), scale="constant", max_weight=weight, max_norm=100.0, max_extra_norm=1000.0
    )


def split(questions: Sequence[Question], test: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Shares of the clients, skewed by class, and the held-out questions."""
    train, held_out = demo_data.hold_out(len(questions), test, seed=0)
    parts = demo_data.dirichlet_split([questions[i].label for i in train], len(RANKS), 0.5, seed=0)
    return [train[part] for part in parts], held_out


def classifiers(model: Path, questions: Sequence[Question], out: Path, steps: int, test: int = 300) -> Federation:
    """``transformers.Trainer`` on a sentence encoder with a new head."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer([question.text for question in questions], truncation=True, max_length=64)["input_ids"]

    def rows(part: np.ndarray) -> list[dict[str, Any]]:
        return [{"input_ids": inputs[i], "labels": questions[i].label} for i in part]

    shares, held_out = split(questions, test)
    trainers = {}
    for client, share in zip(RANKS, shares, strict=True):
        options = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
        lora = config(client, "layer.0.attention.self.query", **options)
        trainers[client] = Trainer(
            get_peft_model(demo_train.pretrained(model, seed=0), lora),
            TrainingArguments(
                str(out / client),
                max_steps=steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=50,
                learning_rate=2e-3,
                **COMMON,
            ),
            train_dataset=rows(share),
            eval_dataset=rows(held_out),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
    return Federation(trainers, policy([t.model for t in trainers.values()], 16.0 * steps), out)


def chats(model: Path, questions: Sequence[Question], out: Path, steps: int, test: int = 24) -> Federation:
    """trl's ``SFTTrainer`` on a small language model, which answers with the class of a question.

    The model is in bfloat16 where the machine multiplies it in hardware; elsewhere that takes six times as long as
    float32.
    """
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def dialogues(part: np.ndarray) -> Dataset:
        chosen = [questions[i] for i in part]
        prompts = [f"Question: {question.text}\nThe answer is a" for question in chosen]
        answers = [f" {WORDS[demo_data.LABELS[question.label]]}" for question in chosen]
        return Dataset.from_dict({"prompt": prompts, "completion": answers})

    shares, held_out = split(questions, test)
    trainers = {}
    for client, share in zip(RANKS, shares, strict=True):
        lora = config(client, "layers.0.self_attn.q_proj", target_modules=["q_proj", "v_proj"])
        base = AutoModelForCausalLM.from_pretrained(model, dtype=base_dtype())
        trainers[client] = SFTTrainer(
            get_peft_model(base, lora),
            args=SFTConfig(
                str(out / client),
                max_steps=steps,
                per_device_train_batch_size=8,
                per_device_eval_batch_size=24,
                learning_rate=1e-3,
                max_length=64,
                gradient_checkpointing=True,
                **COMMON,
            ),
            train_dataset=dialogues(share[: 8 * steps]),
            eval_dataset=dialogues(held_out),
            processing_class=tokenizer,
        )
    return Federation(trainers, policy([t.model for t in trainers.values()], 8.0 * steps), out)
