"""What the gate costs an honest client, beside plain loading of the same file: ``python -m benchmarks.gate``.

All ways in turn, in one run, one thread, files in the page cache; medians, and their ratios. ``safetensors`` maps a
file and reads nothing until values are used, so that plain loading is given twice: alone, and with ``torch.isfinite``
of every tensor, which is the least that anybody who looks at values does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

import flexlora_fast as ff
from flexlora_fast.folder import WEIGHTS_NAME
from flexlora_fast.gate import RoundPolicy

# name -> (layers, m, n, rank), float32
SIZES = {
    "4 layers, 1024×1024, r 8": (4, 1024, 1024, 8),
    "32 layers, 4096×4096, r 16": (32, 4096, 4096, 16),
    "224 layers, 4096×6000, r 16": (224, 4096, 6000, 16),  # as many as all linear layers of a 7B model
}


def saved(layers: int, m: int, n: int, rank: int, path: Path) -> Path:
    generator, state = torch.Generator().manual_seed(0), {}
    for i in range(layers):
        state[f"base_model.model.l{i}.lora_A.weight"] = torch.randn(rank, n, generator=generator) / n**0.5
        state[f"base_model.model.l{i}.lora_B.weight"] = torch.randn(m, rank, generator=generator) / m**0.5
    ff.Adapter.from_state_dict(state, {"r": rank, "lora_alpha": 2 * rank}).save(path)
    return path


def ways(folder: Path, rank: int, spool: Path) -> dict[str, Callable[[], object]]:
    """Each returns what it loaded, so that giving it back is not timed."""
    file = folder / WEIGHTS_NAME
    policy = RoundPolicy.from_adapter(folder, ranks=(rank,), max_layer_norm=20.0, max_norm=300.0)

    def looked_at() -> object:
        state = load_file(file)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
        return state

    return {
        "load_file": lambda: load_file(file),
        "load_file, isfinite": looked_at,
        "Adapter.load, in memory": lambda: ff.Adapter.load(folder).in_memory(),
        "gate, to a spool": lambda: policy.admit(folder, client="a", spool=spool),
        "gate, to memory": lambda: policy.admit(folder, client="a"),
    }


def medians(calls: dict[str, Callable[[], object]], spool: Path, repeats: int) -> dict[str, float]:
    """Milliseconds of each, the first turn left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            result = call()
            times[name].append(1e3 * (time.perf_counter() - start))
            del result
            for copy in spool.iterdir():
                copy.unlink()
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def lines(repeats: int) -> Iterator[str]:
    names: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        spool = Path(place) / "spool"
        spool.mkdir()
        for i, (title, (layers, m, n, rank)) in enumerate(SIZES.items()):
            folder = saved(layers, m, n, rank, Path(place) / str(i))
            size = (folder / WEIGHTS_NAME).stat().st_size / 1e6
            found = medians(ways(folder, rank, spool), spool, repeats)
            if not names:
                names = list(found)
                titles = " | ".join(f"{name}, ms" for name in names)
                yield f"| adapter | MB | {titles} | spool ÷ isfinite | spool ÷ load |"
                yield f"|---|---|{'---|' * (len(names) + 2)}"
            gate = found["gate, to a spool"]
            ratios = [gate / found[name] for name in ("load_file, isfinite", "Adapter.load, in memory")]
            cells = [f"{found[name]:.2f}" for name in names] + [f"{ratio:.2f}" for ratio in ratios]
            yield f"| {title} | {size:.1f} | {' | '.join(cells)} |"


def main() -> None:
    from importlib.metadata import version

    from benchmarks.machine import commit, cpu_name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the table, beside printing it")
    parser.add_argument("--repeats", type=int, default=15, help="turns that are counted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join(
        [
            "# The gate, for honest clients",
            "",
            f"`python -m benchmarks.gate`, commit {commit()}, torch {torch.__version__}, safetensors "
            f"{version('safetensors')}, 1 thread of {os.cpu_count()}, {cpu_name()}. What is compared: "
            "`benchmarks/gate.py`. The gate's time has the copy to a file of the server's own in it, the checks of "
            "header and config, and the look at all values: finite, and ‖s·B·A‖_F of every layer.",
            "",
            *lines(options.repeats),
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
