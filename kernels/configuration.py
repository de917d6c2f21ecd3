"""Which tile sizes a kernel runs with: candidates pruned by shape, and the measured best of them.

The order in which a kernel adds depends on its tile sizes, so they are never chosen by timing at run time: two servers
would get different bits. Each operation lists its candidates, best guess first; ``tuned.json`` beside this file,
written by ``python -m flexlora_fast.kernels.tune`` on a GPU and committed, names the one that was fastest. No choice
depends on how many layers there are or what their ranks are: a layer comes out the same alone and among others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from flexlora_fast.errors import OptionError

Precision = Literal["float32", "bf16x3", "tf32x3", "tf32", "bf16"]

# Registers of a multiprocessor, and the most that one thread can have.
REGISTERS = 65536
MOST_REGISTERS = 255

# What float32 products of 64 × 64 tiles run with where loads are of single elements. Found by compiling: with more
# registers ptxas reorders until it spills some bytes, on one target or another.
FMA_ODD = (16, 96)

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Configuration:
    """Tile sizes and launch options of a kernel.

    Attributes:
        blocks: the kernel's own constants (BLOCK_C, PART, …), as pairs of name and value.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline of its loads.
        resident: programs of the persistent grid on each multiprocessor; they share its registers.
        registers: of a thread, where fewer are wanted than ``resident`` programs leave to it.
        odd: num_warps and registers where loads are of single elements; otherwise there are twice the registers then.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    resident: int
    registers: int = MOST_REGISTERS
    odd: tuple[int, int] | None = None

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's own constants."""
        return dict(self.blocks)

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options.

        Fused multiply-add by name, because Triton's default for it is about to change. A limit of registers, because
        ``resident`` programs must fit; and because ptxas, left to itself, spills a few bytes to fit one more.
        """
        left = REGISTERS // (32 * self.num_warps * self.resident) // 8 * 8
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": min(left, self.registers, MOST_REGISTERS),
            "enable_fp_fusion": True,
        }

    @property
    def choice(self) -> dict[str, Any]:
        """What tells this candidate from others, as kept in tuned.json."""
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages, "resident": self.resident}
        return launch | {"blocks": self.constants}

    def for_alignment(self, aligned: bool) -> Configuration:
        """This, or what runs in its place where sizes or addresses are not multiples of 16 bytes.

        Loads are of single elements then, each with a pointer of its own. Sums keep their order.
        """
        if aligned:
            return self
        resident = max(1, self.resident // 2)
        if self.odd is None:
            return replace(self, resident=resident)
        return replace(self, resident=resident, num_warps=self.odd[0], registers=self.odd[1])


def configuration(
    num_warps: int, num_stages: int, resident: int, odd: tuple[int, int] | None = None, **blocks: int
) -> Configuration:
    """A Configuration from keyword block sizes."""
    return Configuration(tuple(blocks.items()), num_warps, num_stages, resident, odd=odd)


def padded(size: int, least: int = 16, most: int = 128) -> int:
    """The smallest power of two that holds ``size``, between ``least`` (what tensor cores take) and ``most``.

    >>> padded(1), padded(17), padded(4096)
    (16, 32, 128)
    """
    return min(max(least, 1 << (size - 1).bit_length()), most)


def entry(op: str, device: torch.device, dtype: torch.dtype, precision: Precision, width: int) -> str:
    """The name of a choice in tuned.json: what the best tile sizes were seen to depend on."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{op} sm_{major}{minor} {str(dtype).removeprefix('torch.')} {precision} {width}"


@cache
def tuned() -> dict[str, dict[str, Any]]:
    """What tuned.json holds: the choice of each entry."""
    table: dict[str, dict[str, Any]] = json.loads(TUNED.read_text())
    return table


def record(choices: dict[str, Configuration]) -> None:
    """Add measured choices to tuned.json."""
    table = tuned() | {name: chosen.choice for name, chosen in choices.items()}
    TUNED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    tuned.cache_clear()


def best(
    op: str,
    candidates: Sequence[Configuration],
    device: torch.device,
    dtype: torch.dtype,
    precision: Precision,
    width: int = 0,
) -> Configuration:
    """The measured best of ``candidates`` for this GPU, or the first where nothing was measured."""
    if device.type != "cuda":
        return candidates[0]
    measured = tuned().get(entry(op, device, dtype, precision, width))
    return next((c for c in candidates if c.choice == measured), candidates[0])


def check_precision(op: str, precision: str, **factors: torch.dtype) -> None:
    """Raise OptionError for a precision that does not exist, or that these factors cannot be multiplied in."""
    if precision not in get_args(Precision):
        known = ", ".join(repr(p) for p in get_args(Precision))
        raise OptionError(f"{op}: precision {precision!r} does not exist: expected one of {known}")
    for name, dtype in factors.items():
        if precision == "bf16x3" and dtype != torch.bfloat16:
            raise OptionError(
                f"{op}: precision 'bf16x3' is for bfloat16 factors, which it keeps exact; {name} is {dtype}: "
                "take 'tf32x3' or 'float32'"
            )
