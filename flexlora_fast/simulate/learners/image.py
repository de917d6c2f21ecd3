"""Classes of images: a pretrained vision transformer with a new head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTImageProcessorPil,
)

from flexlora_fast.errors import OptionError
from flexlora_fast.simulate.encoder import without_dropout
from flexlora_fast.simulate.learners.adapting import adapted, device
from flexlora_fast.simulate.learners.base import About, LoraSpec, ModelSpec
from flexlora_fast.simulate.learners.classifying import ClassifyingLearner, Example
from flexlora_fast.simulate.processes import base_dtype

if TYPE_CHECKING:
    from datasets import Dataset

HEAD = "classifier"
TINY_SIDE = 32  # pixels of the images that the tiny model takes


class Images(Sequence[Example]):
    """Rows as examples; an image is decoded when it is asked for: decoded and resized, all would not fit in memory."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[int(index)]
        return Example(row["image"].convert("RGB"), row["label"])


class Head(nn.Linear):
    """A linear head in float32 behind a model that may be in bfloat16."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, labels) float32 of (batch, n)."""
        return super().forward(hidden.to(self.weight.dtype))


class ImageLearner(ClassifyingLearner):
    """A vision transformer whose linear layers take LoRA, and a head (``modules_to_save``) that is trained whole.

    Images are resized, rescaled and normalised as the model's own processor says, by its version for PIL: the result
    does not depend on whether torchvision is there. There is no augmentation.
    """

    def __init__(self, model: ModelSpec, lora: LoraSpec, about: About, *, rank: int, seed: int) -> None:
        super().__init__(model, lora, about, rank=rank, seed=seed)
        self.processor, base = tiny(about) if model.path == "tiny" else pretrained(model, about)
        torch.manual_seed(seed)
        base.classifier = head(base, len(about.labels))
        self.model = adapted(base, lora, rank, [HEAD])

    def examples(self, rows: Dataset) -> Sequence[Example]:
        """The rows; see ``Images``."""
        return Images(rows)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """``pixel_values`` (batch, 3, height, width) float32, and the labels."""
        pixels = self.processor(images=[example.content for example in examples], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([example.label for example in examples])}


def head(base: Any, labels: int) -> Head:
    """A fresh head in place of the model's own."""
    fresh = Head(base.classifier.in_features, labels)
    nn.init.normal_(fresh.weight, std=0.02)
    nn.init.zeros_(fresh.bias)
    return fresh


def pretrained(model: ModelSpec, about: About) -> tuple[Any, Any]:
    """The processor and the model of a folder or of a name on the hub.

    Raises ``OptionError`` for a wheel, and for a model whose head is not a linear ``classifier``.
    """
    if model.path.startswith("wheel:"):
        raise OptionError(f"model.path {model.path!r} is no model of images; take a folder, a name on the hub, or tiny")
    config = without_dropout(AutoConfig.from_pretrained(model.path, num_labels=len(about.labels)))
    base = AutoModelForImageClassification.from_pretrained(
        model.path,
        config=config,
        dtype=base_dtype(model.dtype, cuda=device().type == "cuda"),
        ignore_mismatched_sizes=True,  # the head of its pretraining, which is replaced
    )
    if not isinstance(getattr(base, HEAD, None), nn.Linear):
        raise OptionError(
            f"model.path {model.path!r} is a {type(base).__name__}, whose head is not a linear layer named {HEAD!r}; "
            "take one of the kind of ViT, DeiT, Swin or DINOv2"
        )
    return AutoImageProcessor.from_pretrained(model.path, backend="pil"), base


def tiny(about: About) -> tuple[Any, Any]:
    """A random vision transformer of two layers, always the same one."""
    config = ViTConfig(
        image_size=TINY_SIDE,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=len(about.labels),
    )
    torch.manual_seed(0)
    size = {"height": TINY_SIDE, "width": TINY_SIDE}
    return ViTImageProcessorPil(size=size), AutoModelForImageClassification.from_config(config)
