"""Classes of texts: a pretrained encoder, the mean over its tokens, and a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import encoder
from flexlora_fast.simulate.encoder import HEAD, SentenceClassifier
from flexlora_fast.simulate.learners.adapting import adapted, device
from flexlora_fast.simulate.learners.base import About, LoraSpec, ModelSpec
from flexlora_fast.simulate.learners.classifying import ClassifyingLearner, Example
from flexlora_fast.simulate.learners.tiny import END, byte_tokenizer
from flexlora_fast.simulate.packing import first_position, pack
from flexlora_fast.simulate.processes import base_dtype
from flexlora_fast.simulate.wheels import MINILM, unpacked

if TYPE_CHECKING:
    from datasets import Dataset

ROOM = 64  # tokens of a row of packed texts
MAX_TINY = 256  # tokens of a text that the tiny model takes


class TextLearner(ClassifyingLearner):
    """An encoder whose linear layers take LoRA, and a head (``modules_to_save``) that is trained whole."""

    def __init__(self, model: ModelSpec, lora: LoraSpec, about: About, *, rank: int, seed: int) -> None:
        super().__init__(model, lora, about, rank=rank, seed=seed)
        self.tokenizer, base = tiny(len(about.labels), seed) if model.path == "tiny" else pretrained(model, about, seed)
        self.first_position = first_position(base.config)
        self.max_length = min(model.max_length, longest(base.config, self.tokenizer))
        self.model = adapted(base, lora, rank, [HEAD])
        self._tokens: dict[str, np.ndarray] = {}  # of every text that this process has met

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of texts, cut to ``max_length``; each text is tokenized once in a process."""
        new = list(dict.fromkeys(text for text in texts if text not in self._tokens))
        if new:
            found = self.tokenizer(new, truncation=True, max_length=self.max_length)["input_ids"]
            self._tokens.update(zip(new, (np.asarray(ids, dtype=np.int32) for ids in found), strict=True))
        return [self._tokens[text] for text in texts]

    def examples(self, rows: Dataset) -> list[Example]:
        """Token ids and class of each row."""
        pairs = zip(self.tokens(rows["text"][:]), rows["label"][:], strict=True)
        return [Example(ids, label) for ids, label in pairs]

    def order(self, examples: Sequence[Example]) -> Sequence[int]:
        """By length, so that little is padding."""
        return sorted(range(len(examples)), key=lambda i: len(examples[i].content))

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The batch's texts and labels: packed into rows where the encoder allows it, else one a row and padded."""
        room = 0 if self.first_position is None else ROOM
        packed = pack([example.content for example in examples], self.tokenizer.pad_token_id, room)
        batch = {
            "input_ids": torch.from_numpy(packed.input_ids),
            "labels": torch.tensor([example.label for example in examples]),
        }
        if self.first_position is None:
            return batch | {"attention_mask": torch.from_numpy(packed.texts).sign()}
        positions = torch.from_numpy(packed.position_ids) + self.first_position
        return batch | {"texts": torch.from_numpy(packed.texts), "position_ids": positions}


def longest(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model takes: fewer than its positions where those start behind the padding's (RoBERTa)."""
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    return int(min(positions, tokenizer.model_max_length))


def pretrained(model: ModelSpec, about: About, seed: int) -> tuple[PreTrainedTokenizerBase, SentenceClassifier]:
    """The tokenizer and the encoder of a folder, of a name on the hub, or of the wheel, with a fresh head."""
    if model.path.startswith("wheel:") and model.path != "wheel:minilm":
        raise OptionError(f"model.path {model.path!r} is no encoder for texts; take wheel:minilm, a folder or a name")
    path = unpacked(MINILM, model.data) if model.path == "wheel:minilm" else model.path
    dtype = base_dtype(model.dtype, cuda=device().type == "cuda")
    return AutoTokenizer.from_pretrained(path), encoder.pretrained(path, len(about.labels), seed, dtype)


def tiny(labels: int, seed: int) -> tuple[PreTrainedTokenizerBase, SentenceClassifier]:
    """A random BERT of two layers that reads bytes, always the same one; only its head depends on ``seed``."""
    tokenizer = byte_tokenizer(MAX_TINY)
    # As other encoders' tokenizers do, so that an empty text has a token too.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_TINY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return tokenizer, encoder.classifier(AutoModel.from_config(config), labels, seed)
