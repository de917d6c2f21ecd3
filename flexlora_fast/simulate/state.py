"""The server's state between two rounds, in a folder: all that going on takes, and no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flexlora_fast.simulate.prepare import write_json
from flexlora_fast.storage import UPDATE_NAME
from flexlora_fast.tensorfile import TensorFile
from flexlora_fast.update import GlobalUpdate

BASE, FACTS = "base.safetensors", "state.json"


@dataclass
class State:
    """After ``round`` rounds: the global update (None: nobody has sent anything yet), and what else there is.

    Attributes:
        base: a file of what was added to base weights, float32 by layer; None where nothing was.
        ranks: layers' ranks of clients that changed them (HetLoRA's self-pruning), by name.
        extra: JSON-able state of a server optimizer or of asynchronous rounds.
    """

    round: int = 0
    update: GlobalUpdate | None = None
    base: Path | None = None
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, added: Mapping[str, Tensor] | None = None) -> None:
        """Write it; the file with the facts comes last, so that a folder with it is whole.

        ``added``: what a new ``base`` holds.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.update is not None:
            self.update.save(folder / UPDATE_NAME)
        if added:
            from safetensors.torch import save_file

            save_file({layer: tensor.contiguous() for layer, tensor in added.items()}, folder / BASE)
            self.base = folder / BASE
        elif self.base is not None:
            shutil.copyfile(self.base, folder / BASE)
            self.base = folder / BASE
        facts = {"round": self.round, "ranks": self.ranks, "extra": self.extra}
        write_json(folder / FACTS, facts)

    @classmethod
    def load(cls, folder: Path) -> State:
        """What ``save`` wrote."""
        facts = json.loads((folder / FACTS).read_text())
        update, base = folder / UPDATE_NAME, folder / BASE
        return cls(
            facts["round"],
            GlobalUpdate.load(update) if update.is_file() else None,
            base if base.is_file() else None,
            facts["ranks"],
            facts["extra"],
        )


def added(base: Path | None) -> dict[str, Tensor]:
    """What was added to base weights so far, by layer."""
    return {} if base is None else dict(TensorFile(base))
