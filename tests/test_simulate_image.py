"""The learner of images: it learns, the same seed gives the same, and preprocessing is the processor's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("PIL")

import flexlora_fast as ff
from flexlora_fast.errors import OptionError
from flexlora_fast.simulate.learners.base import About, LoraSpec, ModelSpec
from flexlora_fast.simulate.learners.image import ImageLearner
from tests import learning

ABOUT = About("image", tuple(learning.COLOURS))


def learner(seed: int = 0, rank: int = 4) -> ImageLearner:
    return ImageLearner(ModelSpec(path="tiny"), LoraSpec(), ABOUT, rank=rank, seed=seed)


def test_it_learns_and_scores_every_row(tmp_path: Path) -> None:
    rows, made = learning.images(), learner()
    before = made.evaluate(rows, batch=20)
    learning.train(made, rows, tmp_path, steps=20)
    after = made.evaluate(rows, batch=20)
    assert before.loss.mean() == pytest.approx(np.log(3), abs=0.2)
    assert after.loss.mean() < 0.5 * before.loss.mean()
    assert after.values.mean() > 0.9
    np.testing.assert_allclose(after.loss, made.evaluate(rows, batch=7).loss, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    states, losses = [], []
    for seed in (1, 1, 2):
        made = learner(seed)
        losses.append(learning.train(made, learning.images(16), tmp_path, steps=2, seed=7))
        states.append(ff.Adapter.from_peft(made.model).state_dict())
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert sum("classifier" in name for name in states[0]) == 2


def test_images_of_any_mode_are_resized_and_normalised() -> None:
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    pictures = [Picture.new("L", (50, 40), 255), Picture.new("RGBA", (8, 8), (0, 0, 0, 255))]
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": pictures, "label": [0, 2]}, features=features)
    made = learner()
    batch = made.collate(list(made.examples(rows)))
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert (batch["pixel_values"][0] == 1).all()  # (255/255 − 0.5) / 0.5
    assert (batch["pixel_values"][1] == -1).all()
    assert batch["labels"].tolist() == [0, 2]


def test_a_pretrained_folder_in_bfloat16_gets_a_new_float32_head(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=7, **small)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model = ModelSpec(path=str(tmp_path), dtype="bfloat16")
    made = ImageLearner(model, LoraSpec(target_modules=["q_proj", "v_proj"]), ABOUT, rank=2, seed=0)
    loss = learning.train(made, learning.images(16), tmp_path, steps=1)
    assert np.isfinite(loss)
    trained = {parameter.dtype for parameter in made.model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for name, parameter in made.model.named_parameters() if "embeddings" in name}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    assert made.evaluate(learning.images(4), batch=4).loss.shape == (4,)


def test_a_wheel_is_no_model_of_images() -> None:
    with pytest.raises(OptionError, match=r"wheel:minilm.*take a folder"):
        ImageLearner(ModelSpec(path="wheel:minilm"), LoraSpec(), ABOUT, rank=2, seed=0)


def test_a_model_with_another_head_is_refused(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=r"ResNetForImageClassification.*classifier"):
        ImageLearner(ModelSpec(path=str(tmp_path)), LoraSpec(), ABOUT, rank=2, seed=0)
