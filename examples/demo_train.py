"""One client's side of the demo: an ordinary PEFT model trained by the ordinary ``transformers.Trainer``.

It runs in worker processes. Each loads the frozen base model once and keeps it; a job then only puts an adapter into
it (``Adapter.load_into``, whatever its rank), trains or evaluates, and writes an adapter folder.
"""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding, PrinterCallback

import flexlora_fast as ff
from flexlora_fast.simulate import encoder
from flexlora_fast.simulate.encoder import SentenceClassifier
from flexlora_fast.simulate.processes import base_dtype, settle
from flexlora_fast.simulate.questions import LABELS


@dataclass(frozen=True)
class Setup:
    """What all jobs share. ``alpha_over_r`` is the scale s that every rank trains with.

    The learning rates are the first pair that trained well and the same in both arms; neither arm was tuned.
    """

    model: Path
    texts: list[str]
    labels: list[int]
    steps: int = 10
    batch: int = 32
    lr: float = 1e-3
    head_lr: float = 1e-2
    alpha_over_r: int = 2


@dataclass(frozen=True)
class TrainJob:
    """One client in one round: start from the adapter in ``start``, leave the trained one in ``out``."""

    client: str
    examples: np.ndarray
    start: Path
    out: Path
    seed: int


@dataclass(frozen=True)
class EvaluateJob:
    """An adapter folder and the examples to test it on."""

    adapter: Path
    examples: np.ndarray


@dataclass(frozen=True)
class Score:
    """Which examples an adapter gets right (bool, in the job's order), and its mean cross-entropy in nats."""

    correct: np.ndarray = field(repr=False)
    loss: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def pretrained(model: Path, seed: int) -> SentenceClassifier:
    """The pretrained encoder with a fresh head, float32; the rest may be bfloat16."""
    return encoder.pretrained(model, len(LABELS), seed, base_dtype())


def build(model: Path, rank: int, alpha_over_r: int, seed: int) -> PeftModel:
    """The pretrained model with a fresh LoRA adapter on all its linear layers, and a fresh head.

    The base may be bfloat16; LoRA and head are float32: in bfloat16 small steps would be rounded away.
    """
    base = pretrained(model, seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha_over_r * rank,
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )
    return get_peft_model(base, config)


class Worker:
    """The base model of one process, and the jobs that use it."""

    def __init__(self, setup: Setup) -> None:
        settle()
        self.setup = setup
        self.tokenizer = AutoTokenizer.from_pretrained(setup.model)
        self.inputs = self.tokenizer(setup.texts, truncation=True, max_length=64)["input_ids"]
        self.model = build(setup.model, rank=1, alpha_over_r=setup.alpha_over_r, seed=0)
        gc.freeze()  # each Trainer.train() runs the garbage collector, half a second over the imported libraries

    def rows(self, examples: np.ndarray) -> list[dict[str, Any]]:
        return [{"input_ids": self.inputs[i], "labels": self.setup.labels[i]} for i in examples]

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW with a higher learning rate for the head, which starts from nothing."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["classifier" in name].append(parameter)
        return torch.optim.AdamW(
            [
                {"params": groups[False], "lr": self.setup.lr},
                {"params": groups[True], "lr": self.setup.head_lr},
            ],
            weight_decay=0.01,
        )

    def train(self, job: TrainJob) -> tuple[float, float]:
        """Train a client for one round; returns its mean training loss and the seconds it took."""
        started = time.perf_counter()
        # Every round builds a new Trainer and with it a new optimizer. It has to: the rank may have changed, and even
        # where it has not, the SVD has turned the basis of the factors, to which Adam's moments belong.
        ff.Adapter.load(job.start).load_into(self.model)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = transformers.Trainer(
                self.model,
                transformers.TrainingArguments(
                    scratch,
                    max_steps=self.setup.steps,
                    per_device_train_batch_size=self.setup.batch,
                    lr_scheduler_type="constant",
                    seed=job.seed,
                    use_cpu=True,
                    disable_tqdm=True,
                    report_to="none",
                    save_strategy="no",
                    logging_strategy="no",
                    dataloader_pin_memory=False,
                ),
                train_dataset=self.rows(job.examples),
                data_collator=DataCollatorWithPadding(self.tokenizer),
                optimizers=(self.optimizer(), None),
            )
            trainer.remove_callback(PrinterCallback)
            loss = trainer.train().training_loss
        ff.Adapter.from_peft(self.model, client=job.client).save(job.out)
        return loss, time.perf_counter() - started

    def evaluate(self, job: EvaluateJob) -> Score:
        """Test an adapter."""
        # Outside of inference mode: parameters made in it, as a new rank asks for, could never be trained again.
        ff.Adapter.load(job.adapter).load_into(self.model)
        return self._score(job)

    @torch.inference_mode()
    def _score(self, job: EvaluateJob) -> Score:
        """Test the model as it is. Examples are batched by length, so that little is padding."""
        self.model.eval()
        order = sorted(range(len(job.examples)), key=lambda i: len(self.inputs[job.examples[i]]))
        collate = DataCollatorWithPadding(self.tokenizer)
        correct, loss = np.zeros(len(order), dtype=bool), 0.0
        for start in range(0, len(order), 100):
            part = order[start : start + 100]
            batch = collate(self.rows(job.examples[part]))
            output = self.model(**batch)
            correct[part] = (output.logits.argmax(1) == batch["labels"]).numpy()
            loss += float(output.loss) * len(part)
        return Score(correct, loss / len(order))


_worker: Worker | None = None


def start(setup: Setup) -> None:
    """Make this process a worker; called once in each."""
    global _worker  # noqa: PLW0603 - what a process pool's initializer leaves for its jobs has no other place
    _worker = Worker(setup)


def train(job: TrainJob) -> tuple[float, float]:
    """``Worker.train`` in this process."""
    assert _worker is not None
    return _worker.train(job)


def evaluate(job: EvaluateJob) -> Score:
    """``Worker.evaluate`` in this process."""
    assert _worker is not None
    return _worker.evaluate(job)
