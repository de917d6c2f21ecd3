"""Small models with every kind of layer that LoRA adapts, and PEFT models with trained-looking factors on them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCAB, HIDDEN, WIDE, CLASSES, EXPERTS, INNER = 23, 12, 20, 5, 3, 7


class Experts(nn.Module):
    """A dense mixture with 3-D parameters, as in transformers: ``gate_up_proj`` (E, 2·inner, hidden) first."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
        if is_transposed:
            up, down = (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN)
        self.gate_up_proj = nn.Parameter(torch.randn(up) / 4)
        self.down_proj = nn.Parameter(torch.randn(down) / 4)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, value = torch.einsum("bth,ehi->ebti", x, up).chunk(2, dim=-1)
        return torch.einsum("ebti,eih->bth", torch.sigmoid(gate) * value, down) / EXPERTS


class Zoo(nn.Module):
    """One layer of each kind, all of them rectangular where they can be; tokens (b, t) -> logits (b, classes)."""

    def __init__(self, is_transposed: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.fc = nn.Linear(HIDDEN, WIDE)
        self.proj = Conv1D(HIDDEN, WIDE)  # weight (WIDE, HIDDEN): stored transposed
        self.conv1 = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(2, 3, (3, 2), padding=(1, 0))
        self.conv3 = nn.Conv3d(1, 2, (1, 2, 3))
        self.point = nn.Conv2d(3, 4, 1)
        self.mha = nn.MultiheadAttention(HIDDEN, 3, batch_first=True)
        self.experts = Experts(is_transposed)
        self.norm = nn.LayerNorm(HIDDEN)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.proj(torch.tanh(self.fc(x)))
        x = x + self.conv1(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        x = self.norm(x + self.experts(x))
        image = torch.stack([x, x.flip(1)], dim=1)  # (b, 2, t, h)
        flat = self.point(self.conv2(image)).mean(dim=(1, 2, 3))
        volume = self.conv3(x[:, None, None].expand(-1, -1, 2, -1, -1)).mean(dim=(1, 2, 3, 4))
        return self.classifier(x.mean(dim=1)) + (flat + volume)[:, None]


# what to pass to `trained_adapter` to adapt one kind of layer
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["fc"]},
    "conv1d_hf": {"target_modules": ["proj"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed"]},
    "conv1": {"target_modules": ["conv1"]},
    "conv2": {"target_modules": ["conv2"]},
    "conv2_pointwise": {"target_modules": ["point"]},
    "conv3": {"target_modules": ["conv3"]},
    "mha": {"target_modules": ["mha"]},
    "moe": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "moe_nested": {
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "mixed": {"target_modules": ["fc", "embed", "conv2", "mha"], "target_parameters": ["experts.down_proj"]},
}


def base_model(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Zoo:
    """The frozen model: the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Zoo(**options).to(dtype).eval()


def tokens(seed: int = 0) -> Tensor:
    """A batch (2, 6) of inputs for ``Zoo``."""
    return torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(seed))


def randomize(model: PeftModel, seed: int, adapter_name: str = "default") -> None:
    """Random non-zero values in everything the adapter trains, addressed by name."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and (adapter_name in name.split(".") or "lora_" not in name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.data.copy_(noise.to(parameter.dtype))


def trained_adapter(
    seed: int,
    rank: int = 4,
    *,
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
    **config: Any,
) -> PeftModel:
    """A PEFT model over ``base_model()`` (or ``model``) whose adapter looks trained.

    ``kind`` picks the layers (a key of ``KINDS``), ``config`` goes to ``LoraConfig`` on top of it. ``dtype`` is that
    of the base weights and the factors.
    """
    options = {"r": rank, "lora_alpha": 2 * rank, **KINDS[kind], **config}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        base = base_model(dtype=dtype) if model is None else model
        peft_model = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=False)
    randomize(peft_model, seed)
    return peft_model.eval()


def outputs(model: nn.Module) -> Tensor:
    """What ``Zoo`` (or a PEFT model over it) makes of ``tokens()``."""
    with torch.no_grad():
        return model(tokens())


def reload(folder: Path, base: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A PEFT model made from a saved folder, over ``base_model()`` (or ``base``)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base_model(dtype=dtype) if base is None else base
        return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


def tiny(name: str, **options: Any) -> Any:
    """A causal model of transformers, a few thousand weights, the same for the same arguments."""
    sizes: dict[str, Any] = {"vocab_size": 32, **options}
    config = getattr(transformers, f"{name}Config")(**sizes)
    kind = "ForCausalLM" if hasattr(transformers, f"{name}ForCausalLM") else "LMHeadModel"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name + kind)(config).eval()


LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
