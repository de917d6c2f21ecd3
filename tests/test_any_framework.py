"""The recipe for any other framework: exact, at each client's rank, and as short as it says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from examples import any_framework as recipe
from tests import states

RANKS = {"a": 4, "b": 8, "c": 16}
EXAMPLES = {"a": 100, "b": 200, "c": 300}


def state(rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{layer}.lora_{x}.weight": torch.randn(
            (rank, n) if x == "A" else (m, rank), generator=generator
        )
        for layer, (m, n) in recipe.SHAPES.items()
        for x in "AB"
    }


SENT = {name: state(rank, seed) for seed, (name, rank) in enumerate(RANKS.items())}


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_mixed_ranks_in_and_out(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = state(8, 9) | {"base_model.model.up.lora_A.weight": torch.full((8, 24), torch.nan)}
    weights = EXAMPLES | {"hostile": 50}
    update = recipe.aggregate(SENT | {"hostile": hostile}, RANKS | {"hostile": 8}, weights)
    assert "refused: client 'hostile', layer 'up'" in capsys.readouterr().out
    # The defence clips norms: what is summed is what it judged each client's update to be worth.
    factors = {verdict.client: verdict.share * verdict.factor for verdict in update.verdicts}
    assert factors.keys() == RANKS.keys()
    given = [factors[name] for name in RANKS]
    want = states.expected([SENT[name] for name in RANKS], given, rank, alpha=16)
    states.check(recipe.send(update, rank), {key: x * sum(given) for key, x in want.items()}, alpha=16)


def test_it_has_thirty_lines_of_code() -> None:
    tree = ast.parse(Path(recipe.__file__).read_text())
    kept = [node for node in tree.body if isinstance(node, ast.Import | ast.Assign | ast.FunctionDef)]
    parts = [ast.unparse(node) for node in kept if getattr(node, "name", "") != "main"]
    assert sum(len(part.splitlines()) for part in parts) <= 30


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main()
    assert "refused: client 'hostile'" in capsys.readouterr().out
