"""A group of layers on a GPU: Triton kernels that read the clients' factors from where they are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexlora_fast.backends.group import coefficients
from flexlora_fast.stack import Stack

if TYPE_CHECKING:
    from flexlora_fast.kernels.table import Table


class Tabled:
    """A ``group.Group`` over a device table of column addresses; no factor is copied.

    Products of bfloat16 factors are exact on the matrix units. Where one operand is float32 it is split into three
    bfloat16 (or TF32) numbers, which hold its 24 bits: float32's accuracy at a third of the matrix units' rate.

    ``table``: where the factors lie; ``d``: (L, W) float64 as ``group.Group`` has it.

    Raises ``BackendError`` where Triton is missing or cannot run on the factors' device.
    """

    @classmethod
    def of(cls, stacks: Sequence[Stack]) -> Tabled:
        """The group of these stacks."""
        from flexlora_fast.kernels.table import Table

        table = Table(stacks)
        return cls(table, coefficients(stacks, table.W, table.device))

    def __init__(self, table: Table, d: Tensor) -> None:
        from flexlora_fast.kernels.combine import combine
        from flexlora_fast.kernels.gram import gram
        from flexlora_fast.kernels.materialize import materialize
        from flexlora_fast.kernels.project import project_t

        self._combine, self._gram, self._materialize, self._project_t = combine, gram, materialize, project_t
        self.table, self.d = table, d
        self.layers, self.m, self.n = self.table.layers, self.table.m, self.table.n
        self.W, self.device = self.table.W, self.table.device
        sixteen = self.table.P.dtype == self.table.Q.dtype == torch.bfloat16
        self._precision: Any = "bf16x3" if sixteen else "tf32x3"

    def gram(self) -> tuple[Tensor, Tensor]:
        return self._gram(self.table, precision=self._precision)

    def project_t(self, Y: Tensor) -> Tensor:
        return self._project_t(self.table, Y, precision=self._precision)

    def combine(self, Z: Tensor) -> Tensor:
        return self._combine(self.table, Z, precision=self._precision)

    def materialize(self, out: Tensor | None = None) -> Tensor:
        return self._materialize(self.table, out, precision=self._precision)

    def signature(self) -> Hashable:
        return "tabled", self.table.signature(), self._precision

    def inputs(self) -> list[Tensor]:
        return [*self.table.inputs(), self.d]

    def copied(self) -> Tabled:
        return Tabled(self.table.copied(), self.d.clone())
