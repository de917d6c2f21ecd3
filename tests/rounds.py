"""Rounds of synthetic clients, made from state dicts alone: every kind of layer, any mix of ranks, scales and dtypes.

A ``Client`` keeps the factors that it sends as A (E, r, n) and B (E, m, r) beside the scale PEFT would give them,
both written down here without the package's help. ``Client.adapter`` lays them out as PEFT's checkpoints do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexlora_fast import Adapter

PREFIX = "base_model.model."
Factors = tuple[Tensor, Tensor]  # A (E, r, n), B (E, m, r)


@dataclass(frozen=True)
class Layer:
    """One adapted weight of m outputs and n inputs, by its name in the state dict.

    ``tail``: the shape of a convolution's A behind r. ``pattern``: the path that PEFT matches rank_pattern and
    target_modules against, where it is not the name. ``parameter``: its entry in target_parameters.
    """

    name: str
    m: int
    n: int
    kind: str = "linear"
    experts: int = 1
    tail: tuple[int, ...] = ()
    pattern: str = ""
    parameter: str = ""

    @property
    def path(self) -> str:
        return self.pattern or self.name

    def keys(self) -> tuple[str, str]:
        a, b = ("lora_A.weight", "lora_B.weight")
        if self.kind == "embedding":
            a, b = ("lora_embedding_A", "lora_embedding_B")
        return f"{PREFIX}{self.name}.{a}", f"{PREFIX}{self.name}.{b}"

    def raw(self, A: Tensor, B: Tensor) -> Factors:
        """A (E, r, n) and B (E, m, r) as PEFT stores them for this kind of layer."""
        rank = A.shape[1]
        if self.kind == "moe":  # A expert-major (E·r, n), B rank-major (m, r·E)
            return torch.cat(list(A)), torch.stack(list(B), dim=2).reshape(self.m, rank * self.experts)
        if self.kind == "conv":
            return A[0].reshape(rank, *self.tail), B[0].reshape(self.m, rank, *(1 for _ in self.tail[1:]))
        return A[0].clone(), B[0].clone()


def conv(name: str, out: int, *tail: int) -> Layer:
    return Layer(name, out, math.prod(tail), "conv", tail=tail)


def attention(name: str, width: int) -> tuple[Layer, Layer]:
    """MultiheadAttention: the packed input projection, and out_proj inside it, under one pattern name."""
    return Layer(name, 3 * width, width), Layer(f"{name}.base_layer.out_proj", width, width, pattern=name)


def experts(name: str, count: int, hidden: int, inner: int) -> tuple[Layer, Layer]:
    """A MoE block with both of its 3-D parameters adapted: PEFT nests gate_up_proj inside down_proj."""
    up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
    return (
        Layer(f"{name}.base_layer", 2 * inner, hidden, "moe", count, pattern=up, parameter=up),
        Layer(name, hidden, inner, "moe", count, pattern=down, parameter=down),
    )


# Rectangular both ways, prime sides, and the shapes that index arithmetic gets wrong.
LINEAR = (Layer("h.0.up", 29, 12), Layer("h.0.down", 11, 23), Layer("h.1.up", 29, 12), Layer("h.1.down", 11, 23))
MODELS: dict[str, tuple[Layer, ...]] = {
    "linear": LINEAR,
    "conv1d_hf": (Layer("h.0.c_attn", 36, 12), Layer("h.0.c_proj", 12, 31)),
    "embedding": (Layer("embed", 12, 37, "embedding"), Layer("fc", 17, 12)),
    "conv": (conv("c1", 11, 5, 3), conv("c2", 7, 3, 3, 2), conv("c3", 6, 2, 1, 2, 3), conv("point", 13, 9, 1, 1)),
    "moe": experts("experts", 3, 10, 7),
    "mha": attention("mha", 12),
    "mixed": (
        *LINEAR[:2],
        Layer("embed", 12, 37, "embedding"),
        conv("c2", 7, 3, 3, 2),
        *attention("mha", 12),
        *experts("experts", 2, 10, 7),
    ),
    "weird": (Layer("wide", 5, 123), Layer("tall", 101, 3), Layer("one", 1, 1), Layer("row", 1, 9), Layer("col", 9, 1)),
}


@dataclass(frozen=True)
class Client:
    """What one client sends, and what it means: ΔW = scale·B·A by layer.

    ``bias`` is lora_B.bias by layer, ``extras`` goes by state-dict key without PEFT's prefix.
    """

    name: str
    config: dict[str, Any]
    layers: dict[str, Layer]
    factors: dict[str, Factors]
    scales: dict[str, float]
    weight: float = 1.0
    bias: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def rank(self, layer: str) -> int:
        return self.factors[layer][0].shape[1]

    def state_dict(self) -> dict[str, Tensor]:
        state = {PREFIX + key: value for key, value in self.extras.items()}
        for name, (A, B) in self.factors.items():
            a_key, b_key = self.layers[name].keys()
            state[a_key], state[b_key] = self.layers[name].raw(A, B)
        for name, bias in self.bias.items():
            state[f"{PREFIX}{name}.lora_B.bias"] = bias
        return state

    def adapter(self) -> Adapter:
        return Adapter.from_state_dict(self.state_dict(), self.config, client=self.name)

    def but(self, **changes: Any) -> Client:
        return dataclasses.replace(self, **changes)

    def mapped(self, change: Any) -> Client:
        """The same client with ``change(layer, A, B)`` for its factors; ranks must stay."""
        return self.but(factors={name: change(name, A, B) for name, (A, B) in self.factors.items()})

    def without(self, *gone: str) -> Client:
        """The same client that does not adapt these layers."""
        keep = {name: layer for name, layer in self.layers.items() if name not in gone}
        return self.but(
            layers=keep,
            config=self.config | _targets(keep.values()),
            factors={name: self.factors[name] for name in keep},
            scales={name: self.scales[name] for name in keep},
        )


def _targets(layers: Any) -> dict[str, list[str]]:
    layers = list(layers)
    return {
        "target_modules": sorted({layer.path for layer in layers if not layer.parameter}),
        "target_parameters": sorted(layer.parameter for layer in layers if layer.parameter),
    }


def client(
    name: str = "c0",
    model: str | Sequence[Layer] = "linear",
    *,
    rank: int = 4,
    alpha: float = 8,
    weight: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **config: Any,
) -> Client:
    """A client with random factors addressed by (seed, name); patterns go by ``Layer.path``."""
    layers = {layer.name: layer for layer in (MODELS[model] if isinstance(model, str) else model)}
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    full = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks, "alpha_pattern": alphas}
    full |= {"fan_in_fan_out": model == "conv1d_hf", "base_model_name_or_path": "base"}
    generator = torch.Generator().manual_seed(hash((seed, *name.encode())) % 2**63)
    factors, scales = {}, {}
    for key, layer in layers.items():
        r = ranks.get(layer.path, rank)
        A = torch.randn(layer.experts, r, layer.n, generator=generator, dtype=torch.float64) / layer.n**0.5
        B = torch.randn(layer.experts, layer.m, r, generator=generator, dtype=torch.float64)
        factors[key] = (A.to(dtype), B.to(dtype))
        scales[key] = alphas.get(layer.path, alpha) / (r**0.5 if rslora else r)
    return Client(name, full | _targets(layers.values()) | config, layers, factors, scales, weight)


DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float32": (torch.float32,),
    "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,),
    "mixed": (torch.float32, torch.bfloat16, torch.float16),
}


def typical(model: str = "linear", dtype: str = "float32", seed: int = 0) -> list[Client]:
    """Five clients of mixed ranks, alphas and weights, one with rsLoRA; R is above some sides and below others."""
    dtypes = DTYPES[dtype]
    settings: list[dict[str, Any]] = [
        {"rank": 2, "alpha": 16, "weight": 3.0},
        {"rank": 1, "alpha": 1, "weight": 1.0},
        {"rank": 4, "alpha": 6.5, "weight": 2.5, "rslora": True},
        {"rank": 4, "alpha": -8, "weight": 0.25},
        {"rank": 3, "alpha": 9, "weight": 4.0},
    ]
    return [
        client(f"c{i}", model, seed=seed, dtype=dtypes[i % len(dtypes)], **options)
        for i, options in enumerate(settings)
    ]


def patterned(model: str = "linear", seed: int = 0) -> list[Client]:
    """Clients whose rank_pattern and alpha_pattern give layers of one adapter other ranks and scales."""
    paths = list(dict.fromkeys(layer.path for layer in MODELS[model]))
    first, last = paths[0], paths[-1]
    return [
        client("p0", model, seed=seed, rank=2, alpha=4, rank_pattern={first: 5}, alpha_pattern={last: 3}),
        client("p1", model, seed=seed, rank=3, alpha=7, rank_pattern={last: 1}, rslora=True, weight=2.0),
        client("p2", model, seed=seed, rank=1, alpha=2, alpha_pattern={first: 0.5}, weight=0.5),
    ]


def fitted(method: str, clients: Sequence[Client]) -> list[Client]:
    """The clients as a method takes them: for FFA-LoRA with slices of one A, for FedEx-LoRA of equal ranks. Those of
    weight 0 stay as they are, and so do clients that fit already.
    """
    counted = [c for c in clients if c.weight > 0]
    if method == "ffa-lora":
        return [c.mapped(lambda x, A, B: (_one_A(x, A), B)) if c.weight > 0 else c for c in clients]
    if method == "fedex-lora":
        layers = {x for c in counted for x in c.factors}
        ranks = {x: max(c.rank(x) for c in counted if x in c.factors) for x in layers}
        return [_resized(c, ranks) if c.weight > 0 else c for c in clients]
    return list(clients)


def _one_A(layer: str, A: Tensor) -> Tensor:
    """The first rows of the A that all clients have in this layer, in a dtype of its own."""
    generator = torch.Generator().manual_seed(hash(tuple(layer.encode())) % 2**63)
    whole = torch.randn(64, A.shape[0], A.shape[2], generator=generator, dtype=torch.float64) / A.shape[2] ** 0.5
    return whole[: A.shape[1]].transpose(0, 1).to(A.dtype)


def _resized(c: Client, ranks: Mapping[str, int]) -> Client:
    """The client with more columns in its layers; alphas stay, scales follow."""
    if all(c.rank(x) == ranks[x] for x in c.factors):
        return c
    generator = torch.Generator().manual_seed(hash(tuple(c.name.encode())) % 2**63)
    factors, scales = {}, {}
    for x, (A, B) in c.factors.items():
        more = ranks[x] - A.shape[1]
        a = torch.randn(A.shape[0], more, A.shape[2], generator=generator) / A.shape[2] ** 0.5
        b = torch.randn(*B.shape[:2], more, generator=generator) * float(B.double().abs().max())
        factors[x] = torch.cat([A, a.to(A)], dim=1), torch.cat([B, b.to(B)], dim=2)
        alpha = c.config["alpha_pattern"].get(c.layers[x].path, c.config["lora_alpha"])
        scales[x] = alpha / (ranks[x] ** 0.5 if c.config["use_rslora"] else ranks[x])
    widest = max(ranks[x] for x in c.factors)
    pattern = {c.layers[x].path: ranks[x] for x in c.factors}
    return c.but(factors=factors, scales=scales, config=c.config | {"r": widest, "rank_pattern": pattern})


def with_spectrum(sigma: Tensor, m: int, n: int, clients: int, seed: int = 0) -> list[Client]:
    """Clients of one Linear "fc" (m, n) whose update has exactly these singular values, j ↦ client j mod K."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(sigma)
    U, V = (torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64))[0] for side in (m, n))
    made = []
    for i in range(clients):
        mine = slice(i, None, clients)
        base = client(f"s{i}", [Layer("fc", m, n)], rank=len(sigma[mine]), alpha=len(sigma[mine]))
        A, B = V[:, mine].T[None], (U[:, mine] * (clients * sigma[mine]))[None]
        made.append(base.but(factors={"fc": (A.float().contiguous(), B.float().contiguous())}))
    return made
