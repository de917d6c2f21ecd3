"""The code in README.md and docs/: what blocks there are, and the world in which they run.

A fenced block is Python, commands (``sh``, or no language in README.md), ``toml``, which becomes the file that its
first line names, or ``text``, which nobody runs; any other language is an error, so that no code goes untested unseen.
A comment in front of a block says more of it: ``<!-- raises -->`` the block must raise, and the heading above it is
the message; ``<!-- output -->`` the block is what the one before printed; ``<!-- gpu -->``, ``<!-- nvflare -->`` it
runs where there is a GPU, or NVFlare, and is only compiled elsewhere; ``<!-- setup … -->`` holds Python that a reader
does not need. All blocks of a page share one namespace and one folder.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import flexlora_fast as ff

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("python", "sh", "text", "toml")
_COMMENT = re.compile(r"<!-- *(setup|raises|output|gpu|nvflare)\b *(.*?) *-->", re.S)


@dataclass(frozen=True)
class Block:
    """Code of one fence (or setup comment), its first line in the page counted from 1, and the heading above it."""

    language: str
    code: str
    line: int
    heading: str = ""
    marks: frozenset[str] = field(default_factory=frozenset)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[Block]:
    """All fenced blocks and setup comments of a page, first to last."""
    found: list[Block] = []
    lines = text.split("\n")
    heading, marks, at = "", set(), 0
    while at < len(lines):
        line = lines[at]
        if line.lstrip().startswith("```"):
            indent, language = len(line) - len(line.lstrip()), line.strip().strip("`")
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            code = "\n".join(x[indent:] for x in lines[at + 1 : end])
            found.append(Block(language, code, at + 2, heading, frozenset(marks)))
            marks, at = set(), end
        elif line.startswith("<!--"):
            end = next(i for i in range(at, len(lines)) if "-->" in lines[i])
            if match := _COMMENT.fullmatch("\n".join(lines[at : end + 1]).strip()):
                if match[1] == "setup":
                    found.append(Block("python", match[2].strip(), at + 2, heading))
                else:
                    marks.add(match[1])
            at = end
        elif line.startswith("#"):
            heading, marks = line.lstrip("#").strip(), set()
        elif line.strip():
            marks = set()
        at += 1
    return found


LAYERS = ("model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj", "model.layers.1.v_proj")
OUTPUTS, INPUTS = 96, 80


def adapter(rank: int, seed: int = 0, alpha: float = 16, **config: Any) -> ff.Adapter:
    """One client's adapter, as large as a test can afford."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in LAYERS:
        state[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, INPUTS, generator=generator) / 20
        state[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(OUTPUTS, rank, generator=generator) / 20
    config = {"base_model_name_or_path": "a-model", "target_modules": ["q_proj", "v_proj"]} | config
    return ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": alpha, **config})


class Net(torch.nn.Module):
    """A model whose adapters are the world's, of a loss that ``Trainer`` takes."""

    def __init__(self) -> None:
        super().__init__()
        sides = {name: (INPUTS, OUTPUTS) for name in ("q_proj", "v_proj")}
        layers = [torch.nn.ModuleDict({k: torch.nn.Linear(*v) for k, v in sides.items()}) for _ in range(2)]
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = sum(layer(x) for block in self.model["layers"] for layer in block.values())
        return {"loss": (found - labels).square().mean()}


def peft_model(rank: int = 4) -> Any:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(Net(), config)


def flower_grid() -> Any:
    """Three nodes in this process, each of which sends back what it got and some noise."""
    from flexlora_fast.integrations.flower import from_record
    from tests import flower

    def train(message: Any, _: Any) -> Any:
        state = from_record(message.content["arrays"])
        return flower.reply_of({key: x + 0.01 * torch.randn(x.shape) for key, x in state.items()})

    return flower.LocalGrid({n: flower.app(train) for n in (1, 2, 3)}, {n: {"lora-rank": 4 * n} for n in (1, 2)})


class Log:
    """What a page logs, kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, text: str, *values: object) -> None:
        self.lines.append(text % values)


class Trainer:
    def train(self) -> None:
        """Training is the user's; here nothing changes."""


def world(folder: Path) -> dict[str, Any]:
    """What the pages take for granted, in the present folder: clients 01 to 03 of ranks 8, 16 and 64, some hostile
    ones, a server's reference, and what stands for a network.
    """
    names: dict[str, Any] = {"__name__": "page"}
    sent: dict[str, Any] = {}
    for number, rank in enumerate((8, 16, 64), start=1):
        adapter(rank, number).save(folder / "clients" / f"{number:02}")
        adapter(rank, number).save(folder / "uploads" / f"{number:02}")
    adapter(8).save(folder / "reference")
    bad = adapter(8, 9)
    state = {key: tensor.clone() for key, tensor in bad.state_dict().items()}
    state[f"base_model.model.{LAYERS[0]}.lora_A.weight"][0, 0] = float("nan")
    ff.Adapter.from_state_dict(state, bad.config).save(folder / "hostile" / "mallory")
    arrivals = [(f"{n:02}", f"clients/{n:02}", 1000 + n) for n in (1, 2, 3)]

    def secagg_sum(message: bytes) -> Any:
        """What a summing protocol does, in the clear."""
        adapters = [ff.Adapter.load(path) for _, path, _ in arrivals]
        return ff.secure.add(ff.secure.sketch(one, names["plan"], message) for one in adapters)

    calibrated = inspect.signature(ff.Privacy.calibrated)

    def planned(**given: Any) -> ff.Privacy:
        """``Privacy.calibrated`` without its ten seconds of search, which tests/test_privacy_accounting.py has."""
        calibrated.bind(**given)
        epsilon, _ = given.pop("epsilon"), given.pop("rounds")
        return ff.Privacy(noise_multiplier=1.0, max_epsilon=epsilon, **given)

    return names | {
        "planned": planned,
        "peft_model": peft_model,
        "flower_grid": flower_grid,
        "arrivals": arrivals,
        "log": Log(),
        "send": sent.__setitem__,
        "sent": sent,
        "secagg_sum": secagg_sum,
        "trainer": Trainer(),
        "population": [f"client-{n}" for n in range(10_000)],
        "names": names,
    }


# What README.md leaves to its reader's imagination, by a piece of the block that it is for.
BEFORE: dict[str, dict[str, str]] = {
    "README.md": {
        "ff.Privacy.calibrated(": "monkeypatch.setattr(ff.Privacy, 'calibrated', planned)",
        "FlexLoRACallback(": """
import queue
inbox, peft_model, arguments, data = queue.Queue(), peft_model(), None, []
real_send, send, Trainer = send, print, lambda *_, **__: trainer
""",
        "agg = ff.Aggregator(rank=64)\n": "send = real_send",
        "adapter.load_into(model)": "import torch; model, adapter = peft_model, update.adapter(rank=8)",
        "FlexLoRAFilter": """
from pathlib import Path
Path("client.py").touch()
initial = {"class_path": "flexlora_fast.integrations.nvflare.GlobalAdapter", "args": {"folder": "reference"}}
as_before = {"name": "job", "model": initial, "min_clients": 2, "num_rounds": 3, "train_script": "client.py"}
from nvflare.recipe.utils import set_per_site_config
sites = {"site-1": {"train_args": ""}, "site-2": {"train_args": ""}}
policy = ff.RoundPolicy.from_adapter("reference", ranks=(8, 16, 64))
""",
        "configs/trec.toml": """
from pathlib import Path
from tests.documented import ROOT
page = (ROOT / "docs/quickstart-simulate.md").read_text(encoding="utf-8")
Path("configs").mkdir()
Path("configs/trec.toml").write_text(page.split("```toml")[1].split("```")[0].replace('"puzzles"', '"trec"'))
""",
        "FlexLoRAStrategy(": """
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict
grid = flower_grid()
""",
        "distributed.aggregate(": """
torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/group", rank=0, world_size=1)
weights = [1200, 300, 560]
""",
        "ff.merge(": """
edges = []
for _, folder, _ in arrivals:
    edges.append(f"{folder}.safetensors")
    ff.aggregate([folder], rank=64).save(edges[-1])
""",
        "flexlora-fast aggregate uploads/": """
import json, os, shutil
shutil.rmtree("round-1")
os.mkdir("old-adapter")
torch.save(adapter.state_dict(), "old-adapter/adapter_model.bin")
with open("old-adapter/adapter_config.json", "w") as file:
    json.dump(adapter.config, file)
""",
        "ff.secure.Plan.from_json(text)": "text, message = plan.to_json(), None",
        'ff.Round.open(\n    "rounds/0007"': """
upload = "clients/01"
with ff.Round.open("rounds/0007", policy=policy, rank=64, defence="clip", min_clients=20) as begun:
    for number in range(19):
        begun.add(upload, weight=1000, client=f"client-{number}")
""",
        "flexlora-fast round status": "round_.close()",
        "cupy_arrays": """
import numpy
other = ff.Adapter.load("clients/01")
config = other.config
cupy_arrays = {key: numpy.from_dlpack(x) for key, x in other.state_dict().items()}
""",
        "ff.aggregate(folders": "folders = [folder for _, folder, _ in arrivals]",
    }
}
