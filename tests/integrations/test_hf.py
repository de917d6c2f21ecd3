"""The documented commands of ``examples.hf`` on their real models, and a ``Trainer`` of two processes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flexlora_fast as ff
from flexlora_fast.integrations.transformers import FlexLoRACallback
from tests.test_callback import language_model, same, trainer_for

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [[], ["--sft"]], ids=["Trainer", "SFTTrainer"])
def test_the_documented_command(options: list[str]) -> None:
    """Three rounds of three clients: the loss on held-out questions falls, a hostile client is refused in each."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.hf", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = re.findall(
        r"round (\d): training loss ([\d.]+); held out: (.*)\n    refused \[([\w-]+)\] (.*)", done.stdout
    )
    assert [(number, code) for number, _, _, code, _ in rounds] == [("1", "not-finite"), ("2", "norm"), ("3", "shape")]
    assert all("'mallory'" in reason for *_, reason in rounds)
    by_round = [dict(re.findall(r"(\w+) ([\d.]+)", held_out)) for _, _, held_out, _, _ in rounds]
    assert all(set(losses) == {"small", "mixed", "large"} for losses in by_round)
    for name in by_round[0]:
        assert float(by_round[2][name]) < float(by_round[0][name])


def _one_of_two(rank: int, port: int, folder: str) -> None:
    """A process of a DistributedDataParallel run: both receive the same, the first one submits."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.manual_seed(0)
    model = language_model()
    sent = ff.Adapter.from_peft(language_model(7))
    submitted: list[Any] = []
    callback = FlexLoRACallback(lambda: sent, lambda *given, client: submitted.append((*given, client)), client="c")
    trainer = trainer_for(model, Path(folder), callback, per_device_train_batch_size=2, ddp_backend="gloo")
    for number in (1, 2):
        trainer.train()
        assert trainer.args.world_size == 2
        assert len(submitted) == (number if rank == 0 else 0)
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}
    ff.Adapter.from_peft(model).save(Path(folder) / f"process-{rank}")
    if rank == 0:
        adapter, weight, client = submitted[-1]
        assert same(adapter, model) and weight == 12 and client == "c"


def test_two_processes_receive_alike_and_one_submits(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    states = [ff.Adapter.load(tmp_path / f"process-{rank}").state_dict() for rank in (0, 1)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
