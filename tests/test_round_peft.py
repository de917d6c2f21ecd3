"""A whole round through live PEFT models: what they hold before, what they hold after, against dense float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import flexlora_fast as ff
from flexlora_fast.lowrank.plan import EXACT, SOLVERS
from tests.models import trained_adapter

LAYERS = ["fc", "proj", "embed", "conv2"]  # Linear, HF Conv1D, Embedding, Conv2d
CLIENTS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 2, "lora_alpha": 4},
    "rslora": {"rank": 5, "lora_alpha": 16, "use_rslora": True},
    "patterns": {"rank": 3, "lora_alpha": 7, "rank_pattern": {"embed": 6, "conv2": 4}, "alpha_pattern": {"fc": 1}},
    "thin": {"rank": 1, "lora_alpha": 32},
}
WEIGHTS = {"plain": 300.0, "rslora": 1200.0, "patterns": 20.0, "thin": 55.0}


@pytest.fixture(scope="module")
def models() -> dict[str, PeftModel]:
    return {
        name: trained_adapter(seed, target_modules=LAYERS, **options)
        for seed, (name, options) in enumerate(CLIENTS.items())
    }


def delta(model: PeftModel, layer: str) -> Tensor:
    """PEFT's own update of one layer in float64, as a matrix (whose truncation a transposition does not change)."""
    layer64 = copy.deepcopy(model.get_submodule(f"base_model.model.{layer}")).double()
    return layer64.get_delta_weight("default").detach().flatten(1)


def truncated(whole: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_every_client_gets_the_best_adapter_of_its_ranks(models: dict[str, PeftModel], solver: str) -> None:
    total = sum(WEIGHTS.values())
    agg = ff.Aggregator(solver=solver)
    for name, model in models.items():
        agg.add(ff.Adapter.from_peft(model), weight=WEIGHTS[name], client=name)
    update = agg.finish()
    assert update.layers == sorted(LAYERS)
    for name, options in CLIENTS.items():
        receiver = trained_adapter(99, target_modules=LAYERS, **options)
        rebuilt = update.adapter(client=name).load_into(receiver)
        assert rebuilt is False  # the ranks are its own: the optimizer keeps its parameters
        for layer in LAYERS:
            whole = sum((WEIGHTS[c] / total * delta(model, layer) for c, model in models.items()), torch.zeros(()))
            rank = receiver.get_submodule(f"base_model.model.{layer}").r["default"]
            best, got = truncated(whole, rank), delta(receiver, layer)
            if solver in EXACT:
                assert (got - best).norm() <= 1e-5 * best.norm()
            else:
                # Where the best error is zero to rounding, the excess over it says nothing.
                assert (got - whole).norm() <= 1.001 * (best - whole).norm() + 1e-5 * whole.norm()
            assert abs(update[layer].error(rank) - (best - whole).norm()) <= 1e-3 * whole.norm()


def test_a_client_may_grow(models: dict[str, PeftModel]) -> None:
    """The thin client is handed rank 5: new parameters, the same update, and a config that saves and loads."""
    update = ff.aggregate([ff.Adapter.from_peft(model) for model in models.values()], clients=list(models))
    receiver = trained_adapter(99, target_modules=LAYERS, **CLIENTS["thin"])
    assert update.adapter(client="rslora").load_into(receiver) is True
    assert receiver.peft_config["default"].r == 5
    for layer in LAYERS:
        whole = sum((delta(model, layer) / len(models) for model in models.values()), torch.zeros(()))
        best = truncated(whole, 5)
        assert (delta(receiver, layer) - best).norm() <= 1e-5 * best.norm()
