"""FlexLoRA in a framework without an integration: state dicts in, state dicts out. Call these functions where it sums.

``python -m examples.any_framework`` runs a round of three clients of ranks 4, 8 and 16.
"""

from __future__ import annotations

import torch

import flexlora_fast as ff

CONFIG = {"lora_alpha": 16, "target_modules": ["up", "down"]}  # of all clients, but for r
SHAPES = {"up": (40, 24), "down": (24, 40)}  # outputs and inputs of the weights that are adapted


def aggregate(states: dict[str, dict], ranks: dict[str, int], examples: dict[str, int]) -> ff.GlobalUpdate:
    """One round: the state dict, the rank and the number of examples of each client. Bad ones are refused, not used."""
    policy = ff.RoundPolicy.from_config(CONFIG | {"r": 16}, SHAPES, ranks=set(ranks.values()), max_weight=1e6)
    round_ = ff.Aggregator(policy=policy, defence="clip")
    for name, state in states.items():
        try:
            adapter = ff.Adapter.from_state_dict(state, CONFIG | {"r": ranks[name]})
            round_.add(adapter, weight=examples[name], client=name)
        except (ff.errors.AdapterError, ff.errors.WeightError) as error:
            print(f"refused: {error}")  # names the client, the layer, the value and the remedy
    return round_.finish()


def send(update: ff.GlobalUpdate, rank: int) -> dict[str, torch.Tensor]:
    """The update for a client of this rank, as ``peft.set_peft_model_state_dict`` takes it."""
    return update.adapter(config=CONFIG | {"r": rank}).state_dict()


def main() -> None:
    """Three clients, and a fourth that sends NaN."""
    ranks = {"a": 4, "b": 8, "c": 16, "hostile": 8}
    states = {
        name: {
            f"base_model.model.{layer}.lora_{x}.weight": torch.randn((r, n) if x == "A" else (m, r))
            for layer, (m, n) in SHAPES.items()
            for x in "AB"
        }
        for name, r in ranks.items()
    }
    states["hostile"]["base_model.model.up.lora_A.weight"][0, 0] = torch.nan
    update = aggregate(states, ranks, {"a": 100, "b": 200, "c": 300, "hostile": 10})
    for name in ("a", "b", "c"):
        print(name, {key: tuple(tensor.shape) for key, tensor in send(update, ranks[name]).items()})


if __name__ == "__main__":
    main()
