"""The examples in Hugging Face's loops on tiny models: rounds, a hostile client, the lines that the drop-in changes."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainingArguments

from examples.hf import after, before, federation, questions
from tests.models import LLAMA, tiny
from tests.test_demo import tiny_model, tiny_questions

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),  # PEFT's use of it
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained"),
]
ROOT = Path(__file__).parents[1]
__all__ = ["tiny_model"]  # a fixture, used by name


def changed_lines(old: Path, new: Path) -> int:
    """Lines of the new file that are not in the old one, blank ones aside."""
    difference = difflib.ndiff(old.read_text().splitlines(), new.read_text().splitlines())
    return sum(line.startswith("+ ") and bool(line[2:].strip()) for line in difference)


def test_the_readme_says_how_many_lines_the_drop_in_changes() -> None:
    count = changed_lines(Path(str(before.__file__)), Path(str(after.__file__)))
    assert count <= 5
    said = re.search(
        r"\| `examples/hf/before.py` \| `examples/hf/after.py` \| (\d+) \|", (ROOT / "README.md").read_text()
    )
    assert said is not None and int(said[1]) == count


@pytest.mark.parametrize("loop", [before, after], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_plain_peft_loop_before_and_after(loop: Any, tmp_path: Path) -> None:
    ids = torch.randint(0, 32, (12, 6), generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Tensor]] = [{"input_ids": x, "labels": x} for x in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=3e-2, **questions.COMMON
    )
    configs = {
        name: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"])
        for name, rank in (("small", 2), ("large", 4))
    }
    torch.manual_seed(0)
    data = {"small": rows[:4], "large": rows[4:]}
    model, losses = loop.federate(tiny("Llama", **LLAMA), configs, data, arguments, rounds=3)
    assert sorted(model.peft_config) == ["large-3", "small-3"]
    assert {name: config.r for name, config in model.peft_config.items()} == {"large-3": 4, "small-3": 2}
    assert losses[2] < losses[0]


def test_rounds_with_a_hostile_client(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    played = questions.classifiers(tiny_model, tiny_questions(300), tmp_path, steps=4, test=60)
    rounds = [played.play() for _ in range(3)]
    for result in rounds:
        assert result.clients == ["large", "mixed", "small"]
        assert [refusal.client for refusal in result.refused] == [federation.HOSTILE]
    assert [result.refused[0].code for result in rounds] == ["not-finite", "norm", "shape"]
    # This encoder is random and learns nothing; that the loss falls on the real one: tests/integrations/test_hf.py.
    assert all(math.isfinite(loss) for result in rounds for loss in result.test_loss.values())
    ranks = {name: set(adapter.skeleton.ranks.values()) for name, adapter in played.sent.items()}
    assert ranks == {"small": {4}, "mixed": {8, 16}, "large": {16}}
