"""Runnable examples. ``python -m examples.demo`` (``make demo``) is the whole loop on real data."""

from __future__ import annotations

import os

# Set before anything here imports transformers, in spawned workers too: nothing is fetched or reported at run time,
# and each process keeps to one thread, since the processes together already fill the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
