"""What every kernel takes of every target GPU: registers, shared memory, spills. No GPU is needed.

    python -m flexlora_fast.kernels.report [--all] [--targets 80 90 100]

Without ``--all``, each operation is compiled with the tile sizes it starts from; with it, with every candidate. Exits
with 1 where anything spills.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table as Grid

from flexlora_fast.kernels import combine, contract, gram, materialize, pack, parts
from flexlora_fast.kernels.compiled import TARGETS, Resources, resources
from flexlora_fast.kernels.configuration import REGISTERS, Configuration, Precision
from flexlora_fast.kernels.table import WIDEST_LOAD, Side

# Bytes of shared memory of a multiprocessor; each program takes 1 KiB more than it asked for.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}

TYPES = {name: "*i64" for side in ("", "P_", "Q_") for name in (f"{side}address_ptr", f"{side}stride_ptr")} | {
    "offset_ptr": "*i64",
    "d_ptr": "*fp32",
    "out_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "G_ptr": "*fp32",
    "Y_ptr": "*fp32",
}

# The precisions and the factors they are for.
CASES: tuple[tuple[Precision, torch.dtype], ...] = (
    ("float32", torch.float32),
    ("float32", torch.bfloat16),
    ("bf16x3", torch.bfloat16),
    ("tf32x3", torch.float32),
    ("tf32x3", torch.bfloat16),
    ("tf32", torch.float32),
    ("tf32", torch.bfloat16),
    ("bf16", torch.bfloat16),
    ("bf16", torch.float32),
)
WIDTHS = (16, 64, 128)
BOTH: tuple[Literal["P"], Literal["Q"]] = ("P", "Q")
LENGTH = 4096


@dataclass(frozen=True)
class Variant:
    """One kernel with constants and tile sizes, ready to compile."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    chosen: Configuration

    def resources(self, target: int, *, aligned: bool = True) -> Resources:
        """Compile for sm_<target>; not ``aligned``: for clients of rank 1 and sizes that are multiples of nothing."""
        constants = dict(self.constants)
        for name in constants:
            if not aligned and name.endswith(("RUN", "BYTES")):
                constants[name] = 1
        return resources(
            self.kernel, self.types, constants, self.chosen.for_alignment(aligned), target, aligned=aligned
        )


def side(name: Literal["P", "Q"], dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a side of factors of ``dtype`` that are read in the widest loads."""
    nothing = torch.empty(0, dtype=torch.int64)
    run = WIDEST_LOAD // dtype.itemsize if name == "P" else 1
    return Side(name, LENGTH, dtype, nothing, nothing, run, WIDEST_LOAD, wide=False).constants


def variants(
    cases: Sequence[tuple[Precision, torch.dtype]] = CASES, widths: Sequence[int] = WIDTHS
) -> Iterator[Variant]:
    """Every operation with every candidate of its tile sizes, best guess first."""
    for precision, dtype in cases:
        kind = f"{str(dtype).removeprefix('torch.')} {precision}"
        for name in BOTH:
            yield from _products(name, kind, precision, dtype, widths)
        sides = {f"{name}_{key}": value for name in BOTH for key, value in side(name, dtype).items()}
        constants = sides | {"PRECISION": precision, "ADD": True, "GROUP": materialize.GROUP}
        for c in materialize.configurations(precision):
            yield Variant(f"materialize {kind}", materialize.materialize_kernel, TYPES, constants, c)
    for dtype in sorted({dtype for _, dtype in cases}, key=str):
        for name in BOTH:
            constants = side(name, dtype) | {"SCALED": True}
            label = f"pack {name} {str(dtype).removeprefix('torch.')}"
            yield Variant(label, pack.pack_kernel, TYPES, constants, pack.CONFIGURATIONS[name])
    yield Variant("sum_parts", parts.sum_parts_kernel, TYPES, {"SCALED": True}, parts.CONFIGURATION)


def _products(
    name: Literal["P", "Q"], kind: str, precision: Precision, dtype: torch.dtype, widths: Sequence[int]
) -> Iterator[Variant]:
    """The operations that read one side."""
    thin = "*bf16" if precision == "bf16" else "*fp32"
    types = TYPES | {"X_ptr": thin, "Z_ptr": thin}
    constants = side(name, dtype) | {"PRECISION": precision, "SPLIT": False}
    for width in widths:
        for c in contract.configurations(precision, LENGTH, width):
            yield Variant(f"contract {name} l={width} {kind}", contract.contract_kernel, types, constants, c)
        for c in combine.configurations(precision, LENGTH, width):
            yield Variant(f"combine {name} l={width} {kind}", combine.combine_kernel, types, constants, c)
    if precision != "bf16x3":  # which is bf16 there
        for c in gram.configurations(precision, LENGTH):
            yield Variant(f"gram {name} {kind}", gram.gram_kernel, types, constants, c)


def first_of_each(candidates: Iterable[Variant]) -> list[Variant]:
    """The best guess of each name."""
    return list({v.name: v for v in reversed(list(candidates))}.values())[::-1]


def fits(variant: Variant, taken: Resources, target: int) -> bool:
    """Whether all programs that the persistent grid puts on a multiprocessor are there at once."""
    resident = variant.chosen.resident
    threads = 32 * variant.chosen.num_warps * resident
    registers = -(-taken.registers // 8) * 8 * threads  # given out in eights
    return registers <= REGISTERS and (taken.shared + 1024) * resident <= SHARED[target]


def report(
    candidates: Iterable[Variant], targets: Sequence[int] = TARGETS, console: Console | None = None
) -> list[str]:
    """Print a table of kernel × target; the names of what spills."""
    grid = Grid("kernel", "tiles", *(f"sm_{t}" for t in targets), title="registers / shared bytes / spilled bytes")
    spilling = []
    for variant in candidates:
        cells = []
        for target in targets:
            taken = variant.resources(target)
            note = "" if fits(variant, taken, target) else " (fewer resident)"
            cells.append(f"{taken.registers} / {taken.shared} / {taken.spilled}{note}")
            if taken.spilled:
                spilling.append(f"{variant.name} on sm_{target}")
        sizes = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in variant.chosen.blocks)
        grid.add_row(variant.name, f"{sizes} w{variant.chosen.num_warps} s{variant.chosen.num_stages}", *cells)
    (console or Console()).print(grid)
    return spilling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every candidate, not only the best guesses")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    options = parser.parse_args()
    every = list(variants())
    if spilling := report(every if options.all else first_of_each(every), options.targets):
        sys.exit("spills: " + ", ".join(spilling))


if __name__ == "__main__":
    main()
