"""Where the tests compute: ``pytest --device cuda`` sets it (``conftest.py``), before any test runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from flexlora_fast.lowrank import solve as solving
from flexlora_fast.lowrank.factorization import Factorization
from flexlora_fast.stack import Block, Stack

DEVICE = torch.device("cpu")


def moved(stack: Stack) -> Stack:
    """The stack with its factors on ``DEVICE``."""
    blocks = [Block(block.B.to(DEVICE), block.A.to(DEVICE), block.d) for block in stack.blocks]
    return Stack(blocks, stack.m, stack.n, stack.batch)


def solve(stack: Stack, rank: int, **options: Any) -> Factorization:
    """``lowrank.solve`` on ``DEVICE``, its result on the CPU."""
    f = solving.solve(moved(stack), rank, **options)
    here = {name: x.cpu() for name, x in vars(f).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(f, **here)
