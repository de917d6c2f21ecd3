"""``run_simulation`` from Python, with synthetic nodes: each in a Ray worker, mixed ranks, one of them hostile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'flwr[simulation]'")

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from flexlora_fast.integrations.flower import FlexLoRAStrategy, rank_mod
from tests import flower

RANKS = (2, 4, 8, 4)

def train(message, context):
    partition = context.node_config["partition-id"]
    content = flower.trains(RANKS[partition], seed=partition, loss=1.0)(message, context)
    if partition == 3:
        content["arrays"] = flower.to_record({"evil": flower.torch.ones(1)})
    return content

server = ServerApp()

@server.main()
def main(grid, context):
    run = FlexLoRAStrategy(flower.policy(), query_ranks=True)
    result = run.start(grid, flower.initial(), num_rounds=3)
    print("RESULT", json.dumps({number: dict(m) for number, m in result.train_metrics_clientapp.items()}))
    print("LOSSES", json.dumps({number: m["loss"] for number, m in result.evaluate_metrics_clientapp.items()}))

run_simulation(
    server,
    flower.app(train, rank_mod(lambda context: RANKS[context.node_config["partition-id"]])),
    num_supernodes=4,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
"""


def test_run_simulation() -> None:
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("RESULT", "LOSSES")))
    rounds = json.loads(found["RESULT"])
    assert sorted(rounds) == ["1", "2", "3"]
    for metrics in rounds.values():
        assert (metrics["flexlora-accepted"], metrics["flexlora-refused-unknown-tensor"]) == (3, 1)
        assert {"flexlora-energy-kept-r2", "flexlora-energy-kept-r4", "flexlora-energy-kept-r8"} <= metrics.keys()
    assert json.loads(found["LOSSES"]) == {"1": 1.0, "2": 1.0, "3": 1.0}
