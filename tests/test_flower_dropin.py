"""An app as FlowerTune's, before and after: how many lines it takes, and that both run."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'flexlora_fast[flower]'")
pytest.importorskip("peft")

from flwr.app import Context, RecordDict
from peft import PeftConfig
from transformers import LlamaConfig, LlamaForCausalLM

import flexlora_fast as ff
from examples.flower import flowertune
from examples.flower.flowertune import client_app, server_app
from flexlora_fast.integrations.flower import from_record
from tests.flower import LocalGrid

APP = Path(flowertune.__file__).parent
FILES = ("client_app.py", "server_app.py")


def patched(name: str) -> str:
    """A file of the app after ``flexlora.diff``."""
    text = (APP / name).read_text()
    part = (APP / "flexlora.diff").read_text().split(f"+++ b/{name}\n")[1].split("--- a/")[0]
    for hunk in part.split("@@ -")[1:]:
        lines = hunk.split("\n")[1:-1]
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
        assert text.count(old) == 1, f"the diff does not fit {name} any more:\n{old}"
        text = text.replace(old, new)
    return text


def changed_lines(before: str, after: str) -> int:
    """Lines added or replaced, and those taken away beyond these."""
    matcher = difflib.SequenceMatcher(a=before.splitlines(), b=after.splitlines(), autojunk=False)
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")


def module(name: str, folder: Path) -> ModuleType:
    path = folder / name
    path.write_text(patched(name))
    spec = importlib.util.spec_from_file_location(f"patched_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(folder)
    return folder


def settings(model: Path, out: Path) -> dict[str, object]:
    config = {"model-name": str(model), "lora-r": 8, "lora-alpha": 16, "vocabulary": 16, "examples": 16}
    config |= {"steps": 3, "learning-rate": 0.01, "fraction-train": 1.0, "num-server-rounds": 3}
    return config | {"save-path": str(out)}


def play(client: ModuleType, server: ModuleType, config: dict[str, object], ranks: dict[int, int]) -> LocalGrid:
    nodes = {node: {"partition-id": i, "lora-rank": rank} for i, (node, rank) in enumerate(ranks.items())}
    grid = LocalGrid(dict.fromkeys(ranks, client.app), nodes, config)
    server.app(grid, Context(1, 0, {}, RecordDict(), config))
    return grid


def test_five_lines_give_each_node_its_own_rank(model: Path, tmp_path: Path) -> None:
    counts = {name: changed_lines((APP / name).read_text(), patched(name)) for name in FILES}
    assert counts == {"client_app.py": 3, "server_app.py": 2}
    assert sum(counts.values()) <= 5
    after = [module(name, tmp_path) for name in FILES]
    grid = play(after[0], after[1], settings(model, tmp_path), {11: 2, 12: 8})
    losses = {node: [reply.content["metrics"]["train_loss"] for reply in grid.received[node]] for node in grid.received}
    assert all(len(of_node) == 3 and of_node[-1] < of_node[0] for of_node in losses.values())
    for node, rank in ((11, 2), (12, 8)):
        last = from_record(grid.received[node][-1].content["arrays"])
        assert {x.shape[0] for key, x in last.items() if "lora_A" in key} == {rank}
    saved = ff.Adapter.load(tmp_path / "3")
    assert saved.rank(saved.layers[0]) == 8
    assert any(bool(saved.factors(layer)[1].any()) for layer in saved.layers)


def test_before_it_is_fedavg_of_one_rank(model: Path, tmp_path: Path) -> None:
    play(client_app, server_app, settings(model, tmp_path) | {"num-server-rounds": 1}, {11: 8, 12: 8})
    assert PeftConfig.from_pretrained(tmp_path / "1").r == 8
