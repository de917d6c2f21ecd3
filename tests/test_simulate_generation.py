"""The learner of language models: what it learns, what it is scored on, and that batches change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn.functional import cross_entropy

import flexlora_fast as ff
from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import language
from flexlora_fast.simulate.learners import generation, learner_class
from flexlora_fast.simulate.learners.base import About, LoraSpec, ModelSpec
from flexlora_fast.simulate.learners.generation import IGNORED, GenerationLearner

PROMPTS = [
    "Say a:",
    "What is the letter that follows after a?",
    "b",
    "A longer question than all of the others, is it?",
]
TARGETS = ["a", "b it is", "ccccc", "yes"]


def learner(max_length: int = 128, new_tokens: int = 12, dtype: str = "float32") -> GenerationLearner:
    about = About("generation", task="natural-instructions", options={"max_new_tokens": new_tokens})
    spec = ModelSpec(path="tiny", max_length=max_length, dtype=dtype)
    made = GenerationLearner(spec, LoraSpec(), about, rank=4, seed=0)
    for parameter in made.model.parameters():  # B is zero in a fresh adapter, which would hide it from every test
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return made


def rows() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "target": TARGETS})


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        **options,
    )


def test_it_is_the_learner_of_the_kind() -> None:
    assert learner_class("generation") is GenerationLearner


def test_a_batch_has_labels_for_the_targets_alone() -> None:
    made = learner()
    batch = made.collate(made.rows(rows()))
    end = made.tokenizer.eos_token_id
    for prompt, target, ids, mask, labels in zip(
        PROMPTS, TARGETS, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        assert made.tokenizer.decode(ids[mask.bool()]) == prompt + target + made.tokenizer.eos_token
        assert not mask[: -int(mask.sum())].any(), "padding is on the left"
        known = labels[labels != IGNORED]
        assert known[-1] == end
        assert made.tokenizer.decode(known[:-1]) == target
    assert batch["logits_to_keep"] == batch["labels"].shape[1] == max(map(len, TARGETS)) + 2


def test_the_loss_in_training_is_that_of_all_logits() -> None:
    made = learner()
    batch = made.collate(made.rows(rows()))
    loss = made.model(**batch).loss
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, -batch["labels"].shape[1] :] = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = made.model(**inputs).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected)


def test_a_long_prompt_loses_its_beginning_and_a_long_target_its_end() -> None:
    made = learner(max_length=16)
    tokens = made.tokens("0123456789abcdefghij", "ok")
    assert made.tokenizer.decode(tokens.prompt) == "789abcdefghij"
    assert len(tokens.prompt + tokens.target) == 16
    tokens = made.tokens("0123456789abcdefghij", "x" * 30)
    assert (len(tokens.prompt), made.tokenizer.decode(tokens.target)) == (8, "x" * 8)


def test_how_long_the_right_answer_is_does_not_show_in_a_tested_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner(max_length=16, new_tokens=5)
    for target in ("y", "yes", "yesyesyesyes"):
        assert made.tokenizer.decode(made.tokens("0123456789abcdefghij", target, testing=True).prompt) == "9abcdefghij"
    seen: list[int] = []
    answer = made._answer
    monkeypatch.setattr(made, "_answer", lambda rows: seen.extend(len(row.prompt) for row in rows) or answer(rows))
    made.evaluate(Dataset.from_dict({"prompt": ["0123456789abcdefghij"] * 2, "target": ["y", "yesyesyes"]}), 2)
    assert seen == [11, 11]


def test_how_the_models_authors_generate_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    load = language.load
    plain = learner()

    def with_habits(spec: ModelSpec) -> Any:
        base, tokenizer = load(spec)
        base.generation_config = transformers.GenerationConfig(
            repetition_penalty=5.0, no_repeat_ngram_size=1, bad_words_ids=[[5]], temperature=0.2, do_sample=True
        )
        return base, tokenizer

    monkeypatch.setattr(language, "load", with_habits)
    made, answers = learner(), {}
    for one_of in (plain, made):
        monkeypatch.setattr(one_of.task, "score", lambda found, rows: answers.setdefault(len(answers), found) and [0.0])
        one_of.evaluate(rows(), 4)
    assert answers[0] == answers[1] and any(len(set(answer)) < len(answer) for answer in answers[0])


def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path: Path) -> None:
    made = learner()
    frozen = {name: p.clone() for name, p in made.model.named_parameters() if not p.requires_grad}
    before = made.evaluate(rows(), 2).loss.mean()
    optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], lr=1e-2)
    trainer = made.trainer(rows(), arguments(tmp_path, max_steps=40, per_device_train_batch_size=4), optimizer)
    trainer.train()
    scores = made.evaluate(rows(), 2)
    assert scores.loss.mean() < before / 3
    assert scores.values.max() == 1.0, "it answers a question that it has learnt by heart"
    for name, parameter in made.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_evaluation_is_that_of_a_loop_over_rows(batch: int) -> None:
    made = learner()
    scores = made.evaluate(rows(), batch)
    for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        loss, answer = one(made, prompt, target)
        assert scores.loss[i] == pytest.approx(loss, rel=1e-5)
        expected = made.task.score([answer], rows().select([i]))
        assert scores.values[i] == expected[0]


def test_answers_are_those_of_a_loop_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner()
    seen: list[str] = []

    def score(answers: list[str], _: Dataset) -> np.ndarray:
        seen.extend(answers)
        return np.zeros(len(answers))

    monkeypatch.setattr(made.task, "score", score)
    made.evaluate(rows(), 3)
    assert seen == [one(made, prompt, target)[1] for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    assert len(set(seen)) > 1


@torch.inference_mode()
def one(made: GenerationLearner, prompt: str, target: str) -> tuple[float, str]:
    """Loss and greedy answer of a row alone, without padding, cache, ``generate`` or merged weights."""
    ids, answer = made.tokenizer(prompt).input_ids, made.tokenizer(target).input_ids
    answer = [*answer, made.tokenizer.eos_token_id]
    logits = made.model(input_ids=torch.tensor([ids + answer])).logits[0]
    loss = cross_entropy(logits[len(ids) - 1 : -1].float(), torch.tensor(answer))
    written: list[int] = []
    while len(written) < made.task.max_new_tokens:
        token = int(made.model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == made.tokenizer.eos_token_id:
            break
        written.append(token)
    return float(loss), made.tokenizer.decode(written)


def test_merged_weights_are_taken_out_again_bit_for_bit() -> None:
    made = learner()
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    inputs = {"input_ids": torch.tensor([made.tokenizer(PROMPTS[3]).input_ids])}
    with torch.no_grad():
        expected = made.model(**inputs).logits
        with generation.merged(made.model):
            assert any(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())
            torch.testing.assert_close(made.model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.model(**inputs).logits, expected, rtol=0, atol=0)
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(RuntimeError, match="stop"), generation.merged(made.model):
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())


def test_a_base_in_bfloat16_keeps_lora_in_float32_and_is_not_merged() -> None:
    made = learner(dtype="bfloat16")
    kinds = {p.requires_grad: p.dtype for p in made.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    with generation.merged(made.model):
        assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert np.isfinite(made.evaluate(rows(), 4).loss).all()


def test_adapters_of_other_ranks_are_put_in_and_evaluated() -> None:
    made, other = learner(), learner()
    adapter = ff.Adapter.from_peft(other.model)
    update = ff.aggregate([adapter], rank=2)
    update.adapter(rank=2).load_into(made.model)
    assert made.evaluate(rows(), 4).loss != pytest.approx(other.evaluate(rows(), 4).loss, rel=1e-3)
    assert ff.Adapter.from_peft(made.model).rank(adapter.layers[0]) == 2


def test_the_tiny_model_is_always_the_same() -> None:
    first, second = language.tiny()[0], language.tiny()[0]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_wheel_is_no_language_model() -> None:
    with pytest.raises(OptionError, match=r"wheel:minilm.*wheel:smollm2"):
        language.load(ModelSpec(path="wheel:minilm"))
