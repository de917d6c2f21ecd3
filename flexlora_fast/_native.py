"""The compiled extension ``flexlora_fast._C`` where it is usable, and otherwise the reason why it is not.

Everything works without the extension; what needs it asks here:

>>> from flexlora_fast import _native
>>> (_native.extension is None) == (_native.reason is not None)
True
"""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

INFO = Path(__file__).with_name("_build_info.json")
REBUILD = "rebuild it from the source: `pip install --no-build-isolation --no-deps --force-reinstall -v .`"


@dataclass(frozen=True)
class Missing:
    """Why there is no extension: ``broken`` if one was built and cannot be used, which is worth a warning."""

    reason: str
    broken: bool


def build_info(path: Path = INFO) -> dict[str, Any]:
    """What setup.py wrote down: built, reason, cuda, torch, python; empty if nothing was written."""
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def load(info: dict[str, Any]) -> ModuleType | Missing:
    """Import ``flexlora_fast._C``, if the build that ``info`` describes fits the torch that is running.

    torch keeps its C++ interface stable within one version only; an extension of another one may load and
    then corrupt memory, so it is not tried.
    """
    if info.get("built") is False:
        return Missing(f"it was not built: {info.get('reason')}", broken=False)
    built_for = str(info.get("torch") or "").partition("+")[0]
    running = torch.__version__.partition("+")[0]
    if built_for and built_for != running:
        return Missing(f"it was built for torch {built_for} and this is torch {running}; {REBUILD}", broken=True)
    try:
        return importlib.import_module("flexlora_fast._C")
    except ModuleNotFoundError:
        if info.get("built"):
            return Missing(f"it was built, but its file is gone; {REBUILD}", broken=True)
        return Missing("this copy of the package was never built; install it with pip", broken=False)
    except ImportError as error:
        return Missing(f"it was built, but does not load: {error}; {REBUILD}", broken=True)


_loaded = load(build_info())
extension: ModuleType | None = None if isinstance(_loaded, Missing) else _loaded
reason: str | None = _loaded.reason if isinstance(_loaded, Missing) else None
broken: bool = isinstance(_loaded, Missing) and _loaded.broken
if broken:
    warnings.warn(
        f"flexlora_fast: the native extension is unusable, the slower PyTorch path is taken: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
