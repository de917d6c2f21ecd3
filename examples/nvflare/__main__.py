"""The job in NVFlare's simulator: ``python -m examples.nvflare``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from nvflare.recipe.utils import set_per_site_config
from peft import PeftModel, set_peft_model_state_dict

from examples.flower.flexlora_trec import task
from flexlora_fast import RoundPolicy
from flexlora_fast.integrations.nvflare import FlexLoRAAggregator, FlexLoRAFilter

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RANKS = {"site-1": 4, "site-2": 16, "site-3": 8}
HOSTILE = "site-3"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.nvflare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--hostile", action="store_true", help=f"{HOSTILE} sends NaN")
    add("--bfloat16", action="store_true", help="sites send factors of bfloat16")
    add("--data", type=Path, default=ROOT / ".demo-data", help="folder with the two wheels (default: %(default)s)")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=8, help="optimizer steps of 32 questions, per site and round")
    add("--test-questions", type=int, default=200)
    add("--out", type=Path, help="where the final adapter goes")
    return parser.parse_args(arguments)


def job(options: argparse.Namespace, model: PeftModel, folder: Path) -> FedAvgRecipe:
    """NVFlare's FedAvg with another aggregator, and a filter at each site."""
    initial = folder / "initial"
    model.save_pretrained(initial, save_embedding_layers=False)
    rules = RoundPolicy.from_model(
        model, ranks=set(RANKS.values()), scale="constant", max_weight=10_000, max_layer_norm=100.0
    )
    policy = rules.save(folder / "policy.json")
    recipe = FedAvgRecipe(
        name="flexlora",
        model={
            "class_path": "flexlora_fast.integrations.nvflare.GlobalAdapter",
            "args": {"folder": str(initial)},
        },
        aggregator=FlexLoRAAggregator(policy, options={"min_clients": 2}),
        min_clients=len(RANKS),
        num_rounds=options.rounds,
        train_script=str(HERE / "client.py"),
        server_expected_format="pytorch",  # tensors as they are, bfloat16 too
        key_metric="test-accuracy",
    )
    given = f"--data {options.data.resolve()} --partitions {len(RANKS)} --steps {options.steps}"
    given += f" --test-questions {options.test_questions} --dtype {'bfloat16' if options.bfloat16 else 'float32'}"
    sites = {}
    for number, (site, rank) in enumerate(RANKS.items()):
        own = f"{given} --rank {rank} --partition {number}"
        sites[site] = {"train_args": own + (" --hostile" if options.hostile and site == HOSTILE else "")}
    set_per_site_config(recipe, sites)
    for site, rank in RANKS.items():
        recipe.add_client_input_filter(FlexLoRAFilter(policy, rank), tasks=["train"], clients=[site])
    return recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job, and test what it leaves."""
    options = parse(arguments)
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    os.environ.update(offline)  # of the sites' processes
    model = task.build({"data": options.data, "alpha-over-r": 2}, max(RANKS.values()))
    found = task.questions(str(options.data), options.test_questions)
    print("before: test loss {:.4f}, accuracy {:.3f}".format(*task.test(model, found)), flush=True)
    with tempfile.TemporaryDirectory(prefix="flexlora-nvflare-") as folder:
        recipe = job(options, model, Path(folder))
        recipe.run(SimEnv(clients=list(RANKS), workspace_root=folder))
        saved = next(Path(folder).rglob("FL_global_model.pt"))
        set_peft_model_state_dict(model, torch.load(saved, weights_only=True)["model"])
    print("after:  test loss {:.4f}, accuracy {:.3f}".format(*task.test(model, found)), flush=True)
    if options.out is not None:
        model.save_pretrained(options.out, save_embedding_layers=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
