"""Model, data, training and testing: what has nothing to do with Flower."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer, DataCollatorWithPadding, PrinterCallback

from examples import demo_data, demo_train

SEED = 0


def ranks(config: Mapping[str, Any]) -> list[int]:
    """The LoRA ranks of the run config, in the order of the partitions."""
    return [int(rank) for rank in str(config["lora-ranks"]).split(",")]


def build(config: Mapping[str, Any], rank: int) -> PeftModel:
    """MiniLM with a LoRA adapter on all linear layers and a classification head."""
    demo_train.settle()
    model = demo_data.unpacked(demo_data.MINILM, Path(config["data"]))
    return demo_train.build(model, rank, int(config["alpha-over-r"]), SEED)


class Questions:
    """The tokenized TREC questions: a held-out test set, and a partition for each node."""

    def __init__(self, data: Path, test: int) -> None:
        folder = demo_data.unpacked(demo_data.QUESTIONS, data)
        questions = demo_data.read_questions(folder / demo_data.QUESTIONS.files[0])
        self.tokenizer = AutoTokenizer.from_pretrained(demo_data.unpacked(demo_data.MINILM, data))
        inputs = self.tokenizer([question.text for question in questions], truncation=True, max_length=64)["input_ids"]
        labels = [question.label for question in questions]
        self.rows = [{"input_ids": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]
        self.train, self.test = demo_data.hold_out(len(questions), test, SEED)

    def partition(self, number: int, of: int, alpha: float) -> list[dict[str, Any]]:
        """The rows of one node: a Dirichlet share of the training questions."""
        labels = [self.rows[i]["labels"] for i in self.train]
        part = demo_data.dirichlet_split(labels, of, alpha, SEED)[number]
        return [self.rows[i] for i in self.train[part]]


@cache
def questions(data: str, test: int) -> Questions:
    """Read once in each process."""
    return Questions(Path(data), test)


def train(model: PeftModel, found: Questions, rows: list[dict[str, Any]], steps: int, seed: int) -> float:
    """Train the adapter and the head with the ordinary Trainer; returns the mean loss."""
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    lora = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    optimizer = torch.optim.AdamW([{"params": lora, "lr": 1e-3}, {"params": head, "lr": 1e-2}], weight_decay=0.01)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                scratch,
                max_steps=steps,
                per_device_train_batch_size=32,
                lr_scheduler_type="constant",
                seed=seed,
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(found.tokenizer),
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.train().training_loss


@torch.inference_mode()
def test(model: PeftModel, found: Questions) -> tuple[float, float]:
    """Mean cross-entropy in nats, and accuracy, on the held-out questions."""
    model.eval()
    order = sorted((found.rows[i] for i in found.test), key=lambda row: len(row["input_ids"]))
    collate, losses, right = DataCollatorWithPadding(found.tokenizer), [], []
    for start in range(0, len(order), 100):
        batch = collate(order[start : start + 100])
        output = model(**batch)
        losses += [float(output.loss)] * len(batch["labels"])
        right += (output.logits.argmax(1) == batch["labels"]).tolist()
    return float(np.mean(losses)), float(np.mean(right))
