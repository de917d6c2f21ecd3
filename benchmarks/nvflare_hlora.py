"""What a rule that leaves scales out makes of mixed ranks: ``python -m benchmarks.nvflare_hlora [--out FILE]``.

The rule is that of the MedGemma example of NVFlare (examples/advanced/medgemma, ``HLoRAMaxRankAggregator``, read in
November 2026), restated: with w the normalised weights and r the global rank, the server makes

    Σ w_k·B_k·A_k = U·S·Vᵀ   (QR of the stacked √w_k·B_k and √w_k·A_k, SVD of the small core),
    B' = U_r,  A' = S_r·V_rᵀ,

and a client of rank r' takes B'[:, :r'] and A'[:r'], under its own s' = alpha/r'. FlexLoRA's is Σ w_k·s_k·B_k·A_k,
and s'·B'·A' is that cut to r'. Both get the same state dicts, ranks 4, 8 and 16 at alpha 16, so s = 4, 2 and 1. The
truth is a float64 SVD of the dense sum; errors are ‖s'·B'·A' − truth_r'‖_F/‖truth_r'‖_F. Times are medians of
alternating runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import flexlora_fast as ff
from benchmarks.text import markdown, seconds
from tests.rounds import Client, Layer, client

ALPHA, RANKS, LARGEST = 16, (4, 8, 16), 16
LAYERS = tuple(Layer(f"h.{i}", 512, 768) for i in range(4))
PEOPLE, RUNS = 9, 7
Factors = dict[str, tuple[Tensor, Tensor]]  # B and A by layer


def trained(seed: int = 0) -> list[Client]:
    """Clients that trained each something of their own."""
    return [
        client(f"c{i}", LAYERS, rank=RANKS[i % 3], alpha=ALPHA, weight=1.0 + i % 2, seed=seed) for i in range(PEOPLE)
    ]


def unchanged(seed: int = 0) -> list[Client]:
    """Clients that send the same update ΔW of rank 4, each in factors of its own rank and scale: the sum is ΔW."""
    first = client("c", LAYERS, rank=min(RANKS), alpha=ALPHA, seed=seed)

    def padded(name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        own, more = first.factors[name], A.shape[1] - min(RANKS)
        B = own[1] * first.scales[name] / (ALPHA / A.shape[1])
        zeros = B.new_zeros(*B.shape[:2], more)
        return torch.cat([own[0], A[:, :more]], dim=1), torch.cat([B, zeros], dim=2)

    return [one.mapped(padded) for one in trained(seed)]


def hlora(clients: Sequence[Client]) -> Factors:
    """The rule above: B' and A' at the largest rank."""
    total, made = sum(one.weight for one in clients), {}
    for layer in clients[0].layers:
        root = [(one.weight / total) ** 0.5 for one in clients]
        B = torch.cat([w * one.factors[layer][1][0] for w, one in zip(root, clients, strict=True)], dim=1)
        A = torch.cat([w * one.factors[layer][0][0] for w, one in zip(root, clients, strict=True)], dim=0)
        (Q, R), (P, T) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(R @ T.T, full_matrices=False)
        made[layer] = (Q @ U[:, :LARGEST], S[:LARGEST, None] * (Vh[:LARGEST] @ P.T))
    return made


def flexlora(clients: Sequence[Client]) -> ff.GlobalUpdate:
    """This package's round of the same clients."""
    adapters, weights = [one.adapter() for one in clients], [one.weight for one in clients]
    return ff.aggregate(adapters, weights=weights, rank=LARGEST, progress=False)


def truth(clients: Sequence[Client], layer: str, rank: int) -> Tensor:
    """Σ w·s·B·A, float64, cut to ``rank``."""
    total = sum(one.weight for one in clients)
    parts = [
        (one.weight / total * one.scales[layer]) * one.factors[layer][1][0].double() @ one.factors[layer][0][0].double()
        for one in clients
    ]
    U, S, Vh = torch.linalg.svd(torch.stack(parts).sum(0), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def errors(clients: Sequence[Client], rank: int) -> tuple[float, float]:
    """Of HLoRA's rule and of this package, at a client of ``rank``: the largest over the layers."""
    plain, update, found = hlora(clients), flexlora(clients), []
    own = update.adapter(rank=rank, alpha=ALPHA)
    for layer in clients[0].layers:
        B, A = plain[layer]
        want = truth(clients, layer, rank)
        served = (ALPHA / rank * B[:, :rank].double() @ A[:rank].double(), own.delta(layer).double())
        found.append([float(torch.linalg.norm(have - want) / torch.linalg.norm(want)) for have in served])
    one, other = (max(column) for column in zip(*found, strict=True))
    return one, other


def times(clients: Sequence[Client]) -> tuple[float, float]:
    """Seconds of a round of each, in memory: HLoRA's rule, and this package with all its checks."""
    taken: tuple[list[float], list[float]] = ([], [])
    rules: tuple[Callable[[Sequence[Client]], object], ...] = (hlora, flexlora)
    for _ in range(RUNS):
        for rule, found in zip(rules, taken, strict=True):
            started = time.perf_counter()
            rule(clients)
            found.append(time.perf_counter() - started)
    return median(taken[0]), median(taken[1])


def lines() -> Iterator[str]:
    """The report, as Markdown."""
    what = {"same ΔW from all": unchanged(), "each trained its own": trained()}
    body = [
        [name, str(rank), f"{ALPHA // rank}", f"{one:.2g}", f"{other:.1g}"]
        for name, clients in what.items()
        for rank in RANKS
        for one, other in [errors(clients, rank)]
    ]
    yield "# Scales left out: NVFlare's HLoRA example and FlexLoRA on the same state dicts\n"
    layer = LAYERS[0]
    shape = f"{len(LAYERS)} layers of {layer.m}×{layer.n}, float32, {torch.get_num_threads()} thread(s)"
    yield f"{PEOPLE} clients of ranks 4, 8 and 16 at alpha {ALPHA}, {shape}."
    yield "Relative error, in the Frobenius norm, of what a client is served: s'·B'·A' against a float64 SVD.\n"
    yield markdown(["clients", "r'", "s'", "HLoRA example", "flexlora_fast"], body) + "\n"
    one, other = times(trained())
    yield f"A round takes {seconds(one)} and {seconds(other)} (medians of {RUNS} alternating runs;"
    yield "the second reads, checks and certifies state dicts, the first is its linear algebra alone).\n"
    yield "Where all clients send one and the same ΔW, the sum without scales is Σ w_k/s_k·ΔW, and a client of rank r'"
    yield "takes it times its s': too large where its rank is low, too small where it is high. The error is made again"
    yield "in each round."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nvflare_hlora", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write as well")
    options = parser.parse_args(arguments)
    text = "\n".join(lines()) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
