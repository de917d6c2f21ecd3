"""The folder that a round is written to: all of it or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flexlora_fast.errors import OptionError
from flexlora_fast.factors import Split
from flexlora_fast.folder import CONFIG_NAME, WEIGHTS_NAME
from flexlora_fast.inputs import folder_names
from flexlora_fast.progress import track
from flexlora_fast.report import Report
from flexlora_fast.storage import UPDATE_NAME
from flexlora_fast.update import GlobalUpdate

REPORT_NAME = "report.json"


def check(out: Path, inputs: Sequence[Path], force: bool) -> None:
    """Raise ``OptionError`` where writing to ``out`` would destroy something."""
    target = out.resolve()
    for path in inputs:
        real = Path(os.path.realpath(path))  # ``resolve`` raises for a loop of links
        if target == real or target in real.parents:
            raise OptionError(f"--out {str(out)!r} is or holds the input {str(path)!r}; write to another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise OptionError(f"--out {str(out)!r} is a file; give a folder")
    held = sorted(item.name for item in out.iterdir())
    if held and not force:
        raise OptionError(f"--out {str(out)!r} is not empty ({', '.join(held[:4])} …); --force replaces it")
    if held and not (out / UPDATE_NAME).is_file():
        raise OptionError(
            f"--out {str(out)!r} holds something else than a round ({', '.join(held[:4])} …), and --force replaces "
            f"only folders with a {UPDATE_NAME}; remove it yourself or write to another folder"
        )


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A fresh folder beside ``out`` that takes its place, whatever was there, when the block ends without error."""
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder = temporary / "new"
        folder.mkdir()  # with the permissions that the user's umask gives; mkdtemp's own are private
        yield folder
        if target.exists():
            os.rename(target, temporary / "old")
        os.rename(folder, target)
    finally:
        if not target.exists() and (temporary / "old").exists():
            os.rename(temporary / "old", target)
        shutil.rmtree(temporary, ignore_errors=True)


def write(
    update: GlobalUpdate,
    folder: Path,
    *,
    ranks: Sequence[int],
    per_client: bool,
    split: Split,
    dtype: torch.dtype | None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a round: the adapters, the update, the report and its plots. Returns the report as JSON-able values.

    Args:
        ranks: one adapter of each of these ranks goes to ``rank-R/``.
        per_client: one adapter for every client goes to ``clients/NAME/``; those that are the same share their
            weights file by a hard link.
        dtype: of the factors (None: each client's own, float32 for ``ranks``).

    Raises ``RankError`` for a rank the update does not keep, ``AdapterError`` for factors beyond ``dtype``.
    """
    written: dict[str, dict[str, str]] = {"ranks": {}, "clients": {}}
    for rank in ranks:
        update.adapter(rank=rank, split=split, dtype=dtype).save(folder / f"rank-{rank}")
        written["ranks"][str(rank)] = f"rank-{rank}"
    if per_client:
        written["clients"] = _write_clients(update, folder / "clients", split, dtype, progress)
    if not (folder / UPDATE_NAME).exists():  # `finish(out=...)` may have written it there
        update.save(folder / UPDATE_NAME)
    sent = {rank for client in update.clients for rank in client.ranks.values()} if per_client else set()
    report = Report(update, sent.union(ranks))
    document = report.to_dict() | {"adapters": written}
    (folder / REPORT_NAME).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    (folder / "report.md").write_text(report.markdown(), encoding="utf-8")
    report.plot_energy(folder / "energy.png")
    report.plot_spectrum(folder / "spectrum.png")
    return document


def _write_clients(
    update: GlobalUpdate, folder: Path, split: Split, dtype: torch.dtype | None, progress: bool | None
) -> dict[str, str]:
    """An adapter per client; each distinct one is computed and stored once."""
    names = folder_names(client.name for client in update.clients)
    first: dict[str, Path] = {}
    for client in track(update.clients, "writing", progress):
        target = folder / names[client.name]
        own = client.name if any(layer.fresh for layer in update.values()) else ""  # begun anew, each for itself
        key = json.dumps([client.config, client.ranks, client.extras, client.dtype, own], sort_keys=True)
        if key not in first:
            update.adapter(client=client.name, split=split, dtype=dtype).save(target)
            first[key] = target
        else:
            target.mkdir(parents=True)
            shutil.copyfile(first[key] / CONFIG_NAME, target / CONFIG_NAME)
            _link(first[key] / WEIGHTS_NAME, target / WEIGHTS_NAME)
    return {name: f"clients/{safe}" for name, safe in names.items()}


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none (or no more)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
