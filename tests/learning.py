"""What tests of learners share: a client's training in a few lines, and toy rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from flexlora_fast.simulate.learners.base import Learner

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def train(learner: Learner, rows: Any, out: Path, steps: int, *, lr: float = 5e-3, seed: int = 0) -> float:
    """Train a learner for a few steps of 16 rows; returns the mean loss."""
    arguments = transformers.TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        seed=seed,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    optimizer = torch.optim.AdamW([p for p in learner.model.parameters() if p.requires_grad], lr=lr)
    return float(learner.trainer(rows, arguments, optimizer).train().training_loss)


def texts(count: int = 120) -> Any:
    """Texts of different lengths whose class is told by the letter that they are full of."""
    from datasets import Dataset

    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=count)
    words = [
        "".join(generator.choice(list("abc"[label] * 2 + "xyz"), size=generator.integers(3, 40))) for label in labels
    ]
    return Dataset.from_dict({"text": words, "label": labels.tolist()})


def images(count: int = 48) -> Any:
    """Noisy images whose class is their colour."""
    from datasets import Dataset, Features, Image, Value

    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=count).tolist()
    base = np.array(list(COLOURS.values()), dtype=np.int64)[labels][:, None, None]
    pixels = (base + generator.integers(-30, 31, size=(count, 20, 24, 3))).astype(np.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)
