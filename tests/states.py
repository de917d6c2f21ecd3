"""What a server of state dicts is tested with: one policy, and states at its ranks, hostile ones among them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flexlora_fast as ff
from tests import rounds

ALPHA, LARGEST = 8, 8
A, B = (rounds.PREFIX + f"h.0.up.lora_{x}.weight" for x in "AB")
State = dict[str, Tensor]


def policy(**rules: Any) -> ff.RoundPolicy:
    rules = {"ranks": (1, 2, 4, 8), "max_weight": 1000.0, "max_layer_norm": 1e6} | rules
    return ff.RoundPolicy.from_adapter(rounds.client("server", rank=LARGEST, alpha=ALPHA).adapter(), **rules)


def state(rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    return rounds.client("c", rank=rank, alpha=ALPHA, seed=seed, dtype=dtype).state_dict()


def changed(**changes: Any) -> dict[Any, Any]:
    named = {{"A": A, "B": B}.get(key, key): value for key, value in changes.items()}
    return {key: x for key, x in (state() | named).items() if x is not None}


def delta(found: State, alpha: float = ALPHA) -> dict[str, Tensor]:
    """s·B·A by layer, float64, with s = alpha/r."""
    pairs = {key: key.replace("lora_A", "lora_B") for key in found if "lora_A" in key}
    return {a: alpha / len(found[a]) * found[b].double() @ found[a].double() for a, b in pairs.items()}


def expected(states: list[State], weights: list[float], rank: int, alpha: float = ALPHA) -> dict[str, Tensor]:
    """ΔW = Σ w/Σw · s·B·A of each, cut to ``rank`` by a float64 SVD."""
    deltas, found = [delta(x, alpha) for x in states], {}
    for key in deltas[0]:
        total = sum(w * d[key] for w, d in zip(weights, deltas, strict=True)) / sum(weights)
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        found[key] = U[:, :rank] * S[:rank] @ Vh[:rank]
    return found


def check(found: State, want: dict[str, Tensor], tol: float = 1e-5, alpha: float = ALPHA) -> None:
    for key, have in delta(found, alpha).items():
        assert torch.linalg.norm(have - want[key]) <= tol * torch.linalg.norm(want[key]), key


class Reference:
    """A tensor on disk, as NVFlare's lazy references are."""

    def __init__(self, tensor: Any, path: str) -> None:
        self.tensor, self.file_path, self.read = tensor, path, 0

    def materialize(self) -> Any:
        self.read += 1
        if isinstance(self.tensor, Exception):
            raise self.tensor
        return self.tensor


class Rude:
    """A tensor that raises whatever is done to it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no")


def _nan() -> Tensor:
    return state()[A].index_fill(0, torch.tensor([1]), math.nan)


# What it is: (state dict, code)
HOSTILE: dict[str, tuple[Any, str]] = {
    "nothing": (None, "content"),
    "a list": ([1, 2], "content"),
    "text": ("weights.bin", "content"),
    "no tensors": ({}, "missing-tensor"),
    "a tensor less": (changed(A=None), "missing-tensor"),
    "a tensor more": (changed(**{"base_model.model.x": torch.ones(1)}), "unknown-tensor"),
    "a path for a name": (changed(**{"../../etc/passwd\0": torch.ones(1)}), "unknown-tensor"),
    "a number for a name": (state() | {7: torch.ones(1)}, "unknown-tensor"),
    "text for a tensor": (changed(A="x" * 10**6), "content"),
    "None for a tensor": (state() | {A: None}, "content"),
    "a list for a tensor": (changed(A=[[1.0]]), "content"),
    "what raises": (changed(A=Rude()), "unreadable"),
    "a reference that raises": (changed(A=Reference(OSError("gone"), "/nonexistent")), "unreadable"),
    "NaN": (changed(A=_nan()), "not-finite"),
    "infinities": (changed(B=torch.full((29, 4), math.inf)), "not-finite"),
    "an update of norm 1e30": (changed(B=torch.full((29, 4), 1e30)), "norm"),
    "a rank of 3": (state(3), "rank"),
    "a rank of 64": (state(64), "file-size"),
    "ranks that differ": (changed(A=torch.ones(2, 12)), "shape"),
    "another shape": (changed(A=torch.ones(4, 13)), "shape"),
    "a vector": (changed(A=torch.ones(48)), "shape"),
    "a scalar": (changed(A=torch.tensor(1.0)), "shape"),
    "an empty tensor": (changed(A=torch.empty(0, 12)), "shape"),
    "a terabyte by strides": (changed(A=torch.ones(1, 1).expand(10**6, 10**6)), "file-size"),
    "a terabyte by strides of NumPy": (changed(A=np.broadcast_to(np.float32(1), (10**6, 10**6))), "file-size"),
    "a terabyte backwards": (changed(A=np.broadcast_to(np.ones(1, "f4"), (10**6, 10**6))[::-1]), "file-size"),
    "big-endian numbers": (changed(A=np.ones((4, 12), ">f4")), "dtype"),
    "a sparse tensor": (changed(A=torch.ones(4, 12).to_sparse()), "content"),
    "a tensor without memory": (changed(A=torch.ones(4, 12, device="meta")), "content"),
    "complex numbers": (changed(A=torch.ones(4, 12, dtype=torch.complex64)), "dtype"),
    "integers": (changed(A=torch.ones(4, 12, dtype=torch.int32)), "dtype"),
    "objects of NumPy": (changed(A=np.array([[object()]])), "dtype"),
    "texts of NumPy": (changed(A=np.array([["x"]])), "dtype"),
}
