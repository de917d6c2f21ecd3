"""The drop-in merge against PEFT's own, error and time of both: ``python -m benchmarks.peft_merge``.

Both add the same adapters of one layer up with the same signed weights and cut the sum to the largest of their ranks.
Error: ‖X − best‖_F / ‖best‖_F over ``get_delta_weight`` in float64, where best is the truncated float64 SVD of
Σ w·s·B·A. Time: the fastest of ``--repeats`` calls, in turn, with the making of the new adapter in each; PEFT's full
SVD, its default, is called once.
``--out FILE`` writes the table to a file as well.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.text import markdown, seconds
from flexlora_fast.peft import add_weighted_adapter


@dataclass(frozen=True)
class Case:
    """A layer of n inputs and m outputs, the ranks of its adapters, and what is special about them."""

    name: str
    m: int
    n: int
    ranks: tuple[int, ...]
    rslora: bool = False
    dtype: torch.dtype = torch.float32


CASES = (
    Case("plain", 2048, 2048, (8, 16, 32, 64)),
    Case("tall", 4096, 1024, (8, 16, 32, 64)),
    Case("rsLoRA", 1024, 1024, (8, 16, 32, 64), rslora=True),
    Case("bfloat16", 1024, 1024, (8, 16, 32, 64), dtype=torch.bfloat16),
    Case("ten adapters", 1024, 1024, (16,) * 10),
)


def model_of(case: Case) -> PeftModel:
    """One linear layer with the case's adapters, their factors drawn at random."""
    torch.manual_seed(0)
    model: PeftModel | None = None
    for i, rank in enumerate(case.ranks):
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=["0"], use_rslora=case.rslora)
        if model is None:
            base = nn.Sequential(nn.Linear(case.n, case.m, bias=False, dtype=case.dtype))
            model = get_peft_model(base, config, f"a{i}", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
        layer = model.get_submodule("base_model.model.0")
        nn.init.normal_(layer.lora_B[f"a{i}"].weight, std=0.02)
    assert model is not None
    return model


def delta(model: PeftModel, adapter: str) -> Tensor:
    layer = model.get_submodule("base_model.model.0")
    A, B = (factors[adapter].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))
    return layer.scaling[adapter] * (B @ A)


def best(model: PeftModel, weights: dict[str, float], rank: int) -> Tensor:
    whole = torch.stack([w * delta(model, name) for name, w in weights.items()]).sum(dim=0)
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def measure(case: Case, repeats: int) -> list[str]:
    """A row of the table."""
    model = model_of(case)
    weights = {name: (-1.0) ** i * (i + 1) / len(case.ranks) for i, name in enumerate(model.peft_config)}
    given = (list(weights), list(weights.values()))
    calls = {
        "peft": lambda: model.add_weighted_adapter(*given, "sum"),
        "reduced": lambda: model.add_weighted_adapter(*given, "sum", svd_full_matrices=False),
        "ours": lambda: add_weighted_adapter(model, *given, "sum"),
    }
    times = dict.fromkeys(calls, float("inf"))
    errors = {}
    target = best(model, weights, max(case.ranks))
    for number in range(repeats):
        for name, call in calls.items():
            if name == "peft" and number > 0:
                continue
            started = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - started)
            errors[name] = float((delta(model, "sum") - target).norm() / target.norm())
            model.delete_adapter("sum")
    ranks = " + ".join(map(str, case.ranks)) if len(set(case.ranks)) > 1 else f"{len(case.ranks)} × {case.ranks[0]}"
    shown = [f"{errors[name]:.0e}" for name in ("peft", "ours")] + [seconds(times[name]) for name in calls]
    return [case.name, f"{case.m} × {case.n}", ranks, *shown, f"{times['reduced'] / times['ours']:.3g}×"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peft_merge", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="layers of an eighth the side, to see it run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Adapter name .* should not be contained")
    shrink = 8 if arguments.quick else 1
    cases = [Case(c.name, c.m // shrink, c.n // shrink, c.ranks, c.rslora, c.dtype) for c in CASES]
    header = [
        "adapters", "layer", "ranks", "error, PEFT", "error, ours",
        "PEFT", "PEFT, `svd_full_matrices=False`", "ours", "faster than that",
    ]  # fmt: skip
    text = (
        "# Merging adapters: PEFT's `add_weighted_adapter` and ours\n\n"
        f"`python -m benchmarks.peft_merge`, peft {peft.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s) of {os.cpu_count()}. "
        "What the figures are: `benchmarks/peft_merge.py`.\n\n"
        + markdown(header, [measure(case, arguments.repeats) for case in cases])
        + "\n\nOf bfloat16 adapters ours is stored in bfloat16, which is all of its error; PEFT's becomes float32.\n"
    )
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
