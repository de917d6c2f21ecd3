"""The server's state between two rounds, in a folder: all that going on takes, and no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flexlora_fast import files
from flexlora_fast.methods.fedopt import ServerOptimizer
from flexlora_fast.methods.sparse import SparseDelta
from flexlora_fast.simulate.prepare import write_json
from flexlora_fast.storage import UPDATE_NAME
from flexlora_fast.tensorfile import TensorFile
from flexlora_fast.update import GlobalUpdate

BASE, SPARSE, OPTIMIZER, FACTS = "base.safetensors", "sparse.safetensors", "optimizer", "state.json"


@dataclass
class State:
    """After ``round`` rounds: the global update (None: nobody has sent anything yet), and what else there is.

    Attributes:
        base: a file of what was added to base weights, float32 by layer; None where nothing was.
        sparse: a file of the trained entries of base weights, in an SLoRA stage.
        optimizer: the server's, with its moments.
        ranks: layers' ranks of clients that changed them (HetLoRA's self-pruning), by name.
        extra: JSON-able state of asynchronous rounds.
    """

    round: int = 0
    update: GlobalUpdate | None = None
    base: Path | None = None
    sparse: Path | None = None
    optimizer: ServerOptimizer | None = None
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def save(
        self, folder: Path, *, base: Mapping[str, Tensor] | None = None, sparse: SparseDelta | None = None
    ) -> None:
        """Write it; the file with the facts comes last, so that a folder with it is whole.

        ``base``, ``sparse``: new contents of those files; without, ``base`` goes on as it was, and ``sparse`` ends.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.update is not None:
            self.update.save(folder / UPDATE_NAME)
        if base is not None:
            tensors = {layer: tensor.contiguous() for layer, tensor in base.items()}
            files.replace(folder / BASE, lambda to: save_file(tensors, to))
        elif (before := self.base) is not None:
            files.replace(folder / BASE, lambda to: shutil.copyfile(before, to))
        self.sparse = None if sparse is None else sparse.save(folder / SPARSE)
        if self.optimizer is not None:
            self.optimizer.save(folder / OPTIMIZER)
        self.base = folder / BASE if (folder / BASE).is_file() else None
        write_json(folder / FACTS, {"round": self.round, "ranks": self.ranks, "extra": self.extra})
        files.sync_folder(folder.parent)

    @classmethod
    def load(cls, folder: Path, optimizer: type[ServerOptimizer] | None = None) -> State:
        """What ``save`` wrote; ``optimizer``: the kind of its server optimizer."""
        facts = json.loads((folder / FACTS).read_text())
        update, base, sparse = (folder / name for name in (UPDATE_NAME, BASE, SPARSE))
        return cls(
            facts["round"],
            GlobalUpdate.load(update) if update.is_file() else None,
            base if base.is_file() else None,
            sparse if sparse.is_file() else None,
            None if optimizer is None else optimizer.load(folder / OPTIMIZER),
            facts["ranks"],
            facts["extra"],
        )


def added(base: Path | None) -> dict[str, Tensor]:
    """What was added to base weights so far, by layer."""
    return {} if base is None else dict(TensorFile(base))
