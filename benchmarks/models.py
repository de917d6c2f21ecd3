"""Whole rounds on disk: every layer of a model, one PEFT adapter folder a client, bfloat16."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LayerShape = tuple[str, int, int]  # name, m, n
_POOL = 1 << 24


@dataclass(frozen=True)
class ModelRound:
    """The layers of a model and the clients' ranks; every client adapts every layer."""

    name: str
    layers: tuple[LayerShape, ...]
    ranks: tuple[int, ...]

    @property
    def k(self) -> int:
        return max(self.ranks)

    @property
    def R(self) -> int:
        return sum(self.ranks)

    @property
    def bytes(self) -> int:
        """Of all factors."""
        return 2 * self.R * sum(m + n for _, m, n in self.layers)

    def weights(self, clients: int | None = None) -> list[float]:
        return [100.0 + 37 * i % 91 for i in range(len(self.ranks))][:clients]

    def folders(self, root: Path) -> list[Path]:
        return [root / self.name / f"client-{i:05d}" for i in range(len(self.ranks))]


def decoder(depth: int, hidden: int, key_value: int, inner: int) -> tuple[LayerShape, ...]:
    """The linear layers of a Llama decoder."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return tuple((f"model.layers.{i}.{name}", m, n) for i in range(depth) for name, (m, n) in shapes.items())


LLAMA_2_7B, TINY_LLAMA = decoder(32, 4096, 4096, 11008), decoder(22, 2048, 256, 5632)
FULL = {
    "round-7b": ModelRound("round-7b", LLAMA_2_7B, (16,) * 100),
    "round-tiny": ModelRound("round-tiny", TINY_LLAMA, (2, 4, 8, 8, 16, 16, 32, 64) * 2),
    "scale": ModelRound("scale", (("layer", 4096, 4096),), (8,) * 10_000),
}
QUICK = {
    "round-7b": ModelRound("round-7b", decoder(2, 64, 64, 172), (4,) * 12),
    "round-tiny": ModelRound("round-tiny", decoder(2, 64, 16, 176), (2, 4, 8) * 2),
    "scale": ModelRound("scale", (("layer", 96, 96),), (2,) * 40),
}
SCALE_CLIENTS = {False: (10, 100, 1000, 10_000), True: (4, 40)}


def write(round_: ModelRound, root: Path) -> list[Path]:
    """The clients' folders under ``root``, written once; those of an earlier run with the same sizes are kept."""
    folders = round_.folders(root)
    note, about = root / round_.name / "round.json", json.dumps(asdict(round_))
    if note.is_file() and note.read_text() == about:
        return folders
    note.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    for folder, rank, tensors in zip(folders, round_.ranks, drawn(round_), strict=True):
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config(round_, rank)))
    if hasattr(os, "sync"):
        os.sync()  # pages not yet on disk could not be dropped from memory
    note.write_text(about)
    return folders


def drawn(round_: ModelRound, device: str = "cpu") -> Iterator[dict[str, Tensor]]:
    """Every client's state dict in turn, bfloat16, drawn on ``device`` and left there.

    Drawing 4e9 Gaussians would take minutes, so factors are slices of one pool of them at addressed offsets. Clients
    share a subspace with σ ∝ 1/j, plus 30 % noise, as in the "decay" workloads.
    """
    g = torch.Generator(device).manual_seed(0)
    largest = max(round_.ranks) * max(max(m, n) for _, m, n in round_.layers)
    pool = torch.randn(min(_POOL, 64 * largest) + largest, generator=g, device=device).bfloat16()
    for i, rank in enumerate(round_.ranks):
        yield _client(round_, rank, i, pool, largest)


def _client(round_: ModelRound, rank: int, client: int, pool: Tensor, largest: int) -> dict[str, Tensor]:
    """One client's state dict: shared slices, the same for every client, plus its own noise."""
    starts = torch.Generator().manual_seed(client + 1)
    shared = torch.Generator().manual_seed(0)
    room = pool.numel() - largest
    top = max(round_.ranks)
    decay = torch.arange(1, rank + 1, device=pool.device).reciprocal().bfloat16()

    def slice_of(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        start = int(torch.randint(room, (1,), generator=generator))
        return pool[start : start + rows * columns].view(rows, columns)

    tensors = {}
    for name, m, n in round_.layers:
        A = torch.add(slice_of(top, n, shared)[:rank], slice_of(rank, n, starts), alpha=0.3)
        B = torch.add(slice_of(m, top, shared)[:, :rank], slice_of(m, rank, starts), alpha=0.3)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.mul_(decay).contiguous()
    return tensors


def config(round_: ModelRound, rank: int) -> dict[str, Any]:
    """The adapter config of a client of this rank."""
    targets = sorted({name.rsplit(".", 1)[-1] for name, _, _ in round_.layers})
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
