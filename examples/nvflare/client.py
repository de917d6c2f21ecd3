"""A site: an ordinary PEFT model of its own rank, in NVFlare's client API."""

from __future__ import annotations

import argparse
from pathlib import Path

import nvflare.client as flare
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from examples.flower.flexlora_trec import task


def main() -> None:
    """Take the global adapter, at this site's rank by now; test it, train it, send it back; until the job ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rank", "partition", "partitions", "steps", "test-questions"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", help="of the factors that are sent")
    parser.add_argument("--hostile", action="store_true", help="send NaN")
    options = parser.parse_args()

    model = task.build({"data": options.data, "alpha-over-r": 2}, options.rank)
    found = task.questions(str(options.data), options.test_questions)
    rows = found.partition(options.partition, options.partitions, 3.0)
    flare.init()
    while flare.is_running():
        received = flare.receive()
        set_peft_model_state_dict(model, received.params)
        loss, accuracy = task.test(model, found)
        task.train(model, found, rows, options.steps, seed=received.current_round)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        state = {key: x.detach().to(getattr(torch, options.dtype)) if "lora_" in key else x for key, x in state.items()}
        if options.hostile:
            state = {key: torch.full_like(x, torch.nan) for key, x in state.items()}
        metrics = {"test-loss": loss, "test-accuracy": accuracy}
        flare.send(flare.FLModel(params=state, metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": len(rows)}))


if __name__ == "__main__":
    main()
