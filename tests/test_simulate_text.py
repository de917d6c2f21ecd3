"""The learner of texts: packing changes nothing, it learns, and the same seed gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("datasets")

import flexlora_fast as ff
from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import encoder, packing
from flexlora_fast.simulate.learners.base import About, LoraSpec, ModelSpec
from flexlora_fast.simulate.learners.text import TextLearner
from flexlora_fast.simulate.processes import base_dtype
from tests import learning

LABELS = ("a", "b", "c")
LENGTHS = (5, 1, 9, 3, 3, 12, 2, 7)


def learner(seed: int = 0, rank: int = 4, **model: Any) -> TextLearner:
    return TextLearner(ModelSpec(path="tiny", **model), LoraSpec(), About("text", LABELS), rank=rank, seed=seed)


def tokens() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, 60, size=length).astype(np.int32) for length in LENGTHS]


@pytest.mark.parametrize("room", [0, 1, 12, 20, 500])
def test_packing_keeps_every_token_in_order(room: int) -> None:
    packed = packing.pack(tokens(), pad=0, room=room)
    for number, ids in enumerate(tokens(), start=1):
        here = packed.texts == number
        assert (packed.input_ids[here] == ids).all()
        assert (packed.position_ids[here] == np.arange(len(ids))).all()
        assert len(set(np.nonzero(here)[0])) == 1  # in one row
    assert (packed.input_ids[packed.texts == 0] == 0).all()
    assert packed.texts.shape[1] <= max(room, *LENGTHS)
    if not room:
        assert len(packed.texts) == len(LENGTHS)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_packed_texts_get_the_logits_they_get_alone(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 32}
    if kind == "distilbert":
        sizes = {"n_layers": 2, "n_heads": 2, "dim": 24, "hidden_dim": 32}
    config = encoder.without_dropout(AutoConfig.for_model(kind, vocab_size=64, **sizes))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = encoder.classifier(AutoModel.from_config(config), 3, seed=0)
    # As in a pretrained encoder: with zeros in place of biases some mistakes in positions would not be seen.
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    start = packing.first_position(config)
    assert start is not None
    packed = packing.pack(tokens(), int(config.pad_token_id), room=20)
    assert len(packed.texts) < len(LENGTHS)
    with torch.inference_mode():
        together = model(
            torch.from_numpy(packed.input_ids),
            texts=torch.from_numpy(packed.texts),
            position_ids=torch.from_numpy(packed.position_ids) + start,
        ).logits
        for logits, ids in zip(together, tokens(), strict=True):
            one = torch.from_numpy(ids.astype(np.int64))[None]
            alone = model(one, attention_mask=torch.ones_like(one)).logits
            torch.testing.assert_close(logits, alone[0], rtol=1e-4, atol=1e-5)


def test_an_encoder_with_other_positions_is_padded() -> None:
    made = learner()
    examples = made.examples(learning.texts(8))
    packed = made.collate(examples)
    made.first_position = None
    padded = made.collate(examples)
    assert len(packed["texts"]) < len(padded["input_ids"]) == 8
    assert (padded["attention_mask"].sum(1) == torch.tensor([len(e.content) for e in examples])).all()
    with torch.inference_mode():
        torch.testing.assert_close(made.model(**packed).logits, made.model(**padded).logits, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(made.model(**packed).loss, made.model(**padded).loss)


def test_it_learns_and_scores_every_row(tmp_path: Path) -> None:
    rows, made = learning.texts(), learner()
    before = made.evaluate(rows, batch=50)
    learning.train(made, rows, tmp_path, steps=40)
    after = made.evaluate(rows, batch=50)
    assert before.loss.mean() == pytest.approx(np.log(3), abs=0.1)
    assert after.loss.mean() < 0.5 * before.loss.mean()
    assert after.values.mean() > 0.9
    assert set(after.values) <= {0.0, 1.0}
    # In the rows' order, whatever the batches were.
    alone = made.evaluate(rows, batch=7)
    np.testing.assert_array_equal(after.values, alone.values)
    np.testing.assert_allclose(after.loss, alone.loss, rtol=1e-4, atol=1e-6)
    backwards = made.evaluate(rows.select(range(len(rows) - 1, -1, -1)), batch=50)
    np.testing.assert_allclose(after.loss, backwards.loss[::-1], rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    rows, states, losses = learning.texts(), [], []
    for seed in (1, 1, 2):
        made = learner(seed)
        losses.append(learning.train(made, rows, tmp_path, steps=3, seed=7))
        states.append(ff.Adapter.from_peft(made.model).state_dict())
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert {value.dtype for value in states[0].values()} == {torch.float32}
    assert sum("classifier" in name for name in states[0]) == 2


def test_adapters_of_other_ranks_fit_in(tmp_path: Path) -> None:
    made = learner(rank=2)
    ff.Adapter.from_peft(learner(rank=6).model).load_into(made.model)
    learning.train(made, learning.texts(32), tmp_path, steps=1)
    trained = ff.Adapter.from_peft(made.model)
    assert {trained.rank(layer) for layer in trained.layers} == {6}
    assert len(trained.layers) == 12  # six linear layers in two blocks; no pooler, no head


def test_a_bfloat16_base_trains_float32_factors(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=10, **small)).save_pretrained(tmp_path)
    model = ModelSpec(path=str(tmp_path), dtype="bfloat16")
    made = TextLearner(model, LoraSpec(target_modules=["query", "value"]), About("text", LABELS), rank=2, seed=0)
    assert made.max_length == 10
    learning.train(made, learning.texts(16), tmp_path, steps=1)
    dtypes = {parameter.dtype for parameter in made.model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for name, parameter in made.model.named_parameters() if "embeddings" in name}
    assert (dtypes, frozen) == ({torch.float32}, {torch.bfloat16})
    assert made.model.config.hidden_dropout_prob == 0


def test_an_empty_text_has_a_score() -> None:
    from datasets import Dataset

    scores = learner().evaluate(Dataset.from_dict({"text": ["", "abc", ""], "label": [0, 1, 2]}), batch=2)
    assert np.isfinite(scores.loss).all()


def test_texts_are_cut_to_what_the_model_takes() -> None:
    assert [len(ids) for ids in learner(max_length=8).tokens(["a" * 100, "ab"])] == [8, 3]
    assert [len(ids) for ids in learner().tokens(["a" * 1000])] == [256]


def test_errors_name_the_value() -> None:
    with pytest.raises(OptionError, match=r"wheel:smollm2.*wheel:minilm"):
        TextLearner(ModelSpec(path="wheel:smollm2"), LoraSpec(), About("text", LABELS), rank=2, seed=0)
    with pytest.raises(OptionError, match=r"'int8'.*float32"):
        base_dtype("int8")
    assert base_dtype("float16") == torch.float16
    assert base_dtype(cuda=True) == torch.bfloat16
