"""A quick comparison with the dense loop, in the same process on the same adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora_fast import tables
from flexlora_fast.adapter import Adapter
from flexlora_fast.errors import OptionError
from flexlora_fast.oneshot import aggregate
from flexlora_fast.tables import count, number

if TYPE_CHECKING:
    from rich.console import RenderableType

Results = list[dict[int, Tensor]]  # by layer: ΔW_r (m, n) by rank


def parse_shape(text: str) -> tuple[int, int]:
    """``"4096x1024"`` as (m, n). Raises ``OptionError``.

    >>> parse_shape("4096x1024")
    (4096, 1024)
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise OptionError(f"--shape is {text!r}; give outputs × inputs, such as 4096x1024")
    return int(parts[0]), int(parts[1])


def clients(m: int, n: int, ranks: Sequence[int], layers: int, seed: int = 0) -> list[Adapter]:
    """Synthetic adapters: Gaussian factors, column j of both scaled by 1/√j, so that spectra decay."""
    adapters = []
    for i, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        decay = torch.arange(1, rank + 1).rsqrt()
        state = {}
        for layer in range(layers):
            name = f"base_model.model.layers.{layer}.fc"
            state[f"{name}.lora_A.weight"] = decay[:, None] * torch.randn(rank, n, generator=generator) / n**0.5
            state[f"{name}.lora_B.weight"] = decay * torch.randn(m, rank, generator=generator) / m**0.5
        adapters.append(Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 2 * rank}, f"client-{i:03d}"))
    return adapters


def dense_loop(adapters: Sequence[Adapter], dtype: torch.dtype) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """The plain way: by layer, B (m, r) and A (r, n) by rank, from an SVD of the dense mean update (m, n)."""
    result = []
    for layer in adapters[0].layers:
        total = torch.zeros(adapters[0].spec(layer).m, adapters[0].spec(layer).n, dtype=dtype)
        for adapter in adapters:
            A, B = (X[0].to(dtype) for X in adapter.factors(layer))
            total += adapter.scale(layer) / len(adapters) * (B @ A)
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        ranks = {min(adapter.rank(layer), len(S)) for adapter in adapters}
        result.append({r: (U[:, :r] * S[:r], Vh[:r]) for r in ranks})
    return result


def fast(adapters: Sequence[Adapter], tol: float) -> tuple[list[dict[int, tuple[Tensor, Tensor]]], dict[str, int]]:
    """This package, from adapters to adapters, and the solvers it chose."""
    update = aggregate(adapters, tol=tol, progress=False)
    sent = {rank: update.adapter(rank=rank) for rank in {adapter.rank(adapter.layers[0]) for adapter in adapters}}
    result = []
    for layer in update.layers:
        factors = {rank: (adapter.factors(layer), adapter.scale(layer)) for rank, adapter in sent.items()}
        result.append({r: (s * B[0], A[0]) for r, ((A, B), s) in factors.items()})
    return result, dict(update.solvers())


def compare(
    m: int, n: int, ranks: Sequence[int], *, layers: int = 2, tol: float = 1e-3, repeats: int = 3
) -> dict[str, Any]:
    """Seconds (the fastest of ``repeats``) and errors of this package and of the dense loop in both precisions.

    relative_error: the largest ‖X − ΔW_r‖_F/‖ΔW_r‖_F over layers and ranks against the float64 truncation ΔW_r;
    excess: the largest ‖ΔW − X‖_F/‖ΔW − ΔW_r‖_F − 1 (null where ΔW_r is all of ΔW), which is what ``tol`` bounds.
    ratio: how many times as long as this package.
    """
    if max(ranks) > min(m, n):
        raise OptionError(f"rank {max(ranks)} is more than a {m}×{n} layer has; give smaller --ranks")
    adapters = clients(m, n, ranks, layers)
    ways: dict[str, Callable[[], Any]] = {
        "flexlora_fast": lambda: fast(adapters, tol),
        "dense float32": lambda: dense_loop(adapters, torch.float32),
        "dense float64": lambda: dense_loop(adapters, torch.float64),
    }
    done = {name: _timed(way, repeats) for name, way in ways.items()}
    solvers = done["flexlora_fast"][1][1]
    truth = done["dense float64"][1]
    own = done["flexlora_fast"][0]
    entries = []
    for name, (seconds, output) in done.items():
        factors = output[0] if name == "flexlora_fast" else output
        error, excess = _errors(adapters, factors, truth)
        entries.append(
            {"way": name, "seconds": seconds, "ratio": seconds / own, "relative_error": error, "excess": excess}
        )
    return {
        "format": "flexlora_fast.bench/1",
        "m": m,
        "n": n,
        "layers": layers,
        "ranks": list(ranks),
        "clients_rank_total": sum(ranks),
        "tol": tol,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "solvers": solvers,
        "results": entries,
    }


def view(result: dict[str, Any]) -> RenderableType:
    """The comparison as a rich table."""
    rows = [
        [x["way"], number(x["seconds"]), f"{x['ratio']:.2f}×", number(x["relative_error"]), number(x["excess"])]
        for x in result["results"]
    ]
    solvers = ", ".join(f"{name} {count}" for name, count in sorted(result["solvers"].items()))
    title = (
        f"{count(result['layers'], 'layer')} {result['m']}×{result['n']}, {count(len(result['ranks']), 'client')}, R = "
        f"{result['clients_rank_total']}, tol {result['tol']:g}, {count(result['threads'], 'thread')}, best of "
        f"{result['repeats']}; solved by {solvers}"
    )
    return tables.table(title, ["way", "seconds", "time ratio", "relative error", "excess"], rows, left=["way"])


def _timed(way: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, output = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        output = way()
        best = min(best, time.perf_counter() - start)
    return best, output


def _errors(adapters: Sequence[Adapter], results: Any, truth: Any) -> tuple[float, float | None]:
    """The worst relative error and excess over layers and ranks, in float64."""
    worst, excesses = 0.0, []
    for layer, factors, exact in zip(adapters[0].layers, results, truth, strict=True):
        full = sum(a.scale(layer) / len(adapters) * _product(*reversed(a.factors(layer)))[0] for a in adapters)
        for rank, (B, A) in factors.items():
            X, best = _product(B, A), _product(*exact[rank])
            worst = max(worst, float((X - best).norm() / best.norm()))
            lost = float((full - best).norm())
            if lost > 1e-9 * float(best.norm()):
                excesses.append(float((full - X).norm()) / lost - 1)
    return worst, max(excesses, default=None)


def _product(B: Tensor, A: Tensor) -> Tensor:
    return B.double() @ A.double()
