"""Language models that learn to answer prompts, and are tested by answering them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import language, tasks
from flexlora_fast.simulate.learners.adapting import adapted
from flexlora_fast.simulate.learners.base import About, Learner, LoraSpec, ModelSpec, Scores
from flexlora_fast.simulate.tasks.answering import AnsweringTask

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # what cross entropy in torch and transformers leaves out


@dataclass(frozen=True)
class Tokens:
    """A prompt, and the answer that should follow it with the token that ends it, as token ids."""

    prompt: list[int]
    target: list[int]


class GenerationLearner(Learner):
    """A causal language model. It learns the targets alone, not the prompts, and is scored on what it generates.

    Prompt and target are tokenized apart and joined, so the boundary is the same in training and in testing; the token
    that ends a text follows the target. Longer than ``max_length`` together, the prompt loses its beginning (in
    instructions the question comes last); a target may take half of ``max_length`` and is cut there. In testing the
    room that is left for the answer is the same for all rows: how long a right answer is must not be told.
    """

    def __init__(self, model: ModelSpec, lora: LoraSpec, about: About, *, rank: int, seed: int) -> None:
        super().__init__(model, lora, about, rank=rank, seed=seed)
        base, self.tokenizer = language.load(model)
        task = tasks.make(about.task, dict(about.options))
        if not isinstance(task, AnsweringTask):
            raise OptionError(f"task {task.name!r} is of kind {task.kind!r}: a language model has no answers to score")
        self.task = task
        torch.manual_seed(seed)
        # What a model's authors like to generate with (penalties, sampling) would fill what an answer's settings leave
        # open, and is no part of a task's metric.
        base.generation_config = transformers.GenerationConfig()
        self.model = adapted(base, lora, rank)
        # What the tokenizer starts a text with: a prompt that loses its beginning keeps it.
        self._start = [token for token in self.tokenizer("").input_ids if token != self.tokenizer.eos_token_id]

    def tokens(self, prompt: str, target: str, *, testing: bool = False) -> Tokens:
        """Token ids of a row, cut to ``max_length`` together; in testing the prompt as if before the longest answer."""
        length = self.spec.max_length
        answer = [*self.tokenizer(target, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        answer = answer[: length // 2]
        question = self.tokenizer(prompt, add_special_tokens=False).input_ids
        ahead = min(self.task.max_new_tokens, length // 2) if testing else len(answer)
        room = length - ahead - len(self._start)
        return Tokens(self._start + question[max(0, len(question) - room) :], answer)

    def rows(self, rows: Dataset, *, testing: bool = False) -> list[Tokens]:
        """Token ids of all rows."""
        pairs = zip(rows["prompt"], rows["target"], strict=True)
        return [self.tokens(prompt, target, testing=testing) for prompt, target in pairs]

    def collate(self, rows: Sequence[Tokens]) -> dict[str, Any]:
        """A batch for the model: padded on the left, so that the targets stand together at its end.

        The model then computes logits where targets are and nowhere else (``logits_to_keep``), a fifth of the work of a
        small model with a large vocabulary, and most of its memory. ``labels`` are as long as the logits.
        """
        last = max(len(row.target) for row in rows) + 1  # and one before the first target, which predicts it
        batch = self._left_padded([row.prompt + row.target for row in rows])
        labels = torch.full((len(rows), last), IGNORED)
        for line, row in zip(labels, rows, strict=True):
            line[last - len(row.target) :] = torch.tensor(row.target)
        return batch | {"labels": labels, "logits_to_keep": last}

    def trainer(
        self, rows: Dataset, arguments: transformers.TrainingArguments, optimizer: torch.optim.Optimizer
    ) -> transformers.Trainer:
        """A Trainer of ``model`` on these rows; ready for ``train()``."""
        return transformers.Trainer(
            self.model,
            arguments,
            train_dataset=self.rows(rows),
            data_collator=self.collate,
            optimizers=(optimizer, None),
        )

    @torch.inference_mode()
    def evaluate(self, rows: Dataset, batch: int) -> Scores:
        """Greedy answers, scored by the task, and the mean loss over the tokens of each target.

        Rows of one length are batched together, so that little is padding.
        """
        self.model.eval()
        tokens = self.rows(rows, testing=True)
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i].prompt), len(tokens[i].target)))
        answers, loss = [""] * len(tokens), np.zeros(len(tokens))
        with merged(self.model):
            for start in range(0, len(order), batch):
                part = order[start : start + batch]
                generated, loss[part] = self._answer([tokens[i] for i in part])
                for i, answer in zip(part, generated, strict=True):
                    answers[i] = answer
        return Scores(self.task.score(answers, rows), loss)

    def _answer(self, rows: Sequence[Tokens]) -> tuple[list[str], np.ndarray]:
        """Greedy answers and mean losses (N,). The prompts are read once: both continue from the same cache."""
        cache = DynamicCache(config=self.model.config)
        prompts = self._left_padded([row.prompt for row in rows])
        prompts = {name: value.to(self.model.device) for name, value in prompts.items()}
        before = prompts["input_ids"].shape[1] - 1
        if before:
            first = {key: value[:, :before] for key, value in prompts.items()}
            self.model(**first, past_key_values=cache, use_cache=True, logits_to_keep=1)
        loss = self._losses(rows, prompts, cache)
        output = self.model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            past_key_values=cache,
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=self.task.max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
        )
        return self.tokenizer.batch_decode(output[:, before + 1 :], skip_special_tokens=True), loss

    def _losses(self, rows: Sequence[Tokens], prompts: dict[str, Tensor], cache: DynamicCache) -> np.ndarray:
        """Mean loss of each row's target (N,), read after the prompts but for their last token; the cache stays so."""
        longest = max(len(row.target) for row in rows)
        targets = torch.full((len(rows), longest), IGNORED)
        for line, row in zip(targets, rows, strict=True):
            line[: len(row.target)] = torch.tensor(row.target)
        targets = targets.to(self.model.device)
        known = targets != IGNORED
        inputs = targets.masked_fill(~known, self.tokenizer.pad_token_id)[:, :-1]
        last = prompts["position_ids"][:, -1:]
        logits = self.model(
            input_ids=torch.cat([prompts["input_ids"][:, -1:], inputs], 1),
            attention_mask=torch.cat([prompts["attention_mask"], known[:, :-1].long()], 1),
            position_ids=last + torch.arange(longest, device=last.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        cache.crop(-longest)
        losses = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        return (losses.double().sum(1) / known.sum(1)).cpu().numpy()

    def _left_padded(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``position_ids``, each (N, longest)."""
        batch = self.tokenizer.pad({"input_ids": list(sequences)}, padding_side="left", return_tensors="pt")
        mask = batch["attention_mask"]
        # Without them a model counts the padding; one with absolute positions would read another text.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """The model with its adapter added to frozen weights of float32, which takes a third off its time; then as before.

    Weights of less precision stay as they are: the sum, rounded to them, would lose much of the adapter.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    frozen = [layer.get_base_layer().weight for layer in layers]
    if any(weight.dtype != torch.float32 for weight in frozen):
        yield
        return
    before = [weight.data for weight in frozen]
    try:
        for layer, weight in zip(layers, frozen, strict=True):
            weight.data = weight.data + layer.get_delta_weight("default")
        with model.disable_adapter():
            yield
    finally:
        for weight, data in zip(frozen, before, strict=True):
            weight.data = data
