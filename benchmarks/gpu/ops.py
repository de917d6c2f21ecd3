"""The gate's only hold on the engine: everything that it measures, by the engine's own names.

Where an op, the round or the small problems move, this file moves with them, and no other of the gate.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import flexlora_fast as ff
from benchmarks.gpu.stage import NEEDS_GPU
from benchmarks.peers import Answer
from benchmarks.workloads import Clients
from flexlora_fast.stack import Block, Stack

# What the kernels can compute in, with factors of each type, most accurate first.
PRECISIONS = {torch.bfloat16: ("bf16x3", "bf16"), torch.float32: ("tf32x3", "tf32")}
# A precision's products for each multiplication of the formula, and whose measured rate bounds them.
_WORK = {
    "float32": (1, "float32"),
    "bf16x3": (3, "bf16"),
    "bf16": (1, "bf16"),
    "tf32x3": (3, "tf32"),
    "tf32": (1, "tf32"),
}
# Functions, looked up in their module at each call, that solve the small problems of a round: in the
# solver of whole groups, and in those of single layers.
SMALL = (
    ("flexlora_fast.backends.small", "ritz"),
    ("flexlora_fast.backends.small", "whiten"),
    ("flexlora_fast.backends.small", "condition"),
    ("flexlora_fast.backends.reference", "orthonormalize"),
    ("flexlora_fast.backends.reference", "eigh_small"),
)
# The names of the kernels, for profilers.
KERNELS = ("contract_kernel", "combine_kernel", "gram_kernel", "materialize_kernel", "pack_kernel", "sum_parts_kernel")
# What the names of the CUDA kernels begin with.
CUDA_KERNELS = "flexlora_"

# The CUDA kernels' host functions, looked up by name since they may not be there, and what says whether they can run.
CUDA, LAUNCHER = "flexlora_fast.backends.cuda", "flexlora_fast.backends.launcher"
# The eigensolver that takes one matrix after the other.
TORCH_EIGH = "torch.linalg.eigh"

Op = Callable[[], object]
# A function, or why there is none here.
Found = Callable[..., Any] | str


def products(op: str, precision: str) -> tuple[int, str]:
    """How many products the precision takes for one of the op's, and on which unit.

    A Gram multiplies factors with each other: where both are bfloat16, one product is exact.
    """
    count, unit = _WORK[precision]
    return (1 if (op, precision) == ("gram", "bf16x3") else count), unit


def kernels_obstacle() -> str | None:
    """Why the Triton kernels cannot run here; None if they can."""
    from flexlora_fast import kernels

    return kernels.obstacle()


def stacks(layers: int, m: int, n: int, ranks: Sequence[int], dtype: torch.dtype, device: str) -> list[Stack]:
    """Layers of one shape with fresh random factors, each client's in tensors of their own, as uploads are."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=g, device=device).to(dtype)

    def one() -> Stack:
        blocks = [Block(normal(m, r), normal(r, n), torch.full((r,), 1 / r, dtype=torch.float64)) for r in ranks]
        return Stack(blocks, m, n)

    return [one() for _ in range(layers)]


def kernel_ops(stacks: Sequence[Stack], X: Tensor, Y: Tensor, precision: str) -> dict[str, Op]:
    """The Triton ops over one table: X (L, n, l), Y (L, m, l), in the type that the precision multiplies."""
    from flexlora_fast.kernels.gram import gram
    from flexlora_fast.kernels.materialize import materialize
    from flexlora_fast.kernels.pack import pack
    from flexlora_fast.kernels.project import project, project_t
    from flexlora_fast.kernels.table import Table

    table: Any = Table(stacks)
    if precision == "bf16":
        X, Y = X.bfloat16(), Y.bfloat16()
    return {
        "project": lambda: project(table, X, precision=precision),
        "project_t": lambda: project_t(table, Y, precision=precision),
        "gram": lambda: gram(table, precision=precision),
        "materialize": lambda: materialize(table, precision=precision),
        "pack": lambda: pack(table, dtype=stacks[0].blocks[0].B.dtype),
    }


def torch_ops(stacks: Sequence[Stack], X: Tensor, Y: Tensor, dtype: torch.dtype) -> dict[str, Op]:
    """What a user would write with torch's own products: batched, over factors packed beforehand (not timed).

    P (L, m, R), Q (L, R, n) in ``dtype``. Clients have one rank each in all layers. "pack" is the packing itself.
    """
    P, Q = (torch.cat([getattr(s, f"packed_{side}")(dtype) for s in stacks]) for side in "PQ")
    d, X, Y = stacks[0].d.to(P.device, dtype).unsqueeze(1), X.to(dtype), Y.to(dtype)
    return {
        "project": lambda: P @ ((Q @ X) * d),
        "project_t": lambda: Q.mT @ ((P.mT @ Y) * d),
        "gram": lambda: (P.mT @ P, Q @ Q.mT),
        "materialize": lambda: (P * d.mT) @ Q,
        "pack": lambda: [(s.packed_P(dtype), s.packed_Q(dtype)) for s in stacks],
    }


def prepared_round(
    states: Sequence[dict[str, Tensor]],
    configs: Sequence[dict[str, Any]],
    weights: Sequence[float],
    k: int,
    device: str,
    certificate: Literal["exact", "estimate"] = "exact",
) -> Callable[[], ff.GlobalUpdate]:
    """All clients taken in, their factors where they were drawn; the call finishes the round, as often as wanted.

    Results stay on the device, as the peers' do.
    """
    aggregator = ff.Aggregator(rank=k, device=device, results="device", progress=False, certificate=certificate)
    for i, (state, config, weight) in enumerate(zip(states, configs, weights, strict=True)):
        aggregator.add(ff.Adapter.from_state_dict(state, config), weight, client=f"client-{i:05d}")
    return aggregator.finish


def streamed_round(
    sources: Sequence[ff.Adapter | Path],
    weights: Sequence[float],
    k: int,
    device: str,
    limit: int,
    read: Literal["add", "finish"],
) -> Callable[[], ff.GlobalUpdate]:
    """The same for adapters in host memory or folders, whose factors pass through so many bytes of the device."""
    aggregator = ff.Aggregator(rank=k, device=device, memory_limit=limit, read=read, progress=False)
    for i, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        aggregator.add(source, weight, client=f"client-{i:05d}")
    return aggregator.finish


def prepared_layer(
    clients: Clients, k: int, certificate: Literal["exact", "estimate"] = "exact"
) -> Callable[[], Answer]:
    """The same for a single layer: through the public face, so that the planner chooses as in any round."""
    name, K = "layer.fc", len(clients)
    keys = {side: f"base_model.model.{name}.lora_{side}.weight" for side in "AB"}
    states = [{keys["A"]: A, keys["B"]: B} for B, A, _ in clients]
    ranks = [A.shape[0] for _, A, _ in clients]
    # w is 1/K for each, so that w·s = c.
    configs = [
        {"peft_type": "LORA", "r": r, "lora_alpha": c * K * r, "target_modules": ["fc"]}
        for r, (_, _, c) in zip(ranks, clients, strict=True)
    ]
    finish = prepared_round(states, configs, [1.0] * K, k, str(clients[0][0].device), certificate)
    return lambda: answer(finish(), name)


def triplets(update: ff.GlobalUpdate, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), V (n, k) of one layer."""
    f = update[layer].factorization
    return f.U[0], f.S[0], f.V[0]


def answer(update: ff.GlobalUpdate, layer: str) -> Answer:
    """B (m, k) with all of S, A (k, n) of one layer."""
    U, S, V = triplets(update, layer)
    return Answer(U * S.to(U), V.T, update[layer].solver, update[layer].iterations)


def phases(update: ff.GlobalUpdate) -> Mapping[str, float]:
    """Seconds of the round's parts, as the round itself reports them; not those before ``finish``."""
    return {name: seconds for name, seconds in update.seconds.items() if name != "collect"}


def client_factors(
    states: Sequence[dict[str, Tensor]], configs: Sequence[dict[str, Any]], weights: Sequence[float], layer: str
) -> Clients:
    """(B, A, w·s) of one layer of every client, for the truth: by PEFT's own names and formula, not by the engine."""
    total = sum(weights)
    return [
        (
            state[f"base_model.model.{layer}.lora_B.weight"],
            state[f"base_model.model.{layer}.lora_A.weight"],
            weight / total * config["lora_alpha"] / config["r"],
        )
        for state, config, weight in zip(states, configs, weights, strict=True)
    ]


def eigensolvers(device: str) -> dict[str, Found]:
    """By name: (l, l) symmetric float64 matrices (b, l, l) to eigenvalues (b, l) in either order and eigenvectors."""
    from flexlora_fast.backends import cusolver

    cuda = device.startswith("cuda")
    return {
        "cuda.jacobi_eigh": of_extension("jacobi_eigh", device),
        "cuSOLVER XsyevBatched": (cusolver.obstacle() or cusolver.eigh) if cuda else NEEDS_GPU,
        "cupy.linalg.eigh": _of_cupy() if cuda else NEEDS_GPU,
        TORCH_EIGH: torch.linalg.eigh,
    }


def orthonormalizers(device: str) -> dict[str, Found]:
    """By name: panels (b, m, l) float32 to orthonormal bases of their columns, of the same shape."""
    from flexlora_fast.backends import reference

    return {
        "cuda.orthonormalize": of_extension("orthonormalize", device),
        "reference.orthonormalize": reference.orthonormalize,
        "torch.linalg.qr": lambda Y: torch.linalg.qr(Y)[0],
    }


def extension_obstacle(device: str) -> str | None:
    """Why the CUDA extension cannot be called here; None if it can."""
    if not device.startswith("cuda"):
        return NEEDS_GPU
    obstacle = _function(LAUNCHER, "obstacle")
    return f"there is no {LAUNCHER}" if obstacle is None else obstacle()


def of_extension(name: str, device: str) -> Found:
    """A function of the CUDA extension, or why there is none here."""
    return extension_obstacle(device) or _function(CUDA, name) or f"{CUDA} has no {name}"


def extension_ops(device: str, matrices: int, rows: int, width: int) -> dict[str, Op]:
    """What there is of the CUDA kernels' host functions, on matrices (b, l, l) or panels (b, rows, l) of l = ``width``.

    Nothing but these kernels runs in a call.
    """
    g = torch.Generator().manual_seed(0)
    panel = torch.randn(matrices, rows, width, generator=g)
    eye = torch.eye(width, dtype=torch.float64).repeat(matrices, 1, 1)
    gram, eye = (panel.double().mT @ panel.double()).to(device), eye.to(device)
    X, Y = panel.to(device), panel.to(device, copy=True)
    G, M, d = gram.float(), gram.float(), torch.ones(matrices, width, dtype=torch.float64, device=device)
    spoiled, column = torch.zeros(matrices, dtype=torch.bool, device=device), X[:, 0].contiguous()
    calls: dict[str, Callable[[Callable[..., Any]], object]] = {
        "signs": lambda f: f([(1, 0)] * matrices, rows, width, device=X.device),
        "gram64": lambda f: (f(X, Y), f(X, X, symmetric=True)),
        "whiten": lambda f: f(gram),
        "condition": lambda f: f(gram),
        "ritz_begin": lambda f: f(gram, gram),
        "ritz_end": lambda f: f(gram, d, eye, spoiled, width, last=True),
        "orthonormalize": lambda f: f(X),
        "apply_right": lambda f: f(X, gram),
        "scale_grams": lambda f: f(G, M, d),
        "chebyshev": lambda f: f(X, X, X, column, column, column, out=torch.empty_like(X)),
        "jacobi_eigh": lambda f: f(gram),
        "jacobi_svd": lambda f: f(gram),
    }
    found = {name: of_extension(name, device) for name in calls}
    return {name: functools.partial(calls[name], f) for name, f in found.items() if callable(f)}


def _of_cupy() -> Found:
    try:
        cupy: Any = importlib.import_module("cupy")
    except Exception as error:  # one that does not fit the driver raises whatever it raises
        return f"cupy cannot be imported: {error}"
    return lambda C: tuple(torch.from_dlpack(X) for X in cupy.linalg.eigh(cupy.from_dlpack(C)))


class SmallProblems:
    """Device time spent in ``SMALL`` while :meth:`watch` is on, by CUDA events around every outermost call.

    ``absent``: names of ``SMALL`` that this engine does not have.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.absent = [f"{module}.{name}" for module, name in SMALL if _function(module, name) is None]
        self._depth = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count every call from here on, on a GPU. Calls recorded into a CUDA graph leave no span."""
        found = [(module, name, _function(module, name)) for module, name in SMALL]
        originals = [(sys.modules[module], name, call) for module, name, call in found if call is not None]
        try:
            for module, name, original in originals:
                setattr(module, name, self._timed(original))
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._depth or torch.cuda.is_current_stream_capturing():
                return original(*arguments, **options)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._depth += 1
            start.record()
            try:
                return original(*arguments, **options)
            finally:
                self._depth -= 1
                end.record()
                self.spans.append((start, end))

        return call

    @property
    def seconds(self) -> float:
        """Of all spans; waits for the device."""
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1e3


def _function(module: str, name: str) -> Callable[..., Any] | None:
    """A function by its name; None where the engine has none of it."""
    if importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), name, None)
