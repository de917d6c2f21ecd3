"""Time every candidate of tile sizes on this GPU and keep the fastest in tuned.json.

    python -m flexlora_fast.kernels.tune [--layers 16] [--clients 50] [--rank 16] [--size 4096] [--dry]

Commit the file with the figures it prints: results then come out alike on every server with such a GPU. Run it again
after a change of a kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid

from flexlora_fast.kernels import combine, contract, gram, materialize
from flexlora_fast.kernels._triton import triton
from flexlora_fast.kernels.configuration import Configuration, Precision, entry, padded, record
from flexlora_fast.kernels.report import BOTH, CASES
from flexlora_fast.kernels.table import Table
from flexlora_fast.stack import Block, Stack

WIDTHS = (16, 32, 64, 128)

# The name of an entry of tuned.json, its candidates, and how one of them is run.
Work = tuple[str, Sequence[Configuration], Callable[..., Any]]


def rounds(layers: int, clients: int, rank: int, size: int, dtype: torch.dtype) -> Table:
    """A table of random factors of square layers."""
    generator = torch.Generator("cuda").manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    d = torch.ones(rank, dtype=torch.float64)
    return Table(
        [
            Stack([Block(factor(1, size, rank), factor(1, rank, size), d) for _ in range(clients)], size, size)
            for _ in range(layers)
        ]
    )


def work(table: Table, precision: Precision) -> Iterator[Work]:
    """All there is to tune on one table."""
    device, dtype, L = table.device, table.Q.dtype, table.layers
    for side in BOTH:
        length, options = table.side(side).length, {"side": side, "precision": precision}
        for width in WIDTHS:
            X = torch.randn(L, length, width, device=device)
            Z = torch.randn(L, table.W, width, device=device)
            for op, run, operand, candidates in (
                ("contract", contract.contract, X, contract.configurations(precision, length, width)),
                ("combine", combine.combine, Z, combine.configurations(precision, length, width)),
            ):
                name = entry(f"{op} {side}", device, dtype, precision, padded(width))
                yield name, candidates, partial(run, table, operand, **options)
        if precision != "bf16x3":  # which is bf16 there
            name = entry(f"gram {side}", device, dtype, precision, 0)
            yield name, gram.configurations(precision, length), partial(gram.gram_of, table, **options)
    name = entry("materialize", device, dtype, precision, 0)
    yield name, materialize.configurations(precision), partial(materialize.materialize, table, precision=precision)


def fastest(candidates: Sequence[Configuration], run: Callable[..., Any]) -> tuple[Configuration, float, float]:
    """The fastest candidate, its milliseconds, and those of the first."""
    times = []
    for c in candidates:
        try:
            times.append(float(triton.testing.do_bench(partial(run, chosen=c), return_mode="median")))
        except triton.runtime.errors.OutOfResources:  # more shared memory than this GPU has
            times.append(float("inf"))
    best = min(range(len(times)), key=times.__getitem__)
    return candidates[best], times[best], times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 16), ("clients", 50), ("rank", 16), ("size", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dry", action="store_true", help="do not write tuned.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA GPU, and torch sees none")
    grid = Grid("entry", "fastest", "ms", "ms of the first guess")
    choices = {}
    for precision, dtype in CASES:
        table = rounds(options.layers, options.clients, options.rank, options.size, dtype)
        for name, candidates, run in work(table, precision):
            chosen, milliseconds, first = fastest(candidates, run)
            choices[name] = chosen
            grid.add_row(name, str(chosen.choice), f"{milliseconds:.3f}", f"{first:.3f}")
    Console().print(grid)
    if not options.dry:
        record(choices)


if __name__ == "__main__":
    main()
