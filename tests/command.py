"""Folders of clients for the command line, and ways to run it: in this process, and as users start it."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from typer.testing import CliRunner

import flexlora_fast as ff
from flexlora_fast import cli

LAYERS = ("model.layers.0.fc", "model.layers.1.fc", "model.layers.1.out")
M, N = 10, 14


def adapter(rank, seed, *, layers=LAYERS, alpha=12, bad=False, dtype=torch.float32, **config):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in layers:
        state[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, N, generator=generator).to(dtype)
        state[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(M, rank, generator=generator).to(dtype)
    if bad:
        state[f"base_model.model.{layers[0]}.lora_A.weight"][0, 0] = float("nan")
    targets = sorted({layer.rsplit(".", 1)[1] for layer in layers})
    return ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": alpha, "target_modules": targets, **config})


def three_clients(folder):
    """``folder`` with three adapters in it, of ranks 2, 4, 4 with different alphas and rsLoRA."""
    adapter(2, 0).save(folder / "anna")
    adapter(4, 1, alpha=6, use_rslora=True).save(folder / "ben")
    adapter(4, 2).save(folder / "carl")
    return folder


def run(*arguments):
    """The command in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def start(*arguments, **environment):
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "flexlora_fast", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        check=False,
    )
